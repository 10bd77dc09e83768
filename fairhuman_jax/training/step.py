"""The train step of every system: in each phase K gradients of one forward pass, one combination, one update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fairhuman_jax.contract import Batch, Parts, Phase, System
from fairhuman_jax.devices.sharding import AXES, BATCH_SPEC, SPLIT_ABOVE, WHOLE, box, leaf_specs, named
from fairhuman_jax.training.combining import Combining, FairConfig, Metrics
from fairhuman_jax.training.objectives import moved, with_moved
from fairhuman_jax.training.run_config import RunConfig
from fairhuman_jax.training.state import TrainState, make_optimizer

PyTree = Any
PHASE_STREAM = 2**31 - 16  # folded into the step's key, less the phase's number; no batch has so many positions


class TrainStep(Protocol):
    """`step(state, frozen, batch, refresh=True, due=None) -> (state, metrics)`, compiled; also has jit's `lower`."""

    def __call__(
        self,
        state: TrainState,
        frozen: PyTree,
        batch: Batch,
        refresh: bool = True,
        due: tuple[str, ...] | None = None,
    ) -> tuple[TrainState, Metrics]: ...

    def lower(
        self,
        state: TrainState,
        frozen: PyTree,
        batch: Batch,
        refresh: bool = True,
        due: tuple[str, ...] | None = None,
    ) -> jax.stages.Lowered: ...


@dataclass(frozen=True)
class Settings:
    """What the step of every phase shares; `make_train_step` says what each means."""

    mesh: Mesh
    fair: FairConfig
    accumulate: int
    ema_decay: float | None
    split_above: int
    split_frozen: bool


def make_train_step(
    system: System,
    optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    mesh: Mesh,
    fair: FairConfig,
    *,
    accumulate: int = 1,
    clip_norm: float | Mapping[str, float | None] | None = None,
    ema_decay: float | None = None,
    split_above: int = SPLIT_ABOVE,
    split_frozen: bool = False,
) -> TrainStep:
    """The compiled train step; `state` is donated, `frozen` is not.

    Phases run one after the other, each on what the one before left. The batch is split over the mesh, large trainables
    (with their moments and average) over its `fsdp` axis, and so is `frozen` with `split_frozen`: arrays must be placed
    that way (sharding.place, with the same `split_above`). `refresh` and `due` are constants of the program: `refresh`
    True solves for the weights, False takes the last ones and costs what a plain step costs; `due` names the phases
    that run, None all. optimizer and clip_norm are those of all players, or by player; the combined gradient's norm is
    cut to clip_norm. A gradient or statistic that is not finite leaves its phase's trainables, optimiser state,
    averages, statistics and rule as they were and adds one to `skipped`.
    """
    settings = Settings(mesh, fair, accumulate, ema_decay, split_above, split_frozen)
    phases = system.phases

    def step(
        state: TrainState, frozen: PyTree, batch: Batch, refresh: bool = True, due: tuple[str, ...] | None = None
    ) -> tuple[TrainState, Metrics]:
        metrics: Metrics = {}
        key = jax.random.fold_in(state.key, state.step)
        for index, phase in enumerate(phases):
            if due is None or phase.name in due:
                own = optimizer[phase.player] if isinstance(optimizer, Mapping) else optimizer
                clip = clip_norm[phase.player] if isinstance(clip_norm, Mapping) else clip_norm
                own_key = jax.random.fold_in(key, PHASE_STREAM - index) if index else key
                state, more = _run_phase(phase, settings, own, clip, state, frozen, batch, own_key, refresh)
                metrics |= labelled(more, phase.name if len(phases) > 1 else "")
        state = _constrained(replace(state, step=state.step + 1), mesh, split_above)
        return state, metrics | {"skipped": jnp.sum(jnp.stack(list(state.skipped.values())))}

    return jax.jit(step, donate_argnums=0, static_argnames=("refresh", "due"))


