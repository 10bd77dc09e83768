"""Pipelines as single files in LDM naming, which ComfyUI, A1111 and diffusers' single-file loader read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fairhuman_jax.models import presets
from fairhuman_jax.weights.ldm.reading import CONFIGS, OPTIONS, REFINER_OPTIONS, SCHEDULER
from fairhuman_jax.weights.ldm.recognition import (
    CLIP_PREFIX,
    CLIP_XL_PREFIX,
    LONE_OPENCLIP_PREFIX,
    OPENCLIP_PREFIX,
    OPENCLIP_XL_PREFIX,
    UNET_PREFIX,
    V_MARK,
    VAE_PREFIX,
    ZERO_SNR_MARK,
)
from fairhuman_jax.weights.ldm.slots import Slots, ldm_openclip_slots, ldm_unet_slots, ldm_vae_slots
from fairhuman_jax.weights.ldm.views import Slot, View
from fairhuman_jax.weights.pipeline import Pipeline
from fairhuman_jax.weights.safetensors_io import write_tensors
from fairhuman_jax.weights.tensors import ParamTensors

PyTree = Any


def save_single_file(pipeline: Pipeline, path: str | Path, dtype: jnp.dtype | str | None = None) -> Path:
    """Write `pipeline` as one .safetensors file in LDM naming; returns its path.

    The layout follows the text encoders: CLIP (SD 1.x), OpenCLIP (SD 2.x, in the 23 layers that are used) or both
    (SDXL); OpenCLIP's attention is fused again. dtype None keeps each parameter's own. The configs go into the file's
    metadata, from which `open_single_file` takes what shapes do not say; other programs read the prediction type there
    and, for SDXL, from the empty tensors `v_pred` and `ztsnr`. No tokenizer is written. Raises: ValueError for a name
    that does not end in .safetensors; a UNet without middle block; values that do not fit `dtype`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a single file is written as .safetensors")
    views = []
    for name, module in networks(pipeline).items():
        source = ParamTensors.of(pipeline.params[name], name)
        views.append(View(source, _slots(pipeline, name, module, source.names())))
    owners = {name: view for view in views for name in view.names()}
    shapes = {name: view.shape(name) for name, view in owners.items()}
    dtypes = {name: jnp.dtype(dtype or view.dtype(name)) for name, view in owners.items()}
    empty = np.zeros(0, np.float32)
    marks = _marks(pipeline) if pipeline.is_xl else ()
    shapes |= dict.fromkeys(marks, empty.shape)
    dtypes |= dict.fromkeys(marks, empty.dtype)
    write_tensors(
        path, shapes, dtypes, lambda name: owners[name].read(name) if name in owners else empty, _metadata(pipeline)
    )
    return path


def networks(pipeline: Pipeline) -> dict[str, Any]:
    """Component -> network, as the pipeline's parameters are named."""
    encoders = dict(zip(pipeline.text_encoder_names, pipeline.text_encoders, strict=True))
    return {"unet": pipeline.unet, "vae": pipeline.vae, **encoders}


def _slots(pipeline: Pipeline, name: str, module: Any, names: tuple[str, ...]) -> Slots:
    if name == "unet":
        return ldm_unet_slots(names, UNET_PREFIX, linear=module.use_linear_projection)
    if name == "vae":
        return ldm_vae_slots(names, VAE_PREFIX)
    if name == "text_encoder_2":
        alone = len(pipeline.text_encoders) == 1
        return ldm_openclip_slots(names, LONE_OPENCLIP_PREFIX if alone else OPENCLIP_XL_PREFIX)
    if pipeline.is_xl or module.config["hidden_act"] == presets.SD15_TEXT["hidden_act"]:
        prefix = CLIP_XL_PREFIX if pipeline.is_xl else CLIP_PREFIX
        return {f"{prefix}{source}": Slot((source,)) for source in names}
    return ldm_openclip_slots(names, OPENCLIP_PREFIX)


def _marks(pipeline: Pipeline) -> tuple[str, ...]:
    if pipeline.schedule.prediction_type != "v_prediction":
        return ()
    return (V_MARK, ZERO_SNR_MARK) if pipeline.schedule.rescale_betas_zero_snr else (V_MARK,)


def _metadata(pipeline: Pipeline) -> dict[str, str]:
    configs = {name: module.to_config() for name, module in networks(pipeline).items()}
    options = {name: getattr(pipeline, name) for name in REFINER_OPTIONS}
    v = pipeline.schedule.prediction_type == "v_prediction"
    if pipeline.is_xl:
        architecture = (
            "stable-diffusion-xl-v1-base" if len(pipeline.text_encoders) > 1 else "stable-diffusion-xl-v1-refiner"
        )
    elif pipeline.unet.use_linear_projection:
        architecture = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    else:
        architecture = "stable-diffusion-v1"
    return {
        CONFIGS: json.dumps({**configs, SCHEDULER: pipeline.schedule.to_config(), OPTIONS: options}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": "v" if v else "epsilon",
    }
