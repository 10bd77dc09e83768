"""From a data configuration to batches: the held-out split, fixed times, cached latents with their masks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SIZE, write_folder

from fairhuman_jax.data.transforms import JointTransform
from fairhuman_jax.training.config import DataConfig, TrainConfig
from fairhuman_jax.training.datasets import encode_source, held_out_batches, open_data, training_batches


class Pooling:
    """An encoder that averages 2 x 2 pixels, and a tokenizer that counts letters."""

    def encode_image(self, params, image):
        blocks = image.astype(jnp.float32).reshape(image.shape[0], SIZE // 2, 2, SIZE // 2, 2, 3)
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
    encoded = encode_source(source, Pooling(), {}, transform)
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
