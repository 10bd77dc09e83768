"""The alpha-fair solver: published values, scale laws, a float64 oracle, and the transforms that callers apply."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fairhuman_jax.losses import mpd_weights

G0 = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, -0.5], [0.5, -0.5, 1.0]])
CONFLICT = np.array([[1.0, -0.6, -0.3], [-0.6, 4.0, 0.2], [-0.3, 0.2, 0.25]])
PUBLISHED = [
    (np.diag([1.0, 8.0, 27.0]), 2.0, [1.0, 1 / 4, 1 / 9], 11 / 6),
    (G0, 2.0, [0.334983278677, 0.525557321941, 1.064512185906], 2.335482722166),
    (G0, 0.5, [0.637851944171, 0.678742712631, 1.006861785061], None),
    (G0, 1.0, [0.484607901029, 0.581987527101, 1.024641199860], 3.0),
    (G0, 5.0, [0.169192497770, 0.515229756655, 1.146112142187], None),
    (CONFLICT, 2.0, [2.229274563800, 0.482601902768, 4.233183147652], 4.245241169629),
]


# Traced alpha and priority: one program for every value.
SOLVE_ALL = jax.jit(jax.vmap(mpd_weights, (0, None, None)))


def oracle(grams: np.ndarray) -> np.ndarray:
    """Float64 MPD weights of [N, K, K]: minimise 1/2 u^T rho u - 2 sum_i sqrt(c_i u_i), u_i = w_i sqrt(G_ii).

    The caller certifies the answer by the residual of the defining equation.
    """
    norms = np.sqrt(np.einsum("nii->ni", grams))
    cosines = grams / (norms[:, :, None] * norms[:, None, :])
    value = norms ** (-1.0 / 3.0)

    def merit(u: np.ndarray) -> np.ndarray:
        return 0.5 * np.einsum("ni,nij,nj->n", u, cosines, u) - 2.0 * np.sum(np.sqrt(u / norms), axis=1)

    for _ in range(150):
        gradient = np.einsum("nij,nj->ni", cosines, value) - (value * norms) ** -0.5
        curvature = 0.5 * norms**-0.5 * value**-1.5
        hessian = cosines + curvature[:, :, None] * np.eye(grams.shape[1])
        step = -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        length = np.minimum(1.0, 0.9 / np.maximum(np.max(-step / value, axis=1), 1e-12))[:, None]
        before = merit(value)
        for _ in range(12):
            worse = merit(value + length * step) > before + 1e-15 * np.abs(before)
            length[worse] *= 0.5
        value = value + length * step
    return value / norms


def random_jacobians(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Three task gradients each, random directions, norms log-uniform over 1e-3 .. 1e3."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 3, size))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows * 10 ** rng.uniform(-3, 3, size=(count, 3, 1))).astype(np.float32)


@pytest.mark.parametrize(("gram", "alpha", "expected", "squared_norm"), PUBLISHED)
def test_published_values(gram, alpha, expected, squared_norm):
    weights = np.asarray(mpd_weights(jnp.asarray(gram, jnp.float32), alpha))
    np.testing.assert_allclose(weights, expected, rtol=2e-6)
    with jax.enable_x64(True):
        exact = np.asarray(mpd_weights(jnp.asarray(gram, jnp.float64), alpha))
    np.testing.assert_allclose(exact, expected, rtol=1e-10)
    if squared_norm is not None:
        np.testing.assert_allclose(exact @ gram @ exact, squared_norm, rtol=1e-10)


def test_rank_deficient_directions():
    rows = np.array([[3.0, 0, 4], [1, 2, 2], [0, -1, 1]])
    weights = np.asarray(mpd_weights(jnp.asarray(rows @ rows.T, jnp.float32)))
    np.testing.assert_allclose(weights, [0.03382882, 0.20441060, 0.58568205], rtol=1e-5)
    direction = weights @ rows
    np.testing.assert_allclose(direction, [0.30589706, -0.17686085, 1.12981854], rtol=1e-5)
    np.testing.assert_allclose(rows @ direction, [5.43696534, 2.21181243, 1.30667939], rtol=1e-5)
    same = np.asarray(mpd_weights(jnp.full((3, 3), 4.0)))
    np.testing.assert_allclose(same, 12.0 ** (-2 / 3), rtol=1e-5)


def test_equal_norms_and_cosines():
    gram = 0.49 * (0.7 * np.eye(3) + 0.3)
    np.testing.assert_allclose(mpd_weights(jnp.asarray(gram, jnp.float32)), 1.176131707, rtol=1e-6)


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
def test_scale_law_in_fp32(exponent):
    scale = 10.0**exponent
    weights = np.asarray(mpd_weights(jnp.asarray(scale * G0, jnp.float32)), np.float64)
    np.testing.assert_allclose(weights * scale ** (2 / 3), PUBLISHED[1][2], rtol=5e-6)


def test_inactive_tasks_get_zero_and_leave_the_rest_alone():
    gram = np.zeros((3, 3), np.float32)
    gram[:2, :2] = [[25, 11], [11, 9]]
    weights = np.asarray(mpd_weights(jnp.asarray(gram)))
    np.testing.assert_allclose(weights[:2], [0.07166350, 0.17672110], rtol=1e-5)
    assert weights[2] == 0.0
    np.testing.assert_array_equal(mpd_weights(jnp.zeros((3, 3))), 0.0)
    np.testing.assert_array_equal(mpd_weights(jnp.asarray(gram).at[0, 0].set(jnp.nan)), 0.0)


def test_opposed_gradients_stay_finite_and_cancel():
    rows = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0.5, 0]], np.float32)
    weights = np.asarray(mpd_weights(jnp.asarray(rows @ rows.T)))
    assert np.all(np.isfinite(weights))
    np.testing.assert_allclose(weights @ rows, [0.0, 0.5 ** (-1 / 3), 0.0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size", [3, 50])
def test_direction_error_on_ill_scaled_problems(size):
    rows = random_jacobians(1000, size)
    wide = rows.astype(np.float64)
    grams = np.einsum("nip,njp->nij", wide, wide)
    weights = np.asarray(jax.jit(jax.vmap(mpd_weights))(jnp.asarray(grams, jnp.float32)), np.float64)
    exact = oracle(grams)
    products = np.einsum("nij,nj->ni", grams, exact)
    assert np.max(np.abs(exact * products**2 - 1)) < 1e-6
    directions = np.einsum("ni,nip->np", weights, wide)
    truths = np.einsum("ni,nip->np", exact, wide)
    cosine = np.sum(directions * truths, -1) / np.linalg.norm(directions, axis=-1) / np.linalg.norm(truths, axis=-1)
    assert np.max(1.0 - cosine) <= 1e-5
    if size == 50:
        unit_gap = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        unit_gap -= truths / np.linalg.norm(truths, axis=-1, keepdims=True)
        assert np.max(np.linalg.norm(unit_gap, axis=-1)) <= 1e-5


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0])
def test_every_alpha_satisfies_its_equation(alpha):
    """In float64, so that cancellation in G w does not blur the check; near-equal norms, so that nothing is floored."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(50, 3, 20)) * 10 ** rng.uniform(-0.3, 0.3, size=(50, 3, 1))
    rows *= 0.2
    grams = np.einsum("nip,njp->nij", rows, rows)
    priority = jnp.asarray([1.0, 2.0, 0.5])
    with jax.enable_x64(True):
        weights = np.asarray(SOLVE_ALL(jnp.asarray(grams), alpha, jnp.asarray(priority, jnp.float64)))
    products = np.einsum("nij,nj->ni", grams, weights)
    np.testing.assert_allclose(products, (np.asarray(priority) / weights) ** (1 / alpha), rtol=1e-8)


