"""From a data configuration to batches: the held-out split, fixed times, cached latents with their masks."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_models import SIZE, write_folder

from fairhuman_jax.config import ConfigError, apply_overrides
from fairhuman_jax.contract import System
from fairhuman_jax.data.folder import FolderDataset
from fairhuman_jax.data.keypoint_transforms import PoseTransform
from fairhuman_jax.data.pose_files import MappingDataset
from fairhuman_jax.data.shards import ShardedDataset
from fairhuman_jax.data.tfds_folder import TFDSDataset, build_tfds
from fairhuman_jax.data.transforms import JointTransform
from fairhuman_jax.keypoints.skeletons import HUMANSD17, draw_bodies
from fairhuman_jax.training.datasets import encode_source, held_out_batches, open_data, open_source, training_batches
from fairhuman_jax.training.encoded_folder import encode_folder
from fairhuman_jax.training.run_config import DataConfig, TrainConfig


class Pooling(System):
    """An encoder that averages 2 x 2 pixels, and a tokenizer that counts letters."""

    encodes = ("image",)

    def encode_image(self, params, image):
        count, height, width, _ = image.shape
        blocks = image.astype(jnp.float32).reshape(count, height // 2, 2, width // 2, 2, 3)
        mean = blocks.mean((2, 4)) / 255.0
        return mean, jnp.full_like(mean, -3.0)

    def tokenize(self, captions):
        return {"input_ids": np.array([[len(caption)] for caption in captions], np.int32)}


class Textless(System):
    def tokenize(self, captions):
        return {}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig(folder=str(write_folder(tmp_path_factory.mktemp("data"))), resolution=SIZE, held_out=128)


def test_held_out_samples_are_the_last_and_at_most_a_quarter(data):
    training, held_out = open_data(data)
    assert (len(training), len(held_out)) == (9, 3)
    whole = [training[i]["image"] for i in range(9)] + [held_out[i]["image"] for i in range(3)]
    assert len({image.tobytes() for image in whole}) == 12


def test_held_out_batches_cover_all_times_once(data):
    batches = held_out_batches(open_data(data)[1], Pooling(), data, 2)
    assert len(batches) == 2
    times = np.concatenate([batch["times"] for batch in batches])
    np.testing.assert_allclose(np.sort(times), [0.125, 0.375, 0.625, 0.875])
    assert all(np.ptp(batch["times"]) == 0.5 for batch in batches)
    again = held_out_batches(open_data(data)[1], Pooling(), data, 2)
    for first, second in zip(batches, again, strict=True):
        assert first.keys() == second.keys() >= {"image", "face_mask", "hand_mask", "input_ids", "time_ids", "position"}
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_cached_latents_keep_masks_sizes_and_captions(data):
    source, _ = open_data(data)
    transform = JointTransform(SIZE)
    encoded = encode_source(source, Pooling(), {}, [transform])
    assert len(encoded) == 9
    rng = np.random.default_rng(0)
    for index in (0, 8):
        plain, sample = transform(source[index], rng), encoded[index]
        assert sample["caption"] == source[index]["caption"] and "image" not in sample
        for name in ("face_mask", "hand_mask", "time_ids"):
            np.testing.assert_array_equal(sample[name], plain[name])
        assert sample["face_mask"].any()
        mean, _ = Pooling().encode_image({}, plain["image"][None])
        np.testing.assert_allclose(sample["latent_mean"], mean[0], atol=1e-3)
        assert sample["latent_mean"].dtype == np.float16


def test_training_batches_come_from_latents_without_flips(data):
    cached = DataConfig(**(vars(data) | {"cache_latents": True, "flip": 1.0}))
    train = TrainConfig(batch_size=3)
    with training_batches(open_data(cached)[0], Pooling(), cached, train, {}) as batches:
        batch = next(batches)
    with training_batches(open_data(data)[0], Pooling(), data, train, {}) as batches:
        plain = next(batches)
    assert "image" not in batch and batch["latent_mean"].shape == (3, SIZE // 2, SIZE // 2, 3)
    np.testing.assert_array_equal(batch["face_mask"], plain["face_mask"])
    np.testing.assert_array_equal(batch["input_ids"], plain["input_ids"])


def test_settings_that_do_not_fit_are_refused(data, tmp_path):
    cached = DataConfig(**(vars(data) | {"cache_latents": True}))
    with pytest.raises(ValueError, match="cache_latents: Textless has no frozen autoencoder to encode with"):
        training_batches(open_data(cached)[0], Textless(), cached, TrainConfig(), {})
    with pytest.raises(ValueError, match="1 samples; training and held-out need at least 2"):
        open_data(DataConfig(folder=str(write_folder(tmp_path, 1))))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with standing and lying pictures; buckets are multiples of 4 pixels."""
    root = write_folder(tmp_path_factory.mktemp("mixed"))
    for index in range(0, 12, 3):
        for name in ("image", "mask_face", "mask_hand"):
            path = root / f"{name}_{index}.png"
            with Image.open(path) as picture:
                picture.resize((SIZE, 2 * SIZE)).save(path)
    return DataConfig(folder=str(root), resolution=SIZE, held_out=3, buckets=True, bucket_step=4)


