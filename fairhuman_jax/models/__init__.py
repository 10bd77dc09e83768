"""Networks, built from the `config.json` of their diffusers and transformers twins."""

from __future__ import annotations

from fairhuman_jax.models.attention import attention
from fairhuman_jax.models.clip import CLIPText
from fairhuman_jax.models.clip_vision import CLIPVision, embed_subjects, subject_pixels
from fairhuman_jax.models.controlnet import ControlNet, controlnet_from_unet
from fairhuman_jax.models.higher_hrnet import HigherHRNet, stage_mean
from fairhuman_jax.models.lora import TEXT_TARGETS, UNET_TARGETS, concatenate_lora, init_lora, merge_lora, scale_lora
from fairhuman_jax.models.postfuse import Postfuse
from fairhuman_jax.models.t2i_adapter import T2IAdapter
from fairhuman_jax.models.transformer import COLUMNS
from fairhuman_jax.models.unet import UNet2DCondition, watched_columns
from fairhuman_jax.models.vae import AutoencoderKL
from fairhuman_jax.models.vae_tiling import tiled_decode

__all__ = [
    "COLUMNS",
    "TEXT_TARGETS",
    "UNET_TARGETS",
    "AutoencoderKL",
    "CLIPText",
    "CLIPVision",
    "ControlNet",
    "HigherHRNet",
    "Postfuse",
    "T2IAdapter",
    "UNet2DCondition",
    "attention",
    "concatenate_lora",
    "controlnet_from_unet",
    "embed_subjects",
    "init_lora",
    "merge_lora",
    "scale_lora",
    "stage_mean",
    "subject_pixels",
    "tiled_decode",
    "watched_columns",
]