def test_every_positive_definite_gram_gives_descent_for_all():
    rows = np.random.default_rng(1).normal(size=(200, 4, 6))
    with jax.enable_x64(True):
        grams = jnp.asarray(np.einsum("nip,njp->nij", rows, rows))
        weights = np.asarray(jax.jit(jax.vmap(mpd_weights))(grams))
    products = np.einsum("nij,nj->ni", np.asarray(grams), weights)
    assert products.min() > 0
    assert np.max(np.abs(weights * products**2 - 1)) < 1e-6
    squared_norm = np.sum(weights * products, axis=-1)
    np.testing.assert_allclose(squared_norm, np.sum(np.sqrt(weights), axis=-1), rtol=1e-6)


def test_priority_is_a_loss_factor_in_disguise():
    """Multiplying loss i by c equals priority 1/c; w_i differs by the factor c of the gradient that it multiplies."""
    factor = 25.0
    scale = np.diag([1.0, factor, 1.0])
    scaled = mpd_weights(jnp.asarray(scale @ G0 @ scale, jnp.float32))
    chosen = mpd_weights(jnp.asarray(G0, jnp.float32), priority=jnp.asarray([1.0, 1.0 / factor, 1.0]))
    np.testing.assert_allclose(np.asarray(scaled) * [1, factor, 1], chosen, rtol=1e-5)


