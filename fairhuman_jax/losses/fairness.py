"""Fair combination of per-task gradients: alpha-fair weights from a Gram matrix, and the path that applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from fairhuman_jax.losses.alpha_fair import solve_alpha_fair

Array = jax.Array
PyTree = Any

# A gradient whose norm is below fp32 epsilon times the largest one is rounding noise of the shared backward pass.
ACTIVE_THRESHOLD = 2.0**-46
RESCALES = ("n_tasks", "none", "match_sum_norm", "unit")


def mpd_weights(gram: Array, alpha: float | Array = 2.0, priority: Array | None = None) -> Array:
    """Weights of the alpha-fair direction; alpha = 2 is the minimum-potential-delay (MPD) rule.

    Solves (G w)_i = (p_i / w_i)^(1/alpha), w > 0, over the tasks with a nonzero gradient; the others get w_i = 0.
    alpha = 0 gives w = p (uniform), 1 proportional fairness, large alpha approaches max-min.

    Args: `gram` [K, K] = J J^T, fp32 or fp64 (lower precisions are read as fp32); `alpha` >= 0, scalar, may be traced;
    `priority` [K] > 0, default ones.
    Returns w [K], in the dtype of the computation; all zero when `gram` holds an inf or NaN.
    Limits: w scales as gram^(-alpha/(alpha+1)) and is clipped to the largest finite number of its dtype; a task
    with G_ii <= 2^-46 max_j G_jj is inactive. Exactly opposed gradients have no finite solution: a ridge of one
    machine epsilon on the cosine matrix bounds their weights, and they cancel. First derivatives are
    the implicit ones; higher derivatives are not defined. Checked for alpha in [0.1, 100]; from about 10 on, weights
    of tasks far from the worst one may be floored near zero.
    Source: FairHuman (arXiv 2507.02714); FairGrad (arXiv 2402.15638).
    """
    gram = _as_float(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"mpd_weights: gram has shape {gram.shape}; expected a square matrix [K, K]")
    _check_alpha(alpha)
    priority = _read_priority(priority, gram)
    finite = jnp.all(jnp.isfinite(gram))
    gram = jnp.where(finite, gram, jnp.eye(gram.shape[0], dtype=gram.dtype))
    active = active_tasks(gram)

    # The common scale c is taken out before any power: w(G) = c^(-alpha/(alpha+1)) w(G / c), for every c.
    tiny = jnp.finfo(gram.dtype).tiny
    common = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.diagonal(gram)), tiny))
    weights = solve_alpha_fair(gram / common, active, alpha, priority)
    alpha = jnp.asarray(alpha, gram.dtype)
    largest = jnp.finfo(gram.dtype).max
    weights = jnp.minimum(weights * common ** (-alpha / (alpha + 1.0)), largest)
    return jnp.where(active & finite, weights, 0.0)


def active_tasks(gram: Array) -> Array:
    """Tasks that take part: G_ii > 2^-46 max_j G_jj and G_ii a normal number.

    `gram` [K, K]; returns bool [K].
    """
    diagonal = jnp.diagonal(gram)
    floor = jnp.finfo(gram.dtype).tiny
    return diagonal > jnp.maximum(ACTIVE_THRESHOLD * jnp.max(diagonal), floor)


def gram_matrix(task_grads: PyTree, scale: float | Array = 1.0) -> Array:
    """Gram matrix of task gradients, G_ij = scale^2 <g_i, g_j>, summed leaf by leaf in fp32.

    Every leaf of `task_grads` is [K, ...]; `scale` multiplies the gradients first, so that the squares of tiny or
    huge ones stay in range (see `gradient_scale`). Returns fp32 [K, K]. Raises ValueError when the leading axes differ.
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
    """K, the leading axis shared by every leaf. Raises ValueError when leaves disagree or there are none."""
    leaves = jax.tree.leaves(task_grads)
    counts: set[Any] = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(counts) != 1 or None in counts:
        found = sorted(map(str, counts)) if counts else "no leaves"
        raise ValueError(f"task_grads: every leaf needs one leading task axis of the same size; found {found}")
    return counts.pop()


