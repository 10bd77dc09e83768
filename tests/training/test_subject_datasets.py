"""From a data configuration to batches of subjects: pictures of people, their masks, and captions that mark them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tiny_models import SIZE, write_folder
from tiny_subjects import CAPTION, write_subjects

from fairhuman_jax.config import ConfigError, apply_overrides, from_json, to_json
from fairhuman_jax.contract import System
from fairhuman_jax.data.people.subjects import PeopleSubjects
from fairhuman_jax.data.subject_folder import MARKER, SubjectDataset
from fairhuman_jax.data.subject_transforms import SubjectConfig, SubjectTransform
from fairhuman_jax.systems.shipped.autoencoder import AutoencoderConfig
from fairhuman_jax.training.compile_only import batch_shapes
from fairhuman_jax.training.datasets import Part, held_out_batches, open_data, open_source, training_batches
from fairhuman_jax.training.encoded_folder import encode_folder
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig

SUBJECTS = SubjectConfig(max_objects=2, object_resolution=8, uncondition_prob=0.25, identities=4, references=2)


class Letters(System):
    """A tokenizer that keeps the caption: its letters, padded."""

    def tokenize(self, captions):
        return {"input_ids": np.array([[ord(c) for c in f"{caption:<300}"] for caption in captions], np.int32)}


class Encoding(Letters):
    """A system that could encode pictures once."""

    encodes = ("image",)

    def encode_image(self, params, image):
        return image, image


def take(config, count):
    with training_batches(open_data(config)[0], Letters(), config, TrainConfig(batch_size=2), {}) as batches:
        return [next(batches) for _ in range(count)]


def planned(config):
    """Shapes and types that a compilation ahead of time expects."""
    run = RunConfig(AutoencoderConfig(), "", data=config, train=TrainConfig(batch_size=2))
    return {name: (leaf.shape, leaf.dtype) for name, leaf in batch_shapes(Letters(), run).items()}


def arrays(batch):
    return {name: (array.shape, array.dtype) for name, array in batch.items() if name != "input_ids"}


def said(batch):
    return ["".join(map(chr, row)).rstrip() for row in batch["input_ids"]]


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """A folder of nine photos with segments, six of them for training."""
    root = write_subjects(tmp_path_factory.mktemp("linked"), 9, test=1)
    return DataConfig(folder=str(root), resolution=SIZE, held_out=2, subjects=SUBJECTS, on_error="stop")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """The people world with eight samples of four people, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIRHUMAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        subjects = dataclasses.replace(SUBJECTS, pairs=0.5)
        yield DataConfig(length=6, held_out=2, resolution=SIZE, subjects=subjects)


@pytest.mark.parametrize("kind", ["linked", "crowd"])
def test_subjects_come_with_pictures_masks_and_marked_captions(kind, request):
    data = request.getfixturevalue(kind)
    batches = take(data, 8)
    for batch in batches:
        assert {name: array.shape for name, array in batch.items()} == {
            "image": (2, SIZE, SIZE, 3),
            "object_pixels": (2, 2, 8, 8, 3),
            "object_masks": (2, 2, SIZE, SIZE),
            "num_objects": (2,),
            "time_ids": (2, 6),
            "input_ids": (2, 300),
        }
        assert batch["object_pixels"].dtype == batch["object_masks"].dtype == np.uint8
        for row, caption in enumerate(said(batch)):
            count = batch["num_objects"][row]
            assert caption.count(MARKER) == count and (caption or not count)
            assert batch["object_masks"][row].any((1, 2)).tolist() == [k < count for k in range(2)]
            assert batch["object_pixels"][row].any((1, 2, 3)).tolist() == [k < count for k in range(2)]
    counts = np.concatenate([batch["num_objects"] for batch in batches])
    empty = [not caption for batch in batches for caption in said(batch)]
    assert 0 < sum(empty) < 10 and set(counts) == {0, 1, 2}
    assert planned(data) == arrays(batches[0])


