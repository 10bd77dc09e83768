"""From a data configuration to batches: the held-out split, fixed times, cached latents with their masks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_models import SIZE, write_folder

from fairhuman_jax.data.folder import FolderDataset
from fairhuman_jax.data.shards import ShardedDataset
from fairhuman_jax.data.tfds_folder import TFDSDataset, build_tfds
from fairhuman_jax.data.transforms import JointTransform
from fairhuman_jax.training.config import DataConfig, TrainConfig
from fairhuman_jax.training.datasets import (
    encode_source,
    held_out_batches,
    open_data,
    open_source,
    training_batches,
)
from fairhuman_jax.training.encode import encode_folder


class Pooling:
    """An encoder that averages 2 x 2 pixels, and a tokenizer that counts letters."""

    def encode_image(self, params, image):
        count, height, width, _ = image.shape
        blocks = image.astype(jnp.float32).reshape(count, height // 2, 2, width // 2, 2, 3)
        mean = blocks.mean((2, 4)) / 255.0
        return mean, jnp.full_like(mean, -3.0)

    def tokenize(self, captions):
        return {"input_ids": np.array([[len(caption)] for caption in captions], np.int32)}


class Textless:
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
