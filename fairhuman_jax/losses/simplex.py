"""Two convex problems over the simplex of K task weights, solved face by face from the Gram matrix."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.losses.alpha_fair import solve_spd
from fairhuman_jax.losses.gram import gram_product

Array = jax.Array

# All faces of the simplex are solved at once: 2^K - 1 systems of K equations.
MOST_TASKS = 12


def min_norm_point(gram: Array, active: Array) -> tuple[Array, Array]:
    """Weights of the shortest vector in the convex hull of the active gradients.

    On every face S the shortest vector of the affine hull is w = x / sum(x), (G_SS + gamma 1 1^T) x = 1, for any
    gamma > 0. The optimum is the w >= 0 with the smallest gap w^T G w - min_i (G w)_i; its gap is 0.

    `gram` [K, K] finite, K <= 12; `active` bool [K]. Returns (w [K] >= 0 with sum 1, the gap over max_i G_ii).
    With no active task w is 0. Source: MGDA (Desideri 2012; Sener and Koltun, arXiv 1810.04650).
    Raises: ValueError for more than 12 tasks.
    """
    gram = _normalised(gram, active)
    faces, usable = _faces(active)
    matrices = _face_matrices(gram, faces)
    points = jax.vmap(solve_spd)(matrices, faces.astype(gram.dtype))
    points = points / jnp.sum(points, axis=1, keepdims=True)
    slopes = gram_product(gram, points)
    gaps = jnp.sum(points * slopes, axis=1) - jnp.min(jnp.where(active, slopes, jnp.inf), axis=1)
    return _best(points, gaps, usable, active)


def conflict_averse_point(gram: Array, active: Array, average: Array, radius: Array) -> tuple[Array, Array]:
    """Weights w of the simplex that minimise w^T G b + r sqrt(w^T G w), the dual problem of CAGrad.

    With t = sqrt(w^T G w) / r a stationary point of face S is w = p + t q, where p is the face's shortest vector,
    q = p sum(z) - z, z = (G_SS + gamma 1 1^T)^-1 (G b)_S, and t^2 = p^T G p / (r^2 - q^T G q).

    `gram` [K, K] finite, K <= 12; `active` bool [K]; `average` b [K]; `radius` r >= 0 in the unit of a gradient.
    Returns (w [K] >= 0 with sum 1, the gap in the stationarity conditions over max_i G_ii).
    Source: CAGrad (arXiv 2110.14048), equation 3 of the dual.
    Raises: ValueError for more than 12 tasks.
    """
    common = _largest_square(gram, active)
    gram, radius = _normalised(gram, active), radius / jnp.sqrt(common)
    faces, usable = _faces(active)
    matrices = _face_matrices(gram, faces)
    pull = gram_product(gram, average)
    shortest = jax.vmap(solve_spd)(matrices, faces.astype(gram.dtype))
    shortest = shortest / jnp.sum(shortest, axis=1, keepdims=True)
    towards = jax.vmap(solve_spd)(matrices, jnp.where(faces, pull, 0.0))
    towards = shortest * jnp.sum(towards, axis=1, keepdims=True) - towards

    # Where `room` is not positive, t is huge and the point leaves the face.
    room = radius**2 - jnp.sum(towards * gram_product(gram, towards), axis=1)
    smallest = jnp.finfo(gram.dtype).tiny
    length = jnp.sqrt(squared_length(gram, shortest) / jnp.maximum(room, smallest))[:, None]
    points = shortest + length * towards
    slopes = length * pull + gram_product(gram, points)
    gaps = jnp.sum(points * slopes, axis=1) - jnp.min(jnp.where(active, slopes, jnp.inf), axis=1)
    return _best(points, gaps / length[:, 0], usable, active)


def squared_length(gram: Array, weights: Array) -> Array:
    """w^T G w over the last axis, at least as large as its rounding error, so that dividing by it is safe."""
    terms = weights[..., :, None] * gram * weights[..., None, :]
    floor = 4.0 * jnp.finfo(gram.dtype).eps * jnp.sum(jnp.abs(terms), axis=(-2, -1))
    return jnp.maximum(jnp.sum(terms, axis=(-2, -1)), floor)


def _largest_square(gram: Array, active: Array) -> Array:
    return jnp.maximum(jnp.max(jnp.where(active, jnp.diagonal(gram), 0.0)), jnp.finfo(gram.dtype).tiny)


def _normalised(gram: Array, active: Array) -> Array:
    return gram / _largest_square(gram, active)


def _faces(active: Array) -> tuple[Array, Array]:
    """The nonempty subsets of K tasks, bool [2^K - 1, K], and which of them hold active tasks only."""
    count = active.shape[0]
    if count > MOST_TASKS:
        raise ValueError(f"{count} tasks: a rule over the simplex of weights takes at most {MOST_TASKS}")
    subsets = np.array(list(itertools.product((False, True), repeat=count))[1:])
    faces = jnp.asarray(subsets)
    return faces, jnp.all(~faces | active, axis=1)


def _face_matrices(gram: Array, faces: Array) -> Array:
    """G_SS + gamma 1 1^T on each face, the identity elsewhere; gamma is the face's smallest G_ii, so that it
    does not swamp small gradients."""
    shift = jnp.min(jnp.where(faces, jnp.diagonal(gram), jnp.inf), axis=1)
    pairs = faces[:, :, None] & faces[:, None, :]
    return jnp.where(pairs, gram + shift[:, None, None], jnp.eye(gram.shape[0], dtype=gram.dtype))


def _best(points: Array, gaps: Array, usable: Array, active: Array) -> tuple[Array, Array]:
    """The feasible point with the smallest gap. Dependent gradients may spoil a face; a smaller face covers it."""
    feasible = usable & jnp.all(jnp.isfinite(points) & (points >= 0), axis=1) & jnp.isfinite(gaps)
    gaps = jnp.where(feasible, gaps, jnp.inf)
    chosen = jnp.argmin(gaps)
    found = feasible[chosen]
    # No point is feasible when no task is active, or when rounding spoils every face.
    even = active / jnp.maximum(jnp.sum(active), 1).astype(points.dtype)
    return jnp.where(found, points[chosen], even), jnp.where(found, jnp.maximum(gaps[chosen], 0.0), 0.0)
