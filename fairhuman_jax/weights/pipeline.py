"""Whole Stable Diffusion pipelines: `model_index.json` and the folders it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.weights.diffusers import load_model, read_config, save_model
from fairhuman_jax.weights.files import read_json, write_json
from fairhuman_jax.weights.tokenizers import load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PyTree = Any


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a Stable Diffusion model; `params` by name: unet, vae, text_encoder (and text_encoder_2).

    Two text encoders make it an SDXL one.
    """

    unet: UNet2DCondition
    vae: AutoencoderKL
    text_encoders: tuple[CLIPText, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    schedule: NoiseSchedule
    params: dict[str, PyTree]


def load_pipeline(
    path: str | Path, dtype: jnp.dtype | str | None = None, *, host: bool = False, **runtime: Any
) -> Pipeline:
    """The pipeline in a diffusers folder; dtype, host and runtime as in `load_model`, for every network.

    An autoencoder whose config says `force_upcast` overflows in float16, so it stays in float32 there.
    Errors, one line each: no such folder, a component that is missing or does not fit its config.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a pipeline folder holds model_index.json")
    index = read_json(folder / "model_index.json")
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if name not in index:
            raise ValueError(f"{folder}/model_index.json ({index.get('_class_name')}) has no {name}")
    second = index.get("text_encoder_2") or [None]
    suffixes = ("", "_2") if second[0] else ("",)
    names = ("unet", "vae", *(f"text_encoder{suffix}" for suffix in suffixes))
    modules, params = {}, {}
    for name in names:
        kind = _vae_dtype(folder / "vae", dtype) if name == "vae" else dtype
        modules[name], params[name] = load_model(folder, name, kind, host=host, **runtime)
    return Pipeline(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[f"text_encoder{suffix}"] for suffix in suffixes),
        tokenizers=tuple(load_tokenizer(folder / f"tokenizer{suffix}") for suffix in suffixes),
        schedule=NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json")),
        params=params,
    )


def save_pipeline(pipeline: Pipeline, folder: str | Path, dtype: jnp.dtype | str | None = None) -> None:
    """Write a folder that diffusers' StableDiffusionPipeline (or XL) loads; `model_index.json` comes last."""
    folder = Path(folder)
    scheduler = pipeline.schedule.to_config()
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler.get("_class_name", "DDIMScheduler")],
        "feature_extractor": [None, None],
    }
    if len(pipeline.text_encoders) == 1:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    else:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    save_model(pipeline.unet, pipeline.params["unet"], folder / "unet", dtype)
    save_model(pipeline.vae, pipeline.params["vae"], folder / "vae", dtype)
    for i, (encoder, tokenizer) in enumerate(zip(pipeline.text_encoders, pipeline.tokenizers, strict=True)):
        suffix = f"_{i + 1}" if i else ""
        name = f"text_encoder{suffix}"
        save_model(encoder, pipeline.params[name], folder / name, dtype)
        save_tokenizer(tokenizer, folder / f"tokenizer{suffix}")
        index[name] = ["transformers", encoder.to_config()["architectures"][0]]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": index["scheduler"][1], **scheduler})
    write_json(folder / "model_index.json", index)


def _vae_dtype(folder: Path, dtype: jnp.dtype | str | None) -> jnp.dtype | str | None:
    half = dtype is not None and jnp.dtype(dtype) == jnp.float16
    return jnp.float32 if half and read_config(folder).get("force_upcast", True) else dtype
