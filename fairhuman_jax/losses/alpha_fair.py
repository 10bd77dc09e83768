"""Alpha-fair weights, solved by a damped Newton method on a diagonally scaled Gram matrix."""

from __future__ import annotations

import functools
import math

import jax
import jax.core
import jax.numpy as jnp

from fairhuman_jax.losses.gram import active_tasks, as_float, read_priority

Array = jax.Array

NEWTON_STEPS = 40
LINE_SEARCH_HALVINGS = 10
BOUNDARY_FRACTION = 0.95
CONTINUATION_START = 3.0
TRACED_ALPHA_STAGES = 5


def mpd_weights(gram: Array, alpha: float | Array = 2.0, priority: Array | None = None) -> Array:
    """Weights of the alpha-fair direction; alpha = 2 is the minimum-potential-delay (MPD) rule.

    Solves (G w)_i = (p_i / w_i)^(1/alpha), w > 0, over the tasks with a nonzero gradient; other tasks get w_i = 0.
    alpha = 0 gives w = p (uniform), 1 gives proportional fairness, a large alpha approaches max-min.

    Args: `gram` [K, K] = J J^T, fp32 or fp64 (lower precisions are read as fp32); `alpha` >= 0, scalar, may be traced;
    `priority` [K] > 0, default ones.
    Returns w [K], in the dtype of the computation; all zero when `gram` holds an inf or NaN.
    Limits: w scales as gram^(-alpha/(alpha+1)) and is clipped to the largest finite number of its dtype; a task
    with G_ii <= 2^-46 max_j G_jj is inactive. Exactly opposed gradients have no finite solution: a ridge of one
    machine epsilon on the cosine matrix bounds their weights, and they cancel. First derivatives come from implicit
    differentiation; higher derivatives are not defined. Checked for alpha in [0.1, 100]; from about 10 on, weights
    of tasks far from the worst one may be floored near zero.
    Raises: ValueError for a Gram matrix that is not square, an alpha that is negative or not finite, or a priority
    without K entries.
    Source: FairHuman (arXiv 2507.02714); FairGrad (arXiv 2402.15638).
    """
    gram = as_float(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"mpd_weights: gram has shape {gram.shape}; expected a square matrix [K, K]")
    check_alpha(alpha)
    priority = read_priority(priority, gram.shape[0], gram.dtype)
    finite = jnp.all(jnp.isfinite(gram))
    gram = jnp.where(finite, gram, jnp.eye(gram.shape[0], dtype=gram.dtype))
    active = active_tasks(gram)

    # Divide by the common scale c before any power is taken: w(G) = c^(-alpha/(alpha+1)) w(G / c), for every c.
    tiny = jnp.finfo(gram.dtype).tiny
    common = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.diagonal(gram)), tiny))
    weights = solve_alpha_fair(gram / common, active, alpha, priority)
    alpha = jnp.asarray(alpha, gram.dtype)
    largest = jnp.finfo(gram.dtype).max
    weights = jnp.minimum(weights * common ** (-alpha / (alpha + 1.0)), largest)
    return jnp.where(active & finite, weights, 0.0)


def check_alpha(alpha: float | Array) -> None:
    """Check an exponent. Raises: ValueError unless `alpha` is traced or a finite number >= 0."""
    if not isinstance(alpha, jax.core.Tracer) and not 0.0 <= float(alpha) < float("inf"):
        raise ValueError(f"alpha is {alpha}; expected a finite number >= 0 (0 uniform, 1 proportional, 2 MPD)")


def solve_alpha_fair(gram: Array, active: Array, alpha: float | Array, priority: Array) -> Array:
    """Solve (G w)_i = (p_i / w_i)^(1/alpha), w > 0, over the active tasks.

    With s_i = p_i^(1/(alpha+1)) G_ii^(-alpha/(alpha+1)) and w = s v the equation is K v = v^(-1/alpha), K_ii = 1;
    multiplied by m_i^2, m_i = s_i sqrt(G_ii), it is the stationarity condition of the strictly convex function
    1/2 v^T M v - sum_i m_i^2 phi(v_i), M = m rho m, phi' = v^(-1/alpha), which a damped Newton method minimises.

    `gram` [K, K] finite, of order 1; `active` bool [K]; `alpha` >= 0; `priority` [K] > 0.
    Returns w [K]; the entries of inactive tasks are meaningless.
    """
    if isinstance(alpha, jax.core.Tracer):
        stages = TRACED_ALPHA_STAGES
    else:
        stages = max(1, 1 + math.ceil(math.log2(max(float(alpha), 1e-6) / CONTINUATION_START)))
    return _solve(gram, active, jnp.asarray(alpha, gram.dtype), priority, stages)


# Jitted separately, so that eager calls with the same number of stages share one program for all values of alpha.
@functools.partial(jax.jit, static_argnames="stages")
def _solve(gram: Array, active: Array, alpha: Array, priority: Array, stages: int) -> Array:
    dtype = gram.dtype
    norm = jnp.sqrt(jnp.where(active, jnp.diagonal(gram), 1.0))
    pair = active[:, None] & active[None, :]
    eye = jnp.eye(gram.shape[0], dtype=dtype)
    # The diagonal is 1 by definition. The ridge of one machine epsilon bounds the weights of exactly opposed gradients;
    # a larger ridge would dominate the error for nearly dependent gradients.
    cosines = jnp.where(pair & (eye == 0), gram / (norm[:, None] * norm[None, :]), 0.0)
    cosines = cosines + (1.0 + jnp.finfo(dtype).eps) * eye

    path = _alpha_path(alpha, stages)
    last = path[-1]
    values = _continuation(*jax.lax.stop_gradient((cosines, norm, active, path, priority)))

    # One more Newton step, with solution and Jacobian held constant: its derivative is the implicit derivative.
    stopped = jax.lax.stop_gradient
    matrix, share = _scaled_problem(cosines, norm, active, last, priority)
    step = -solve_spd(stopped(_hessian(values, matrix, share, last)), _gradient(values, matrix, share, last))
    values = _advance(values, stopped(_largest_step(values, step, last)) * step, last)
    scale = priority ** (1.0 / (last + 1.0)) * norm ** (-2.0 * last / (last + 1.0))
    return jnp.where(alpha > 0, scale * values, priority)