def task_weights(
    gram: Array,
    method: str = "mpd",
    *,
    alpha: float | Array = 2.0,
    priority: Array | None = None,
    rescale: str | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Coefficients of a linear combination of task gradients, from their Gram matrix alone.

    `method`: "mpd" solves for fair weights; "sum" uses `priority` (default ones) as they are; "single" keeps
    the first task only. `rescale` multiplies the weights: "n_tasks" by K (the reference), "none" by 1 (the paper),
    "match_sum_norm" so that the combined norm is that of the plain sum, "unit" to norm 1; None = "n_tasks" for
    "mpd", "none" otherwise.
    Returns (coefficients [K], info): info has `weights` [K] before rescaling, `gram` [K, K], `cosines` [K, K],
    `active` bool [K], `finite` bool, `residual` (largest relative error of w_i (G w)_i^alpha = p_i; 0 unless "mpd").
    With a non-finite Gram matrix all coefficients are 0 and `finite` is False.
    """
    gram = _as_float(gram)
    if method not in _RULES:
        raise ValueError(f"task_weights: unknown method {method!r}; known: {', '.join(_RULES)}")
    rescale = rescale or ("n_tasks" if method == "mpd" else "none")
    if rescale not in RESCALES:
        raise ValueError(f"task_weights: unknown rescale {rescale!r}; known: {', '.join(RESCALES)}")
    priority = _read_priority(priority, gram)
    finite = jnp.all(jnp.isfinite(gram))
    safe = jnp.where(finite, gram, jnp.eye(gram.shape[0], dtype=gram.dtype))
    active = active_tasks(safe)
    weights = jnp.where(finite, _RULES[method](safe, alpha, priority), 0.0)
    residual = jnp.zeros((), gram.dtype)
    if method == "mpd":
        error = weights * jnp.maximum(_product(safe, weights), 0.0) ** alpha / priority - 1.0
        residual = jnp.max(jnp.where(active & finite, jnp.abs(error), 0.0))
    norm = jnp.sqrt(jnp.where(active, jnp.diagonal(safe), 1.0))
    pair = active[:, None] & active[None, :]
    info = {
        "weights": weights,
        "gram": gram,
        "cosines": jnp.where(pair, safe / (norm[:, None] * norm[None, :]), 0.0),
        "active": active & finite,
        "finite": finite,
        "residual": residual,
    }
    return weights * _rescale_factor(safe, weights, rescale), info


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


def combine(
    task_grads: PyTree,
    method: str = "mpd",
    *,
    alpha: float | Array = 2.0,
    priority: Array | None = None,
    rescale: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    loss_scale: float | Array = 1.0,
) -> tuple[PyTree, dict[str, Array]]:
    """Combine K task gradients into one, by "mpd", "sum" or "single" (see `task_weights`).

    Every leaf of `task_grads` is [K, ...]. With `axis_name` the task gradients are averaged over that mapped axis
    first (the Gram matrix is not linear in them). `loss_scale` is the factor the losses were multiplied by; it is
    removed before anything else. Returns (grads without the task axis, info as `task_weights` plus
    `coefficients` [K], the factors applied to the gradients). If any task gradient is not finite, grads are zero and
    `info["finite"]` is False: the caller skips the update. The direction is right for any finite fp32 scale;
    the entries of `gram`, `weights` and `coefficients` leave the fp32 range for gradient norms
    outside about 1e-19 .. 1e19 and are reported as 0 or the largest number.
    """
    if axis_name is not None:
        task_grads = jax.tree.map(
            lambda leaf: jax.lax.pmean(leaf.astype(jnp.float32), axis_name).astype(leaf.dtype), task_grads
        )
    scale = gradient_scale(task_grads)
    applied, info = task_weights(
        gram_matrix(task_grads, scale), method, alpha=alpha, priority=priority, rescale=rescale
    )
    # What is solved is h = unit * g, g the gradient of the unscaled loss; both results go back to g by one power.
    unit = scale * loss_scale
    weight_unit, output_unit = _undo_unit(unit, method, alpha, rescale)
    grads = jax.tree.map(
        lambda total, leaf: jnp.where(info["finite"], total * output_unit, 0.0).astype(leaf.dtype),
        combine_weighted(task_grads, applied, scale),
        task_grads,
    )
    largest = jnp.finfo(jnp.float32).max
    info["gram"] = jnp.clip(info["gram"] / unit / unit, -largest, largest)
    info["weights"] = jnp.minimum(info["weights"] * weight_unit, largest)
    info["coefficients"] = jnp.minimum(applied * output_unit * scale, largest)
    return grads, info


def fair_combine(
    task_grads: PyTree,
    alpha: float | Array = 2.0,
    priority: Array | None = None,
    rescale: str = "n_tasks",
    axis_name: str | tuple[str, ...] | None = None,
    loss_scale: float | Array = 1.0,
) -> tuple[PyTree, dict[str, Array]]:
    """Alpha-fair (alpha = 2: MPD) combination of K task gradients, d = c sum_i w_i g_i with w from `mpd_weights`.

    `combine` with method "mpd": same arguments, same (grads, info).
    """
    return combine(
        task_grads,
        "mpd",
        alpha=alpha,
        priority=priority,
        rescale=rescale,
        axis_name=axis_name,
        loss_scale=loss_scale,
    )


def _sum_weights(gram: Array, alpha: float | Array, priority: Array) -> Array:
    return priority


def _single_weights(gram: Array, alpha: float | Array, priority: Array) -> Array:
    return jnp.zeros_like(priority).at[0].set(1.0)


_RULES: dict[str, Callable[[Array, float | Array, Array], Array]] = {
    "mpd": mpd_weights,
    "sum": _sum_weights,
    "single": _single_weights,
}


def _rescale_factor(gram: Array, weights: Array, rescale: str) -> Array | float:
    """The scalar that `rescale` multiplies the weights by; 1 where the combined gradient is zero."""
    if rescale == "none":
        return 1.0
    if rescale == "n_tasks":
        return float(gram.shape[0])
    squared = jnp.sum(weights * _product(gram, weights))
    wanted = 1.0 if rescale == "unit" else jnp.maximum(jnp.sum(gram), 0.0)
    return jnp.where(squared > 0, jnp.sqrt(wanted / jnp.where(squared > 0, squared, 1.0)), 1.0)


def _undo_unit(unit: Array, method: str, alpha: float | Array, rescale: str | None) -> tuple[Array, Array]:
    """Factors that turn weights and combined gradient of unit * g into those of g."""
    fair = method == "mpd"
    one = jnp.ones_like(unit)
    weight_unit = unit ** (2.0 * alpha / (alpha + 1.0)) if fair else one
    if rescale == "unit":
        return weight_unit, one
    if fair and rescale != "match_sum_norm":
        return weight_unit, unit ** ((alpha - 1.0) / (alpha + 1.0))
    return weight_unit, 1.0 / unit


def _product(gram: Array, weights: Array) -> Array:
    """G w by elementwise products: a dot may run in reduced precision on accelerators."""
    return jnp.sum(gram * weights, axis=-1)


def _as_float(gram: Array) -> Array:
    gram = jnp.asarray(gram)
    return gram.astype(jnp.promote_types(gram.dtype, jnp.float32))


def _read_priority(priority: Array | None, gram: Array) -> Array:
    count = gram.shape[0]
    if priority is None:
        return jnp.ones(count, gram.dtype)
    priority = jnp.asarray(priority, gram.dtype)
    if priority.shape != (count,):
        raise ValueError(f"priority has shape {priority.shape}; expected ({count},), one entry a task")
    return priority


def _check_alpha(alpha: float | Array) -> None:
    if not isinstance(alpha, jax.core.Tracer) and not 0.0 <= float(alpha) < float("inf"):
        raise ValueError(f"alpha is {alpha}; expected a finite number >= 0 (0 uniform, 1 proportional, 2 MPD)")