def take(config, count, system=None, **train):
    settings = TrainConfig(**({"batch_size": 2} | train))
    with training_batches(open_data(config)[0], system or Pooling(), config, settings, {}) as batches:
        return [next(batches) for _ in range(count)]


def test_buckets_give_batches_of_several_shapes_and_a_square_held_out_set(mixed):
    shapes = {batch["image"].shape[1:3] for batch in take(mixed, 8)}
    assert len(shapes) == 2 and all(batch["face_mask"].shape[1:3] in shapes for batch in take(mixed, 2))
    assert all(height * width <= SIZE**2 for height, width in shapes)
    for batch in held_out_batches(open_data(mixed)[1], Pooling(), mixed, 2):
        assert batch["image"].shape == (2, SIZE, SIZE, 3)


def test_latents_in_memory_keep_the_buckets(mixed):
    cached = dataclasses.replace(mixed, cache_latents=True)
    plain, latents = take(mixed, 6), take(cached, 6)
    assert len({batch["latent_mean"].shape for batch in latents}) == 2
    for batch in latents:
        height, width = batch["face_mask"].shape[1:3]
        assert batch["latent_mean"].shape == (2, height // 2, width // 2, 3)
    assert {b["face_mask"].shape for b in plain} == {b["face_mask"].shape for b in latents}


def test_folder_tfds_and_shards_are_told_apart_and_agree(mixed, tmp_path):
    built, _ = build_tfds(str(mixed.folder), tmp_path / "tfds")
    encode_folder(mixed, Pooling(), {}, tmp_path / "shards", text=False)
    configs = [dataclasses.replace(mixed, folder=str(folder)) for folder in (mixed.folder, built, tmp_path / "shards")]
    kinds = [type(open_source(config)) for config in configs]
    assert kinds == [FolderDataset, TFDSDataset, ShardedDataset]
    folder, tfds, shards = (take(config, 6) for config in configs)
    for expected, batch in zip(folder, tfds, strict=True):
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])
    assert all("image" not in batch and batch["input_ids"].shape == (2, 1) for batch in shards)
    assert {batch["face_mask"].shape for batch in shards} == {batch["face_mask"].shape for batch in folder}
    held_out = held_out_batches(open_data(configs[2])[1], Pooling(), configs[2], 2)
    assert all(np.ptp(batch["times"]) > 0 and len(batch["latent_mean"]) == 2 for batch in held_out)
    assert len({batch["latent_mean"].shape for batch in held_out}) == 2


