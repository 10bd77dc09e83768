"""Autoencoder: learns, weighs regions, exports a diffusers folder that loads back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import QUICK, SIZE, VAE, quick_jit, random_batch

from fairhuman_jax.contract import Parts, PreviewConfig
from fairhuman_jax.devices.sharding import make_mesh
from fairhuman_jax.systems.shipped.autoencoder import AutoencoderConfig
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.state import init_state
from fairhuman_jax.training.step import make_train_step
from fairhuman_jax.weights import load_model

KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def system():
    return AutoencoderConfig(vae=VAE).build()


@pytest.fixture(scope="module")
def run(system):
    """(parameters after 25 steps on one batch, losses)."""
    start, frozen = system.init(jax.random.key(0))
    mesh, rule = make_mesh(devices=jax.devices()[:1]), optax.adam(3e-3)
    state = init_state(start, rule, jax.random.key(4), ema=False)
    batch = random_batch(4, position=False)
    batch["image"] = batch["image"] // 4 + 96  # near grey, which is quickly learnt
    program = make_train_step(system, rule, mesh, FairConfig()).lower(state, frozen, batch).compile(QUICK)
    losses = []
    for _ in range(25):
        state, metrics = program(state, frozen, batch)
        losses.append(float(metrics["loss/reconstruction"]))
    return state.trainable, losses


def test_the_loss_falls_on_one_batch(run):
    assert run[1][-1] < 0.7 * run[1][0]


def test_objective_weighs_pixels_of_regions_and_the_divergence():
    image = np.full((1, 4, 4, 3), 255, np.uint8)
    quarter = np.zeros((1, 4, 4, 1), np.uint8)
    quarter[:, :2, :2] = 1
    zeros = jnp.zeros((1, 2, 2, 4))
    exact = {"image": jnp.ones((1, 4, 4, 3)), "mean": zeros, "logvar": zeros}
    off = exact | {"image": jnp.full((1, 4, 4, 3), 0.5)}

    def loss(prediction, kl_weight=0.0, **masks):
        system = AutoencoderConfig(vae=VAE, face_weight=4.0, hand_weight=8.0, kl_weight=kl_weight).build()
        return float(system.objectives(prediction, {"image": image} | masks)["reconstruction"])

    assert loss(exact) == 0.0
    assert loss(off) == 0.25
    assert loss(off, face_mask=quarter) == pytest.approx(0.25 * (1 + 4 / 4))
    assert loss(off, face_mask=quarter, hand_mask=quarter) == pytest.approx(0.25 * (1 + 4 / 4 + 8 / 4))
    wide = exact | {"mean": zeros + 2.0, "logvar": zeros + np.log(3.0)}
    assert loss(wide, kl_weight=0.1) == pytest.approx(0.1 * 0.5 * (4 + 3 - 1 - np.log(3.0)))


def test_export_loads_back_with_the_same_pictures(system, run, tmp_path):
    trained, _ = run
    batch = random_batch(4)
    folder = system.export(Parts(trained, {}, {}), tmp_path / "vae", batch)
    module, params = load_model(folder, dtype="float32")
    factor = module.to_config()["scaling_factor"]
    assert module.to_config() == system.vae.to_config() | {"scaling_factor": factor}
    latents = quick_jit(lambda tree: system.predict(tree, {}, batch, KEY))(params)
    drawn = latents["mean"] + jnp.exp(latents["logvar"] / 2) * jax.random.normal(KEY, latents["mean"].shape)
    assert float(jnp.std(factor * drawn)) == pytest.approx(1.0, abs=0.05)
    images, titles = system.preview(PreviewConfig(), batch)
    assert images.dtype == jnp.uint8 and titles == [""] * 4
    reconstruct = quick_jit(lambda tree: system.sample(tree, {}, images, KEY))
    found, expected = reconstruct(params), reconstruct(trained)
    assert found.shape == (4, SIZE, SIZE, 3) and float(jnp.abs(found).max()) <= 1.0
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert np.abs(found - expected).max() > 0  # they were rounded to float16


def test_unsupported_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="shift_factor"):
        AutoencoderConfig(vae=VAE | {"shift_factor": 0.1}).build()
