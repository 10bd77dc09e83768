"""Subject models: the checkpoints of FastComposer and of Face-diffuser, and folders of our own.

Theirs are one flat state dict, `pytorch_model.bin`: `unet.`, `vae.` and `text_encoder.` in the names of diffusers 0.16
and transformers, and for subjects `image_encoder.` and `postfuse_module.`. Face-diffuser's scene model (TDM) lacks the
last two and is a Stable Diffusion 1.5, which `load_pipeline` reads; its subject model (SDM) and FastComposer's are read
here. `open_single_file` tells them.
Source: fastcomposer/model.py; the key names of the published files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fairhuman_jax.models import CLIPVision, Postfuse
from fairhuman_jax.weights.diffusers import save_model
from fairhuman_jax.weights.hub import fetch_file, is_hub_id
from fairhuman_jax.weights.keys import OLD_ATTENTION, TOWERS
from fairhuman_jax.weights.ldm.reading import (
    CONFIGS,
    OPTIONS,
    SCHEDULER,
    load_component,
    load_single_file,
    open_single_file,
)
from fairhuman_jax.weights.ldm.recognition import FLAT_PREFIXES
from fairhuman_jax.weights.ldm.views import Slot, View
from fairhuman_jax.weights.ldm.writing import networks
from fairhuman_jax.weights.opening import load_model, load_pipeline
from fairhuman_jax.weights.pipeline import Pipeline, save_pipeline
from fairhuman_jax.weights.placement import Placement
from fairhuman_jax.weights.safetensors_io import write_tensors
from fairhuman_jax.weights.tensors import ParamTensors

PyTree = Any

FLAT_FILE = "pytorch_model.bin"
PARTS: dict[str, type] = {"image_encoder": CLIPVision, "postfuse": Postfuse}
EXPECTED = f"expected the {FLAT_FILE} of FastComposer or of Face-diffuser's SDM, or a folder of save_subject_model"


class SubjectPipeline(NamedTuple):
    """A Stable Diffusion with what it reads subjects by; `params` of all its networks by name: those of
    `pipeline.params`, `image_encoder` and `postfuse`. What is written is `params`.
    """

    pipeline: Pipeline
    image_encoder: CLIPVision
    postfuse: Postfuse
    params: dict[str, PyTree]


def load_subject_model(
    path: str | Path,
    dtype: jnp.dtype | str | None = None,
    *,
    tokenizer: str | Path | None = None,
    host: bool = False,
    sharding: Placement = None,
    **runtime: Any,
) -> SubjectPipeline:
    """The subject model in a file of FastComposer or of Face-diffuser, in the folder of one, or in one of our own.

    path: `pytorch_model.bin` or what `save_flat_file` wrote; a folder with the former, or `org/name` of one on the hub;
    a folder of `save_subject_model`. dtype, host, sharding and runtime as in `load_pipeline`. dtype None keeps what is
    stored: in published files bfloat16 but for what was trained. tokenizer: of files, see `clip_tokenizer`. Raises:
    ValueError, FileNotFoundError, one line each, as `load_pipeline`; a model without subjects; widths that do not fit
    each other.
    """
    path = fetch_file(str(path), FLAT_FILE) if is_hub_id(path) else Path(path)
    options = {"host": host, "sharding": sharding, **runtime}
    file = path / FLAT_FILE if path.is_dir() and not (path / "model_index.json").is_file() else path
    if file.is_file():
        single = open_single_file(file)
        if missing := [name for name in PARTS if name not in single.components]:
            raise ValueError(f"{file} ({single.kind}) has no {', '.join(missing)}; {EXPECTED}")
        parts = {name: load_component(file, name, dtype, **options) for name in PARTS}
        pipeline = load_single_file(file, dtype, tokenizer=tokenizer, **options)
    else:
        if not path.is_dir() or not all((path / name).is_dir() for name in PARTS):
            raise FileNotFoundError(f"{path} is no subject model; {EXPECTED}")
        parts = {name: load_model(path, name, dtype, **options) for name in PARTS}
        pipeline = load_pipeline(path, dtype, **options)
    for name, (module, _) in parts.items():
        if not isinstance(module, PARTS[name]):
            raise ValueError(f"{path}: its {name} is a {type(module).__name__}, not a {PARTS[name].__name__}")
    modules: Any = {name: module for name, (module, _) in parts.items()}
    model = SubjectPipeline(pipeline, **modules, params=pipeline.params | {name: p for name, (_, p) in parts.items()})
    _check_widths(model, str(path))
    return model


def save_subject_model(model: SubjectPipeline, folder: str | Path, dtype: jnp.dtype | str | None = None) -> None:
    """Write a diffusers folder of the pipeline, with two more in it: `image_encoder`, of transformers, and `postfuse`.

    diffusers loads it as the Stable Diffusion it is, `load_subject_model` whole. dtype as in `save_model`.
    """
    folder = Path(folder)
    for name in PARTS:
        save_model(getattr(model, name), model.params[name], folder / name, dtype)
    save_pipeline(dataclasses.replace(model.pipeline, params=model.params), folder, dtype)


def save_flat_file(model: SubjectPipeline | Pipeline, path: str | Path, dtype: jnp.dtype | str | None = None) -> Path:
    """Write a subject model, or a pipeline as Face-diffuser's scene model, as one .safetensors file; returns its path.

    Tensors have the names and shapes that FastComposer's and Face-diffuser's own code loads strictly: old names of the
    autoencoder's attention, no `text_model.`, and the buffers `position_ids`. dtype None keeps each parameter's own.
    The configs go into the file's metadata, for `open_single_file`. Raises: ValueError for a name that does not end in
    .safetensors; a pipeline that is not of Stable Diffusion 1's one text encoder.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a flat file is written as .safetensors")
    pipeline = model.pipeline if isinstance(model, SubjectPipeline) else model
    modules = networks(pipeline)
    if "text_encoder_2" in modules:
        raise ValueError(f"{path}: FastComposer's naming has one text encoder, that of Stable Diffusion 1")
    if isinstance(model, SubjectPipeline):
        modules |= {name: getattr(model, name) for name in PARTS}
    owners: dict[str, View] = {}
    for name in modules:
        source = ParamTensors.of(model.params[name], name)
        view = View(source, {flat_name(name, stored): Slot((stored,)) for stored in source.names()})
        owners |= dict.fromkeys(view.names(), view)
    buffers = _position_ids(modules)
    shapes = {name: view.shape(name) for name, view in owners.items()}
    dtypes = {name: jnp.dtype(dtype or view.dtype(name)) for name, view in owners.items()}
    shapes |= {name: ids.shape for name, ids in buffers.items()}
    dtypes |= {name: ids.dtype for name, ids in buffers.items()}
    configs = {name: module.to_config() for name, module in modules.items()}
    metadata = {CONFIGS: json.dumps({**configs, SCHEDULER: pipeline.schedule.to_config(), OPTIONS: {}})}
    write_tensors(
        path, shapes, dtypes, lambda name: owners[name].read(name) if name in owners else buffers[name], metadata
    )
    return path


