"""One forward pass, K objectives, and the gradient of any weighting of them.

All objectives depend on the trainables through one prediction, so their gradients are J^T c_i with
c_i = d loss_i / d prediction. The prediction is computed once with `jax.vjp`; what is pulled back, and how often, is up
to the caller: K cotangents together by `vmap` cost F + K B instead of K (F + B), their weighted sum costs F + B.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.contract import Batch, Parts, Phase

PyTree = Any


@dataclass(frozen=True)
class Linearised:
    """K objectives at one point.

    names and losses [K]; pull(weights [K]): the gradient of sum_i w_i L_i in what the phase moves; statistics: the new
    ones.
    """

    names: tuple[str, ...]
    losses: jax.Array
    pull: Callable[[jax.Array], PyTree]
    statistics: PyTree

    def pull_all(self) -> PyTree:
        """The K gradients, every leaf with a leading axis K, by one vmapped pull-back."""
        if len(self.names) == 1:
            # A plain backward pass: under vmap, XLA's CPU compiler takes minutes over a large convolutional network.
            return jax.tree.map(lambda leaf: leaf[None], self.pull(jnp.ones(1, jnp.float32)))
        return jax.vmap(self.pull)(jnp.eye(len(self.names), dtype=jnp.float32))

    def pull_each(self) -> PyTree:
        """As `pull_all`, by K pull-backs one after the other: one set of activation gradients at a time.

        With rematerialisation each of them recomputes the forward pass.
        """
        gradients = []
        for weights in jnp.eye(len(self.names), dtype=jnp.float32):
            if gradients:  # what is pulled back next waits for the gradient before it
                weights, gradients[-1] = jax.lax.optimization_barrier((weights, gradients[-1]))
            gradients.append(self.pull(weights))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)


def moved(phase: Phase, trainable: PyTree) -> PyTree:
    """The part of the trainables that a phase moves."""
    return {name: trainable[name] for name in phase.trains} if phase.trains else trainable


def with_moved(phase: Phase, trainable: PyTree, part: PyTree) -> PyTree:
    """The trainables with the phase's part replaced: the inverse of `moved`."""
    return {**trainable, **part} if phase.trains else part


def linearise(phase: Phase, parts: Parts, batch: Batch, key: jax.Array) -> Linearised:
    """The objectives of one phase on one batch, and their pull-back.

    Source: FairHuman, weighting_strategy/weight_methods.py (three backward passes over one retained graph there).
    """

    def predict(part: PyTree) -> tuple[PyTree, PyTree]:
        return phase.predict(parts._replace(trainable=with_moved(phase, parts.trainable, part)), batch, key)

    prediction, pull_back, statistics = jax.vjp(predict, moved(phase, parts.trainable), has_aux=True)
    names: list[str] = []

    def stacked_losses(tree: PyTree) -> jax.Array:
        losses = phase.objectives(tree, batch)
        names[:] = losses
        return jnp.stack([jnp.asarray(loss, jnp.float32) for loss in losses.values()])

    losses, pull_back_losses = jax.vjp(stacked_losses, prediction)
    return Linearised(tuple(names), losses, lambda weights: pull_back(*pull_back_losses(weights))[0], statistics)


def mean_over_micro_batches(function: Callable[[Batch], PyTree], batch: Batch, count: int) -> PyTree:
    """Mean of `function(micro_batch)` over `count` equal parts of the batch, one at a time.

    With sample-wise randomness (`sample_keys`), losses and gradients equal those of the whole batch up to rounding.
    Raises: ValueError for a batch that does not divide.
    """
    if count == 1:
        return function(batch)
    size = next(iter(batch.values())).shape[0]
    if size % count:
        raise ValueError(f"a batch of {size} per device does not divide into {count} micro-batches")
    parts = jax.tree.map(lambda x: x.reshape(count, size // count, *x.shape[1:]), batch)

    def body(total: PyTree, part: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    total, _ = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), parts)
    return jax.tree.map(lambda x: x / count, total)


def task_gradients(
    phase: Phase, parts: Parts, batch: Batch, key: jax.Array
) -> tuple[PyTree, OrderedDict[str, jax.Array]]:
    """Gradients of the K objectives, every leaf with a leading axis K, and the losses by name."""
    point = linearise(phase, parts, batch, key)
    # Ordered, because plain dicts come out of scan, jit and shard_map with their keys sorted.
    return point.pull_all(), OrderedDict(zip(point.names, point.losses, strict=True))


def objective_names(phase: Phase, parts: Parts, batch: Batch) -> tuple[str, ...]:
    """The names of a phase's objectives in their order, without computing any."""
    names: list[str] = []

    def note(key: jax.Array) -> None:
        names[:] = phase.objectives(phase.predict(parts, batch, key)[0], batch)

    jax.eval_shape(note, jax.random.key(0))
    return tuple(names)
