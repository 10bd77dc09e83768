"""Opens a network or a whole base: a folder, a model on the hub or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.files import read_json
from fairhuman_jax.weights.diffusers import NETWORKS, class_name, params_from
from fairhuman_jax.weights.folders import pipeline_parts, read_config, weight_files
from fairhuman_jax.weights.hub import fetch_model, fetch_pipeline, is_hub_id
from fairhuman_jax.weights.ldm import load_component, load_single_file, open_single_file
from fairhuman_jax.weights.pipeline import Pipeline, vae_dtype
from fairhuman_jax.weights.placement import Placement
from fairhuman_jax.weights.tensors import open_tensors
from fairhuman_jax.weights.tokenizers import load_tokenizer

PyTree = Any


def load_model(
    path: str | Path,
    subfolder: str | None = None,
    dtype: jnp.dtype | str | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    host: bool = False,
    sharding: Placement = None,
    **runtime: Any,
) -> tuple[nn.Module, PyTree]:
    """Network and parameters of a diffusers or transformers folder, of a model on the hub, or out of a single file.

    path: a folder, `org/name` on the hub (at `revision`), or a file, in which `subfolder` names the network unless it
    holds one alone. variant: as in fp16, of folders; None takes full precision, or fp16 where that is all there is.
    dtype, host, sharding: see `params_from`; dtype is that of computation too, which None leaves at float32. runtime:
    scan, remat, attention. Raises: ValueError, one line each: no such folder or model; unsupported config keys; a
    variant that is not there; tensors missing, unknown or of the wrong shape (all of them in one error that names the
    file); a truncated file.
    """
    if Path(path).is_file():
        return _load_from_file(Path(path), subfolder, dtype, host=host, sharding=sharding, **runtime)
    if is_hub_id(path):
        folder = fetch_model(str(path), subfolder, variant, revision)
    else:
        folder = Path(path) / subfolder if subfolder else Path(path)
    config = read_config(folder)
    network = NETWORKS[class_name(config, folder)]
    if dtype is not None:
        runtime["dtype"] = jnp.dtype(dtype)
    module = network.from_config(config, **runtime)
    tensors = open_tensors(weight_files(folder, variant))
    return module, params_from(tensors, module, dtype, host=host, sharding=sharding)


def _load_from_file(path: Path, component: str | None, *args: Any, **kwargs: Any) -> tuple[nn.Module, PyTree]:
    if component is None:
        components = list(open_single_file(path).components)
        if len(components) > 1:
            raise ValueError(f"{path} holds {', '.join(components)}; name one, as in subfolder={components[0]!r}")
        component = components[0]
    return load_component(path, component, *args, **kwargs)


def load_pipeline(
    path: str | Path,
    dtype: jnp.dtype | str | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    host: bool = False,
    sharding: Placement = None,
    **runtime: Any,
) -> Pipeline:
    """The pipeline in a diffusers folder, in a model on the hub (`org/name`) or in a single file.

    dtype, variant, revision, host, sharding and runtime as in `load_model`, for every network. An autoencoder whose
    config says `force_upcast` overflows in float16, so it stays in float32 there. Raises: FileNotFoundError,
    ValueError, one line each: no such folder or model, a component that is missing or does not fit its config.
    """
    if Path(path).is_file():
        return load_single_file(path, dtype, host=host, sharding=sharding, **runtime)
    folder = fetch_pipeline(str(path), variant, revision) if is_hub_id(path) else Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a pipeline folder holds model_index.json")
    index = read_json(folder / "model_index.json")
    parts = pipeline_parts(index, str(folder))
    modules, params = {}, {}
    for name in (*parts["networks"], *parts["text_encoders"]):
        kind = vae_dtype(read_config(folder / "vae"), dtype) if name == "vae" else dtype
        modules[name], params[name] = load_model(
            folder, name, kind, variant=variant, host=host, sharding=sharding, **runtime
        )
    return Pipeline(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[name] for name in parts["text_encoders"]),
        tokenizers=tuple(load_tokenizer(folder / name) for name in parts["tokenizers"]),
        schedule=NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json")),
        params=params,
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
        requires_aesthetics_score=bool(index.get("requires_aesthetics_score", False)),
    )
