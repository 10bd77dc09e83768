"""LoRA files: `pytorch_lora_weights.safetensors` in diffusers' naming, and the other layouts they come in.

Torch holds `down` as (r, in) and `up` as (out, r); ours are [in, r] and [r, out], stacked like the kernels
they adapt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fairhuman_jax.weights.diffusers import expected_params
from fairhuman_jax.weights.files import read_json
from fairhuman_jax.weights.keys import is_stacked, module_names
from fairhuman_jax.weights.safetensors_io import TensorFiles, write_tensors

PyTree = Any
Layer = tuple[tuple[str, ...], int | None, tuple[int, int], int]  # module, place in its stack, (in, out), depth
FILE_NAME = "pytorch_lora_weights.safetensors"
COMPONENTS = {"unet": "lora", "text_encoder": "lora_linear_layer", "text_encoder_2": "lora_linear_layer"}
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}

# Marks of layouts that hold something else than two factors a linear layer.
REFUSED = {
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "input_blocks": "kohya in the original (sgm) block naming",
    "output_blocks": "kohya in the original (sgm) block naming",
}
# How a tensor's name ends in diffusers' naming, kohya's and PEFT's; A is down, B is up.
FACTOR_ENDINGS = (
    re.compile(r"\.lora(?:_linear_layer)?\.(down|up)\.weight$"),
    re.compile(r"\.lora_(down|up)\.weight$"),
    re.compile(r"\.lora_(A|B)(?:\.[^.]+)?\.weight$"),
)
OLD_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")


def save_lora(
    loras: Mapping[str, PyTree], folder: str | Path, *, rank: int | None = None, alpha: float | None = None
) -> Path:
    """Write the trees `loras` by component (unet, text_encoder, text_encoder_2), float32; returns the file.

    `alpha / rank` (1 when alpha is None) is multiplied into `up`, so every reader applies the trained
    strength without being told of it. Errors: an unknown component; alpha without rank.
    """
    strength = 1.0
    if alpha is not None:
        if rank is None:
            raise ValueError("save_lora: alpha has a meaning only with the rank it was trained at")
        strength = alpha / rank
    tensors: dict[str, tuple[np.ndarray, int | None]] = {}
    for component, lora in loras.items():
        if component not in COMPONENTS:
            raise ValueError(f"save_lora: unknown component {component!r}; known: {', '.join(COMPONENTS)}")
        for (*module, factor), leaf in flatten_dict(lora).items():
            array = np.asarray(leaf, np.float32) * (strength if factor == "up" else 1.0)
            stacked = is_stacked(tuple(module))
            for i, name in enumerate(module_names(tuple(module), len(array) if stacked else None)):
                key = f"{component}.{name}.{COMPONENTS[component]}.{factor}.weight"
                tensors[key] = (array, i if stacked else None)

    def read(name: str) -> np.ndarray:
        array, layer = tensors[name]
        return np.asarray(array if layer is None else array[layer], np.float32).T

    path = Path(folder) / FILE_NAME
    shapes = {name: read(name).shape for name in tensors}
    write_tensors(path, shapes, jnp.dtype(jnp.float32), read, {} if rank is None else {"rank": str(rank)})
    return path


def load_lora(path: str | Path, target: nn.Module | PyTree, component: str = "unet") -> PyTree:
    """The LoRA tree (float32 host arrays) for `target`, a network or its parameters, from file or folder.

    Reads diffusers' present and old naming, PEFT and kohya; alpha / rank is multiplied into `up`. A layer of
    a stack that the file does not adapt gets zeros; ranks within a stack are padded to the largest.
    Errors, one line each: a layout that is not read (by name), layers that `target` does not have, wrong
    shapes.
    """
    path = Path(path)
    files = TensorFiles([path / FILE_NAME if path.is_dir() else path])
    for mark, dialect in REFUSED.items():
        if any(mark in name for name in files.names()):
            raise ValueError(f"{path} is a {dialect} file; only plain LoRA on linear layers is read")
    params = expected_params(target) if isinstance(target, nn.Module) else target
    layers = _linear_layers(params)
    factors = _factors(files, component, {name.replace(".", "_"): name for name in layers})
    if not factors:
        raise ValueError(f"{path} holds no LoRA for {component!r}; its first tensor is {min(files.names())}")
    for name, pair in sorted(factors.items()):
        if name not in layers:
            raise ValueError(f"{path} adapts {name}, which is no linear layer of this network")
        shapes = {factor: array.shape for factor, array in pair.items()}
        width_in, width_out = layers[name][2]
        rank = shapes.get("down", (0,))[0]
        if shapes != {"down": (rank, width_in), "up": (width_out, rank)}:
            raise ValueError(f"{path}: {name} is {width_in} -> {width_out}, but its factors are {shapes}")
    return _stack(factors, layers)


def _linear_layers(params: PyTree) -> dict[str, Layer]:
    """Torch name of every linear layer -> (module path, place in its stack or None, (in, out), depth)."""
    layers: dict[str, Layer] = {}
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for (*parts, leaf), array in flat.items():
        module = tuple(parts)
        stacked = is_stacked(module)
        if leaf != "kernel" or len(array.shape) - stacked != 2:
            continue
        depth = array.shape[0] if stacked else 1
        for i, name in enumerate(module_names(module, depth if stacked else None)):
            layers[name] = (module, i if stacked else None, tuple(array.shape[-2:]), depth)
    return layers


def _factors(files: TensorFiles, component: str, dotted: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Module name -> {"down": (r, in), "up": (out, r)}, strength folded into `up`."""
    adapter_alpha = _adapter_alpha(files, component)
    factors: dict[str, dict[str, np.ndarray]] = {}
    alphas: dict[str, float] = {}
    for stored in files.names():
        name = _without_prefix(OLD_PROCESSOR.sub(_new_processor_name, stored), component)
        if name is None:
            continue
        if name.endswith(".alpha"):
            module = name.removesuffix(".alpha")
            alphas[dotted.get(module, module)] = files.read(stored).item()
            continue
        module, factor = _split(name, stored)
        factors.setdefault(dotted.get(module, module), {})[factor] = files.read(stored).astype(np.float32)
    for module, pair in factors.items():
        if "down" in pair and "up" in pair:
            alpha = alphas.get(module, adapter_alpha)
            pair["up"] = pair["up"] * (1.0 if alpha is None else alpha / pair["down"].shape[0])
    return factors


