"""Losses and gradient combiners: pure functions on arrays and pytrees."""

from __future__ import annotations

from fairhuman_jax.losses.alpha_fair import mpd_weights
from fairhuman_jax.losses.contrastive import contrastive_loss
from fairhuman_jax.losses.denoising import denoising_loss, min_snr_weight, x0_weight
from fairhuman_jax.losses.fairness import COMBINERS, Combiner, fair_combine, make_combiner
from fairhuman_jax.losses.gram import active_tasks, combine_weighted, gradient_scale, gram_matrix
from fairhuman_jax.losses.heatmap import heatmap_mask, heatmap_weight, humansd_loss
from fairhuman_jax.losses.localization import localization_loss, object_mask, object_masked_loss
from fairhuman_jax.losses.pyramid import halved, pyramid_loss
from fairhuman_jax.losses.regions import latent_mask, region_losses

__all__ = [
    "COMBINERS",
    "Combiner",
    "active_tasks",
    "combine_weighted",
    "contrastive_loss",
    "denoising_loss",
    "fair_combine",
    "gradient_scale",
    "gram_matrix",
    "halved",
    "heatmap_mask",
    "heatmap_weight",
    "humansd_loss",
    "latent_mask",
    "localization_loss",
    "make_combiner",
    "min_snr_weight",
    "mpd_weights",
    "object_mask",
    "object_masked_loss",
    "pyramid_loss",
    "region_losses",
    "x0_weight",
]
