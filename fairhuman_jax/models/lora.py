"""Low-rank adaptation: the `lora` collection that `models.layers.Linear` and `models.layers.Conv` apply.

A tree holds `down` and `up` for every adapted layer: [in, r] and [r, out] for a linear layer, [h, w, in, r] and
[r, out] for a convolution, each with a leading depth axis where the kernel has one. So `down @ up` has the kernel's
shape.
Source: Hu et al. 2021 (LoRA), section 4.1; initial scale as in peft's "gaussian" setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

PyTree = Any
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def init_lora(key: jax.Array, params: PyTree, rank: int, targets: Sequence[str] = UNET_TARGETS) -> PyTree:
    """Make a LoRA tree for every layer of `params` whose dotted module name ends in one of `targets`.

    Layers are linear layers and convolutions. Leaves, float32: `down` ~ N(0, 1 / r^2) and `up` = 0, so the adapted
    network equals the plain network at first. `params` may hold arrays or their shapes.
    Raises: ValueError for a rank below 1, or a target that names no layer with a kernel.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}")
    kernels = _target_kernels(params, targets)
    lora = {}
    for name_key, (module, shape) in zip(jax.random.split(key, len(kernels)), kernels.items(), strict=True):
        *_, width_in, width_out = shape
        stack = shape[:1] if len(shape) == 3 else ()
        lora[(*module, "down")] = jax.random.normal(name_key, (*shape[:-2], width_in, rank), jnp.float32) / rank
        lora[(*module, "up")] = jnp.zeros((*stack, rank, width_out), jnp.float32)
    return unflatten_dict(lora)


def scale_lora(lora: PyTree, weight: float | jax.Array) -> PyTree:
    """Multiply the strength of an update by `weight` (alpha / rank goes here); only `up` changes.

    Leaves may be boxes around an array (flax's `AxisMetadata`).
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(lora)
    scaled = {path: jax.tree.map(lambda up: up * weight, leaf) for path, leaf in flat.items() if path[-1] == "up"}
    return unflatten_dict(flat | scaled)


def concatenate_lora(loras: Sequence[PyTree]) -> PyTree:
    """Combine several updates into their sum, whose rank is the sum of their ranks, by concatenating their factors.

    Trees may adapt different layers. Host arrays stay on the host.
    Raises: ValueError for an empty sequence; ValueError (numpy) or TypeError (jax) when shapes of factors do not match.
    """
    if not loras:
        raise ValueError("concatenate_lora: no LoRA was given")
    together: dict[tuple[str, ...], list[Any]] = {}
    for lora in loras:
        for path, leaf in flatten_dict(lora).items():
            together.setdefault(path, []).append(leaf)
    flat = {}
    for path, leaves in together.items():
        library = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        axis = -1 if path[-1] == "down" else -2
        flat[path] = leaves[0] if len(leaves) == 1 else library.concatenate(leaves, axis=axis)
    return unflatten_dict(flat)


def merge_lora(params: PyTree, lora: PyTree) -> PyTree:
    """`params` with `kernel + down @ up` in place of every adapted kernel, summed in float32, in the kernel's dtype.

    The network then gives the same results without a `lora` collection.
    Raises: ValueError when `params` lacks an adapted layer, or has it in another shape.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    factors: dict[tuple[str, ...], Any] = flatten_dict(lora)
    for module in {path[:-1] for path in factors}:
        kernel = flat.get((*module, "kernel"))
        if kernel is None:
            raise ValueError(f"the LoRA adapts {'.'.join(module)}, which these parameters do not have")
        down, up = (jnp.asarray(factors[(*module, name)], jnp.float32) for name in ("down", "up"))
        if (*down.shape[:-1], up.shape[-1]) != kernel.shape or down.shape[-1] != up.shape[-2]:
            raise ValueError(
                f"the LoRA on {'.'.join(module)} is {down.shape} and {up.shape}, but the kernel is {kernel.shape}"
            )
        update = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
        flat[(*module, "kernel")] = (jnp.asarray(kernel, jnp.float32) + update).astype(kernel.dtype)
    return unflatten_dict(flat)


def _target_kernels(params: PyTree, targets: Sequence[str]) -> dict[tuple[str, ...], tuple[int, ...]]:
    unused = set(targets)
    kernels = {}
    for path, leaf in sorted(flatten_dict(params).items()):
        name = ".".join(path[:-1])
        matching = {target for target in targets if name == target or name.endswith(f".{target}")}
        if path[-1] == "kernel" and matching:
            unused -= matching
            kernels[path[:-1]] = tuple(leaf.shape)
    if unused or not kernels:
        named = ", ".join(sorted(unused)) or "none were given"
        raise ValueError(f"LoRA targets that name no linear layer and no convolution: {named}")
    return kernels
