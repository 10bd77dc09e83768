"""TextToImage: built from folders, learns, exports a pipeline, and trains alike from images and cached latents."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    QUICK,
    SCHEDULE,
    SMALL_UNET,
    assert_trees_close,
    clip_config,
    quick_jit,
    random_batch,
    tiny_pipeline,
    tiny_tokenizer,
)

from fairhuman_jax.contract import Parts, sample_keys
from fairhuman_jax.devices.sharding import make_mesh
from fairhuman_jax.systems.shipped.text_to_image import TextToImageConfig
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.state import init_state
from fairhuman_jax.training.step import make_train_step
from fairhuman_jax.weights import load_pipeline, save_model
from fairhuman_jax.weights.tokenizers import save_tokenizer

KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    pipeline = tiny_pipeline()
    save_model(pipeline.vae, pipeline.params["vae"], folder / "vae")
    save_tokenizer(tiny_tokenizer(), folder / "tokenizer")
    config = TextToImageConfig(
        vae=str(folder / "vae"),
        tokenizer=str(folder / "tokenizer"),
        unet=SMALL_UNET,
        text_encoder=clip_config(num_hidden_layers=1),
        scheduler=SCHEDULE,
        snr_gamma=5.0,
    )
    return config.build()


@pytest.fixture(scope="module")
def run(system):
    """(trainables at the start, after 25 steps on one batch, losses of the steps)."""
    start, frozen = system.init(jax.random.key(0))
    assert set(start) == {"unet", "text_encoder"} and set(frozen) == {"vae"}
    mesh, rule = make_mesh(devices=jax.devices()[:1]), optax.adam(3e-3)
    batch = random_batch(4, position=False) | {"times": np.array([0.2, 0.4, 0.6, 0.8], np.float32)}
    state = init_state(jax.tree.map(jnp.copy, start), rule, jax.random.key(4), ema=False)
    step = make_train_step(system, rule, mesh, FairConfig(), clip_norm=1.0)
    program = step.lower(state, frozen, batch).compile(QUICK)
    losses = []
    for _ in range(25):
        state, metrics = program(state, frozen, batch)
        losses.append(float(metrics["loss/denoising"]))
    assert (
        set(metrics) == {"loss/denoising", "weight/denoising", "gradient_norm", "skipped"} and state.skipped["all"] == 0
    )
    return start, state.trainable, losses


def test_the_loss_falls_on_one_batch(run):
    _, _, losses = run
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_denoiser_and_text_encoder_both_train(run):
    start, trained, _ = run
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, trained)
    assert moved["unet"]["conv_in"]["kernel"] > 1e-3
    layers = moved["text_encoder"]["text_model"]["encoder"]["layers"]
    assert layers["self_attn"]["q_proj"]["kernel"] > 1e-3


def test_export_is_a_pipeline_with_the_same_output(system, run, tmp_path):
    _, trained, _ = run
    folder = system.export(Parts(trained, {}, {"vae": system.pipeline.params["vae"]}), tmp_path / "base", {})
    again = load_pipeline(folder, dtype="float32")
    assert again.schedule.to_config() == system.pipeline.schedule.to_config()
    assert again.unet.to_config() == system.pipeline.unet.to_config()
    batch = random_batch(4)
    predict = quick_jit(lambda params: system.noisy_prediction(params, batch, KEY)[0])
    found, expected = predict(again.params), predict({"vae": system.pipeline.params["vae"]} | trained)
    assert_trees_close(found, expected, 5e-3)  # parameters were rounded to float16
    ids = [part.tokenize(["two hands"])["input_ids"] for part in (system, replace(system, pipeline=again))]
    np.testing.assert_array_equal(*ids)


def test_cached_latents_are_drawn_like_those_of_images(system):
    frozen, batch = system.pipeline.params, random_batch(4)
    keys = sample_keys(KEY, batch)
    mean, logvar = quick_jit(system.encode_image)(frozen, batch["image"])
    assert mean.shape == (4, 8, 8, 4)
    cached = {"latent_mean": np.asarray(mean), "latent_logvar": np.asarray(logvar)}
    draw = quick_jit(lambda batch: system.latents(frozen, batch, keys))
    expected = draw({"image": batch["image"]})
    np.testing.assert_allclose(draw(cached), expected, rtol=1e-5, atol=1e-6)
    halved = {name: array.astype(np.float16) for name, array in cached.items()}
    np.testing.assert_allclose(draw(halved), expected, atol=5e-3)
    assert np.abs(expected - 0.5 * mean).max() > 0.01  # a draw, scaled by scaling_factor 0.5, not the mean


def test_folders_that_are_missing_are_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vae: no such folder; a model folder holds"):
        TextToImageConfig(vae=str(tmp_path / "vae"), tokenizer=str(tmp_path)).build()


def test_training_starts_from_another_pipeline(system, run, tmp_path):
    _, trained, _ = run
    system.export(Parts(trained, {}, {"vae": system.pipeline.params["vae"]}), tmp_path, {})
    again, _ = replace(system.config, start=str(tmp_path)).build().init(KEY)
    assert_trees_close(again, trained, 2e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(jnp.float32)}
    with pytest.raises(ValueError, match="its text_encoder has another config"):
        replace(system.config, start=str(tmp_path), text_encoder=clip_config(num_hidden_layers=2)).build()


def test_further_channels_of_the_latents_begin_without_effect(system, run, tmp_path):
    _, trained, _ = run
    system.export(Parts(trained, {}, {"vae": system.pipeline.params["vae"]}), tmp_path, {})
    wide = dict(SMALL_UNET) | {"in_channels": 6, "out_channels": 6}
    again = replace(system.config, start=str(tmp_path), unet=wide).build()
    params, _ = again.init(KEY)
    latents, times, text = jax.random.normal(KEY, (2, 8, 8, 6)), jnp.array([10, 500]), jnp.ones((2, 6, 8))
    found = again.pipeline.unet.apply({"params": params["unet"]}, latents, times, text)
    expected = system.pipeline.unet.apply({"params": trained["unet"]}, latents[..., :4], times, text)
    np.testing.assert_allclose(found[..., :4], expected, atol=2e-2)  # parameters were rounded to float16
    assert float(jnp.abs(found[..., 4:]).max()) == 0.0
    with pytest.raises(ValueError, match="its unet has another config"):
        replace(system.config, start=str(tmp_path), unet=dict(SMALL_UNET) | {"in_channels": 3}).build()
