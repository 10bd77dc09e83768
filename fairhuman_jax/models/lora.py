"""Low-rank adaptation of linear layers: the `lora` collection that `models.layers.Linear` applies.

Source: Hu et al. 2021 (LoRA), section 4.1; initial scale as in peft's "gaussian" setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

PyTree = Any
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def init_lora(key: jax.Array, params: PyTree, rank: int, targets: Sequence[str] = UNET_TARGETS) -> PyTree:
    """A LoRA tree for every linear layer of `params` whose dotted module name ends in one of `targets`.

    Leaves, float32: `down` [in, r] ~ N(0, 1 / r^2) and `up` [r, out] = 0, each with a leading depth axis
    where the kernel has one; so the adapted network equals the plain one at first. `params` may hold arrays
    or their shapes.
    Errors: rank below 1; a target that names no layer; a target that names a convolution.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}")
    kernels = _target_kernels(params, targets)
    lora = {}
    for name_key, (module, shape) in zip(jax.random.split(key, len(kernels)), kernels.items(), strict=True):
        *stack, width_in, width_out = shape
        lora[(*module, "down")] = jax.random.normal(name_key, (*stack, width_in, rank), jnp.float32) / rank
        lora[(*module, "up")] = jnp.zeros((*stack, rank, width_out), jnp.float32)
    return unflatten_dict(lora)


def scale_lora(lora: PyTree, weight: float | jax.Array) -> PyTree:
    """The same update at `weight` times its strength (alpha / rank goes here): only `up` is multiplied."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(lora)
    return unflatten_dict({path: leaf * weight if path[-1] == "up" else leaf for path, leaf in flat.items()})


def _target_kernels(params: PyTree, targets: Sequence[str]) -> dict[tuple[str, ...], tuple[int, ...]]:
    unused = set(targets)
    kernels = {}
    for path, leaf in sorted(flatten_dict(params).items()):
        name = ".".join(path[:-1])
        matching = {target for target in targets if name == target or name.endswith(f".{target}")}
        if path[-1] != "kernel" or not matching:
            continue
        if len(leaf.shape) > 3:
            raise ValueError(f"LoRA target {name} is a convolution; only linear layers take a low-rank update")
        unused -= matching
        kernels[path[:-1]] = tuple(leaf.shape)
    if unused or not kernels:
        raise ValueError(f"LoRA targets that name no linear layer: {', '.join(sorted(unused)) or 'none were given'}")
    return kernels
