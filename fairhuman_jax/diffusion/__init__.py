"""Noise schedules, prediction types, samplers, guidance and fusion: pure functions, jax only."""

from __future__ import annotations

from fairhuman_jax.diffusion.guidance import classifier_free
from fairhuman_jax.diffusion.multistep import dpmpp_2m, unipc
from fairhuman_jax.diffusion.named_rules import RULES, rule_named, rule_of
from fairhuman_jax.diffusion.plms import pndm
from fairhuman_jax.diffusion.prediction import target, to_epsilon, to_x0, velocity
from fairhuman_jax.diffusion.samplers import (
    keep_known,
    renoise_known,
    row_count,
    sample,
    start_latents,
    start_noise,
    start_row,
)
from fairhuman_jax.diffusion.schedule import NoiseSchedule, add_noise, sample_timesteps, sigma, snr, timesteps
from fairhuman_jax.diffusion.single_step import ddim, ddim_humansd, ddpm, euler, euler_ancestral
from fairhuman_jax.diffusion.snf import snf_fuse, snf_saliency
from fairhuman_jax.diffusion.staged import BASELINES, FusionMaps, delayed_sample, stage_steps, staged_sample
from fairhuman_jax.diffusion.step_rule import StepRule

__all__ = [
    "BASELINES",
    "RULES",
    "FusionMaps",
    "NoiseSchedule",
    "StepRule",
    "add_noise",
    "classifier_free",
    "ddim",
    "ddim_humansd",
    "ddpm",
    "delayed_sample",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "keep_known",
    "pndm",
    "renoise_known",
    "row_count",
    "rule_named",
    "rule_of",
    "sample",
    "sample_timesteps",
    "sigma",
    "snf_fuse",
    "snf_saliency",
    "snr",
    "stage_steps",
    "staged_sample",
    "start_latents",
    "start_noise",
    "start_row",
    "target",
    "timesteps",
    "to_epsilon",
    "to_x0",
    "unipc",
    "velocity",
]
