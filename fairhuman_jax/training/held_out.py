"""Losses on samples kept from training, at fixed times and noise: the same question before and after."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from fairhuman_jax.contract import Batch, Measure, Parts, System


def make_held_out_losses(system: System, batches: Sequence[Batch], key: jax.Array) -> Measure:
    """`losses(parts) -> {objective: mean}` over `batches`, whose `times` and `position` are fixed.

    Batch i draws its noise from `fold_in(key, i)`, so two calls differ by the parts alone. Objectives of several phases
    are named as in generator.adversarial.
    """
    phases = system.phases

    @jax.jit
    def losses(parts: Parts, batch: Batch, index: int) -> dict[str, jax.Array]:
        found = {}
        for phase in phases:
            prediction, _ = phase.predict(parts, batch, jax.random.fold_in(key, index))
            for name, loss in phase.objectives(prediction, batch).items():
                label = f"{phase.name}.{name}" if len(phases) > 1 else name
                found[label] = loss
                if label not in order:
                    order.append(label)
        return found

    order: list[str] = []  # a dict leaves jit sorted by name

    def mean_losses(parts: Parts) -> dict[str, float]:
        rows = jax.device_get([losses(parts, batch, i) for i, batch in enumerate(batches)])
        return {name: float(sum(row[name] for row in rows) / len(rows)) for name in order}

    return mean_losses
