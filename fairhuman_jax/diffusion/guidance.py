"""Classifier-free guidance around a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


def classifier_free(
    predict: Callable[[Array, Array, PyTree], Array],
    cond: PyTree,
    uncond: PyTree,
    guidance: float | Array,
    rescale: float | Array = 0.0,
) -> Callable[[Array, Array], Array]:
    """Guided denoiser: u + guidance (c - u), from one call of `predict` on a batch of 2B.

    `predict(latents [2B, ...], timesteps [2B], condition)` gets each example twice in a row, unconditional first;
    `cond` and `uncond` are pytrees of one structure with leaves [B, ...]. `guidance` is a scalar or [B] and may be
    traced. With g the guided result, `rescale` r returns r g std(c) / std(g) + (1 - r) g, which moves the standard
    deviation of g towards that of c (arXiv 2305.08891).
    Returns `(latents [B, ...], timesteps [B]) -> fp32 [B, ...]` for `sample`.
    """
    both = joined(uncond, cond)

    def guided(latents: Array, timesteps: Array) -> Array:
        output = predict(joined(latents, latents), joined(timesteps, timesteps), both)
        without, given = parted(output.astype(jnp.float32))
        strength = per_example(guidance, without.ndim)
        result = without + strength * (given - without)
        if isinstance(rescale, (int, float)) and rescale == 0:
            return result
        axes = tuple(range(1, result.ndim))
        spread = jnp.std(result, axis=axes, keepdims=True)
        ratio = jnp.std(given, axis=axes, keepdims=True) / jnp.where(spread > 0, spread, 1.0)
        mix = per_example(rescale, without.ndim)
        return result * (mix * ratio + (1.0 - mix))

    return guided


def joined(first: PyTree, second: PyTree) -> PyTree:
    """Interleave two batches of one structure into one batch of pairs [2B, ...].

    Both members of a pair stay together, so each device keeps its own examples when the batch is split over devices.
    """
    return jax.tree.map(lambda one, other: jnp.stack([one, other], 1).reshape(-1, *one.shape[1:]), first, second)


def parted(both: Array) -> tuple[Array, Array]:
    """Split a batch made by `joined` into its two batches [B, ...]."""
    pairs = both.reshape(-1, 2, *both.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def per_example(value: float | Array, ndim: int) -> Array:
    """Convert a scalar or [B] to fp32, shaped to broadcast against a batch of `ndim` axes."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (ndim - value.ndim)) if value.ndim else value
