"""Losses and gradient combiners: pure functions on arrays and pytrees."""

from __future__ import annotations

from fairhuman_jax.losses.denoising import denoising_loss, min_snr_weight, x0_weight
from fairhuman_jax.losses.fairness import (
    active_tasks,
    combine,
    combine_weighted,
    fair_combine,
    gradient_scale,
    gram_matrix,
    mpd_weights,
    task_weights,
)
from fairhuman_jax.losses.regions import latent_mask, region_losses

__all__ = [
    "active_tasks",
    "combine",
    "combine_weighted",
    "denoising_loss",
    "fair_combine",
    "gradient_scale",
    "gram_matrix",
    "latent_mask",
    "min_snr_weight",
    "mpd_weights",
    "region_losses",
    "task_weights",
    "x0_weight",
]
