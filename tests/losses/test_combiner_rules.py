"""Each rule against closed forms, float64 certificates of optimality, or a plain implementation of its paper."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.losses import make_combiner, mpd_weights
from fairhuman_jax.losses.gram_rules import projection_order

KEY = jax.random.key(0)
CONFLICT = np.array([[1.0, -0.6, -0.3], [-0.6, 4.0, 0.2], [-0.3, 0.2, 0.25]])


@functools.cache
def weigher(method: str, **options):
    """Weights and residuals of a batch of Gram matrices [N, K, K]."""

    def weigh(gram, losses):
        combiner = make_combiner(method, **options)
        coefficients, _, info = combiner.weigh(gram, combiner.init(gram.shape[0]), losses, KEY)
        return info["weights"], info["residual"], coefficients

    return jax.jit(jax.vmap(weigh))


def solve(method: str, grams, losses=None, **options) -> tuple[np.ndarray, np.ndarray]:
    """(weights, residuals) in float64 of fp32 solutions."""
    grams = jnp.asarray(grams, jnp.float32)
    losses = jnp.ones(grams.shape[:2]) if losses is None else jnp.asarray(losses, jnp.float32)
    weights, residuals, _ = weigher(method, **options)(grams, losses)
    return np.asarray(weights, np.float64), np.asarray(residuals)


def problems(tasks: int, size: int, decades: float, count: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random gradients [N, tasks, size], norms over 10^+-decades, and their Gram matrices, float64."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, tasks, size)) + rng.normal(size=(count, 1, size)) * rng.uniform(-1, 1, (count, 1, 1))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    rows *= 10 ** rng.uniform(-decades, decades, size=(count, tasks, 1))
    return rows, np.einsum("nip,njp->nij", rows, rows)


def products(grams: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nj->ni", grams, weights)


# --- MGDA -------------------------------------------------------------------------------------------------------------


def test_mgda_of_two_tasks_is_the_closed_form():
    _, grams = problems(2, 4, 2.0)
    first, second, inner = grams[:, 0, 0], grams[:, 1, 1], grams[:, 0, 1]
    expected = np.clip((second - inner) / (first + second - 2 * inner), 0.0, 1.0)
    weights, _ = solve("mgda", grams)
    np.testing.assert_allclose(weights[:, 0], expected, rtol=1e-4, atol=1e-6)
    assert np.any(expected == 0) and np.any(expected == 1) and np.any((expected > 0.1) & (expected < 0.9))


@pytest.mark.parametrize(("tasks", "size", "decades"), [(3, 2, 0.3), (3, 3, 2.0), (3, 40, 3.0), (5, 4, 1.0)])
def test_mgda_is_certified_in_float64(tasks, size, decades):
    """For every point of the hull ||d - d*||^2 <= d^T d - min_i g_i^T d."""
    _, grams = problems(tasks, size, decades)
    weights, residuals = solve("mgda", grams)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    weights /= weights.sum(1, keepdims=True)
    slopes = products(grams, weights)
    gaps = (np.sum(weights * slopes, axis=1) - slopes.min(1)) / np.max(np.einsum("nii->ni", grams), axis=1)
    assert gaps.max() < 2e-6 and residuals.max() < 2e-6
    assert len(set(np.sum(weights > 1e-3, axis=1))) > 1, "every problem had an optimum of one kind"


def test_mgda_of_orthogonal_opposed_and_equal_gradients():
    norms = np.array([1.0, 4.0, 9.0])
    weights, _ = solve("mgda", np.diag(norms)[None])
    np.testing.assert_allclose(weights[0], 1 / norms / np.sum(1 / norms), rtol=1e-5)
    opposed = np.array([[1.0, 0], [-2, 0], [0, 1]])
    weights, _ = solve("mgda", (opposed @ opposed.T)[None])
    np.testing.assert_allclose(weights[0] @ opposed, 0.0, atol=1e-6)
    weights, _ = solve("mgda", np.full((1, 3, 3), 4.0))
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


def test_mgda_normalization_divides_what_spans_the_hull():
    _, grams = problems(3, 5, 0.5, count=20)
    losses = np.random.default_rng(1).uniform(0.5, 2.0, size=(20, 3))
    norms = np.sqrt(np.einsum("nii->ni", grams))
    for name, divisor in {"norm": norms, "loss": losses, "loss+": norms * losses}.items():
        expected, _ = solve("mgda", grams / divisor[:, :, None] / divisor[:, None, :])
        weights, _ = solve("mgda", grams, losses, normalization=name)
        np.testing.assert_allclose(weights, expected, atol=1e-4)


# --- CAGrad -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tasks", "size", "decades", "c"), [(2, 3, 1.0, 0.4), (3, 4, 0.5, 0.4), (4, 30, 1.0, 0.9)])
def test_cagrad_is_certified_by_duality(tasks, size, decades, c):
    """max_{||d - g_0|| <= c ||g_0||} min_i g_i^T d = min_w g_w^T g_0 + c ||g_0|| ||g_w||: both sides, in float64."""
    rows, grams = problems(tasks, size, decades)
    weights, residuals = solve("cagrad", grams, c=c)
    directions = (1 + c * c) * np.einsum("ni,nip->np", weights, rows)
    mean = rows.mean(1)
    length = np.linalg.norm(mean, axis=1)
    np.testing.assert_allclose(np.linalg.norm(directions - mean, axis=1), c * length, rtol=2e-3)
    primal = np.einsum("nip,np->ni", rows, directions).min(1)
    point = np.maximum((1 + c * c) * weights - 1 / tasks, 0.0)
    hull = np.einsum("ni,nip->np", point / point.sum(1, keepdims=True), rows)
    dual = np.sum(hull * mean, axis=1) + c * length * np.linalg.norm(hull, axis=1)
    scale = length * np.max(np.linalg.norm(rows, axis=2), axis=1)
    # The primal value falls by what the norm exceeds the ball, so compare within the error of the norm.
    assert np.max(np.abs(primal - dual) / scale) < 3e-4
    assert residuals.max() < 1e-4
    uniform = np.einsum("nip,np->ni", rows, mean * (1 + c)).min(1)
    assert np.all(primal >= uniform - 1e-4 * scale) and np.any(primal > uniform + 0.1 * scale)


def test_cagrad_edges():
    _, grams = problems(3, 5, 0.5, count=20)
    weights, _ = solve("cagrad", grams, c=0.0)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
    equal = np.diag([1.0, 1.0, 1.0])[None]
    np.testing.assert_allclose(solve("cagrad", equal)[0], 1.4 / 3 / 1.16, rtol=1e-5)
    opposed = np.array([[1.0, 0], [-1, 0], [0, 1]])
    for rows in (opposed, opposed[[0, 1]], np.array([[1.0, 0], [-2, 0]])):
        weights, _ = solve("cagrad", (rows @ rows.T)[None])
        mean = rows.mean(0)
        direction = 1.16 * weights[0] @ rows
        assert np.linalg.norm(direction - mean) <= 0.401 * np.linalg.norm(mean) + 1e-6
        if len(rows) == 3:  # nothing helps both opposed tasks: the best harms neither
            np.testing.assert_allclose(rows[:2] @ direction, 0.0, atol=1e-4)


def test_cagrad_stays_in_its_ball_where_no_direction_helps_all():
    """The last gradient is against a mix of the others, so the hull holds 0 and g_w / ||g_w|| is rounding error."""
    rows, _ = problems(3, 4, 0.5)
    rows[:, 2] = -rows[:, 0] * np.linspace(0.1, 1.0, 300)[:, None] - rows[:, 1] * np.linspace(1.0, 0.1, 300)[:, None]
    weights, _ = solve("cagrad", np.einsum("nip,njp->nij", rows, rows))
    mean = rows.mean(1)
    steps = np.linalg.norm(1.16 * np.einsum("ni,nip->np", weights, rows) - mean, axis=1)
    assert np.all(steps <= 0.41 * np.linalg.norm(mean, axis=1))


@pytest.mark.parametrize(("method", "error"), [("mgda", 2e-6), ("cagrad", 2e-6), ("imtl_g", 1e-4)])
def test_directions_of_ill_scaled_problems_in_fp32(method, error):
    rows, grams = problems(3, 20, 3.0)
    directions = np.einsum("ni,nip->np", solve(method, grams)[0], rows)
    with jax.enable_x64(True):
        exact = np.asarray(weigher(method)(jnp.asarray(grams), jnp.ones((300, 3)))[0])
    assert exact.dtype == np.float64
    truths = np.einsum("ni,nip->np", exact, rows)
    assert np.max(np.linalg.norm(directions - truths, axis=1) / np.linalg.norm(truths, axis=1)) < error


# --- IMTL-G, Nash-MTL, PCGrad -----------------------------------------------------------------------------------------


def test_imtl_g_gives_equal_projections():
    rows, grams = problems(3, 6, 2.0)
    norms = np.sqrt(np.einsum("nii->ni", grams))
    weights, residuals = solve("imtl_g", grams)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-3)
    directions = np.einsum("ni,nip->np", weights, rows)
    projections = np.einsum("nip,np->ni", rows, directions) / norms
    size = np.sum(np.abs(weights) * norms, axis=1)
    assert np.max(np.ptp(projections, axis=1) / size) < 1e-5 and residuals.max() < 1e-5
    two = problems(2, 6, 2.0)[1]
    norms = np.sqrt(np.einsum("nii->ni", two))
    np.testing.assert_allclose(solve("imtl_g", two)[0], norms[:, ::-1] / norms.sum(1, keepdims=True), rtol=1e-4)


def test_imtl_g_equals_the_published_solve():
    """a_{2..n} = g_1 U^T (D U^T)^-1 with rows D = g_1 - g_j and U = u_1 - u_j."""
    rows, grams = problems(4, 9, 0.3, count=50)
    weights, _ = solve("imtl_g", grams)
    for gradients, found in zip(rows, weights, strict=True):
        units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
        differences, turns = gradients[0] - gradients[1:], units[0] - units[1:]
        rest = gradients[0] @ turns.T @ np.linalg.inv(differences @ turns.T)
        np.testing.assert_allclose(found, np.concatenate([[1 - rest.sum()], rest]), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("rows", [[[1.0, 0], [1, 0], [0, 1]], [[1.0, 0], [-1, 0], [0, 1]], [[1.0, 0], [0, 1], [1, 1]]])
def test_imtl_g_of_dependent_gradients_is_finite(rows):
    rows = np.asarray(rows)
    weights, _ = solve("imtl_g", (rows @ rows.T)[None])
    projections = rows @ (weights[0] @ rows) / np.linalg.norm(rows, axis=1)
    assert np.all(np.isfinite(weights)) and np.ptp(projections) < 1e-3


def test_nash_mtl_solves_its_equation():
    _, grams = problems(3, 20, 1.0)
    weights, residuals = solve("nash_mtl", grams)
    unit = grams / np.linalg.norm(grams, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(weights * products(unit, weights), 1.0, rtol=2e-4)
    assert residuals.max() < 2e-4
    fair = np.asarray(jax.jit(jax.vmap(functools.partial(mpd_weights, alpha=1.0)))(jnp.asarray(grams, jnp.float32)))
    ratio = weights / fair
    np.testing.assert_allclose(ratio, np.sqrt(np.linalg.norm(grams, axis=(1, 2)))[:, None] * np.ones(3), rtol=1e-4)
    priority = (1.0, 2.0, 0.5)
    weights, _ = solve("nash_mtl", grams, priority=priority)
    np.testing.assert_allclose(weights * products(unit, weights), np.tile(priority, (300, 1)), rtol=5e-4)


def project_conflicts(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """PCGrad on the vectors themselves."""
    projected = []
    for task, gradient in enumerate(rows):
        gradient = gradient.copy()
        for other in order[task]:
            inner = gradient @ rows[other]
            if other != task and inner < 0:
                gradient -= inner / (rows[other] @ rows[other]) * rows[other]
        projected.append(gradient)
    return np.stack(projected)


@pytest.mark.parametrize("tasks", [2, 4])
def test_pcgrad_equals_projection_of_vectors(tasks):
    rows, grams = problems(tasks, 5, 1.0, count=100)
    keys = jax.random.split(jax.random.key(7), 100)
    combiner = make_combiner("pcgrad")
    weigh = jax.jit(jax.vmap(lambda gram, key: combiner.weigh(gram, (), None, key)[0]))
    found = np.einsum("ni,nip->np", np.asarray(weigh(jnp.asarray(grams, jnp.float32), keys), np.float64), rows)
    orders = np.asarray(jax.vmap(functools.partial(projection_order, count=tasks))(keys))
    expected = np.stack([project_conflicts(*pair).sum(0) for pair in zip(rows, orders, strict=True)])
    size = np.linalg.norm(rows, axis=2).sum(1)
    assert np.max(np.linalg.norm(found - expected, axis=1) / size) < 1e-5
    assert np.max(np.linalg.norm(found - rows.sum(1), axis=1) / size) > 0.1
    assert any(not np.array_equal(order[0], order[1]) for order in orders), "one order serves all tasks of a step"
    assert {tuple(sorted(order)) for order in orders.reshape(-1, tasks)} == {tuple(range(tasks))}
    assert len({tuple(order) for order in orders.reshape(-1, tasks)}) == {2: 2, 4: 24}[tasks]


def test_pcgrad_leaves_agreeing_gradients_alone():
    gram = np.array([[1.0, 0.2, 0.0], [0.2, 4.0, 0.5], [0.0, 0.5, 1.0]])
    np.testing.assert_allclose(solve("pcgrad", gram[None])[0], 1.0, rtol=1e-6)


# --- GradDrop, random weights -----------------------------------------------------------------------------------------


def test_graddrop_keeps_one_sign_with_the_published_probability():
    rows = np.random.default_rng(0).normal(size=(3, 4000)).astype(np.float32)
    rows[:, :10] = np.abs(rows[:, :10])
    combiner = make_combiner("graddrop")
    grads, _, info = jax.jit(lambda rows: combiner.update({"a": rows, "b": rows}, (), key=KEY))(rows)
    kept = np.asarray(grads["a"])
    positive, negative = np.maximum(rows, 0).sum(0), np.minimum(rows, 0).sum(0)
    took_positive = np.isclose(kept, positive, rtol=1e-5)
    assert np.all(took_positive | np.isclose(kept, negative, rtol=1e-5))
    np.testing.assert_allclose(kept[:10], rows[:, :10].sum(0), rtol=1e-5)
    purity = 0.5 * (1 + rows.sum(0) / np.abs(rows).sum(0))
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        among = (purity > low) & (purity <= low + 0.2)
        assert abs(np.mean(took_positive[among]) - np.mean(purity[among])) < 0.08
    assert not np.array_equal(kept, np.asarray(grads["b"])), "two leaves drew the same numbers"
    np.testing.assert_allclose(info["coefficients"], 1.0, rtol=1e-6)


def test_rlw_weights_are_softmax_of_normal_numbers():
    combiner = make_combiner("rlw")
    keys = jax.random.split(KEY, 4000)
    weights = np.asarray(jax.vmap(lambda key: combiner.weigh(None, (), jnp.ones(3), key)[0])(keys))
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(np.std(np.log(weights[:, 0] / weights[:, 1])), np.sqrt(2.0), rtol=0.05)


# --- rules that read losses -------------------------------------------------------------------------------------------


def run(method: str, losses: np.ndarray, **options) -> tuple[np.ndarray, dict]:
    """Weights [steps, K] along a sequence of losses, under scan, and the last state."""
    combiner = make_combiner(method, **options)

    def step(state, losses):
        coefficients, state, _ = combiner.weigh(None, state, losses)
        return state, coefficients

    state, weights = jax.jit(lambda x: jax.lax.scan(step, combiner.init(x.shape[1]), x))(
        jnp.asarray(losses, jnp.float32)
    )
    return np.asarray(weights, np.float64), state


def loss_sequence(steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    decay = np.exp(-np.arange(steps)[:, None] * np.array([0.002, 0.02, 0.01]))
    return decay * np.array([1.0, 0.1, 30.0]) * rng.uniform(0.8, 1.2, size=(steps, 3))


def test_log_sum_weights_are_reciprocal():
    weights, _ = run("log_sum", np.array([[2.0, 0.5, 0.0]]))
    np.testing.assert_allclose(weights[0], [0.5, 2.0, 0.0])
    weights, _ = run("log_sum", np.array([[2.0, 0.5, 0.0]]), priority=(1.0, 3.0, 1.0))
    np.testing.assert_allclose(weights[0], [0.5, 6.0, 0.0])


def test_dwa_equals_the_ratio_of_window_means():
    losses = loss_sequence(80)
    weights, _ = run("dwa", losses)
    np.testing.assert_allclose(weights[:25], 1 / 3, rtol=1e-6)
    for step in (26, 40, 50, 51, 80):
        recent, older = losses[step - 25 : step].mean(0), losses[max(step - 50, 0) : step - 25].mean(0)
        expected = np.exp(recent / older / 2.0)
        np.testing.assert_allclose(weights[step - 1], expected / expected.sum(), rtol=1e-5)
    paper, _ = run("dwa", losses, rescale="n_tasks")
    np.testing.assert_allclose(paper, 3 * weights, rtol=1e-6)
    losses[::2, 1] = 0.0  # an empty task in every second batch
    weights, _ = run("dwa", losses, window=4, temperature=1.0)
    present = losses[-4:, 1].sum() / 2, losses[-8:-4, 1].sum() / 2
    ratios = losses[-4:].mean(0) / losses[-8:-4].mean(0)
    ratios[1] = present[0] / present[1]
    np.testing.assert_allclose(weights[-1], np.exp(ratios) / np.exp(ratios).sum(), rtol=1e-5)


def adam(value, slope, moments, rate, decay):
    """Adam as published, float64; `moments` is (mean, square, steps)."""
    slope = slope + decay * value
    mean, square, steps = 0.9 * moments[0] + 0.1 * slope, 0.999 * moments[1] + 0.001 * slope**2, moments[2] + 1
    step = (mean / (1 - 0.9**steps)) / (np.sqrt(square / (1 - 0.999**steps)) + 1e-8)
    return value - rate * step, (mean, square, steps)


def test_famo_follows_the_change_of_log_losses():
    losses = loss_sequence(60)
    floor = np.array([0.1, 0.001, 1.0])
    weights, _ = run("famo", losses, min_losses=tuple(floor))
    above = losses - floor + 1e-8
    xi, moments = np.zeros(3), (np.zeros(3), np.zeros(3), 0)
    for step in range(60):
        share = np.exp(xi) / np.exp(xi).sum()
        if step:
            jacobian = np.diag(share) - np.outer(share, share)
            xi, moments = adam(xi, jacobian @ np.log(above[step - 1] / above[step]), moments, 0.025, 1e-5)
            share = np.exp(xi) / np.exp(xi).sum()
        np.testing.assert_allclose(weights[step], share / above[step] / np.sum(share / above[step]), rtol=2e-3)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)


def test_famo_raises_the_share_of_the_task_that_falls_slowest():
    losses = np.exp(-np.arange(100)[:, None] * np.array([0.0, 0.02, 0.05]))
    _, state = run("famo", losses)
    xi = np.asarray(state["xi"]["value"])
    assert xi[0] > xi[1] > xi[2] and int(state["xi"]["steps"]) == 99


def test_famo_leaves_an_empty_task_out():
    losses = loss_sequence(30)
    losses[:, 2] = 0.0
    weights, _ = run("famo", losses)
    np.testing.assert_array_equal(weights[:, 2], 0.0)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    losses[15] = 0.0
    assert np.all(np.isfinite(run("famo", losses)[0]))


def test_uncertainty_learns_the_logarithm_of_constant_losses():
    losses = np.tile([2.0, 0.5, 0.0], (3000, 1))
    weights, state = run("uncertainty", losses, learning_rate=0.01)
    np.testing.assert_allclose(weights[0], 0.5)
    np.testing.assert_allclose(weights[1], 0.5 * np.exp([-0.01, 0.01, 0.0]), rtol=1e-5)
    np.testing.assert_allclose(weights[-1], [0.25, 1.0, 0.5], rtol=1e-3)
    np.testing.assert_allclose(state["value"], np.log([2.0, 0.5, 1.0]), atol=1e-3)


def test_uncertainty_follows_the_gradient_of_its_objective():
    losses = loss_sequence(40)
    weights, _ = run("uncertainty", losses, learning_rate=0.03)
    value, moments = np.zeros(3), (np.zeros(3), np.zeros(3), 0)
    objective = jax.grad(lambda s, loss: 0.5 * jnp.sum(jnp.exp(-s) * loss + s))
    for step in range(40):
        np.testing.assert_allclose(weights[step], 0.5 * np.exp(-value), rtol=1e-4)
        slope = np.asarray(objective(jnp.asarray(value, jnp.float32), jnp.asarray(losses[step], jnp.float32)))
        value, moments = adam(value, slope, moments, 0.03, 0.0)


def test_single_keeps_the_task_that_it_is_told():
    np.testing.assert_array_equal(solve("single", CONFLICT[None], task=1)[0][0], [0.0, 1.0, 0.0])
