"""Combining task gradients: published directions, rescaling, extreme scales, non-finite gradients, devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fairhuman_jax import losses
from fairhuman_jax.losses import combine_weighted, gram_matrix, make_combiner, mpd_weights


@functools.partial(jax.jit, static_argnames="method")
def combine(task_grads, method, priority=None, loss_scale=1.0):
    """(gradient, info) of a rule without state."""
    grads, _, info = make_combiner(method, priority=priority).update(task_grads, (), loss_scale=loss_scale)
    return grads, info


fair_combine = jax.jit(losses.fair_combine, static_argnames=("alpha", "rescale", "axis_name"))
ROWS = np.array([[3.0, 0, 4], [1, 2, 2], [0, -1, 1]], np.float32)


def tree(rows: np.ndarray) -> dict:
    """The same gradients as a tree of two leaves, a matrix and a vector."""
    return {"kernel": jnp.asarray(rows[:, :2]).reshape(3, 1, 2), "bias": jnp.asarray(rows[:, 2:])}


def flat(grads: dict) -> np.ndarray:
    return np.concatenate([np.asarray(grads["kernel"]).ravel(), np.asarray(grads["bias"])])


def test_gram_matrix_is_summed_over_leaves_in_fp32():
    rows = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    np.testing.assert_allclose(gram_matrix(tree(rows)), rows @ rows.T, rtol=1e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree(ROWS))
    assert gram_matrix(half).dtype == jnp.float32
    with pytest.raises(ValueError, match="leading task axis"):
        gram_matrix({"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))})


def test_published_direction_and_info():
    grads, info = fair_combine(tree(ROWS))
    np.testing.assert_allclose(flat(grads), [0.91769119, -0.53058256, 3.38945561], rtol=1e-5)
    np.testing.assert_allclose(info["weights"], [0.03382882, 0.20441060, 0.58568205], rtol=1e-5)
    np.testing.assert_allclose(info["gram"], ROWS @ ROWS.T, rtol=1e-6)
    np.testing.assert_allclose(info["coefficients"], 3 * np.asarray(info["weights"]), rtol=1e-6)
    np.testing.assert_allclose(info["cosines"][0, 1], 11 / 15, rtol=1e-6)
    assert info["finite"] and np.all(info["active"]) and info["residual"] < 1e-4


def test_empty_region_is_inactive_and_harmless():
    rows = ROWS.copy()
    rows[2] = 0
    grads, info = fair_combine(tree(rows))
    np.testing.assert_allclose(flat(grads), [1.17513476, 1.06032659, 1.92028854], rtol=1e-5)
    assert info["weights"][2] == 0 and list(np.asarray(info["active"])) == [True, True, False]
    grads, info = fair_combine(tree(0 * rows))
    np.testing.assert_array_equal(flat(grads), 0.0)
    assert info["finite"] and not np.any(info["active"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_gradient_gives_zero_and_a_flag(value):
    for method in ("mpd", "sum", "single"):
        rows = ROWS.copy()
        rows[1, 2] = value
        grads, info = combine(tree(rows), method)
        np.testing.assert_array_equal(flat(grads), 0.0)
        assert not info["finite"] and not np.any(info["active"])
        np.testing.assert_array_equal(info["coefficients"], 0.0)


def test_baselines_share_the_path_and_differ_from_mpd():
    total, info = combine(tree(ROWS), "sum")
    np.testing.assert_allclose(flat(total), ROWS.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(info["coefficients"], 1.0)
    np.testing.assert_allclose(flat(combine(tree(ROWS), "single")[0]), ROWS[0], rtol=1e-6)
    weighted, _ = combine(tree(ROWS), "sum", priority=jnp.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(flat(weighted), ROWS.T @ [1, 2, 3], rtol=1e-6)
    fair = flat(fair_combine(tree(ROWS))[0])
    cosine = fair @ ROWS.sum(0) / np.linalg.norm(fair) / np.linalg.norm(ROWS.sum(0))
    assert cosine < 0.95
    with pytest.raises(ValueError, match="unknown method 'mean'"):
        combine(tree(ROWS), "mean")


def test_rescale_options():
    direction = flat(fair_combine(tree(ROWS), rescale="none")[0])
    wanted = {
        "n_tasks": 3 * np.linalg.norm(direction),
        "match_sum_norm": np.linalg.norm(ROWS.sum(0)),
        "unit": 1.0,
    }
    for rescale, norm in wanted.items():
        grads = flat(fair_combine(tree(ROWS), rescale=rescale)[0])
        np.testing.assert_allclose(np.linalg.norm(grads), norm, rtol=1e-5, err_msg=rescale)
        np.testing.assert_allclose(grads / norm, direction / np.linalg.norm(direction), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="unknown rescale 'max'"):
        fair_combine(tree(ROWS), rescale="max")


@pytest.mark.parametrize("exponent", [-30, -20, -6, 6, 20, 34])
@pytest.mark.parametrize("rescale", ["n_tasks", "match_sum_norm", "unit"])
def test_gradients_whose_squares_leave_fp32(exponent, rescale):
    scale = 10.0**exponent
    power = {"n_tasks": -1 / 3, "match_sum_norm": 1.0, "unit": 0.0}[rescale]
    base = flat(fair_combine(tree(ROWS), rescale=rescale)[0])
    grads, info = fair_combine(tree((ROWS.astype(np.float64) * scale).astype(np.float32)), rescale=rescale)
    np.testing.assert_allclose(flat(grads) / scale**power, base, rtol=2e-5)
    assert info["finite"] and np.all(info["active"]) and np.all(np.isfinite(info["weights"]))
    if rescale == "n_tasks" and abs(exponent) <= 20:
        np.testing.assert_allclose(info["weights"] * scale ** (4 / 3), mpd_weights(gram_matrix(tree(ROWS))), rtol=1e-4)


def test_loss_scale_is_removed_before_solving():
    scale = 65536.0
    base, info = fair_combine(tree(ROWS))
    scaled = jax.tree.map(lambda leaf: scale * leaf, tree(ROWS))
    leaked = flat(fair_combine(scaled)[0]) / scale
    np.testing.assert_allclose(leaked / flat(base), 3.7847e-7, rtol=1e-4)
    grads, removed = fair_combine(scaled, loss_scale=scale)
    np.testing.assert_allclose(flat(grads), flat(base), rtol=1e-6)
    np.testing.assert_allclose(removed["weights"], info["weights"], rtol=1e-6)
    np.testing.assert_allclose(removed["gram"], info["gram"], rtol=1e-6)
    np.testing.assert_allclose(flat(combine(scaled, "sum", loss_scale=scale)[0]), ROWS.sum(0), rtol=1e-6)
    np.testing.assert_allclose(combine_weighted(scaled, removed["coefficients"])["bias"], base["bias"], rtol=1e-6)


def test_result_keeps_the_dtype_of_each_leaf():
    mixed = {"a": jnp.asarray(ROWS, jnp.bfloat16), "b": jnp.asarray(ROWS)}
    grads, _ = fair_combine(mixed)
    assert grads["a"].dtype == jnp.bfloat16 and grads["b"].dtype == jnp.float32


def test_weights_from_the_gram_alone_reproduce_the_combination():
    combiner = make_combiner(alpha=1.0, rescale="match_sum_norm")
    coefficients, _, info = combiner.weigh(gram_matrix(tree(ROWS)), ())
    expected = fair_combine(tree(ROWS), alpha=1.0, rescale="match_sum_norm")
    np.testing.assert_allclose(flat(combine_weighted(tree(ROWS), coefficients)), flat(expected[0]), rtol=1e-5)
    np.testing.assert_allclose(info["weights"], expected[1]["weights"], rtol=1e-5)


@jax.jit
def task_gradients(parameters, inputs, targets):
    """Three losses of one linear model, each a mean over the batch; gradients stacked on a task axis."""

    def losses(parameters):
        residual = jnp.square(inputs @ parameters["kernel"] - targets)
        return jnp.stack([jnp.mean(residual), jnp.mean(residual[:, 0]), jnp.mean(residual[:, 1])])

    return jax.jacrev(losses)(parameters)


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    parameters = {"kernel": jax.random.normal(keys[0], (5, 4))}
    return parameters, jax.random.normal(keys[1], (16, 5)), jax.random.normal(keys[2], (16, 4))


def test_accumulated_task_gradients_equal_one_batch():
    parameters, inputs, targets = problem()
    whole, _ = fair_combine(task_gradients(parameters, inputs, targets))
    parts = [task_gradients(parameters, inputs[i : i + 4], targets[i : i + 4]) for i in range(0, 16, 4)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *parts)
    np.testing.assert_allclose(fair_combine(mean)[0]["kernel"], whole["kernel"], rtol=2e-5, atol=1e-6)
    solved_apart = sum(np.asarray(fair_combine(part)[0]["kernel"]) for part in parts) / 4
    assert np.max(np.abs(solved_apart - whole["kernel"])) > 1e-2


def test_eight_devices_average_before_solving():
    parameters, inputs, targets = problem()
    whole, info = fair_combine(task_gradients(parameters, inputs, targets))

    def local(inputs, targets):
        return fair_combine(task_gradients(parameters, inputs, targets), axis_name="data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec(), check_vma=False))
    grads, sharded_info = mapped(inputs, targets)
    np.testing.assert_allclose(grads["kernel"], whole["kernel"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(sharded_info["weights"], info["weights"], rtol=2e-5)
    split = jax.tree.map(lambda array: array.reshape(8, 2, -1), (inputs, targets))
    replicas, _ = jax.pmap(local, axis_name="data")(*split)
    np.testing.assert_allclose(replicas["kernel"], np.broadcast_to(whole["kernel"], (8, 5, 4)), rtol=2e-5, atol=1e-6)


def test_combination_is_differentiable():
    value = jax.jit(jax.grad(lambda grads: jnp.sum(fair_combine(grads)[0]["kernel"])))(tree(ROWS))
    assert np.all(np.isfinite(flat({"kernel": value["kernel"], "bias": value["bias"].ravel()})))
