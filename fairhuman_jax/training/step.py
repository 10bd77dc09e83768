"""The train step of every system: K gradients of one forward pass, one combination, one optimiser update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from fairhuman_jax.losses import combine
from fairhuman_jax.systems.contract import Batch, System
from fairhuman_jax.training.objectives import accumulated_task_gradients
from fairhuman_jax.training.sharding import AXES, BATCH_SPEC
from fairhuman_jax.training.state import TrainState

PyTree = Any
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class FairConfig:
    """How K > 1 gradients become one: `method` mpd (alpha-fair; alpha 2 is minimum potential delay), sum, or single
    (the first objective alone); `priority` weighs objectives inside the fair rule; `rescale` sets the length of the
    combined gradient, None = n_tasks for mpd and none otherwise (losses.fairness). A system with one objective is
    trained on its plain gradient whatever stands here."""

    method: str = "mpd"
    alpha: float = 2.0
    priority: tuple[float, ...] | None = None
    rescale: str | None = None


def make_train_step(
    system: System,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    fair: FairConfig,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """The compiled `step(state, frozen, batch) -> (state, metrics)`; `state` is donated, `frozen` is not.

    The combined gradient's norm is cut to `clip_norm`. The batch is split over the mesh; task gradients are averaged
    over it before the Gram matrix is formed, so every device solves the same system. A non-finite gradient leaves
    trainables, optimiser state and average as they were and adds one to `skipped`.
    """

    def local_gradients(trainable, frozen, batch, key):
        size = next(iter(batch.values())).shape[0]
        first = jax.lax.axis_index(AXES) * size
        batch = batch | {"position": first + jnp.arange(size)}
        gradients, losses = accumulated_task_gradients(system, trainable, frozen, batch, key, accumulate)
        rule = fair if len(losses) > 1 else FairConfig(method="single")
        combined, info = combine(
            gradients,
            method=rule.method,
            alpha=rule.alpha,
            priority=None if rule.priority is None else jnp.asarray(rule.priority),
            rescale=rule.rescale,
            axis_name=AXES,
        )
        # Named here, where the objectives are in order: a dict leaves a transformation sorted by name.
        metrics = {f"loss/{name}": loss for name, loss in jax.lax.pmean(losses, AXES).items()}
        metrics |= {f"weight/{name}": weight for name, weight in zip(losses, info["weights"], strict=True)}
        return combined, metrics, info["finite"]

    replicated = PartitionSpec()
    sharded_gradients = jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(replicated, replicated, BATCH_SPEC, replicated),
        out_specs=replicated,
        check_vma=False,
    )

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradient, metrics, finite = sharded_gradients(state.trainable, frozen, batch, key)
        state, norm = _apply(state, gradient, finite, optimizer, clip_norm, ema_decay)
        return state, metrics | {"gradient_norm": norm, "skipped": state.skipped}

    return jax.jit(step, donate_argnums=0)


def _apply(
    state: TrainState,
    gradient: PyTree,
    finite: jax.Array,
    optimizer: optax.GradientTransformation,
    clip_norm: float | None,
    ema_decay: float | None,
) -> tuple[TrainState, jax.Array]:
    """One optimiser update, or none where the gradient is not finite."""
    norm = global_norm(gradient)
    finite = finite & jnp.isfinite(norm)
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
    new = replace(state, trainable=trainable, opt_state=opt_state, ema=ema)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, replace(state, step=state.step))
    return replace(kept, step=state.step + 1, skipped=state.skipped + jnp.where(finite, 0, 1)), norm


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, float32.

    The leaves' squares are sorted before they are summed: XLA's CPU compiler fuses a plain sum of N scalars, whole,
    into each of the N leaves that the norm scales, and compiling N^2 operands takes minutes; a sort is never fused.
    """
    squares = jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)])
    return jnp.sqrt(jnp.sum(jnp.sort(squares)))
