"""Model folders of diffusers and transformers: `config.json` beside safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.weights.files import read_json, write_json
from fairhuman_jax.weights.keys import canonical_names, leaves
from fairhuman_jax.weights.safetensors_io import TensorFiles, write_tensors

PyTree = Any

NETWORKS: dict[str, Any] = {
    "UNet2DConditionModel": UNet2DCondition,
    "AutoencoderKL": AutoencoderKL,
    "CLIPTextModel": CLIPText,
    "CLIPTextModelWithProjection": CLIPText,
}
STEMS = ("diffusion_pytorch_model", "model")
LISTED = 4  # names an error spells out


def load_model(
    path: str | Path,
    subfolder: str | None = None,
    dtype: jnp.dtype | str | None = None,
    *,
    host: bool = False,
    **runtime: Any,
) -> tuple[nn.Module, PyTree]:
    """Network and parameters of a diffusers or transformers folder.

    dtype: of parameters and computation; None keeps parameters as stored and computes in float32. host: leave
    the arrays in host memory (numpy) for callers that place them themselves. runtime: scan, remat, attention.
    Errors, one line each: no such folder; unsupported config keys; tensors missing, unknown or of the wrong
    shape (all of them in one error that names the file); a truncated file.
    """
    folder = Path(path) / subfolder if subfolder else Path(path)
    config = read_config(folder)
    network = NETWORKS[class_name(config, folder)]
    if dtype is not None:
        runtime["dtype"] = jnp.dtype(dtype)
    module = network.from_config(config, **runtime)
    params = read_params(folder, module, dtype)
    return module, params if host else jax.device_put(params)


def save_model(module: nn.Module, params: PyTree, folder: str | Path, dtype: jnp.dtype | str | None = None) -> None:
    """Write a folder that diffusers or transformers loads: safetensors, then `config.json`.

    dtype None keeps each parameter's own. Files are replaced as a whole; a failed write leaves the old ones.
    Errors: parameters that are not those of `module`; values that do not fit into `dtype`.
    """
    folder = Path(folder)
    expected: dict[tuple[str, ...], Any] = flatten_dict(expected_params(module))
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    wrong = sorted(set(expected) ^ set(flat)) or [k for k in flat if flat[k].shape != expected[k].shape]
    if wrong:
        names = ", ".join(".".join(path) for path in wrong[:LISTED])
        raise ValueError(f"{len(wrong)} parameters are not those of {type(module).__name__}: {names}")
    by_name = {name: leaf for leaf in leaves(params) for name in leaf.names}

    def read(name: str) -> np.ndarray:
        leaf = by_name[name]
        return leaf.to_torch(np.asarray(flat[leaf.path]), name)

    shapes = {name: leaf.shape for name, leaf in by_name.items()}
    dtypes = {name: jnp.dtype(dtype or flat[leaf.path].dtype) for name, leaf in by_name.items()}
    stem = "model" if isinstance(module, CLIPText) else "diffusion_pytorch_model"
    write_tensors(folder / f"{stem}.safetensors", shapes, dtypes, read)
    write_json(folder / "config.json", module.to_config())


def expected_params(module: nn.Module) -> PyTree:
    """Shapes and dtypes of a network's parameters, without computing any."""
    return jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder. Errors: what is missing, and what the folder may be instead."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a model folder holds config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        if (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder} is a pipeline; name one of its networks, as in subfolder='unet'")
        raise FileNotFoundError(f"{folder} has no config.json; a model folder holds config.json and *.safetensors")
    return read_json(folder / "config.json")


def class_name(config: dict[str, Any], folder: Path) -> str:
    """The class a config is for. Errors: one that is not in `NETWORKS`."""
    name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if name not in NETWORKS:
        raise ValueError(f"{folder}/config.json is for {name}; known networks: {', '.join(sorted(NETWORKS))}")
    return name


def read_params(folder: Path, module: nn.Module, dtype: jnp.dtype | str | None = None) -> PyTree:
    """Parameters of `module` as host arrays from the safetensors files of `folder`."""
    files = TensorFiles(weight_files(folder))
    stored = canonical_names(type(module).__name__, files.names())
    wanted = leaves(expected_params(module))
    _check(files, stored, {name: leaf.shape for leaf in wanted for name in leaf.names}, folder)

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return files.read(stored[name]).reshape(shape)

    kind = None if dtype is None else jnp.dtype(dtype)
    flat = {}
    for leaf in wanted:
        flat[leaf.path] = leaf.from_torch(lambda name, shape=leaf.shape: read(name, shape), kind)
    return unflatten_dict(flat)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, full precision before half, one file before shards."""
    for variant in ("", ".fp16"):
        for stem in STEMS:
            whole = folder / f"{stem}{variant}.safetensors"
            if whole.is_file():
                return [whole]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                return [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
    pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
    hint = f"; it holds {pickles}: save it once with safe_serialization=True" if pickles else ""
    raise FileNotFoundError(f"{folder} has no {STEMS[0]}.safetensors and no {STEMS[1]}.safetensors{hint}")


def _check(files: TensorFiles, stored: dict[str, str], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    problems = []
    missing = sorted(wanted.keys() - stored.keys())
    unknown = sorted(stored.keys() - wanted.keys())
    shapes = {name: files.shape(stored[name]) for name in sorted(wanted.keys() & stored.keys())}
    misshaped = [
        f"{name} {list(shape)} for {list(wanted[name])}"
        for name, shape in shapes.items()
        if _without_ones(shape) != _without_ones(wanted[name])
    ]
    for kind, names in (("missing", missing), ("unknown", unknown), ("of the wrong shape", misshaped)):
        if names:
            more = ", ..." if len(names) > LISTED else ""
            problems.append(f"{len(names)} {kind} ({', '.join(names[:LISTED])}{more})")
    if problems:
        source = files.files[0] if len(files.files) == 1 else folder
        raise ValueError(f"{source} does not fit its config.json: tensors {'; '.join(problems)}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a linear map hold the same matrix; files store either."""
    return shape[:2] if shape[2:] == (1, 1) else shape
