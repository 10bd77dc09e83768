from __future__ import annotations

import json

import numpy as np
import pytest

from fairhuman_jax.data import FolderDataset, JointTransform, export_folder, make_loader


class Numbers:
    """Sample i is a picture filled with noise of seed i, its first pixel i."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        image = np.random.default_rng(index).integers(0, 256, (20, 28, 3), np.uint8)
        image[..., 2] = index
        return {"image": image, "caption": f"number {index}", "face_mask": image[..., :1] // 128}


def lengths(captions: list[str]) -> dict[str, np.ndarray]:
    return {"input_ids": np.asarray([[len(text), sum(map(ord, text))] for text in captions])}


def loader(source=None, batch_size=4, seed=0, **options):
    source = Numbers() if source is None else source
    return make_loader(source, JointTransform(16, "random", 0.5), lengths, batch_size, seed, **options)


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def same(first: list[dict], second: list[dict]) -> bool:
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True)
    )


def indices(batches: list[dict]) -> np.ndarray:
    return np.concatenate([batch["image"][:, 0, 0, 2] for batch in batches])


def test_batch_has_the_arrays_of_the_contract():
    with loader() as batches:
        batch = next(batches)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((4, 16, 16, 3), "uint8"),
        "face_mask": ((4, 16, 16, 1), "uint8"),
        "hand_mask": ((4, 16, 16, 1), "uint8"),
        "time_ids": ((4, 6), "float32"),
        "input_ids": ((4, 2), "int32"),
    }


def test_every_epoch_holds_each_sample_once_in_a_new_order():
    with loader() as batches:
        order = indices(take(batches, 10)).reshape(4, 10)
    assert (np.sort(order, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in order}) == 4
    with loader(seed=1) as batches:
        other = indices(take(batches, 5)).reshape(2, 10)
    assert not any((epoch == order).all(1).any() for epoch in other)
    with loader(shuffle=False) as batches:
        assert (indices(take(batches, 5)) == np.tile(np.arange(10), 2)).all()


def test_augmentation_changes_between_epochs():
    with loader(Numbers(1), batch_size=1) as batches:
        seen = {batch["image"].tobytes() for batch in take(batches, 12)}
    assert len(seen) > 8


@pytest.mark.parametrize("at", [0, 1, 4, 13])
def test_resume_is_bitwise(at):
    with loader(caption_dropout=0.3) as whole:
        before, state, after = take(whole, at), json.loads(json.dumps(whole.get_state())), take(whole, 5)
        whole.set_state(state)
        assert same(take(whole, 5), after)
    assert state["step"] == at == len(before)
    with loader(caption_dropout=0.3) as fresh:
        take(fresh, 2)
        fresh.set_state(state)
        assert same(take(fresh, 5), after)
        assert fresh.get_state()["step"] == at + 5


def test_resume_refuses_another_order():
    with loader() as batches:
        state = batches.get_state()
    for other in (loader(seed=1), loader(batch_size=2), loader(Numbers(11)), loader(shuffle=False)):
        with pytest.raises(ValueError, match="data order differs"):
            other.set_state(state)


def test_workers_do_not_change_the_batches_and_report_bad_samples(tmp_path):
    export_folder(Numbers(7), tmp_path)
    (tmp_path / "images" / "000004.png").unlink()
    reference, data = FolderDataset(tmp_path), FolderDataset(tmp_path)
    options = {"caption_dropout": 0.5, "seed": 3}
    with loader(reference, **options) as threads, loader(data, workers=2, **options) as processes:
        expected = take(threads, 6)
        processes.set_state(threads.get_state() | {"step": 1})
        assert same(take(processes, 5), expected[1:])
        assert processes.get_state() == threads.get_state()
    assert data.bad == reference.bad == 1
    assert data.bad_lines() == reference.bad_lines()


def test_shards_put_together_are_the_whole_batch():
    with loader() as whole, loader(shard=(0, 2)) as first, loader(shard=(1, 2)) as second:
        for _ in range(6):
            expected, parts = next(whole), (next(first), next(second))
            for name, array in expected.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
        one, two = first.get_state(), whole.get_state()
        second.set_state(two)
        assert one["step"] == two["step"]


def test_captions_drop_at_the_rate_and_anew_each_epoch():
    with loader(batch_size=10, caption_dropout=0.3) as batches:
        dropped = np.stack([batch["input_ids"][:, 0] == 0 for batch in take(batches, 60)])
    assert 0.22 < dropped.mean() < 0.38
    with loader(batch_size=10, caption_dropout=0.3, shuffle=False) as batches:
        per_sample = np.stack([batch["input_ids"][:, 0] == 0 for batch in take(batches, 40)]).mean(0)
    assert per_sample.min() > 0 and per_sample.max() < 1
    with loader() as kept, loader(caption_dropout=1.0) as none:
        a, b = next(kept), next(none)
    assert (b["input_ids"] == 0).all() and (a["input_ids"] > 0).all()
    np.testing.assert_array_equal(a["image"], b["image"])


def test_one_of_several_captions_is_drawn():
    class Several(Numbers):
        def __getitem__(self, index: int) -> dict:
            return super().__getitem__(index) | {"captions": ("a", "bb", "ccc")}

    with loader(Several()) as batches:
        seen = np.concatenate([batch["input_ids"][:, 0] for batch in take(batches, 20)])
    assert set(seen) == {1, 2, 3}


def test_small_sources_and_wrong_settings():
    with loader(Numbers(3), batch_size=8) as batches:
        assert (np.bincount(indices(take(batches, 3))) == 8).all()
    for options, words in (
        ({"shard": (2, 2)}, "shard"),
        ({"shard": (0, 3)}, "multiple"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"workers": -1}, "workers"),
    ):
        with pytest.raises(ValueError, match=words):
            loader(**options)
    with pytest.raises(ValueError, match="no samples"):
        loader(Numbers(0))


def test_key_points_are_stacked():
    class Pointed(Numbers):
        def __getitem__(self, index: int) -> dict:
            return super().__getitem__(index) | {"keypoints": {"face5": np.full((5, 3), index + 0.5)}}

    transform = JointTransform(20, keypoints=("face5",))
    with make_loader(Pointed(), transform, lengths, 4, 0, shuffle=False) as batches:
        points = next(batches)["keypoints"]["face5"]
    assert points.shape == (4, 5, 3)
    np.testing.assert_array_equal(points[:, 0, 1], np.arange(4) + 0.5)


def test_samples_that_differ_in_keys_are_named():
    class Uneven(Numbers):
        def __getitem__(self, index: int) -> dict:
            whole = super().__getitem__(index)
            return whole | ({"conditioning_image": whole["image"]} if index % 2 else {})

    with loader(Uneven(), shuffle=False) as batches, pytest.raises(ValueError, match="conditioning_image"):
        next(batches)
