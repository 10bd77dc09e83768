"""Noise schedules, prediction types, samplers and guidance: pure functions, jax only."""

from __future__ import annotations

from fairhuman_jax.diffusion.guidance import classifier_free
from fairhuman_jax.diffusion.prediction import target, to_epsilon, to_x0, velocity
from fairhuman_jax.diffusion.samplers import StepRule, ddim, euler_ancestral, sample
from fairhuman_jax.diffusion.schedule import NoiseSchedule, add_noise, sample_timesteps, sigma, snr, timesteps

__all__ = [
    "NoiseSchedule",
    "StepRule",
    "add_noise",
    "classifier_free",
    "ddim",
    "euler_ancestral",
    "sample",
    "sample_timesteps",
    "sigma",
    "snr",
    "target",
    "timesteps",
    "to_epsilon",
    "to_x0",
    "velocity",
]