def _split(name: str, stored: str) -> tuple[str, str]:
    for ending in FACTOR_ENDINGS:
        match = ending.search(name)
        if match:
            return name[: match.start()], "down" if match.group(1) in ("down", "A") else "up"
    raise ValueError(f"LoRA tensor {stored} is in no layout that is read (diffusers, PEFT, kohya)")


def _new_processor_name(match: re.Match[str]) -> str:
    layer = "to_out.0" if match.group(1) == "to_out" else match.group(1)
    return f".{layer}.lora.{match.group(2)}.weight"


def _without_prefix(name: str, component: str) -> str | None:
    """`name` inside `component`, or None when it belongs to another one."""
    name = name.removeprefix("base_model.model.")
    kohya = KOHYA_PREFIXES[component]
    if name.startswith(kohya):
        return name.removeprefix(kohya)
    if component == "text_encoder" and name.startswith("lora_te1_"):
        return name.removeprefix("lora_te1_")
    if name.startswith(f"{component}."):
        return name.removeprefix(f"{component}.")
    others = (*(f"{other}." for other in COMPONENTS), *KOHYA_PREFIXES.values(), "lora_te1_")
    return None if component != "unet" or name.startswith(others) else name


def _adapter_alpha(files: TensorFiles, component: str) -> float | None:
    """`lora_alpha` from the header newer diffusers writes, or PEFT's adapter_config.json beside the file."""
    header = json.loads(files.metadata.get("lora_adapter_metadata", "{}"))
    adapter = {key.removeprefix(f"{component}."): value for key, value in header.items()}
    beside = files.files[0].with_name("adapter_config.json")
    if not header and beside.is_file():
        adapter = read_json(beside)
    for key in ("alpha_pattern", "use_rslora", "use_dora"):
        if adapter.get(key):
            raise ValueError(f"{files.files[0]} was trained with {key}, which is not read")
    return adapter.get("lora_alpha")


def _stack(factors: Mapping[str, Mapping[str, np.ndarray]], layers: Mapping[str, Layer]) -> PyTree:
    ranks: dict[tuple[str, ...], int] = {}
    for name, pair in factors.items():
        module = layers[name][0]
        ranks[module] = max(ranks.get(module, 0), pair["down"].shape[0])
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, pair in factors.items():
        module, place, (width_in, width_out), depth = layers[name]
        rank = ranks[module]
        for factor, shape in (("down", (width_in, rank)), ("up", (rank, width_out))):
            path = (*module, factor)
            if path not in flat:
                flat[path] = np.zeros(shape if place is None else (depth, *shape), np.float32)
            array = pair[factor].T
            into = flat[path] if place is None else flat[path][place]
            into[: array.shape[0], : array.shape[1]] = array
    return unflatten_dict(flat)
