"""The train step of every system: K gradients of one forward pass, one combination, one optimiser update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fairhuman_jax.contract import Batch, System
from fairhuman_jax.devices.sharding import AXES, BATCH_SPEC, SPLIT_ABOVE, WHOLE, box, leaf_specs, named
from fairhuman_jax.training.combining import Combining, FairConfig, Metrics
from fairhuman_jax.training.run_config import RunConfig
from fairhuman_jax.training.state import TrainState

PyTree = Any


class TrainStep(Protocol):
    """`step(state, frozen, batch, refresh=True) -> (state, metrics)`, compiled; also has jit's `lower`."""

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: Batch, refresh: bool = True
    ) -> tuple[TrainState, Metrics]: ...

    def lower(self, state: TrainState, frozen: PyTree, batch: Batch, refresh: bool = True) -> jax.stages.Lowered: ...


def make_train_step(
    system: System,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    fair: FairConfig,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    split_above: int = SPLIT_ABOVE,
    split_frozen: bool = False,
) -> TrainStep:
    """The compiled train step; `state` is donated, `frozen` is not.

    The batch is split over the mesh, large trainables (with their moments and average) over its `fsdp` axis, and so is
    `frozen` with `split_frozen`: arrays must be placed that way (sharding.place, with the same `split_above`).
    `refresh` is a constant of the program: True solves for the weights, False takes the last ones and costs what a
    plain step costs. The combined gradient's norm is cut to `clip_norm`. A gradient that is not finite leaves
    trainables, optimiser state, average and the rule's state as they were and adds one to `skipped`.
    """

    def step(state: TrainState, frozen: PyTree, batch: Batch, refresh: bool = True) -> tuple[TrainState, Metrics]:
        specs = leaf_specs(mesh, state.trainable, split_above)
        frozen_specs = leaf_specs(mesh, frozen, split_above) if split_frozen else jax.tree.map(lambda _: WHOLE, frozen)
        combining = Combining(system, fair, specs, accumulate)

        def local(trainable, frozen, batch, key, fair_state):
            size = next(iter(batch.values())).shape[0]
            batch = batch | {"position": jax.lax.axis_index(AXES) * size + jnp.arange(size)}
            trainable, frozen = box(trainable, specs), box(frozen, frozen_specs)
            return combining(trainable, frozen, batch, key, fair_state, refresh)

        gradient, fair_state, metrics = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, frozen_specs, BATCH_SPEC, WHOLE, WHOLE),
            out_specs=(specs, WHOLE, WHOLE),
            check_vma=False,
        )(state.trainable, frozen, batch, jax.random.fold_in(state.key, state.step), state.fair)

        finite, norm = metrics.pop("finite"), metrics["gradient_norm"]
        new = _updated(replace(state, fair=fair_state), gradient, norm, optimizer, clip_norm, ema_decay)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        kept = replace(kept, step=state.step + 1, skipped=state.skipped + jnp.where(finite, 0, 1))
        return _constrained(kept, mesh, split_above), metrics | {"skipped": kept.skipped}

    return jax.jit(step, donate_argnums=0, static_argnames="refresh")


def step_of_run(config: RunConfig, system: System, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainStep:
    """`make_train_step` with the settings of a run."""
    train = config.train
    return make_train_step(
        system,
        optimizer,
        mesh,
        config.fair,
        accumulate=train.accumulate,
        clip_norm=config.optimizer.clip_norm,
        ema_decay=train.ema_decay,
        split_frozen=train.shard_frozen,
    )


def _updated(
    state: TrainState,
    gradient: PyTree,
    norm: jax.Array,
    optimizer: optax.GradientTransformation,
    clip_norm: float | None,
    ema_decay: float | None,
) -> TrainState:
    """One optimiser update with a gradient of the given norm."""
    if clip_norm is not None:
        shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        gradient = jax.tree.map(lambda leaf: leaf * shrink, gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
        # The average follows quickly at first, so that short runs are not dominated by the start.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, trainable)
    return replace(state, trainable=trainable, opt_state=opt_state, ema=ema)


def _constrained(state: TrainState, mesh: Mesh, split_above: int) -> TrainState:
    """The state, placed as `sharding.place` places it, so that a step's result fits the next step's argument."""
    placed = {
        name: jax.lax.with_sharding_constraint(tree, named(mesh, leaf_specs(mesh, tree, split_above)))
        for name in ("trainable", "opt_state", "ema")
        if (tree := getattr(state, name)) is not None
    }
    return replace(state, **placed)
