"""Aspect-ratio buckets: shapes, assignment, and a stream of batches of one shape each that loses no sample."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fairhuman_jax.data import FolderDataset, JointTransform, export_folder, make_loader
from fairhuman_jax.data.buckets import assign_buckets, bucket_shapes, nearest_bucket
from fairhuman_jax.data.pictures import read_image

SHAPES = bucket_shapes(32, step=8)
SIZES = ((40, 40), (60, 40), (40, 60), (33, 64), (64, 40))


class Mixed:
    """Samples of several sizes; masks are random, the control image is the image's complement."""

    def __init__(self, length: int = 23) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def size(self, index: int) -> tuple[int, int]:
        return SIZES[index**3 % 11 % len(SIZES)]

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        size = self.size(index)
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        masks = rng.integers(0, 2, (2, *size, 1), np.uint8)
        layers = {"image": image, "conditioning_image": 255 - image, "face_mask": masks[0], "hand_mask": masks[1]}
        return layers | {"caption": "x" * index}


def lengths(captions: list[str]) -> dict[str, np.ndarray]:
    return {"input_ids": np.asarray([[len(text)] for text in captions])}


def loader(source=None, batch_size=4, seed=0, **options):
    source = source or Mixed()
    transforms = [JointTransform(shape, "random", 0.5) for shape in SHAPES]
    return make_loader(source, transforms, lengths, batch_size, seed, groups=assign_buckets(source, SHAPES), **options)


def take(batches, count: int) -> list[dict]:
    return list(itertools.islice(batches, count))


def assert_same(first: list[dict], second: list[dict]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_shapes_at_1024_are_those_of_sdxl():
    assert bucket_shapes(1024) == (
        *((1344, 768), (1216, 832), (1152, 896), (1088, 960)),
        (1024, 1024),
        *((960, 1088), (896, 1152), (832, 1216), (768, 1344)),
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 64), st.floats(1.0, 4.0))
def test_shapes_need_no_more_than_the_square(count, step, aspect):
    shapes = bucket_shapes(count * step, step, aspect)
    assert (count * step, count * step) in shapes and {(w, h) for h, w in shapes} == set(shapes)
    for height, width in shapes:
        assert height % step == width % step == 0 and height * width <= (count * step) ** 2
        assert max(height, width) <= aspect * min(height, width)


def test_the_nearest_shape_is_by_ratio_of_ratios():
    shapes = bucket_shapes(1024)
    assert shapes[nearest_bucket((1200, 800), shapes)] == (1216, 832)
    assert shapes[nearest_bucket((10, 100), shapes)] == (768, 1344)
    assert shapes[nearest_bucket((3000, 3010), shapes)] == (1024, 1024)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="resolution 100 must be a multiple of the step 64"):
        bucket_shapes(100)
    with pytest.raises(ValueError, match="the largest aspect is"):
        bucket_shapes(64, 64, 0.5)
    with pytest.raises(ValueError, match="needs one number below 1 for each of the 23 samples"):
        make_loader(Mixed(), JointTransform(8), lengths, 4, 0, groups=np.ones(23, int))


def test_sizes_come_from_headers_as_the_pictures_are_turned(tmp_path):
    export_folder(Mixed(5), tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    turned, cut = tmp_path / "images" / "000001.png", tmp_path / "images" / "000002.png"
    with Image.open(turned) as picture:
        picture.copy().save(turned, exif=exif)
    cut.write_bytes(cut.read_bytes()[:200])  # enough for the header, not for the pixels
    data = FolderDataset(tmp_path)
    assert data.size(1) == read_image(turned).shape[:2] == Mixed(5).size(1)[::-1]
    assert [data.size(i) for i in (0, 2, 3, 4)] == [Mixed(5).size(i) for i in (0, 2, 3, 4)] and data.bad == 0
    cut.unlink()
    assert data.size(2) == data.size(3) and data.bad == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 90), st.integers(20, 90), st.sampled_from(SHAPES))
def test_a_mask_stays_on_its_pixels_in_every_shape(seed, height, width, shape):
    mask = np.zeros((height, width, 1), np.uint8)
    rows = np.sort(np.random.default_rng(seed).integers(0, height, 2))
    columns = np.sort(np.random.default_rng(seed + 1).integers(0, width, 2))
    mask[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = 1
    painted = np.repeat(mask * np.uint8(255), 3, -1)
    whole = {"image": painted, "conditioning_image": painted, "face_mask": mask, "hand_mask": 1 - mask}
    out = JointTransform(shape, "random", 0.5)(whole, np.random.default_rng(seed))
    for name in ("image", "conditioning_image"):
        assert out[name].shape == (*shape, 3)
        np.testing.assert_array_equal(out[name][..., :1] >= 128, out["face_mask"] == 1)
    assert out["time_ids"].tolist()[:2] == [height, width] and out["time_ids"].tolist()[4:] == list(shape)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.booleans(), st.sampled_from(SHAPES))
