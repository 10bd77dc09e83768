"""Whole Stable Diffusion pipelines: `model_index.json` and the folders it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.files import write_json
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.weights.clip_tokenizer import CLIPTokenizer
from fairhuman_jax.weights.diffusers import save_model
from fairhuman_jax.weights.tokenizers import save_tokenizer

PyTree = Any

DIFFUSERS_VERSION = "0.36.0"  # of the layout; diffusers asks for one when it loads some pipelines


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a Stable Diffusion model; `params` by name: unet, vae and `text_encoder_names`.

    Two text encoders make it an SDXL one; the SDXL refiner has the second alone. The last two fields are options of
    `model_index.json`: SDXL's text for an empty prompt is zeros; the refiner is told an aesthetics score in place of
    the target size.
    """

    unet: UNet2DCondition
    vae: AutoencoderKL
    text_encoders: tuple[CLIPText, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    schedule: NoiseSchedule
    params: dict[str, PyTree]
    force_zeros_for_empty_prompt: bool = True
    requires_aesthetics_score: bool = False

    @property
    def is_xl(self) -> bool:
        """Whether the model is SDXL or its refiner, whose UNets read pooled text and sizes."""
        return len(self.text_encoders) == 2 or self.unet.addition_embed_type == "text_time"

    @property
    def inpaints(self) -> bool:
        """Whether the UNet reads, beside its latents, a mask and the latents of the masked picture."""
        return self.unet.in_channels == 2 * self.vae.config["latent_channels"] + 1

    @property
    def reads_pose(self) -> bool:
        """Whether the UNet reads, beside its latents, those of a pose picture (HumanSD)."""
        return self.unet.in_channels == 2 * self.vae.config["latent_channels"]

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """Names of the text encoders, in diffusers' folders and in `params`."""
        names = ("text_encoder", "text_encoder_2")
        return names[1:] if self.is_xl and len(self.text_encoders) == 1 else names[: len(self.text_encoders)]


def save_pipeline(pipeline: Pipeline, folder: str | Path, dtype: jnp.dtype | str | None = None) -> None:
    """Write a folder that diffusers loads as the pipeline it is: SD, SDXL, the refiner, or inpainting.

    dtype as in `save_model`, for every network. `model_index.json` comes last.
    """
    folder = Path(folder)
    scheduler = pipeline.schedule.to_config()
    index = _model_index(pipeline)
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "DDIMScheduler")]
    save_model(pipeline.unet, pipeline.params["unet"], folder / "unet", dtype)
    save_model(pipeline.vae, pipeline.params["vae"], folder / "vae", dtype)
    encoders = zip(pipeline.text_encoder_names, pipeline.text_encoders, pipeline.tokenizers, strict=True)
    for name, encoder, tokenizer in encoders:
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        save_model(encoder, pipeline.params[name], folder / name, dtype)
        save_tokenizer(tokenizer, folder / tokenizer_name)
        index[name] = ["transformers", encoder.to_config()["architectures"][0]]
        index[tokenizer_name] = ["transformers", "CLIPTokenizer"]
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": index["scheduler"][1], **scheduler})
    write_json(folder / "model_index.json", index)


def _model_index(pipeline: Pipeline) -> dict[str, Any]:
    """`model_index.json` without scheduler, text encoders and tokenizers; absent parts are null."""
    index: dict[str, Any] = {
        "_diffusers_version": DIFFUSERS_VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
    }
    if not pipeline.is_xl:
        kind = "StableDiffusionInpaintPipeline" if pipeline.inpaints else "StableDiffusionPipeline"
        return index | {"_class_name": kind, "safety_checker": [None, None], "requires_safety_checker": False}
    refines = len(pipeline.text_encoders) == 1
    kind = "Inpaint" if pipeline.inpaints else "Img2Img" if refines else ""
    index |= {
        "_class_name": f"StableDiffusionXL{kind}Pipeline",
        "force_zeros_for_empty_prompt": pipeline.force_zeros_for_empty_prompt,
    }
    if kind:
        index["requires_aesthetics_score"] = pipeline.requires_aesthetics_score
    if refines:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    return index


def vae_dtype(config: dict[str, Any], dtype: jnp.dtype | str | None) -> jnp.dtype | str | None:
    """`dtype`, or float32 for an autoencoder that overflows in float16, as its `force_upcast` says."""
    half = dtype is not None and jnp.dtype(dtype) == jnp.float16
    return jnp.float32 if half and config.get("force_upcast", True) else dtype
