"""Combiner rules that read the values of the losses; most of them keep a state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.losses.gram import read_priority
from fairhuman_jax.losses.rule import Rule, Solved, TaskView

Array = jax.Array
PyTree = Any

LOSS_FLOOR = 1e-8


def log_sum(*, priority: Any = None) -> Rule:
    """Sum of logarithms, sum_i p_i log L_i: weights p_i / L_i, independent of a loss's unit; 0 where L_i <= 0."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        losses = view.losses
        weights = read_priority(priority, losses.shape[0], losses.dtype) / jnp.where(losses > 0, losses, 1.0)
        return jnp.where(losses > 0, weights, 0.0), state, jnp.zeros(())

    return Rule(solve, reads="losses", needs_losses=True)


def rlw() -> Rule:
    """Random loss weighting: softmax of K standard normal numbers, drawn anew in each call. arXiv 2111.10603."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        known = view.losses if view.gram is None else view.gram[0]
        return jax.nn.softmax(jax.random.normal(view.key, known.shape, known.dtype)), state, jnp.zeros(())

    return Rule(solve, reads="losses", needs_key=True)


def dwa(*, window: int = 25, temperature: float = 2.0) -> Rule:
    """Dynamic weight average: softmax(r / T), r_i the mean of the last `window` losses over the mean of the `window`
    losses before them; equal weights in the first `window` calls. The state is the history [2 window, K], oldest first.

    Losses of exactly 0 (an empty task, or no call yet) are left out of the means.
    The weights sum to 1, as in the reference; `rescale="n_tasks"` is the paper's scale.
    Source: Liu et al., arXiv 1803.10704.
    Raises: ValueError for a window below 1 or a temperature that is not positive.
    """
    if window < 1 or not temperature > 0:
        raise ValueError(f"dwa: window={window}, temperature={temperature}; expected window >= 1 and temperature > 0")

    def init(count: int) -> PyTree:
        return jnp.zeros((2 * window, count), jnp.float32)

    def solve(view: TaskView, state: PyTree) -> Solved:
        history = jnp.concatenate([state[1:], view.losses[None].astype(jnp.float32)])
        older, recent = _mean_of_present(history[:window]), _mean_of_present(history[window:])
        known = (older != 0) & (recent != 0)
        ratio = jnp.where(known, recent / jnp.where(known, older, 1.0), 1.0)
        return jax.nn.softmax(ratio / temperature), history, jnp.zeros(())

    return Rule(solve, init, reads="losses", needs_losses=True)


def uncertainty(*, learning_rate: float = 1e-3) -> Rule:
    """Uncertainty weighting, sum_i (exp(-s_i) L_i + s_i) / 2: weights exp(-s_i) / 2; its own Adam learns s from 0.

    s_i moves towards log L_i; a loss of exactly 0 (an empty task) gives s_i no slope.
    Source: Kendall et al., arXiv 1705.07115.
    """

    def init(count: int) -> PyTree:
        return _adam_init(count)

    def solve(view: TaskView, state: PyTree) -> Solved:
        weights = 0.5 * jnp.exp(-state["value"])
        slope = jnp.where(view.losses != 0, 0.5 - weights * view.losses, 0.0)
        return weights, _adam_step(state, slope, learning_rate, 0.0), jnp.zeros(())

    return Rule(solve, init, reads="losses", needs_losses=True)


def famo(*, learning_rate: float = 0.025, weight_decay: float = 1e-5, min_losses: Any = None) -> Rule:
    """Fast adaptive multitask optimization: weights z_i / (c D_i), z = softmax(xi), D_i = L_i - min_i + 1e-8,
    c = sum_i z_i / D_i. Adam updates xi from the change of log D between two calls, so the tasks whose losses
    fall slowest gain weight. The change is measured between consecutive batches, which saves a second forward pass.

    `min_losses` [K] are lower bounds of the losses, default 0. A loss of exactly 0 (an empty task) gets weight 0.
    Source: FAMO, arXiv 2306.03792.
    """

    def init(count: int) -> PyTree:
        return {"xi": _adam_init(count), "losses": jnp.zeros(count, jnp.float32)}

    def above(losses: Array) -> Array:
        lowest = 0.0 if min_losses is None else read_priority(min_losses, losses.shape[0], losses.dtype)
        return jnp.maximum(losses - lowest, 0.0) + LOSS_FLOOR

    def solve(view: TaskView, state: PyTree) -> Solved:
        losses = view.losses.astype(jnp.float32)
        present = losses != 0
        # The stored losses are 0 before the first call, so the first call does not change xi.
        both = present & (state["losses"] != 0)
        fall = jnp.where(both, jnp.log(above(state["losses"])) - jnp.log(above(losses)), 0.0)
        before = jax.nn.softmax(state["xi"]["value"])
        slope = before * (fall - jnp.sum(before * fall))
        moved = _adam_step(state["xi"], slope, learning_rate, weight_decay)
        xi = jax.tree.map(lambda new, old: jnp.where(jnp.any(both), new, old), moved, state["xi"])
        shares = jnp.where(present, jax.nn.softmax(xi["value"]) / above(losses), 0.0)
        total = jnp.sum(shares)
        return shares / jnp.where(total > 0, total, 1.0), {"xi": xi, "losses": losses}, jnp.zeros(())

    return Rule(solve, init, reads="losses", needs_losses=True)


def _mean_of_present(losses: Array) -> Array:
    """Mean over the nonzero entries of each column of [N, K]; 0 for a column of zeros."""
    present = losses != 0
    return jnp.sum(losses, axis=0) / jnp.maximum(jnp.sum(present, axis=0), 1)


def _adam_init(count: int) -> dict[str, Array]:
    zeros = jnp.zeros(count, jnp.float32)
    return {"value": zeros, "mean": zeros, "square": zeros, "steps": jnp.zeros((), jnp.int32)}


def _adam_step(state: dict[str, Array], slope: Array, rate: float, decay: float) -> dict[str, Array]:
    """One step of Adam (0.9, 0.999, 1e-8) with L2 decay added to the slope."""
    slope = slope.astype(jnp.float32) + decay * state["value"]
    steps = state["steps"] + 1
    mean = 0.9 * state["mean"] + 0.1 * slope
    square = 0.999 * state["square"] + 0.001 * jnp.square(slope)
    step = mean / (1.0 - 0.9**steps) / (jnp.sqrt(square / (1.0 - 0.999**steps)) + 1e-8)
    return {"value": state["value"] - rate * step, "mean": mean, "square": square, "steps": steps}