def test_masking_and_cropping_commute_in_every_shape(seed, extra, wide, shape):
    """A picture that fits in one side is not resized: the same pixels are picked for all layers, bit for bit."""
    size = (shape[0], shape[1] + extra) if wide else (shape[0] + extra, shape[1])
    rng = np.random.default_rng(seed)
    layers = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name in ("image", "conditioning_image")}
    layers |= {name: rng.integers(0, 2, (*size, 1), np.uint8) for name in ("face_mask", "hand_mask")}
    transform = JointTransform(shape, "random", 0.5)
    plain = transform(layers, np.random.default_rng(seed))
    for mask, image in itertools.product(("face_mask", "hand_mask"), ("image", "conditioning_image")):
        masked = transform(layers | {image: layers[image] * layers[mask]}, np.random.default_rng(seed))
        np.testing.assert_array_equal(masked[image], plain[image] * plain[mask])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(SHAPES))
def test_the_picture_covers_the_shape_and_no_more(height, width, shape):
    resized = JointTransform(shape).geometry(height, width, np.random.default_rng(0)).resized
    assert resized[0] >= shape[0] and resized[1] >= shape[1]
    assert resized[0] == shape[0] or resized[1] == shape[1]


def test_every_batch_has_one_shape_and_its_nearest_samples():
    source = Mixed()
    buckets = assign_buckets(source, SHAPES)
    with loader() as batches:
        seen = take(batches, 30)
    for batch in seen:
        shape = batch["image"].shape[1:3]
        assert batch["face_mask"].shape == (4, *shape, 1) and batch["conditioning_image"].shape == (4, *shape, 3)
        assert (batch["time_ids"][:, 4:] == shape).all()
        for caption, ids in zip(batch["input_ids"][:, 0], batch["time_ids"], strict=True):
            assert SHAPES[buckets[caption]] == shape and tuple(ids[:2]) == source.size(int(caption))
    assert len({batch["image"].shape for batch in seen}) == len(np.unique(buckets)) > 2


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_no_sample_is_lost_or_favoured(batch_size):
    """After E epochs each sample came E times, or so many less as wait in its bucket for a whole batch."""
    source, epochs = Mixed(), 12
    sizes = np.bincount(assign_buckets(source, SHAPES))
    steps = int(sum(epochs * size // batch_size for size in sizes))
    with loader(batch_size=batch_size) as batches:
        seen = np.concatenate([batch["input_ids"][:, 0] for batch in take(batches, steps)])
    counts = np.bincount(seen, minlength=len(source))
    for bucket, size in enumerate(sizes):
        members = counts[assign_buckets(source, SHAPES) == bucket]
        if size:
            assert np.ptp(members) <= 1 and 0 <= epochs * size - members.sum() < batch_size


def test_epochs_and_seeds_change_the_order():
    with loader() as first, loader(seed=1) as second:
        shapes = [[batch["image"].shape[1:3] for batch in take(batches, 20)] for batches in (first, second)]
    assert shapes[0] != shapes[1] and shapes[0][:5] != shapes[0][5:10]


@pytest.mark.parametrize("at", [0, 1, 7, 16])
def test_resume_in_the_middle_of_an_epoch_is_bitwise(at):
    with loader(caption_dropout=0.3) as whole:
        take(whole, at)
        state, after = json.loads(json.dumps(whole.get_state())), take(whole, 6)
    with loader(caption_dropout=0.3) as fresh:
        take(fresh, 3)
        fresh.set_state(state)
        assert_same(take(fresh, 6), after)


def test_resume_refuses_other_buckets():
    with loader() as batches, make_loader(Mixed(), JointTransform(8), lengths, 4, 0) as plain:
        with pytest.raises(ValueError, match="data order differs: groups"):
            plain.set_state(batches.get_state())
        with pytest.raises(ValueError, match="data order differs: groups"):
            batches.set_state(plain.get_state())


def test_the_hosts_shares_put_together_are_one_hosts_batch():
    with loader() as whole, loader(shard=(0, 2)) as first, loader(shard=(1, 2)) as second:
        for _ in range(12):
            expected, parts = next(whole), (next(first), next(second))
            for name, array in expected.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_workers_give_the_same_batches_and_bad_samples_take_the_batchs_shape(tmp_path):
    export_folder(Mixed(9), tmp_path)
    (tmp_path / "images" / "000004.png").write_bytes(b"no picture")
    with loader(FolderDataset(tmp_path)) as threads, loader(FolderDataset(tmp_path), workers=2) as processes:
        assert_same(take(processes, 6), take(threads, 6))


def test_one_group_is_the_stream_without_groups():
    source = Mixed()
    options = {"batch_size": 5, "seed": 3}
    with (
        make_loader(source, JointTransform(16), lengths, groups=np.zeros(23, int), **options) as grouped,
        make_loader(source, JointTransform(16), lengths, **options) as plain,
    ):
        assert_same(take(grouped, 9), take(plain, 9))
