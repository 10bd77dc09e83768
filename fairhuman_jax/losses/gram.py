"""Gram matrices of task gradients, the tasks that take part, and linear combinations of gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any

# A gradient whose norm is below fp32 epsilon times the largest one is rounding noise of the shared backward pass.
ACTIVE_THRESHOLD = 2.0**-46


def gram_matrix(task_grads: PyTree, scale: float | Array = 1.0) -> Array:
    """Gram matrix of task gradients, G_ij = scale^2 <g_i, g_j>, summed leaf by leaf in fp32.

    Every leaf of `task_grads` is [K, ...]; `scale` multiplies the gradients first, so that the squares of tiny or huge
    ones stay in range (see `gradient_scale`). Returns fp32 [K, K]. Raises: ValueError when the leading axes differ.
    """
    count = task_count(task_grads)

    def leaf_gram(leaf: Array) -> Array:
        rows = leaf.reshape(count, -1).astype(jnp.float32) * scale
        return jnp.einsum("ip,jp->ij", rows, rows, precision=jax.lax.Precision.HIGHEST)

    # Sorted before they are summed: XLA's CPU compiler fuses a plain sum of N terms, whole, into each of its consumers,
    # which takes minutes to compile; a sort is never fused.
    return jnp.sum(jnp.sort(jnp.stack([leaf_gram(leaf) for leaf in jax.tree.leaves(task_grads)]), axis=0), axis=0)


def gradient_scale(task_grads: PyTree) -> Array:
    """Power of two s with 0.5 <= s * max |g| < 1 over all tasks (1 when all are zero or any is not finite).

    Multiplying by s is exact, so scaled gradients lose nothing. Returns an fp32 scalar in [2^-126, 2^125].
    """
    peaks = [jnp.max(jnp.abs(leaf.astype(jnp.float32)), initial=0.0) for leaf in jax.tree.leaves(task_grads)]
    # The last of a sort, not a maximum, for the reason given in `gram_matrix`. A NaN sorts last as well.
    peak = jnp.sort(jnp.stack(peaks))[-1]
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(peak) & (peak > 0), peak, 0.5))
    return jax.lax.stop_gradient(jnp.ldexp(jnp.float32(1.0), jnp.clip(-exponent, -126, 125)))


def task_count(task_grads: PyTree) -> int:
    """K, the leading axis shared by every leaf. Raises: ValueError when leaves disagree or there are none."""
    leaves = jax.tree.leaves(task_grads)
    counts: set[Any] = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(counts) != 1 or None in counts:
        found = sorted(map(str, counts)) if counts else "no leaves"
        raise ValueError(f"task_grads: every leaf needs one leading task axis of the same size; found {found}")
    return counts.pop()


def active_tasks(gram: Array) -> Array:
    """Tasks that take part: G_ii > 2^-46 max_j G_jj and G_ii a normal number.

    `gram` [K, K]; returns bool [K].
    """
    diagonal = jnp.diagonal(gram)
    floor = jnp.finfo(gram.dtype).tiny
    return diagonal > jnp.maximum(ACTIVE_THRESHOLD * jnp.max(diagonal), floor)


def cosine_matrix(gram: Array, active: Array) -> Array:
    """Cosines of the angles between gradients, [K, K]; 0 where one of the two is inactive."""
    norm = jnp.sqrt(jnp.where(active, jnp.diagonal(gram), 1.0))
    pair = active[:, None] & active[None, :]
    return jnp.where(pair, gram / (norm[:, None] * norm[None, :]), 0.0)


def combine_weighted(task_grads: PyTree, weights: Array, scale: float | Array = 1.0) -> PyTree:
    """Linear combination sum_i w_i (scale g_i), in fp32 throughout.

    Leaves [K, ...], `weights` [K]; result leaves [...], fp32.
    """
    weights = weights.astype(jnp.float32)

    def leaf_sum(leaf: Array) -> Array:
        # A product and a sum fuse into one pass over the leaf; a dot would first write the scaled fp32 copy.
        factors = weights.reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.sum(factors * (leaf.astype(jnp.float32) * scale), axis=0)

    return jax.tree.map(leaf_sum, task_grads)


def gram_product(gram: Array, weights: Array) -> Array:
    """G w over the last axis, by elementwise products: a dot may run in reduced precision on accelerators."""
    return jnp.sum(gram * weights[..., None, :], axis=-1)


def as_float(array: Array) -> Array:
    """In fp32 at least."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def read_priority(priority: Any, count: int, dtype: Any) -> Array:
    """`priority` as [K], ones for None. Raises: ValueError when it has not one entry a task."""
    if priority is None:
        return jnp.ones(count, dtype)
    priority = jnp.asarray(priority, dtype)
    if priority.shape != (count,):
        raise ValueError(f"priority has shape {priority.shape}; expected ({count},), one entry a task")
    return priority
