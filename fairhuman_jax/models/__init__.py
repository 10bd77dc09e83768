"""Networks, built from the `config.json` of their diffusers and transformers twins."""

from __future__ import annotations

from fairhuman_jax.models.attention import attention
from fairhuman_jax.models.clip import CLIPText
from fairhuman_jax.models.lora import TEXT_TARGETS, UNET_TARGETS, init_lora, scale_lora
from fairhuman_jax.models.unet import UNet2DCondition
from fairhuman_jax.models.vae import AutoencoderKL

__all__ = [
    "TEXT_TARGETS",
    "UNET_TARGETS",
    "AutoencoderKL",
    "CLIPText",
    "UNet2DCondition",
    "attention",
    "init_lora",
    "scale_lora",
]