def flat_name(component: str, name: str) -> str:
    """The name in a flat file of a tensor of one network, which has the names of diffusers or transformers."""
    prefix = next(prefix for prefix, (owner, _) in FLAT_PREFIXES.items() if owner == component)
    if component == "text_encoder":
        name = name.removeprefix(TOWERS["CLIPText"][0])
    if component == "vae" and ".attentions." in name:
        for old, current in OLD_ATTENTION.items():
            name = name.replace(f".{current}.", f".{old}.")
    return prefix + name


def _position_ids(modules: dict[str, Any]) -> dict[str, np.ndarray]:
    """The buffers that transformers 4 kept in the state dicts of CLIP's encoders."""
    lengths = {"text_encoder.embeddings": modules["text_encoder"].config["max_position_embeddings"]}
    if "image_encoder" in modules:
        config = modules["image_encoder"].config
        lengths["image_encoder.vision_model.embeddings"] = 1 + (config["image_size"] // config["patch_size"]) ** 2
    return {f"{name}.position_ids": np.arange(length)[None] for name, length in lengths.items()}


def _check_widths(model: SubjectPipeline, label: str) -> None:
    """Text states, embeddings of subjects and their fusion are of one width."""
    text = [encoder.config["hidden_size"] for encoder in model.pipeline.text_encoders]
    image = model.image_encoder.config["projection_dim"] if model.image_encoder.with_projection else None
    if [model.postfuse.width] != text or model.postfuse.width != image:
        raise ValueError(
            f"{label}: postfuse is {model.postfuse.width} wide, the text encoder {text} and the image encoder's "
            f"projection {image}; all must be equal"
        )