@pytest.mark.parametrize("kind", ["linked", "crowd"])
def test_held_out_subjects_all_appear_unchanged(kind, request):
    data = request.getfixturevalue(kind)
    flipped = dataclasses.replace(data, flip=1.0, subjects=dataclasses.replace(data.subjects, appear_prob=0.0))
    source = open_data(data)[1]
    batches, again = (held_out_batches(source, Letters(), one, 2) for one in (data, flipped))
    plain = SubjectTransform(SIZE, subjects=data.subjects.plain())
    for first, second in zip(batches, again, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
        assert all(first["num_objects"]) and all(MARKER in caption for caption in said(first))
    for row in range(2):
        rng = np.random.default_rng((0, 0, row))
        rng.random(2)  # which caption, and whether
        expected = plain(source[row], rng)
        for name in ("image", "object_pixels", "object_masks"):
            np.testing.assert_array_equal(batches[0][name][row], expected[name])


def test_held_out_people_of_the_people_world_are_strangers(crowd):
    training, held_out = open_data(crowd)
    assert isinstance(training, Part) and isinstance(training.source, PeopleSubjects) and len(training) == 6
    alone = dataclasses.replace(crowd, subjects=dataclasses.replace(crowd.subjects, pairs=0.0))
    training, held_out = open_data(alone)
    assert {int(training[i]["people"][0]) for i in range(6)} == {0, 1, 2}
    assert [int(held_out[i]["people"][0]) for i in range(2)] == [3, 3]


def test_a_folder_with_segments_serves_a_model_of_text_alone(linked):
    plain = dataclasses.replace(linked, subjects=None, caption_dropout=0.5)
    assert isinstance(open_source(plain), SubjectDataset)
    batches = take(plain, 6)
    assert {caption for batch in batches for caption in said(batch)} == {"", CAPTION}
    assert "object_pixels" not in batches[0] and batches[0]["image"].shape == (2, SIZE, SIZE, 3)


def test_subjects_follow_buckets_and_the_published_geometry(linked):
    bucketed = take(dataclasses.replace(linked, buckets=True, bucket_step=4), 8)
    shapes = {batch["image"].shape[1:3] for batch in bucketed}
    assert len(shapes) > 1 and all(batch["object_masks"].shape[2:] == batch["image"].shape[1:3] for batch in bucketed)
    published = dataclasses.replace(linked, compat="reference")
    own, reference = take(linked, 4), take(published, 4)
    assert "time_ids" not in reference[0] and planned(published) == arrays(reference[0])
    assert any((a["image"][:, :, 0] != b["image"][:, :, 0]).any() for a, b in zip(own, reference, strict=True))
    black = [(row[:, 0] == 0).all() for batch in reference for row in batch["image"]]
    assert any(black) and not any((row[:, 0] == 0).all() for batch in own for row in batch["image"])


def test_settings_that_do_not_fit_are_refused(linked, tmp_path):
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"a": {"img_path": "a.jpg", "prompt": "", "pose_path": "a.npz"}}))
    for setting, words in (
        ({"cache_latents": True}, "data.subjects: set neither data.cache_latents"),
        ({"keypoints": True}, "data.subjects: set neither"),
        ({"caption_dropout": 0.1}, "dropped together, by data.subjects.uncondition_prob"),
        ({"compat": "reference", "buckets": True}, "crops squares from the middle"),
        ({"compat": "reference", "crop": "random"}, "crops squares from the middle"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(dataclasses.replace(linked, **setting))
    for other in (write_folder(tmp_path / "photos"), mapping, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"data.subjects: .* holds no image_ids_train.txt"):
            open_source(dataclasses.replace(linked, folder=str(other)))
    with pytest.raises(ValueError, match=r"segments alone; set neither data.keypoints nor data.conditioning"):
        open_source(dataclasses.replace(linked, subjects=None, keypoints=True))
    with pytest.raises(ValueError, match="drawn anew each time; train from the folder"):
        encode_folder(linked, Encoding(), {}, tmp_path / "shards")
    changed = apply_overrides(linked, ["subjects.max_objects=3", "subjects.object_types=person,dog"])
    assert changed.subjects.max_objects == 3 and changed.subjects.object_types == ("person", "dog")
    assert apply_overrides(linked, ["subjects=none"]).subjects is None
    assert from_json(DataConfig, to_json(linked)) == linked
    with pytest.raises(ConfigError, match=r"appear_prob = 2.0: use 0 ... 1"):
        apply_overrides(linked, ["subjects.appear_prob=2"])
