"""Region losses, latent masks and the timestep weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.diffusion import NoiseSchedule, snr, to_x0
from fairhuman_jax.losses import denoising_loss, latent_mask, min_snr_weight, region_losses, x0_weight

SDXL = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def left_half(batch: int) -> jax.Array:
    return jnp.zeros((batch, 8, 8, 1)).at[:, :, :4].set(1.0)


def test_latent_mask_reads_the_top_left_pixel():
    mask = np.zeros((1024, 1024), np.uint8)
    mask[200:401, 101:300] = 255
    latent = np.asarray(jax.jit(lambda mask: latent_mask(mask, 8))(mask))
    rows, columns = np.nonzero(latent)
    assert latent.shape == (128, 128) and latent.sum() == 650
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (25, 50, 13, 37)
    np.testing.assert_array_equal(latent, mask[::8, ::8] >= 128)


def test_latent_mask_reads_every_encoding():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, size=(2, 16, 24, 1), dtype=np.uint8)
    grey[0, 0, [0, 8], 0] = [127, 128]
    wanted = (grey[:, ::8, ::8] >= 128).astype(np.float32)
    np.testing.assert_array_equal(latent_mask(grey, 8), wanted)
    binary = (grey >= 128).astype(np.uint8)
    for mask in (binary, binary.astype(bool), binary.astype(np.float32), 255 * binary):
        np.testing.assert_array_equal(latent_mask(mask, 8), wanted)
    # One mask of the batch in each encoding: each mask is read separately.
    np.testing.assert_array_equal(latent_mask(np.stack([binary[0], 255 * binary[1]]), 8), wanted)


def test_area_pooling_keeps_what_striding_loses():
    mask = np.zeros((1, 32, 32, 1), np.uint8)
    mask[0, 9:15, 10:13] = 1  # 18 of the 64 pixels of cell (1, 1), none of which is the sampled pixel
    assert np.asarray(latent_mask(mask, 8)).sum() == 0
    pooled = np.asarray(latent_mask(mask, 8, "area"))
    assert pooled.shape == (1, 4, 4, 1) and pooled.sum() == 1 and pooled[0, 1, 1, 0] == 1
    assert np.asarray(latent_mask(mask, 8, "area", threshold=0.5)).sum() == 0
    with pytest.raises(ValueError, match="30 x 32; expected multiples of 8"):
        latent_mask(mask[:, :30], 8)
    with pytest.raises(ValueError, match="unknown method 'nearest'"):
        latent_mask(mask, 8, "nearest")


def test_constant_residual_scales_with_area():
    prediction, target = jnp.full((3, 8, 8, 4), 0.5), jnp.zeros((3, 8, 8, 4))
    quarter = left_half(3) * jnp.swapaxes(left_half(3), 1, 2)
    losses = jax.jit(region_losses)(prediction, target, quarter, left_half(3))
    np.testing.assert_allclose([losses["global"], losses["face"], losses["hand"]], [0.25, 0.0625, 0.125], rtol=1e-6)
    scaled = region_losses(prediction, target, quarter, left_half(3), local_scale=25.0)
    np.testing.assert_allclose([scaled["global"], scaled["face"]], [0.25, 25 * 0.0625], rtol=1e-6)
    area = region_losses(prediction, target, quarter.at[1].set(0.0), None, normalize="area")
    np.testing.assert_allclose(area["face"], 0.25 * 2 / 3, rtol=1e-6)


def test_missing_mask_has_zero_loss_and_gradient():
    prediction, target = normal(0, 2, 8, 8, 4), normal(1, 2, 8, 8, 4)
    jacobian = jax.jacrev(lambda p: region_losses(p, target, None, 0 * left_half(2), normalize="area"))(prediction)
    np.testing.assert_array_equal(jacobian["face"], 0.0)
    np.testing.assert_array_equal(jacobian["hand"], 0.0)
    assert np.abs(jacobian["global"]).max() > 0


def test_weight_reaches_all_three_but_only_global_in_reference_mode():
    prediction, target = normal(0, 4, 8, 8, 4), normal(1, 4, 8, 8, 4)
    weight = jnp.asarray([0.0, 1.0, 2.0, 3.0])
    masks = (left_half(4), 1 - left_half(4))
    plain = region_losses(prediction, target, *masks, weight=weight)
    singles = [region_losses(prediction[i : i + 1], target[i : i + 1], *(m[:1] for m in masks)) for i in range(4)]
    for name, loss in plain.items():
        np.testing.assert_allclose(loss, sum(i * singles[i][name] for i in range(4)) / 4, rtol=1e-5)
    reference = region_losses(prediction, target, *masks, weight=weight, compat="reference")
    np.testing.assert_allclose(reference["global"], plain["global"], rtol=1e-6)
    np.testing.assert_allclose(reference["face"], 25 * sum(single["face"] for single in singles) / 4, rtol=1e-5)
    halves = [region_losses(prediction[i : i + 2], target[i : i + 2], *(m[:2] for m in masks)) for i in (0, 2)]
    whole = region_losses(prediction, target, *masks)
    np.testing.assert_allclose((halves[0]["hand"] + halves[1]["hand"]) / 2, whole["hand"], rtol=1e-6)


def test_half_precision_inputs_are_read_in_fp32():
    prediction = (300.0 + normal(0, 2, 8, 8, 4)).astype(jnp.float16)
    loss = region_losses(prediction, jnp.zeros_like(prediction), left_half(2), None)
    assert loss["global"].dtype == jnp.float32 and np.isfinite(loss["global"]) and loss["global"] > 8e4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": jnp.zeros((1, 8, 8, 3))}, "differ in shape"),
        ({"face_mask": jnp.zeros((1, 64, 64, 1))}, "face_mask is"),
        ({"normalize": "mean"}, "unknown normalize"),
        ({"compat": "paper"}, "unknown compat"),
        ({"compat": "reference", "local_scale": 2.0}, "fixes local_scale"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {
        "prediction": jnp.zeros((1, 8, 8, 4)),
        "target": jnp.zeros((1, 8, 8, 4)),
        "face_mask": None,
        "hand_mask": None,
    }
    with pytest.raises(ValueError, match=message):
        region_losses(**(arguments | changes))


def test_x0_weight_is_the_sum_of_noise_and_x0_errors():
    noise, x0, prediction = normal(0, 3, 8, 8, 4), normal(1, 3, 8, 8, 4), normal(2, 3, 8, 8, 4)
    t = jnp.asarray([0, 500, 999])
    cumprod = jnp.asarray(SDXL.alphas_cumprod)[t]
    np.testing.assert_allclose(x0_weight(cumprod), [1.000851, 3.618826, 214.587738], rtol=1e-6)
    np.testing.assert_allclose(x0_weight(cumprod, 5.0), [1.000851, 3.618826, 5.0], rtol=1e-6)
    noisy = (
        jnp.asarray(SDXL.signal)[t][:, None, None, None] * x0 + jnp.asarray(SDXL.noise)[t][:, None, None, None] * noise
    )
    both = denoising_loss(prediction, noise) + denoising_loss(to_x0(SDXL, prediction, noisy, t), x0)
    np.testing.assert_allclose(denoising_loss(prediction, noise, x0_weight(cumprod)), both, rtol=2e-4)
    np.testing.assert_allclose(SDXL.alphas_cumprod.size, 1000)
    np.testing.assert_allclose(np.mean(1 / SDXL.alphas_cumprod64), 21.31, rtol=1e-3)


def test_sigma_form_of_the_adapter_trainer_is_plain_epsilon_error():
    noise, x0, prediction = normal(0, 2, 8, 8, 4), normal(1, 2, 8, 8, 4), normal(2, 2, 8, 8, 4)
    sigma = 3.7
    estimate = (x0 + sigma * noise) - sigma * prediction
    np.testing.assert_allclose(
        denoising_loss(estimate, x0, jnp.full(2, sigma**-2)), denoising_loss(prediction, noise), rtol=1e-5
    )


def test_min_snr_weight():
    ratio = snr(SDXL, jnp.asarray([0, 500, 999]))
    np.testing.assert_allclose(min_snr_weight(ratio, 5.0), np.minimum(ratio, 5) / ratio, rtol=1e-6)
    np.testing.assert_allclose(
        min_snr_weight(ratio, 5.0, "v_prediction"), np.minimum(ratio, 5) / (ratio + 1), rtol=1e-6
    )
    assert min_snr_weight(jnp.zeros(()), 5.0) == 1.0
    assert np.isfinite(jax.grad(min_snr_weight)(0.0))
    with pytest.raises(ValueError, match="unknown prediction_type 'flow'"):
        min_snr_weight(ratio, 5.0, "flow")


def test_denoising_loss_is_per_example():
    prediction = jnp.stack([jnp.zeros((4, 4, 1)), jnp.full((4, 4, 1), 2.0)])
    np.testing.assert_allclose(denoising_loss(prediction, jnp.zeros_like(prediction)), [0.0, 4.0])
    with pytest.raises(ValueError, match="differ in shape"):
        denoising_loss(prediction, prediction[:1])