def _continuation(cosines: Array, norm: Array, active: Array, path: Array, priority: Array) -> Array:
    """Solution v for the last exponent of `path`, where each stage starts from the previous stage's solution."""

    def stage(start: Array, alpha: Array) -> tuple[Array, None]:
        matrix, share = _scaled_problem(cosines, norm, active, alpha, priority)
        return _newton(start, matrix, share, alpha), None

    values, _ = jax.lax.scan(stage, jnp.ones_like(norm), path)
    return values


def _alpha_path(alpha: Array, stages: int) -> Array:
    """Exponents of the continuation, in order: a geometric ramp up to a large alpha."""
    alpha = jnp.where(alpha > 0, alpha, 1.0)
    start = jnp.minimum(alpha, CONTINUATION_START)
    return start * (alpha / start) ** (jnp.arange(1, stages + 1, dtype=alpha.dtype) / stages)


def _scaled_problem(cosines: Array, norm: Array, active: Array, alpha: Array, priority: Array) -> tuple[Array, Array]:
    """M [K, K] and m^2 [K] of the scaled problem, normalised so that the largest m_i is 1."""
    share = norm ** ((1.0 - alpha) / (1.0 + alpha)) * priority ** (1.0 / (1.0 + alpha))
    share = jnp.where(active, share, 1.0)
    share = share / jax.lax.stop_gradient(jnp.max(share))
    return cosines * share[:, None] * share[None, :], share**2


def _newton(values: Array, matrix: Array, share: Array, alpha: Array) -> Array:
    """Run damped Newton from `values` > 0: limit a step at the boundary, then try all its halvings by Armijo's rule."""
    halvings = 0.5 ** jnp.arange(LINE_SEARCH_HALVINGS, dtype=values.dtype)
    power = 1.0 - 1.0 / alpha
    eps = jnp.finfo(values.dtype).eps

    def merit(point: Array) -> tuple[Array, Array]:
        logs = jnp.log(point)
        utility = jnp.where(power == 0, logs, jnp.expm1(power * logs) / jnp.where(power == 0, 1.0, power))
        quadratic = 0.5 * jnp.sum(point * jnp.sum(matrix * point, axis=-1))
        total = jnp.sum(share * utility)
        return quadratic - total, quadratic + jnp.sum(jnp.abs(share * utility))

    def body(_: int, point: Array) -> Array:
        gradient = _gradient(point, matrix, share, alpha)
        step = -solve_spd(_hessian(point, matrix, share, alpha), gradient)
        slope = jnp.sum(gradient * step)
        before, size = merit(point)
        sizes = _largest_step(point, step, alpha) * halvings
        after = jax.vmap(lambda length: merit(_advance(point, length * step, alpha))[0])(sizes)
        # Near the solution the true decrease is smaller than the rounding error: allow for that error.
        enough = after <= before + 1e-4 * sizes * slope + 8.0 * eps * size
        chosen = jnp.where(jnp.any(enough), sizes[jnp.argmax(enough)], sizes[-1])
        moved = _advance(point, chosen * step, alpha)
        return jnp.where(jnp.all(jnp.isfinite(moved)), moved, point)

    return jax.lax.fori_loop(0, NEWTON_STEPS, body, values)


def _largest_step(values: Array, step: Array, alpha: Array) -> Array:
    """Largest step length in (0, 1] that moves every entry above the floor at most 0.95 of the way to zero."""
    shrinks = (step < 0) & (values > 2.0 * _floor(alpha))
    ratio = jnp.where(shrinks, -values / jnp.where(shrinks, step, -1.0), jnp.inf)
    return jnp.minimum(1.0, BOUNDARY_FRACTION * jnp.min(ratio))


def _advance(values: Array, step: Array, alpha: Array) -> Array:
    return jnp.maximum(values + step, _floor(alpha))


def _floor(alpha: Array) -> Array:
    """Smallest allowed value. With a large alpha the value of a dominated task and its curvature v^(-1/alpha - 1)
    would leave the fp32 range; at the floor the task's contribution is already negligible.
    """
    return float(jnp.finfo(jnp.float32).tiny) ** (0.8 / (1.0 + 1.0 / alpha))


def _gradient(values: Array, matrix: Array, share: Array, alpha: Array) -> Array:
    return jnp.sum(matrix * values, axis=-1) - share * values ** (-1.0 / alpha)


def _hessian(values: Array, matrix: Array, share: Array, alpha: Array) -> Array:
    return matrix + jnp.diag(share * values ** (-1.0 / alpha - 1.0) / alpha)


def solve_spd(matrix: Array, right: Array) -> Array:
    """Solve a small symmetric positive definite system by elimination without pivoting.

    Plain arithmetic on K x K numbers fuses into the loop body on every backend; a library factorisation would be a
    separate call in every step.
    """
    count = right.shape[0]
    table = jnp.concatenate([matrix, right[:, None]], axis=1)
    for column in range(count):
        pivot = table[column] / table[column, column]
        table = (table - table[:, column : column + 1] * pivot).at[column].set(pivot)
    return table[:, -1]
