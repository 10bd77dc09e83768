"""Per-example denoising loss and its timestep weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def denoising_loss(prediction: Array, target: Array, weight: Array | None = None) -> Array:
    """Mean squared error of each example, w_b mean((prediction_b - target_b)^2).

    `prediction`, `target` [B, ...] of one shape, any float dtype; `weight` [B]. Returns fp32 [B].
    Raises: ValueError when the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"denoising_loss: prediction {prediction.shape} and target {target.shape} differ in shape")
    squared = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    loss = jnp.mean(squared, axis=tuple(range(1, squared.ndim)))
    return loss if weight is None else loss * weight.astype(jnp.float32)


def min_snr_weight(snr: Array, gamma: float | Array = 5.0, prediction_type: str = "epsilon") -> Array:
    """Min-SNR-gamma weight: min(SNR, gamma), divided by SNR for epsilon and by SNR + 1 for v_prediction.

    `prediction_type` is epsilon, v_prediction or sample (no division). `snr` of any shape, >= 0; returns fp32 of that
    shape, 1 for epsilon at SNR = 0.
    Raises: ValueError for another prediction type. Source: arXiv 2303.09556.
    """
    snr = jnp.asarray(snr, jnp.float32)
    if prediction_type == "epsilon":
        return jnp.where(snr > gamma, gamma / jnp.where(snr > gamma, snr, 1.0), 1.0)
    if prediction_type == "v_prediction":
        return jnp.minimum(snr, gamma) / (snr + 1.0)
    if prediction_type == "sample":
        return jnp.minimum(snr, gamma)
    raise ValueError(
        f"min_snr_weight: unknown prediction_type {prediction_type!r}; known: epsilon, v_prediction, sample"
    )


def x0_weight(alphas_cumprod: Array, maximum: float | Array | None = None) -> Array:
    """Weight 1 / alphas_cumprod that turns an epsilon error into the sum of the epsilon and x0 errors.

    |e|^2 + |x0 error|^2 = |e|^2 (1 + (1 - a) / a) = |e|^2 / a. The SDXL schedule has weights from 1.0009 to 214.6;
    `maximum` clamps them. `alphas_cumprod` is a at each example's timestep, any shape; returns fp32 of that
    shape, inf at a = 0 unless clamped. Source: the ControlNet trainer of FairHuman (arXiv 2507.02714).
    """
    weight = 1.0 / jnp.asarray(alphas_cumprod, jnp.float32)
    return weight if maximum is None else jnp.minimum(weight, maximum)