def test_orthogonal_share_falls_with_a_loss_factor():
    base = np.asarray(mpd_weights(jnp.diag(jnp.asarray([1.0, 8.0, 27.0]))))
    more = np.asarray(mpd_weights(jnp.diag(jnp.asarray([1.0, 8.0 * 625, 27.0]))))
    np.testing.assert_allclose(25 * more[1] / base[1], 0.341995, rtol=1e-5)
    np.testing.assert_allclose(more[[0, 2]], base[[0, 2]], rtol=1e-6)


def test_alpha_zero_is_uniform_over_active_tasks():
    np.testing.assert_array_equal(mpd_weights(jnp.asarray(G0, jnp.float32), 0.0), 1.0)
    np.testing.assert_array_equal(mpd_weights(jnp.diag(jnp.asarray([4.0, 0.0])), 0.0), [1.0, 0.0])


def test_gradient_is_the_implicit_one():
    with jax.enable_x64(True):
        gram = jnp.asarray(CONFLICT)
        jacobian = np.asarray(jax.jacobian(mpd_weights)(gram))
        weights = np.asarray(mpd_weights(gram))
    system = CONFLICT + np.diag(0.5 * weights**-1.5)
    for row in range(3):
        for column in range(3):
            right = np.zeros(3)
            right[row] = weights[column]
            np.testing.assert_allclose(jacobian[:, row, column], -np.linalg.solve(system, right), rtol=1e-8, atol=1e-10)


def test_gradients_are_finite_at_the_edges():
    grad = jax.jit(jax.grad(lambda gram: jnp.sum(mpd_weights(gram) * jnp.asarray([1.0, 2.0, 3.0]))))
    opposed = np.array([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]])
    for gram in (
        G0,
        1e-12 * G0,
        1e12 * G0,
        np.diag([1.0, 1.0, 0.0]),
        np.zeros((3, 3)),
        opposed,
        np.full((3, 3), np.nan),
    ):
        assert np.all(np.isfinite(grad(jnp.asarray(gram, jnp.float32)))), gram


def test_transforms_agree():
    assert jax.device_count() == 8
    grams = jnp.asarray(np.stack([scale * G0 for scale in 10.0 ** np.arange(-4, 4)]), jnp.float32)
    jitted = jax.jit(mpd_weights)
    plain = np.stack([mpd_weights(gram) for gram in grams])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(jax.vmap(mpd_weights), mesh=mesh, in_specs=spec, out_specs=spec))
    for name, result in {
        "jit": np.stack([jitted(gram) for gram in grams]),
        "vmap": jax.vmap(mpd_weights)(grams),
        "pmap": jax.pmap(mpd_weights)(grams),
        "shard_map": sharded(grams),
        "traced alpha": jax.jit(jax.vmap(mpd_weights, (0, None)))(grams, 2.0),
    }.items():
        np.testing.assert_allclose(result, plain, rtol=2e-6, err_msg=name)
    alphas = jnp.asarray([0.0, 0.5, 1.0, 5.0, 20.0])
    traced = jax.jit(jax.vmap(mpd_weights, (None, 0)))(grams[4], alphas)
    static = np.stack([mpd_weights(grams[4], float(alpha)) for alpha in alphas])
    np.testing.assert_allclose(traced, static, rtol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 3)),), "square"),
        ((jnp.eye(3), -1.0), "alpha is -1.0"),
        ((jnp.eye(3), 2.0, jnp.ones(2)), r"priority has shape \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mpd_weights(*arguments)
