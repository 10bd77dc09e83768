"""K gradients of one forward pass: equal to K separate ones, however the batch is cut and the network compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    QUICK,
    assert_trees_close,
    fairhuman,
    quick_jit,
    random_batch,
    tiny_gradients,
    tiny_pipeline,
    trained_lora,
)

from fairhuman_jax.contract import Parts, WholePhase
from fairhuman_jax.devices.sharding import leaf_specs, make_mesh, place, shard_batch
from fairhuman_jax.losses import fair_combine
from fairhuman_jax.training.combining import FairConfig, init_fair
from fairhuman_jax.training.objectives import mean_over_micro_batches, task_gradients
from fairhuman_jax.training.state import init_state
from fairhuman_jax.training.step import make_train_step

KEY = jax.random.fold_in(jax.random.key(5), 0)  # of step 0 of a run with key 5
NAMES = ("global", "face", "hand")
SPLIT_ABOVE = 31  # elements
STACKS = ("transformer_blocks", "layers")


@pytest.fixture(scope="module")
def system():
    return fairhuman()


@pytest.fixture(scope="module")
def gradients():
    """`task_gradients` of one batch of eight."""
    return tiny_gradients()


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
    frozen, batch, tree = system.pipeline.params, random_batch(), trained_lora(system)

    def loss(tree, index):
        losses = system.objectives(system.predict(tree, frozen, batch, KEY), batch)
        return jnp.stack(list(losses.values()))[index]

    separate = quick_jit(jax.value_and_grad(loss))
    for index, name in enumerate(NAMES):
        value, gradient = separate(tree, index)
        np.testing.assert_allclose(gradients[1][name], value, rtol=1e-5)
        assert float(value) > 0
        assert_trees_close(jax.tree.map(lambda leaf, i=index: leaf[i], gradients[0]), gradient)
    assert tuple(gradients[1]) == NAMES


def test_equal_to_a_loop_over_one_pull_back(system, gradients):
    frozen, batch = system.pipeline.params, random_batch()

    @quick_jit
    def looped(tree):
        prediction, pull_back = jax.vjp(lambda t: system.predict(t, frozen, batch, KEY), tree)
        cotangents = jax.jacrev(lambda p: jnp.stack([*system.objectives(p, batch).values()]))(prediction)
        return jax.lax.map(lambda cotangent: pull_back(cotangent)[0], cotangents)

    assert_trees_close(gradients[0], looped(trained_lora(system)))


@pytest.mark.parametrize("scan", [True, False])
def test_rematerialised_and_unrolled_networks_give_the_same(system, gradients, scan):
    other = fairhuman(tiny_pipeline(scan, "full"))
    frozen, tree, expected = system.pipeline.params, trained_lora(system), gradients[0]
    if not scan:
        frozen, tree, expected = unstacked(frozen), unstacked(tree), unstacked(expected, axis=1)
    batch = random_batch()
    found, losses = quick_jit(lambda t: task_gradients(WholePhase(system=other), Parts(t, {}, frozen), batch, KEY))(
        tree
    )
    assert_trees_close(found, expected, 1e-4)  # entries of 1e-9 beside activations of 1: rounding of the forward pass
    assert_trees_close(losses, gradients[1])


def test_accumulated_over_micro_batches_equal_one_batch(system, gradients):
    """Gradients averaged over four micro-batches are those of the whole batch."""
    frozen, batch = system.pipeline.params, random_batch()
    tree = trained_lora(system)
    step = quick_jit(
        lambda t: mean_over_micro_batches(
            lambda b: task_gradients(WholePhase(system=system), Parts(t, {}, frozen), b, KEY), batch, 4
        )
    )
    found, losses = step(tree)
    assert_trees_close(found, gradients[0])
    assert tuple(losses) == NAMES
    assert_trees_close(losses, gradients[1])


def test_a_step_on_eight_devices_applies_their_fair_combination(system, gradients):
    """With LoRA factors and the frozen base split over two of them, text encoder and autoencoder included."""
    mesh, rule, fair = make_mesh(2), optax.sgd(1.0), FairConfig()
    state = init_state(trained_lora(system), rule, jax.random.key(5), ema=False, fair=init_fair(fair, 3))
    placed = place(mesh, (state, system.pipeline.params), SPLIT_ABOVE)
    for tree in (state.trainable, *system.pipeline.params.values()):
        assert any(map(tuple, jax.tree.leaves(leaf_specs(mesh, tree, SPLIT_ABOVE))))
    arguments = (*placed, shard_batch(mesh, random_batch(position=False)))
    step = make_train_step(system, rule, mesh, fair, split_above=SPLIT_ABOVE, split_frozen=True)
    after, metrics = step.lower(*arguments).compile(QUICK)(*arguments)
    expected, info = fair_combine(gradients[0])
    assert_trees_close(jax.tree.map(jnp.subtract, trained_lora(system), after.trainable), expected, 1e-4)
    for index, name in enumerate(NAMES):
        np.testing.assert_allclose(metrics[f"loss/{name}"], gradients[1][name], rtol=1e-5)
        np.testing.assert_allclose(metrics[f"weight/{name}"], info["weights"][index], rtol=1e-4)


def test_splitting_a_batch_changes_no_random_number(system):
    frozen, batch, tree = system.pipeline.params, random_batch(4), trained_lora(system)
    predict = quick_jit(lambda batch: system.predict(tree, frozen, batch, KEY))
    whole = predict(batch)
    order = np.array([2, 0, 3, 1])
    assert_trees_close(
        predict({name: array[order] for name, array in batch.items()}),
        jax.tree.map(lambda leaf: leaf[order], whole),
    )
    # Equal pictures at different places of the batch get noise of their own.
    same = predict(jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, 0), batch) | {"position": batch["position"]})
    assert np.abs(same["target"][0] - same["target"][1]).max() > 0.1


def test_refuses_micro_batches_of_unequal_size():
    with pytest.raises(ValueError, match="a batch of 4 per device does not divide into 3 micro-batches"):
        mean_over_micro_batches(len, random_batch(4), 3)
