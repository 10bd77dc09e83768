"""Combiner rules that read the Gram matrix of the task gradients, and two rules that read nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.losses.alpha_fair import check_alpha, mpd_weights, solve_spd
from fairhuman_jax.losses.gram import cosine_matrix, gram_product, read_priority
from fairhuman_jax.losses.rule import Rule, Solved, TaskView
from fairhuman_jax.losses.simplex import conflict_averse_point, min_norm_point, squared_length

Array = jax.Array
PyTree = Any


def mpd(*, alpha: float | Array = 2.0, priority: Any = None) -> Rule:
    """Alpha-fair weights (`mpd_weights`), (G w)_i = (p_i / w_i)^(1/alpha). FairHuman; FairGrad, arXiv 2402.15638.

    Raises: ValueError for an alpha that is negative or not finite.
    """
    check_alpha(alpha)

    def solve(view: TaskView, state: PyTree) -> Solved:
        weights = mpd_weights(view.gram, alpha, priority)
        return weights, state, _fair_residual(view, weights, alpha, priority)

    return Rule(solve, rescale="n_tasks", power=2.0 * alpha / (alpha + 1.0))


def nash_mtl(*, priority: Any = None) -> Rule:
    """Nash bargaining, G a = 1 / a on G / ||G||_F: the alpha-fair equation at alpha = 1. arXiv 2202.01017."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        common = jnp.maximum(jnp.max(jnp.abs(view.gram)), jnp.finfo(view.gram.dtype).tiny)
        norm = jnp.sqrt(jnp.sum(jnp.square(view.gram / common)))
        unit = view._replace(gram=view.gram / common / jnp.where(norm > 0, norm, 1.0))
        weights = mpd_weights(unit.gram, 1.0, priority)
        return weights, state, _fair_residual(unit, weights, 1.0, priority)

    return Rule(solve)


def linear_sum(*, priority: Any = None) -> Rule:
    """Plain sum, sum_i p_i L_i, with p = 1 by default."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        return _ones(view, priority), state, jnp.zeros(())

    return Rule(solve, reads="losses")


def single(*, task: int = 0) -> Rule:
    """Gradient of the single loss L_task."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        ones = _ones(view, None)
        if not 0 <= task < ones.shape[0]:
            raise ValueError(f"single: task={task}; there are {ones.shape[0]} tasks, counted from 0")
        return jnp.zeros_like(ones).at[task].set(1.0), state, jnp.zeros(())

    return Rule(solve, reads="losses")


def mgda(*, normalization: str = "none") -> Rule:
    """The shortest vector of the gradients' convex hull. `normalization` divides the gradients that span the hull
    by "norm", "loss" or "loss+" (loss times norm); the weights then multiply the original gradients.
    Sener and Koltun, arXiv 1810.04650.

    Raises: ValueError for another normalization.
    """
    known = ("none", "norm", "loss", "loss+")
    if normalization not in known:
        raise ValueError(f"mgda: normalization={normalization!r}; known: {', '.join(known)}")

    def solve(view: TaskView, state: PyTree) -> Solved:
        gram, active = view.gram, view.active
        divisor = jnp.ones_like(gram[0])
        if normalization in ("norm", "loss+"):
            divisor = jnp.sqrt(jnp.diagonal(gram))
        if normalization in ("loss", "loss+"):
            divisor = divisor * view.losses
        divisor = jnp.where(active & (divisor != 0), divisor, 1.0)
        weights, gap = min_norm_point(gram / divisor[:, None] / divisor, active)
        return weights, state, gap

    return Rule(solve, rescale="n_tasks", needs_losses=normalization.startswith("loss"))


def cagrad(*, c: float = 0.4) -> Rule:
    """The direction within c ||g_0|| of the mean g_0 that improves the worst task most: (g_0 + c ||g_0|| g_w / ||g_w||)
    / (1 + c^2), with w from `conflict_averse_point`. CAGrad, arXiv 2110.14048.

    Raises: ValueError for a negative c.
    """
    if not c >= 0:
        raise ValueError(f"cagrad: c={c}; expected a number >= 0 (0 the mean)")

    def solve(view: TaskView, state: PyTree) -> Solved:
        mean = jnp.full_like(view.gram[0], 1.0 / view.gram.shape[0])
        radius = c * jnp.sqrt(jnp.maximum(jnp.mean(view.gram), 0.0))
        point, gap = conflict_averse_point(view.gram, view.active, mean, radius)
        length = squared_length(view.gram, point)
        pull = jnp.where(length > 0, radius / jnp.sqrt(jnp.where(length > 0, length, 1.0)), 0.0)
        return jnp.where(view.active, mean + pull * point, 0.0) / (1.0 + c * c), state, gap

    return Rule(solve, rescale="n_tasks")


