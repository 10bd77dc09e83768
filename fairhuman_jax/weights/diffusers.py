"""Model folders of diffusers and transformers: `config.json` beside safetensors files."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fairhuman_jax.files import write_json
from fairhuman_jax.kept import Undescribed, describe, kept
from fairhuman_jax.models import (
    AutoencoderKL,
    CLIPText,
    CLIPVision,
    ControlNet,
    HigherHRNet,
    Postfuse,
    T2IAdapter,
    UNet2DCondition,
)
from fairhuman_jax.weights.keys import canonical_names, leaves
from fairhuman_jax.weights.placement import Placement, place
from fairhuman_jax.weights.recognition import looks_like
from fairhuman_jax.weights.safetensors_io import write_tensors
from fairhuman_jax.weights.tensors import ParamTensors, Tensors

PyTree = Any

NETWORKS: dict[str, Any] = {
    "UNet2DConditionModel": UNet2DCondition,
    "AutoencoderKL": AutoencoderKL,
    "CLIPTextModel": CLIPText,
    "CLIPTextModelWithProjection": CLIPText,
    "CLIPVisionModel": CLIPVision,
    "CLIPVisionModelWithProjection": CLIPVision,
    "ControlNetModel": ControlNet,
    "T2IAdapter": T2IAdapter,
    "HigherHRNet": HigherHRNet,
    "Postfuse": Postfuse,
}
LISTED = 4  # names an error spells out


def save_model(module: nn.Module, params: PyTree, folder: str | Path, dtype: jnp.dtype | str | None = None) -> None:
    """Write a folder that diffusers or transformers loads: safetensors, then `config.json`.

    dtype None keeps each parameter's own. Files are replaced as a whole; a failed write leaves the old ones.
    Raises: ValueError for parameters that are not those of `module`; values that do not fit into `dtype`.
    """
    folder = Path(folder)
    expected: dict[tuple[str, ...], Any] = flatten_dict(expected_params(module))
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    wrong = sorted(set(expected) ^ set(flat)) or [k for k in flat if flat[k].shape != expected[k].shape]
    if wrong:
        names = ", ".join(".".join(path) for path in wrong[:LISTED])
        raise ValueError(f"{len(wrong)} parameters are not those of {type(module).__name__}: {names}")
    tensors = ParamTensors.of(params, str(folder))
    shapes = {name: tensors.shape(name) for name in tensors.names()}
    dtypes = {name: jnp.dtype(dtype or tensors.dtype(name)) for name in shapes}
    stem = "model" if isinstance(module, (CLIPText, CLIPVision)) else "diffusion_pytorch_model"
    write_tensors(folder / f"{stem}.safetensors", shapes, dtypes, tensors.read)
    write_json(folder / "config.json", module.to_config())


def expected_params(module: nn.Module) -> PyTree:
    """Shapes and dtypes of a network's parameters, without computing any.

    Of one with batch norms {"params", "batch_stats"}: its running statistics are loaded and saved with them. Tracing
    the initialisation takes seconds, so the shapes are kept in the user's cache folder.
    """
    try:
        content = kept("shapes", describe(module), lambda: _shapes_to_json(_traced_params(module)))
        return _shapes_from_json(content)
    except (Undescribed, ValueError):
        return _traced_params(module)


def _traced_params(module: nn.Module) -> PyTree:
    variables = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    return dict(variables) if "batch_stats" in variables else variables["params"]


def _shapes_to_json(params: PyTree) -> bytes:
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    rows = [[path, leaf.shape, str(leaf.dtype)] for path, leaf in flat.items()]
    return json.dumps(rows).encode()


def _shapes_from_json(content: bytes) -> PyTree:
    rows = json.loads(content)
    return unflatten_dict({tuple(path): jax.ShapeDtypeStruct(tuple(shape), dtype) for path, shape, dtype in rows})


def class_name(config: dict[str, Any], folder: Path) -> str:
    """The class a config is for. Raises: ValueError for one that is not in `NETWORKS`."""
    name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if name not in NETWORKS:
        raise ValueError(f"{folder}/config.json is for {name}; known networks: {', '.join(sorted(NETWORKS))}")
    return name


def params_from(
    tensors: Tensors,
    module: nn.Module,
    dtype: jnp.dtype | str | None = None,
    *,
    host: bool = False,
    sharding: Placement = None,
) -> PyTree:
    """Parameters of `module` out of tensors in the names of diffusers or transformers, placed leaf by leaf.

    dtype: of all parameters; None keeps what is stored (float64 becomes float32). host: numpy arrays. sharding: one for
    all leaves, or a function (path, shape) -> Sharding; each device is given its own part and no more. Beside what the
    result holds, memory needs the size of one leaf at most (on a CPU device nothing). Values are not looked at: what is
    NaN or infinite in the file stays so, and what does not fit into `dtype` becomes infinite. Raises: ValueError for
    one that lists all missing, unknown, misshaped and non-floating tensors and says what the file looks like.
    """
    stored = canonical_names(type(module).__name__, tensors.names())
    wanted = leaves(expected_params(module))
    _check(tensors, stored, {name: leaf.shape for leaf in wanted for name in leaf.names}, type(module).__name__)
    flat = {}
    for leaf in wanted:
        kind = jnp.dtype(dtype) if dtype is not None else _stored_dtype(tensors, [stored[name] for name in leaf.names])
        flat[leaf.path] = place(leaf, lambda name: tensors.read(stored[name]), kind, host=host, sharding=sharding)
    return unflatten_dict(flat)


def _stored_dtype(tensors: Tensors, names: Sequence[str]) -> np.dtype:
    dtype = functools.reduce(jnp.promote_types, {tensors.dtype(name) for name in names})
    return jnp.dtype(jnp.float32) if dtype == np.float64 else jnp.dtype(dtype)


def _check(tensors: Tensors, stored: dict[str, str], wanted: dict[str, tuple[int, ...]], network: str) -> None:
    shapes = {name: tensors.shape(stored[name]) for name in sorted(wanted.keys() & stored.keys())}
    dtypes = {name: tensors.dtype(stored[name]) for name in shapes}
    kinds = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unknown": sorted(stored.keys() - wanted.keys()),
        "of the wrong shape": [
            f"{name} {list(shape)} for {list(wanted[name])}"
            for name, shape in shapes.items()
            if _without_ones(shape) != _without_ones(wanted[name])
        ],
        "not of a floating type": [
            f"{name} {dtype.name}" for name, dtype in dtypes.items() if not jnp.issubdtype(dtype, jnp.floating)
        ],
    }
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        seems = looks_like(tensors)
        hint = f"; it looks like {seems}" if seems else ""
        raise ValueError(f"{tensors.label} does not fit its config ({network}): tensors {'; '.join(problems)}{hint}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a linear map hold the same matrix; files store either."""
    return shape[:2] if shape[2:] == (1, 1) else shape