def test_folders_that_are_none_of_the_three_are_refused(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_data(DataConfig(folder=str(tmp_path / "nowhere")))
    with pytest.raises(
        ValueError, match=r"no data folder; it needs metadata\.jsonl, dataset_info\.json .* or manifest"
    ):
        open_data(DataConfig(folder=str(tmp_path)))
    encode_folder(data, Pooling(), {}, tmp_path / "shards", text=False)
    shards = dataclasses.replace(data, folder=str(tmp_path / "shards"))
    with pytest.raises(ValueError, match="shards holds latents: Textless has no frozen autoencoder"):
        take(shards, 1, Textless())
    with pytest.raises(ValueError, match="holds latents already"):
        encode_folder(shards, Pooling(), {}, tmp_path / "again", text=False)
    with pytest.raises(ValueError, match="resolution 16 must be a multiple of the step 64"):
        take(dataclasses.replace(data, buckets=True), 1)


# -- people with joints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posed(tmp_path_factory):
    """A mapping file of eight pictures, one to three people each."""
    root, rng, mapping = tmp_path_factory.mktemp("posed"), np.random.default_rng(3), {}
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE + 6 * (i % 3), 3), np.uint8)).save(root / f"{i}.png")
        points = rng.uniform((0, 0, 0.1), (SIZE - 1, SIZE - 1, 1), (1 + i % 3, 17, 3)).astype(np.float32)
        people = np.array([{"keypoints": p, "score": p[:, 2].mean(), "area": 1.0} for p in points], object)
        np.savez(root / f"{i}.npz", people)
        mapping[f"id{i}"] = {"img_path": f"{i}.png", "prompt": "people " + "." * i, "pose_path": f"{i}.npz"}
    (root / "mapping_file_training.json").write_text(json.dumps(mapping))
    return DataConfig(folder=str(root / "mapping_file_training.json"), resolution=SIZE, held_out=2, on_error="stop")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The people world with skeletons, eight pictures, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIRHUMAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield DataConfig(length=6, held_out=2, resolution=SIZE, conditioning="humansd", keypoints=True)


def redrawn(batch):
    """Skeletons of a batch's key points."""
    style = dataclasses.replace(HUMANSD17, threshold=0.02)
    return np.stack([draw_bodies(np.zeros((SIZE, SIZE, 3), np.uint8), people, style) for people in batch["keypoints"]])


def test_mapping_files_give_what_is_asked_for(posed):
    assert isinstance(open_source(posed), MappingDataset)
    training, held_out = open_data(posed)
    assert (len(training), len(held_out)) == (6, 2)
    assert [training[i]["caption"].count(".") for i in range(6)] == list(range(6))
    plain = take(posed, 1)[0]
    assert "conditioning_image" not in plain and "keypoints" not in plain
    (drawn,) = take(dataclasses.replace(posed, conditioning="humansd"), 1)
    assert drawn["conditioning_image"].any() and "keypoints" not in drawn
    both = dataclasses.replace(posed, conditioning="humansd", keypoints=True, crop="random", flip=0.5)
    for batch in take(both, 4):
        assert batch["keypoints"].shape == (2, 10, 17, 3)
        np.testing.assert_array_equal(batch["conditioning_image"], redrawn(batch))
    bare = take(dataclasses.replace(both, conditioning=None), 4)
    for batch, other in zip(bare, take(both, 4), strict=True):
        assert "conditioning_image" not in batch
        np.testing.assert_array_equal(batch["keypoints"], other["keypoints"])


def test_the_people_world_hands_out_exact_skeletons(world):
    first, flipped = take(world, 3), take(dataclasses.replace(world, flip=1.0), 3)
    for batch, mirrored in zip(first, flipped, strict=True):
        np.testing.assert_array_equal(batch["conditioning_image"], redrawn(batch))
        np.testing.assert_array_equal(mirrored["conditioning_image"], redrawn(mirrored))
        np.testing.assert_array_equal(mirrored["image"], batch["image"][:, :, ::-1])
        left, right = batch["keypoints"][:, 0, 5], mirrored["keypoints"][:, 0, 6]
        there = left[:, 2] > 0
        np.testing.assert_allclose(right[there, 0], SIZE - left[there, 0], atol=1e-4)
    assert sum(int((batch["keypoints"][:, 0, :, 2] > 0).sum()) for batch in first) > 30
    drawn_alone = take(dataclasses.replace(world, keypoints=False), 1)[0]
    assert "keypoints" not in drawn_alone and drawn_alone["face_mask"].shape == (2, SIZE, SIZE, 1)
    np.testing.assert_array_equal(drawn_alone["conditioning_image"], first[0]["conditioning_image"])