def imtl_g() -> Rule:
    """Equal projections on all unit gradients, sum a_i = 1: a_i = v_i / ||g_i|| up to a factor, rho v = 1 with rho the
    cosines. Weights may be negative. IMTL, Liu et al. 2021 (openreview IMPnRXEWpvr)."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        gram, active = view.gram, view.active
        norm = jnp.sqrt(jnp.where(active, jnp.diagonal(gram), 1.0))
        norm = norm / jnp.max(jnp.where(active, norm, 0.0), initial=jnp.finfo(gram.dtype).tiny)
        eps = jnp.finfo(gram.dtype).eps
        unit = cosine_matrix(gram, active)
        eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
        # A ridge the size of rounding errors keeps the system solvable for dependent gradients.
        system = jnp.where(eye > 0, 1.0 + 4.0 * gram.shape[0] * eps, unit)
        values = jnp.where(active, solve_spd(system, active.astype(gram.dtype)) / norm, 0.0)
        total, smallest = jnp.sum(values), eps * jnp.sum(jnp.abs(values))
        total = jnp.where(jnp.abs(total) > smallest, total, jnp.where(smallest > 0, smallest, 1.0))
        weights = values / total
        projections = gram_product(unit, weights * norm)
        spread = jnp.max(jnp.where(active, projections, -jnp.inf)) - jnp.min(jnp.where(active, projections, jnp.inf))
        size = jnp.sum(jnp.abs(weights * norm))
        return weights, state, jnp.where(size > 0, spread / jnp.where(size > 0, size, 1.0), 0.0)

    return Rule(solve)


def pcgrad(*, priority: Any = None) -> Rule:
    """Remove from each gradient its conflicts with the others, in random order: where g_i . g_j < 0,
    g_i -= (g_i . g_j / ||g_j||^2) g_j with the original g_j; then sum_i p_i g_i. PCGrad, arXiv 2001.06782."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        gram, active = view.gram, view.active
        count = gram.shape[0]
        order = projection_order(view.key, count)
        square = jnp.where(active, jnp.diagonal(gram), 1.0)
        rows = jnp.eye(count, dtype=gram.dtype)
        for step in range(count):
            other = order[:, step]
            inner = jnp.sum(rows * gram[other], axis=1)
            conflicts = (inner < 0) & active[other] & (other != jnp.arange(count))
            share = jnp.where(conflicts, inner / square[other], 0.0)
            rows = rows - share[:, None] * (other[:, None] == jnp.arange(count))
        priorities = read_priority(priority, gram.shape[0], gram.dtype)
        return jnp.sum(priorities[:, None] * rows, axis=0), state, jnp.zeros((), gram.dtype)

    return Rule(solve, needs_key=True)


def projection_order(key: Array, count: int) -> Array:
    """A separate random order of all tasks for each of `count` tasks: int [K, K]."""
    return jax.vmap(lambda one: jax.random.permutation(one, count))(jax.random.split(key, count))


def graddrop() -> Rule:
    """Keep one sign in each coordinate: positive entries where P > U, negative entries elsewhere, with
    P = (1 + sum_i g_i / sum_i |g_i|) / 2 and U uniform; mean over tasks. GradDrop, arXiv 2010.06808."""

    def solve(view: TaskView, state: PyTree) -> Solved:
        count = view.gram.shape[0]
        return jnp.full(count, 1.0 / count, view.gram.dtype), state, jnp.zeros((), view.gram.dtype)

    return Rule(solve, reads="gradients", rescale="n_tasks", needs_key=True, mix=_keep_one_sign)


def _keep_one_sign(task_grads: PyTree, key: Array) -> PyTree:
    """Mean over tasks of the entries that GradDrop keeps, fp32; each leaf draws from its own key."""
    leaves, structure = jax.tree.flatten(task_grads)

    def kept(leaf: Array, leaf_key: Array) -> Array:
        rows = leaf.astype(jnp.float32)
        size = jnp.sum(jnp.abs(rows), axis=0)
        purity = 0.5 * (1.0 + jnp.sum(rows, axis=0) / jnp.where(size > 0, size, 1.0))
        positive = purity > jax.random.uniform(leaf_key, rows.shape[1:])
        return jnp.mean(jnp.where(positive == (rows > 0), rows, 0.0), axis=0)

    keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
    return structure.unflatten([kept(leaf, one) for leaf, one in zip(leaves, keys, strict=True)])


def _ones(view: TaskView, priority: Any) -> Array:
    known = view.losses if view.gram is None else view.gram[0]
    return read_priority(priority, known.shape[0], known.dtype)


def _fair_residual(view: TaskView, weights: Array, alpha: float | Array, priority: Any) -> Array:
    """Largest relative error of w_i (G w)_i^alpha = p_i."""
    wanted = read_priority(priority, weights.shape[0], weights.dtype)
    error = weights * jnp.maximum(gram_product(view.gram, weights), 0.0) ** alpha / wanted - 1.0
    return jnp.max(jnp.where(view.active, jnp.abs(error), 0.0))