def _run_phase(
    phase: Phase,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    clip_norm: float | None,
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    key: jax.Array,
    refresh: bool,
) -> tuple[TrainState, Metrics]:
    """One phase of a step: its gradient on all devices, then its player's update."""
    mesh = settings.mesh
    specs = leaf_specs(mesh, state.trainable, settings.split_above)
    frozen_specs = jax.tree.map(lambda _: WHOLE, frozen)
    if settings.split_frozen:
        frozen_specs = leaf_specs(mesh, frozen, settings.split_above)
    own_specs = moved(phase, specs)
    combining = Combining(phase, settings.fair, own_specs, settings.accumulate)

    def local(trainable, statistics, frozen, batch, key, fair_state):
        size = next(iter(batch.values())).shape[0]
        batch = batch | {"position": jax.lax.axis_index(AXES) * size + jnp.arange(size)}
        parts = Parts(box(trainable, specs), statistics, box(frozen, frozen_specs))
        found = combining(parts, batch, key, fair_state, refresh)
        return found.gradient, found.state, found.statistics, found.metrics

    gradient, fair_state, statistics, metrics = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, WHOLE, frozen_specs, BATCH_SPEC, WHOLE, WHOLE),
        out_specs=(own_specs, WHOLE, WHOLE, WHOLE),
        check_vma=False,
    )(state.trainable, state.statistics, frozen, batch, key, state.fair[phase.name])

    finite, norm = metrics.pop("finite"), metrics["gradient_norm"]
    for leaf in jax.tree.leaves(statistics):
        finite &= jnp.isfinite(leaf).all()
    new = replace(state, fair=state.fair | {phase.name: fair_state}, statistics=statistics)
    new = _updated(new, phase, gradient, norm, optimizer, clip_norm, settings.ema_decay)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    skipped = state.skipped | {phase.name: state.skipped[phase.name] + jnp.where(finite, 0, 1)}
    return replace(kept, skipped=skipped), metrics


def labelled(metrics: Metrics, phase: str) -> Metrics:
    """Metrics with their phase's name, as in loss/generator.adversarial and gradient_norm/generator."""
    if not phase:
        return metrics
    named = {}
    for name, value in metrics.items():
        kind, _, objective = name.partition("/")
        named[f"{kind}/{phase}.{objective}" if objective else f"{kind}/{phase}"] = value
    return named


def due_phases(system: System, index: int) -> tuple[str, ...]:
    """The names of the phases that run at step `index`, from 0."""
    return tuple(phase.name for phase in system.phases if index % phase.every == 0)


def optimizers_of(config: RunConfig, system: System) -> dict[str, optax.GradientTransformation]:
    """The optimiser of each player of a run's system."""
    players = dict.fromkeys(phase.player for phase in system.phases)
    return {player: make_optimizer(config.optimizer_of(player), config.train.steps) for player in players}


def step_of_run(
    config: RunConfig, system: System, optimizer: Mapping[str, optax.GradientTransformation], mesh: Mesh
) -> TrainStep:
    """`make_train_step` with the settings of a run."""
    train = config.train
    return make_train_step(
        system,
        optimizer,
        mesh,
        config.fair,
        accumulate=train.accumulate,
        clip_norm={player: config.optimizer_of(player).clip_norm for player in optimizer},
        ema_decay=train.ema_decay,
        split_frozen=train.shard_frozen,
    )


def _updated(
    state: TrainState,
    phase: Phase,
    gradient: PyTree,
    norm: jax.Array,
    optimizer: optax.GradientTransformation,
    clip_norm: float | None,
    ema_decay: float | None,
) -> TrainState:
    """One update of a phase's player with a gradient of the given norm."""
    if clip_norm is not None:
        shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        gradient = jax.tree.map(lambda leaf: leaf * shrink, gradient)
    own = moved(phase, state.trainable)
    updates, opt_state = optimizer.update(gradient, state.optimizers[phase.player], own)
    own = optax.apply_updates(own, updates)
    ema, ema_statistics = state.ema, state.ema_statistics
    if ema is not None and ema_decay is not None:
        # The average follows quickly at first, so that short runs are not dominated by the start.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))

        def averaged(old: PyTree, new: PyTree) -> PyTree:
            return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), old, new)

        ema = with_moved(phase, ema, averaged(moved(phase, ema), own))
        ema_statistics = averaged(ema_statistics, state.statistics)
    return replace(
        state,
        trainable=with_moved(phase, state.trainable, own),
        optimizers=state.optimizers | {phase.player: opt_state},
        ema=ema,
        ema_statistics=ema_statistics,
    )


def _constrained(state: TrainState, mesh: Mesh, split_above: int) -> TrainState:
    """The state, placed as `sharding.place` places it, so that a step's result fits the next step's argument."""
    placed = {
        name: jax.lax.with_sharding_constraint(tree, named(mesh, leaf_specs(mesh, tree, split_above)))
        for name in ("trainable", "optimizers", "ema")
        if (tree := getattr(state, name)) is not None
    }
    return replace(state, **placed)
