"""Properties of all combiners: scale laws, empty tasks, non-finite gradients, transforms, devices, arguments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fairhuman_jax.losses import COMBINERS, gram_matrix, make_combiner

ROWS = np.array([[3.0, 0, 4, 1], [1, -2, 2, 0.5], [-1, -1, 1, -3]], np.float32)
LOSSES = jnp.asarray([0.5, 2.0, 1.25])
KEY = jax.random.key(3)
POWER = {"mpd": 4 / 3}
PRIORITY = ("mpd", "nash_mtl", "sum", "log_sum", "pcgrad")


def tree(rows) -> dict:
    rows = jnp.asarray(rows)
    return {"kernel": rows[:, :2].reshape(-1, 1, 2), "bias": rows[:, 2:]}


def flat(grads: dict) -> np.ndarray:
    return np.concatenate([np.asarray(grads["kernel"], np.float64).ravel(), np.asarray(grads["bias"], np.float64)])


@functools.cache
def updater(method: str):
    """Run the compiled update from the first state."""
    combiner = make_combiner(method)

    def update(rows, losses, loss_scale=1.0):
        state = combiner.init(rows.shape[0])
        return combiner.update(tree(rows), state, losses=losses, key=KEY, loss_scale=loss_scale)

    return jax.jit(update)


@pytest.mark.parametrize("method", COMBINERS)
def test_scale_law_without_overflow(method):
    base = flat(updater(method)(ROWS, LOSSES)[0])
    assert np.linalg.norm(base) > 0.1
    power = 1.0 - POWER.get(method, 0.0)
    for exponent in (-30, -12, -6, 6, 12, 30):
        rows = (ROWS.astype(np.float64) * 10.0**exponent).astype(np.float32)
        grads, _, info = updater(method)(rows, LOSSES)
        np.testing.assert_allclose(flat(grads) / 10.0 ** (exponent * power), base, rtol=2e-5, atol=2e-5)
        assert info["finite"] and np.all(info["active"])
    scaled, _, info = updater(method)(1024.0 * ROWS, LOSSES, 1024.0)
    np.testing.assert_allclose(flat(scaled), base, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info["gram"], ROWS @ ROWS.T, rtol=1e-6)


@pytest.mark.parametrize("method", COMBINERS)
def test_an_empty_task_leaves_the_problem_of_the_others(method):
    rows, losses = ROWS.copy(), jnp.asarray([0.5, 2.0, 0.0])
    rows[2] = 0.0
    grads, state, info = updater(method)(rows, losses)
    assert info["finite"] and list(np.asarray(info["active"])) == [True, True, False]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    if method not in ("rlw", "dwa", "graddrop"):
        alone = flat(updater(method)(rows[:2], losses[:2])[0])
        # n_tasks counts all tasks, and so does the mean of cagrad: the two factors cancel.
        factor = {"mpd": 1.5, "mgda": 1.5}.get(method, 1.0)
        np.testing.assert_allclose(flat(grads), factor * alone, rtol=2e-5, atol=1e-5)
        rows[2] = 1e-9 * (ROWS[0] + ROWS[1])  # rounding noise of the shared backward pass
        np.testing.assert_allclose(flat(updater(method)(rows, losses)[0]), factor * alone, rtol=2e-5, atol=1e-5)
    grads, state, info = updater(method)(0.0 * rows, jnp.zeros(3))
    np.testing.assert_array_equal(flat(grads), 0.0)
    assert info["finite"] and not np.any(info["active"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state, info["coefficients"])))


@pytest.mark.parametrize("method", COMBINERS)
def test_what_is_not_finite_changes_nothing(method):
    combiner = make_combiner(method)
    for value in (np.nan, np.inf):
        rows = ROWS.copy()
        rows[1, 2] = value
        grads, state, info = updater(method)(rows, LOSSES)
        np.testing.assert_array_equal(flat(grads), 0.0)
        np.testing.assert_array_equal(info["coefficients"], 0.0)
        assert not info["finite"] and not np.any(info["active"])
        jax.tree.map(np.testing.assert_array_equal, state, combiner.init(3))
    _, state, info = updater(method)(ROWS, LOSSES.at[0].set(jnp.nan))
    if combiner.rule.needs_losses:
        assert not info["finite"]
        jax.tree.map(np.testing.assert_array_equal, state, combiner.init(3))
    else:
        assert info["finite"]


@pytest.mark.parametrize("method", [name for name in COMBINERS if make_combiner(name).reads == "losses"])
def test_rules_that_read_losses_need_one_backward_pass(method):
    combiner = make_combiner(method)
    coefficients, state, info = combiner.weigh(None, combiner.init(3), LOSSES, KEY)
    _, wanted_state, wanted = updater(method)(ROWS, LOSSES)
    np.testing.assert_allclose(coefficients, wanted["coefficients"], rtol=1e-6)
    np.testing.assert_allclose(info["weights"], wanted["weights"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, wanted_state)
    losses = LOSSES.at[1].set(0.0)
    assert list(np.asarray(combiner.weigh(None, combiner.init(3), losses, KEY)[2]["active"])) == [True, False, True]
    assert set(info) == {"weights", "coefficients", "active", "finite", "residual"}
    assert make_combiner(method, rescale="unit").reads == "gram"


@pytest.mark.parametrize("method", [name for name in COMBINERS if name != "graddrop"])
def test_coefficients_are_those_of_the_given_gradients(method):
    combiner = make_combiner(method, rescale="unit")
    grads, _, info = combiner.update(tree(8.0 * ROWS), combiner.init(3), losses=LOSSES, key=KEY, loss_scale=8.0)
    np.testing.assert_allclose(np.asarray(info["coefficients"]) @ (8.0 * ROWS), flat(grads), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(flat(grads)), 1.0, rtol=1e-5)


def test_jit_vmap_pmap_and_shard_map_agree():
    """Each device holds a part of the gradients, and the combiner combines their mean. One program contains all rules
    except mpd, which test_mpd_weights and test_fair_combine test."""
    methods = [method for method in COMBINERS if method != "mpd"]
    shares = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 4)), jnp.float32) + ROWS
    losses = LOSSES + 0.1 * jnp.arange(8.0)[:, None]

    def local(rows, losses, axis_name=None):
        results = {}
        for method in methods:
            combiner = make_combiner(method)
            grads, state, info = combiner.update(
                tree(rows), combiner.init(3), losses=losses, key=KEY, axis_name=axis_name
            )
            results[method] = grads, state, info["weights"]
        return results

    plain = jax.jit(local)
    whole = plain(jnp.mean(shares, 0), jnp.mean(losses, 0))
    over_devices = functools.partial(local, axis_name="data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    mapped = jax.jit(
        jax.shard_map(
            lambda rows, one: over_devices(rows[0], one[0]),
            mesh=mesh,
            in_specs=(spec, spec),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )(shares, losses)
    replicas = jax.pmap(over_devices, axis_name="data")(shares, losses)
    batched = jax.jit(jax.vmap(local))(shares, losses)
    first = plain(shares[0], losses[0])
    for method in methods:
        check = functools.partial(np.testing.assert_allclose, rtol=5e-5, atol=1e-5, err_msg=method)
        jax.tree.map(check, mapped[method], whole[method])
        jax.tree.map(lambda a, b: check(a[5], b), replicas[method], whole[method])  # noqa: B023
        jax.tree.map(lambda a, b: check(a[0], b), batched[method], first[method])  # noqa: B023


@pytest.mark.parametrize("method", PRIORITY)
def test_priorities_follow_their_task(method):
    """Swapping two tasks with their priorities swaps the weights; a larger priority raises a task's weight."""
    gram = gram_matrix(tree(ROWS))
    orthogonal = jnp.diag(jnp.asarray([1.0, 4.0, 2.0]))
    swap = np.array([1, 0, 2])
    priority = jnp.asarray([4.0, 1.0, 1.0])

    def weights(gram, priority):
        combiner = make_combiner(method, priority=priority)
        return np.asarray(combiner.weigh(gram, combiner.init(3), jnp.ones(3), KEY)[2]["weights"])

    assert weights(orthogonal, priority)[0] > 1.5 * weights(orthogonal, None)[0]
    if method != "pcgrad":  # its random order is not swapped with the tasks
        np.testing.assert_allclose(
            weights(gram, priority)[swap], weights(gram[swap][:, swap], priority[swap]), rtol=1e-4
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mean"}, "unknown method 'mean'; known: mpd, sum"),
        ({"method": "cagrad", "d": 1}, "cagrad has no option 'd'; it has: c"),
        ({"method": "rlw", "d": 1}, "rlw has no option 'd'; it has: none"),
        ({"method": "mgda", "priority": (1.0, 2.0)}, "mgda takes no priority; mpd, sum"),
        ({"method": "mgda", "normalization": "l2"}, "normalization='l2'; known: none, norm, loss"),
        ({"method": "cagrad", "c": -1.0}, "c=-1.0; expected a number >= 0"),
        ({"method": "dwa", "window": 0}, "window=0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"rescale": "max"}, "unknown rescale 'max'"),
        ({"method": "graddrop", "rescale": "unit"}, "does not go with graddrop"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_combiner(**arguments)


@pytest.mark.parametrize(
    ("method", "options", "given", "message"),
    [
        ("mpd", {}, {"gram": None, "losses": jnp.ones(2)}, "mpd needs the Gram matrix"),
        ("sum", {}, {"gram": None}, "sum needs the losses"),
        ("famo", {}, {"gram": jnp.eye(2)}, "famo reads the values of the losses"),
        ("pcgrad", {}, {"gram": jnp.eye(2)}, "pcgrad draws random numbers"),
        ("sum", {}, {"gram": jnp.eye(2), "losses": jnp.ones(3)}, r"losses has shape \(3,\); expected \(2,\)"),
        ("single", {"task": 2}, {"gram": jnp.eye(2)}, "task=2; there are 2 tasks"),
        ("mgda", {}, {"gram": jnp.eye(13)}, "13 tasks: .* at most 12"),
        ("sum", {"priority": (1.0,)}, {"gram": jnp.eye(2)}, r"priority has shape \(1,\)"),
    ],
)
def test_missing_inputs_are_named(method, options, given, message):
    combiner = make_combiner(method, **options)
    with pytest.raises(ValueError, match=message):
        combiner.weigh(given.get("gram"), combiner.init(2), given.get("losses"), None)


def test_only_a_rule_that_works_entry_by_entry_mixes():
    with pytest.raises(ValueError, match="sum is a linear combination"):
        make_combiner("sum").mix(tree(ROWS), KEY)
