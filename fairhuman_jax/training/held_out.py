"""Losses on samples kept from training, at fixed times and noise: the same question before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fairhuman_jax.contract import Batch, System

PyTree = Any


def make_held_out_losses(
    system: System, batches: Sequence[Batch], key: jax.Array
) -> Callable[[PyTree, PyTree], dict[str, float]]:
    """`losses(trainable, frozen) -> {objective: mean}` over `batches`, whose `times` and `position` are fixed.

    Batch i draws its noise from `fold_in(key, i)`, so two calls differ by the parameters alone.
    """

    @jax.jit
    def losses(trainable: PyTree, frozen: PyTree, batch: Batch, index: int) -> dict[str, jax.Array]:
        prediction = system.predict(trainable, frozen, batch, jax.random.fold_in(key, index))
        return system.objectives(prediction, batch)

    def mean_losses(trainable: PyTree, frozen: PyTree) -> dict[str, float]:
        rows = jax.device_get([losses(trainable, frozen, batch, i) for i, batch in enumerate(batches)])
        return {name: float(sum(row[name] for row in rows) / len(rows)) for name in rows[0]}

    return mean_losses
