"""One forward pass, K objectives, K gradients.

All objectives depend on the trainables through one prediction, so their gradients are J^T c_i with
c_i = d loss_i / d prediction. The prediction is computed once with `jax.vjp`; the K cotangents are pulled back together
by `vmap`, which costs F + K B instead of K (F + B).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.systems.contract import Batch, System

PyTree = Any


def task_gradients(
    system: System, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
) -> tuple[PyTree, OrderedDict[str, jax.Array]]:
    """Gradients of the K objectives, every leaf with a leading axis K, and the losses by name.

    Source: FairHuman, weighting_strategy/weight_methods.py (three backward passes over one retained graph there).
    """
    prediction, pull_back = jax.vjp(lambda tree: system.predict(tree, frozen, batch, key), trainable)
    names: list[str] = []

    def stacked_losses(tree: PyTree) -> jax.Array:
        losses = system.objectives(tree, batch)
        names[:] = losses
        return jnp.stack([jnp.asarray(loss, jnp.float32) for loss in losses.values()])

    losses, pull_back_losses = jax.vjp(stacked_losses, prediction)
    if len(names) == 1:
        # A plain backward pass: under vmap, XLA's CPU compiler takes minutes over a large convolutional network.
        (gradient,) = pull_back(*pull_back_losses(jnp.ones(1, jnp.float32)))
        gradients = jax.tree.map(lambda leaf: leaf[None], gradient)
    else:
        (cotangents,) = jax.vmap(pull_back_losses)(jnp.eye(len(names), dtype=jnp.float32))
        (gradients,) = jax.vmap(pull_back)(cotangents)
    # Ordered, because plain dicts come out of scan, jit and shard_map with their keys sorted.
    return gradients, OrderedDict(zip(names, losses, strict=True))


def accumulated_task_gradients(
    system: System, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, accumulate: int
) -> tuple[PyTree, OrderedDict[str, jax.Array]]:
    """`task_gradients` of the mean over `accumulate` equal micro-batches, one at a time.

    The K gradients are averaged, never the Gram matrix, which is not linear in them; with sample-wise randomness
    (`sample_keys`) the result equals one large batch up to rounding.
    """
    if accumulate == 1:
        return task_gradients(system, trainable, frozen, batch, key)
    size = next(iter(batch.values())).shape[0]
    if size % accumulate:
        raise ValueError(f"a batch of {size} per device does not divide into {accumulate} micro-batches")
    micro_batches = jax.tree.map(lambda x: x.reshape(accumulate, size // accumulate, *x.shape[1:]), batch)

    def gradients_of(micro_batch: Batch) -> tuple[PyTree, OrderedDict[str, jax.Array]]:
        return task_gradients(system, trainable, frozen, micro_batch, key)

    def body(total: PyTree, micro_batch: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradients_of(micro_batch)), None

    shapes = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, micro_batches)
    return jax.tree.map(lambda x: x / accumulate, total)


def objective_names(system: System, trainable: PyTree, frozen: PyTree, batch: Batch) -> tuple[str, ...]:
    """The names of the objectives in the system's order, without computing any."""
    names: list[str] = []

    def note(key: jax.Array) -> None:
        names[:] = system.objectives(system.predict(trainable, frozen, batch, key), batch)

    jax.eval_shape(note, jax.random.key(0))
    return tuple(names)
