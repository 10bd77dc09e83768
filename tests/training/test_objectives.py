"""K gradients of one forward pass: equal to K separate ones, however the batch is cut and the network compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import assert_trees_close, fairhuman, random_batch, tiny_pipeline, trained_lora

from fairhuman_jax.training.objectives import accumulated_task_gradients, task_gradients

KEY = jax.random.key(3)
NAMES = ("global", "face", "hand")
STACKS = ("transformer_blocks", "layers")


@pytest.fixture(scope="module")
def system():
    return fairhuman()


@pytest.fixture(scope="module")
def gradients(system):
    """`task_gradients` of one batch of four."""
    frozen = system.pipeline.params
    step = jax.jit(lambda tree, batch: task_gradients(system, tree, frozen, batch, KEY))
    return step(trained_lora(system), random_batch(4))


def unstacked(tree, axis=0):
    """Every scanned stack split into one module a layer; `axis` is the one that counts layers."""
    split = {}
    for name, value in tree.items():
        if name in STACKS:
            for i in range(jax.tree.leaves(value)[0].shape[axis]):
                split[f"{name}.{i}"] = jax.tree.map(lambda leaf, i=i: jnp.take(leaf, i, axis), value)
        else:
            split[name] = unstacked(value, axis) if isinstance(value, dict) else value
    return split


def test_equal_to_three_separate_gradients(system, gradients):
    frozen, batch, tree = system.pipeline.params, random_batch(4), trained_lora(system)

    def loss(tree, index):
        losses = system.objectives(system.predict(tree, frozen, batch, KEY), batch)
        return jnp.stack(list(losses.values()))[index]

    separate = jax.jit(jax.value_and_grad(loss))
    for index, name in enumerate(NAMES):
        value, gradient = separate(tree, index)
        np.testing.assert_allclose(gradients[1][name], value, rtol=1e-5)
        assert float(value) > 0
        assert_trees_close(jax.tree.map(lambda leaf, i=index: leaf[i], gradients[0]), gradient)
    assert tuple(gradients[1]) == NAMES


def test_equal_to_a_loop_over_one_pull_back(system, gradients):
    frozen, batch = system.pipeline.params, random_batch(4)

    @jax.jit
    def looped(tree):
        prediction, pull_back = jax.vjp(lambda t: system.predict(t, frozen, batch, KEY), tree)

        def one(name):
            return pull_back(jax.grad(lambda p: system.objectives(p, batch)[name])(prediction))[0]

        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, NAMES))

    assert_trees_close(gradients[0], looped(trained_lora(system)))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_rematerialised_and_unrolled_networks_give_the_same(system, gradients, scan, remat):
    if scan and remat == "none":
        pytest.skip("this is the reference itself")
    other = fairhuman(tiny_pipeline(scan, remat))
    frozen, tree, expected = system.pipeline.params, trained_lora(system), gradients[0]
    if not scan:
        frozen, tree, expected = unstacked(frozen), unstacked(tree), unstacked(expected, axis=1)
    batch = random_batch(4)
    found, losses = jax.jit(lambda t: task_gradients(other, t, frozen, batch, KEY))(tree)
    assert_trees_close(found, expected, 1e-4)
    assert_trees_close(losses, gradients[1])


def test_accumulated_over_micro_batches_equal_one_batch(system, gradients):
    """Acceptance fact 13."""
    frozen, batch = system.pipeline.params, random_batch(4)
    step = jax.jit(lambda t: accumulated_task_gradients(system, t, frozen, batch, KEY, 4))
    assert_trees_close(step(trained_lora(system)), gradients)


def test_splitting_a_batch_changes_no_random_number(system):
    frozen, batch, tree = system.pipeline.params, random_batch(4), trained_lora(system)
    predict = jax.jit(lambda batch: system.predict(tree, frozen, batch, KEY))
    whole = predict(batch)
    order = np.array([2, 0, 3, 1])
    assert_trees_close(
        predict({name: array[order] for name, array in batch.items()}),
        jax.tree.map(lambda leaf: leaf[order], whole),
    )
    # Equal pictures at different places of the batch get noise of their own.
    same = predict(jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, 0), batch) | {"position": batch["position"]})
    assert np.abs(same["target"][0] - same["target"][1]).max() > 0.1


def test_refuses_micro_batches_of_unequal_size(system):
    with pytest.raises(ValueError, match="a batch of 4 per device does not divide into 3 micro-batches"):
        accumulated_task_gradients(system, {}, {}, random_batch(4), KEY, 3)
