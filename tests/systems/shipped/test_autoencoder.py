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
from fairhuman_jax.losses import pyramid_loss
from fairhuman_jax.systems.shipped.autoencoder import AutoencoderConfig, crop_corner, cropped, grown
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
    with pytest.raises(ValueError, match="known: squared, absolute, pyramid"):
        AutoencoderConfig(vae=VAE, loss="cubed").build()  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="multiple of 2 pixels"):
        AutoencoderConfig(vae=VAE, crop=7).build()
    with pytest.raises(ValueError, match=r"needs system\.start"):
        AutoencoderConfig(vae=VAE, anchor_weight=0.1).build()


def test_absolute_and_pyramid_losses_weigh_pixels():
    image = np.full((1, 8, 8, 3), 255, np.uint8)
    quarter = np.zeros((1, 8, 8, 1), np.uint8)
    quarter[:, :4, :4] = 1
    zeros = jnp.zeros((1, 4, 4, 4))
    off = {"image": jnp.full((1, 8, 8, 3), 0.5), "mean": zeros, "logvar": zeros}

    def loss(kind, **masks):
        system = AutoencoderConfig(vae=VAE, loss=kind, face_weight=4.0, kl_weight=0.0).build()
        return float(system.objectives(off, {"image": image} | masks)["reconstruction"])

    assert loss("absolute") == pytest.approx(0.5)
    assert loss("absolute", face_mask=quarter) == pytest.approx(0.5 * 2)
    # An even error has no band but the last, whose factor is 2^3.
    assert loss("pyramid") == pytest.approx(0.5 * 8)
    assert loss("pyramid", face_mask=quarter) == pytest.approx(0.5 * 8 * 2)


def test_a_crop_holds_the_drawn_pixel_and_both_regions_are_drawn():
    regions = np.zeros((2, 32, 32), np.uint8)
    regions[0, 2, 3] = 1
    regions[1, 20:30, 20:30] = 1
    keys = jax.random.split(KEY, 200)
    corners = np.asarray(jax.vmap(lambda key: crop_corner(key, jnp.asarray(regions), 8, 1.0))(keys))
    assert corners.min() >= 0 and corners.max() <= 24
    face = (np.abs(corners - [2, 3]) < 8).all(axis=1)
    hand = (corners >= 12).all(axis=1)
    assert (face | hand).all() and 60 < face.sum() < 140  # one pixel is as likely as a hundred
    empty = np.asarray(jax.vmap(lambda key: crop_corner(key, jnp.zeros((2, 32, 32)), 8, 1.0))(keys))
    assert empty.min() == 0 and empty.max() == 24


def test_a_training_step_sees_a_crop_and_a_held_out_batch_the_whole():
    system = AutoencoderConfig(vae=VAE, crop=8).build()
    trainable, frozen = system.init(KEY)
    batch = random_batch(4)
    seen = system.predict(trainable, frozen, batch, KEY)
    assert seen["image"].shape == (4, 8, 8, 3)
    crops = cropped(jnp.asarray(batch["image"]), seen["corner"], 8)
    exact = seen | {
        "image": crops / 127.5 - 1.0,
        "mean": 0 * seen["mean"],
        "logvar": 0 * seen["mean"],
    }
    assert float(system.objectives(exact, batch)["reconstruction"]) == pytest.approx(0.0, abs=1e-6)
    whole = system.predict(trainable, frozen, batch | {"times": np.zeros(4, np.float32)}, KEY)
    assert whole["image"].shape == (4, SIZE, SIZE, 3) and "corner" not in whole


