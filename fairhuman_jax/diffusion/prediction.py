"""Prediction types of a denoiser (noise, velocity, clean sample) and conversions between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fairhuman_jax.diffusion.schedule import NoiseSchedule, coefficients

Array = jax.Array


def target(schedule: NoiseSchedule, x0: Array, noise: Array, t: Array) -> Array:
    """Training target of the schedule's prediction type: noise, velocity or x0.

    `x0`, `noise` [B, ...]; `t` int [B]. Returns fp32 [B, ...].
    """
    if schedule.prediction_type == "epsilon":
        return noise.astype(jnp.float32)
    if schedule.prediction_type == "v_prediction":
        return velocity(schedule, x0, noise, t)
    return x0.astype(jnp.float32)


def velocity(schedule: NoiseSchedule, x0: Array, noise: Array, t: Array) -> Array:
    """v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (arXiv 2202.00512). Shapes as `target`; fp32."""
    signal, spread = coefficients(schedule, t, x0.ndim)
    return signal * noise.astype(jnp.float32) - spread * x0.astype(jnp.float32)


def to_x0(schedule: NoiseSchedule, prediction: Array, x_t: Array, t: Array) -> Array:
    """Clean sample that a prediction at x_t implies.

    `prediction`, `x_t` [B, ...]; `t` int [B] or scalar. Returns fp32; not finite for epsilon where a_t = 0.
    """
    return to_x0_epsilon(schedule.prediction_type, prediction, x_t, *coefficients(schedule, t, x_t.ndim))[0]


def to_epsilon(schedule: NoiseSchedule, prediction: Array, x_t: Array, t: Array) -> Array:
    """Noise that a prediction at x_t implies. Shapes as `to_x0`; fp32."""
    return to_x0_epsilon(schedule.prediction_type, prediction, x_t, *coefficients(schedule, t, x_t.ndim))[1]


def to_x0_epsilon(
    prediction_type: str, prediction: Array, x_t: Array, signal: Array, spread: Array
) -> tuple[Array, Array]:
    """(x_0, noise) from a prediction, with signal = sqrt(a_t), spread = sqrt(1 - a_t), which broadcast to it; fp32."""
    prediction, x_t = prediction.astype(jnp.float32), x_t.astype(jnp.float32)
    if prediction_type == "epsilon":
        return (x_t - spread * prediction) / signal, prediction
    if prediction_type == "v_prediction":
        return signal * x_t - spread * prediction, signal * prediction + spread * x_t
    return prediction, (x_t - signal * prediction) / spread