def test_held_out_skeletons_stay_and_published_ones_do_not(posed):
    data = dataclasses.replace(posed, conditioning="humansd", keypoints=True)
    reference = dataclasses.replace(data, compat="reference")
    centred = held_out_batches(open_data(data)[1], Pooling(), data, 2)[0]
    source = open_data(data)[1]
    expected = JointTransform(SIZE)(source[0], np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(centred["image"][0], expected)
    published = held_out_batches(open_data(reference)[1], Pooling(), reference, 2)[0]
    again = held_out_batches(open_data(reference)[1], Pooling(), reference, 2)[0]
    np.testing.assert_array_equal(published["keypoints"], again["keypoints"])
    transform = PoseTransform(SIZE, "random", masks=(), compat="reference")
    for i in range(2):
        rng = np.random.default_rng((0, 0, i))
        rng.random(2)  # which caption, and whether
        np.testing.assert_array_equal(published["image"][i], transform(source[i], rng)["image"])
    assert not np.array_equal(published["keypoints"], centred["keypoints"])
    np.testing.assert_array_equal(published["conditioning_image"], redrawn(published))
    batches = take(dataclasses.replace(reference, flip=1.0), 4)
    assert all("face_mask" not in batch and batch["image"].shape == (2, SIZE, SIZE, 3) for batch in batches)


def test_skeletons_are_kept_with_latents(posed, tmp_path):
    data = dataclasses.replace(posed, conditioning="humansd", keypoints=True)
    encode_folder(data, Pooling(), {}, tmp_path / "shards", text=False)
    shards = dataclasses.replace(data, folder=str(tmp_path / "shards"))
    plain, latents, stored = take(data, 3), take(dataclasses.replace(data, cache_latents=True), 3), take(shards, 3)
    for batch, *others in zip(plain, latents, stored, strict=True):
        for other in others:
            assert "image" not in other and other["latent_mean"].shape == (2, SIZE // 2, SIZE // 2, 3)
            for name in ("conditioning_image", "keypoints", "input_ids"):
                np.testing.assert_array_equal(other[name], batch[name])


def test_buckets_draw_skeletons_of_their_shapes(posed):
    data = dataclasses.replace(posed, conditioning="humansd", keypoints=True, buckets=True, bucket_step=4)
    batches = take(data, 8)
    assert len({batch["image"].shape for batch in batches}) > 1
    assert all(batch["conditioning_image"].shape == batch["image"].shape for batch in batches)


def test_pose_settings_that_do_not_fit_are_refused(posed, data):
    for setting, words in (
        ({"keypoints": True}, "has none; mapping files"),
        ({"compat": "reference"}, "no mapping file"),
    ):
        with pytest.raises(ValueError, match=f"data.{next(iter(setting))}: .* {words}"):
            open_source(dataclasses.replace(data, conditioning="humansd", **setting))
    assert isinstance(open_source(dataclasses.replace(data, conditioning="humansd")), FolderDataset)
    with pytest.raises(ValueError, match=r"has joints alone; set data.conditioning to humansd or none"):
        open_source(dataclasses.replace(posed, conditioning="fairhuman"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.json: not found; a mapping file"):
        open_source(DataConfig(folder="nowhere.json"))
    published = dataclasses.replace(posed, compat="reference", conditioning="humansd")
    for wrong in ({"conditioning": None}, {"buckets": True, "bucket_step": 4}, {"cache_latents": True}):
        with pytest.raises(ValueError, match=r"and neither data.buckets nor data.cache_latents"):
            open_source(dataclasses.replace(published, **wrong))
    with pytest.raises(ConfigError, match=r"conditioning=openpose: needs .*'fairhuman', 'humansd'"):
        apply_overrides(posed, ["conditioning=openpose"])
    assert apply_overrides(posed, ["conditioning=none"]).conditioning is None
    assert apply_overrides(posed, ["conditioning=humansd"]).conditioning == "humansd"