def test_a_grown_autoencoder_takes_over_inner_levels_and_keeps_to_their_latents(system, run, tmp_path):
    folder = system.export(Parts(run[0], {}, {}), tmp_path / "vae", random_batch(4))
    wide = VAE | {
        "block_out_channels": [6, *VAE["block_out_channels"]],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    more = AutoencoderConfig(vae=wide, start=str(folder), anchor_weight=0.5, kl_weight=0.0).build()
    trainable, frozen = more.init(KEY)
    _, old = load_model(folder, dtype="float32")
    same = ("downsamplers.0", "conv", "kernel")
    for ours, theirs in (("down_blocks.1", "down_blocks.0"), ("mid_block", "mid_block")):
        tail = same if ours != "mid_block" else ("resnets.0", "conv1", "kernel")
        found, expected = trainable["encoder"][ours], old["encoder"][theirs]
        for name in tail:
            found, expected = found[name], expected[name]
        np.testing.assert_array_equal(found, expected)
    assert trainable["encoder"]["conv_in"]["kernel"].shape[-1] == 6
    ours, theirs = (tree["decoder"]["conv_in"]["kernel"] for tree in (trainable, frozen["anchor"]))
    assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()  # the train step gives up that of `ours`
    small = random_batch(2)
    batch = {"image": small["image"].repeat(2, axis=1).repeat(2, axis=2), "position": np.arange(2)}
    seen = more.predict(trainable, frozen, batch, KEY)
    anchor = system.predict(old, {}, small, KEY)["mean"]
    np.testing.assert_allclose(seen["anchor"], anchor, atol=1e-5)
    exact = {"image": batch["image"] / 127.5 - 1.0}
    loss = float(more.objectives(seen | exact, batch)["reconstruction"])
    assert loss == pytest.approx(0.5 * float(jnp.mean(jnp.square(seen["mean"] - anchor))), rel=1e-4)
    with pytest.raises(ValueError, match="latent channels"):
        AutoencoderConfig(vae=wide | {"latent_channels": 3}, start=str(folder)).build()
    plain = grown(run[0], run[0], 0)
    np.testing.assert_array_equal(plain["decoder"]["conv_in"]["kernel"], run[0]["decoder"]["conv_in"]["kernel"])


def test_further_latent_channels_leave_the_others_and_nearly_the_picture(system, run, tmp_path):
    folder = system.export(Parts(run[0], {}, {}), tmp_path / "vae", random_batch(4))
    more = AutoencoderConfig(
        vae=VAE | {"latent_channels": 6}, start=str(folder), anchor_weight=1.0, kl_weight=0.0
    ).build()
    trainable, frozen = more.init(KEY)
    _, old = load_model(folder, dtype="float32")
    batch = random_batch(2)
    found, expected = more.predict(trainable, frozen, batch, KEY), system.predict(old, {}, batch, KEY)
    for name in ("mean", "logvar"):
        np.testing.assert_allclose(found[name][..., :4], expected[name], atol=1e-5)
    assert float(jnp.std(found["mean"][..., 4:])) > 0.01
    np.testing.assert_allclose(found["logvar"][..., 4:], -4.0, atol=1e-5)
    pictures = (part.sample(tree, {}, batch["image"], KEY) for part, tree in ((more, trainable), (system, old)))
    difference = jnp.abs(next(pictures) - next(pictures))
    assert 0.0 < float(difference.mean()) < 0.1
    exact = found | {"image": batch["image"] / 127.5 - 1.0}
    assert float(more.objectives(exact, batch)["reconstruction"]) == pytest.approx(0.0, abs=1e-6)


def test_pyramid_loss_sees_an_edge_in_the_finest_band_alone():
    stripes = jnp.tile(jnp.array([1.0, -1.0]), 4)[None, None, :, None] * jnp.ones((2, 8, 8, 3))
    assert float(pyramid_loss(stripes, jnp.ones((1, 1, 1, 1)))) == pytest.approx(1.0)
    wide = jnp.repeat(stripes[:, :, :4], 2, axis=2)
    assert float(pyramid_loss(wide, jnp.ones((1, 1, 1, 1)))) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="6 x 6 pixels do not divide by 8"):
        pyramid_loss(jnp.zeros((1, 6, 6, 3)), jnp.ones((1, 1, 1, 1)))
