"""Large leaves split over `fsdp`: the same step as on one device, each way of pulling gradients back, and what the
compiled program says to other devices."""

from __future__ import annotations

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import QUICK, assert_trees_close

from fairhuman_jax.contract import System, sample_keys
from fairhuman_jax.devices.sharding import Shard, box, leaf_specs, make_mesh, place, shard_batch, unbox
from fairhuman_jax.models.layers import Conv, Linear
from fairhuman_jax.models.transformer import rematerialise
from fairhuman_jax.training.combining import GRADIENTS, FairConfig, init_fair
from fairhuman_jax.training.state import OptimizerConfig, init_state, make_optimizer
from fairhuman_jax.training.step import make_train_step

NAMES = ("global", "face", "hand")
MESHES = [(8, 1), (8, 8), (8, 2)]
SPLIT_ABOVE = 100  # elements: kernels of these networks are split, biases are not


class Layer(nn.Module):
    """`x + tanh(W x)`."""

    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(Linear(x.shape[-1], name="fc")(x))


class Net(nn.Module):
    """A convolution, then a scanned, rematerialised stack of three layers."""

    @nn.compact
    def __call__(self, x):
        x = Conv(16, name="conv")(x)
        stack = nn.scan(
            lambda layer, x, _: (layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(rematerialise(Layer, "full", in_scan=True)(name="layers"), x, None)[0]


@dataclasses.dataclass(frozen=True)
class Regions(System):
    """One trainable network after a frozen one; three masked squared errors of its output."""

    def predict(self, trainable, frozen, batch, key):
        noise = jax.vmap(lambda k: 0.1 * jax.random.normal(k, (4, 4, 1)))(sample_keys(key, batch))
        return Net().apply({"params": trainable}, Net().apply({"params": frozen}, batch["x"] + noise))

    def objectives(self, prediction, batch):
        square = jnp.square(prediction - 1.0)
        losses = {"global": square.mean()}
        return losses | {name: jnp.mean(square * batch[f"{name}_mask"]) for name in ("face", "hand")}


SYSTEM = Regions()


@functools.cache
def networks():
    """(trainable, frozen), on the host, because a step takes its state's arrays for good."""
    shapes = ((0, 16), (1, 8))
    return jax.device_get([Net().init(jax.random.key(seed), jnp.ones((1, 4, 4, c)))["params"] for seed, c in shapes])


def batches(count):
    rng = np.random.default_rng(2)
    for _ in range(count):
        masks = {f"{name}_mask": rng.integers(0, 2, (16, 4, 4, 1)).astype(np.float32) for name in ("face", "hand")}
        yield {"x": rng.normal(size=(16, 4, 4, 8)).astype(np.float32)} | masks


def run(devices=1, fsdp=1, *, steps=3, accumulate=1, name="adamw", refresh=None, **fair):
    """(state, metrics of each step) on a mesh of the first devices."""
    mesh, rule = make_mesh(fsdp, jax.devices()[:devices]), FairConfig(**fair)
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.01, eps=1e-3), 100)
    step = make_train_step(
        SYSTEM,
        optimizer,
        mesh,
        rule,
        accumulate=accumulate,
        clip_norm=0.5,
        ema_decay=0.9,
        split_above=SPLIT_ABOVE,
        split_frozen=True,
    )
    trainable, frozen = networks()
    state = init_state(trainable, optimizer, jax.random.key(3), ema=True, fair=init_fair(rule, 3))
    state, frozen = place(mesh, (state, frozen), SPLIT_ABOVE)
    history, programs = [], {}
    for index, batch in enumerate(batches(steps)):
        batch, solve = shard_batch(mesh, batch), refresh is None or refresh[index]
        if solve not in programs:
            programs[solve] = step.lower(state, frozen, batch, solve).compile(QUICK)
        state, metrics = programs[solve](state, frozen, batch)
        history.append(jax.device_get(metrics))
    return state, history


@functools.cache
def alone(accumulate=1):
    """Three steps on one device."""
    return run(accumulate=accumulate)


def assert_same_run(found, expected, tolerance=1e-5):
    (state, records), (other, wanted) = found, expected
    parts = ("trainable", "optimizers", "ema", "fair")
    assert_trees_close(*([jax.device_get(getattr(s, part)) for part in parts] for s in (state, other)), tolerance)
    for record, want in zip(records, wanted, strict=True):
        assert record.keys() == want.keys()
        names = [name for name in want if name != "residual"]  # of the size of rounding
        np.testing.assert_allclose([record[n] for n in names], [want[n] for n in names], rtol=1e-4, atol=1e-6)


# ---- which leaves are split ------------------------------------------------------------------------------------------


def test_large_kernels_are_split_along_their_larger_divisible_axis():
    mesh = make_mesh(4)
    tree = {
        "conv": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(4096)},
        "layers": {"kernel": jnp.zeros((4, 32, 8))},  # a stack of four: the axis that counts layers is not split
        "odd": {"kernel": jnp.zeros((64, 6)), "scale": jnp.zeros((64, 64))},
        "none": {"kernel": jnp.zeros((30, 30))},
        "small": {"kernel": jnp.zeros((10, 8))},
        "lora": {"down": jnp.zeros((64, 4)), "up": jnp.zeros((2, 64))},
    }
    specs = leaf_specs(mesh, tree, split_above=100)
    found = {key: {name: tuple(spec) for name, spec in leaves.items()} for key, leaves in specs.items()}
    assert found == {
        "conv": {"kernel": (None, None, None, "fsdp"), "bias": ()},
        "layers": {"kernel": (None, "fsdp")},
        "odd": {"kernel": ("fsdp",), "scale": ()},
        "none": {"kernel": ()},
        "small": {"kernel": ()},
        "lora": {"down": ("fsdp",), "up": (None, "fsdp")},
    }
    assert not any(map(tuple, jax.tree.leaves(leaf_specs(make_mesh(1), tree, split_above=100))))


def test_a_device_holds_its_part_only():
    mesh = make_mesh(8)
    tree = place(mesh, {"kernel": jnp.arange(64.0 * 24).reshape(64, 24)}, split_above=100)
    assert [shard.data.shape for shard in tree["kernel"].addressable_shards] == [(8, 24)] * 8


def test_boxes_open_to_the_whole_leaf_and_close_to_the_part():
    mesh = make_mesh(8)
    tree = {"kernel": jnp.arange(3.0 * 4 * 16).reshape(3, 4, 16), "bias": jnp.ones(16)}
    specs = leaf_specs(mesh, tree, split_above=100)

    def local(part):
        boxed = box(part, specs)
        assert isinstance(boxed["kernel"], Shard) and boxed["kernel"].value.shape == (3, 4, 2)
        assert jax.tree.map(jnp.shape, unbox(boxed)) == jax.tree.map(jnp.shape, part)
        return nn.meta.unbox(boxed)

    whole = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=jax.sharding.PartitionSpec(), check_vma=False)(
        tree
    )
    np.testing.assert_array_equal(whole["kernel"], tree["kernel"])


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize(("devices", "fsdp"), MESHES)
def test_split_over_devices_equals_one(devices, fsdp, gradients):
    assert_same_run(run(devices, fsdp, gradients=gradients), alone())


@pytest.mark.parametrize("gradients", GRADIENTS[1:])
def test_each_way_of_pulling_back_gives_the_same_on_one_device(gradients):
    assert_same_run(run(gradients=gradients), alone())


@pytest.mark.parametrize("gradients", ["stacked", "sequential"])
def test_micro_batches_equal_one_batch(gradients):
    assert_same_run(run(4, 2, accumulate=4, gradients=gradients), alone())


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_every_optimiser_runs_split(name):
    first, second = run(8, 4, name=name), run(name=name)
    assert_trees_close(*(jax.device_get(s.trainable) for s in (first[0], second[0])), 1e-4)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), jax.device_get(second[0].trainable), networks()[0])
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_replay_refuses_micro_batches():
    with pytest.raises(ValueError, match=r"fair\.gradients='replay' keeps no task gradient.*use .*sequential"):
        run(accumulate=2, gradients="replay")


# ---- re-used weights -------------------------------------------------------------------------------------------------


def test_a_step_between_refreshes_follows_the_last_coefficients():
    """Its gradient is that of the weighted sum of losses, with the weights that the step before found."""
    state, (_, record) = run(8, 2, steps=2, refresh=(True, False))
    solved, (first,) = run(steps=1)
    for name in NAMES:
        assert record[f"weight/{name}"] == pytest.approx(first[f"weight/{name}"], rel=1e-4)
    np.testing.assert_allclose(state.fair["all"].coefficients, solved.fair["all"].coefficients, rtol=1e-4)
    assert not any(name.startswith(("cosine/", "norm/")) for name in record)

    coefficients, batch = np.asarray(solved.fair["all"].coefficients), list(batches(2))[1]
    batch |= {"position": np.arange(16)}
    key = jax.random.fold_in(jax.random.key(3), 1)

    def weighted(trainable):
        losses = SYSTEM.objectives(SYSTEM.predict(trainable, networks()[1], batch, key), batch)
        return sum(c * losses[name] for c, name in zip(coefficients, NAMES, strict=True))

    wanted = float(optax.global_norm(jax.grad(weighted)(jax.device_get(solved.trainable))))
    assert record["gradient_norm"] == pytest.approx(wanted, rel=1e-4)


def test_refreshing_every_step_is_the_default():
    assert_same_run(run(refresh=(True,) * 3), alone())


def test_a_state_made_for_another_number_of_objectives_is_refused():
    optimizer, mesh = optax.sgd(1.0), make_mesh(1, jax.devices()[:1])
    step = make_train_step(SYSTEM, optimizer, mesh, FairConfig())
    state = init_state(networks()[0], optimizer, jax.random.key(0), ema=False)
    with pytest.raises(ValueError, match="made for 1 objectives, but the system has 3: global, face, hand"):
        step(state, networks()[1], shard_batch(mesh, next(batches(1))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradients": "both"}, r"fair\.gradients='both'; known: stacked, sequential, replay"),
        ({"refresh_every": 0}, r"fair\.refresh_every=0; 1 solves at every step"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FairConfig(**changes).combiner()


# ---- collectives -----------------------------------------------------------------------------------------------------

OPERATION = re.compile(r"= (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(")


def collectives(gradients: str, devices: int, fsdp: int) -> list[tuple[str, int]]:
    """(kind, elements of the result) of every collective of the compiled step, those that XLA combined taken apart."""
    mesh, rule = make_mesh(fsdp, jax.devices()[:devices]), FairConfig(gradients=gradients)
    optimizer = make_optimizer(OptimizerConfig(), 100)
    step = make_train_step(SYSTEM, optimizer, mesh, rule, clip_norm=1.0, split_above=SPLIT_ABOVE, split_frozen=True)
    trainable, frozen = networks()
    state = init_state(trainable, optimizer, jax.random.key(3), ema=False, fair=init_fair(rule, 3))
    placed = place(mesh, (state, frozen), SPLIT_ABOVE)
    text = step.lower(*placed, shard_batch(mesh, next(batches(1)))).compile().as_text()
    found = []
    for line in text.splitlines():
        if match := OPERATION.search(line):
            shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", match[1])
            found += [(match[2], int(np.prod([int(n) for n in shape.split(",") if n] or [1]))) for shape in shapes]
    return found


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_devices_exchange_one_small_message_beside_gradients(gradients):
    """All trainable kernels are split: their gradients are scattered sums, and what is left of all-reduces is one of
    K x K + K floats, and those of the whole (small) leaves."""
    found = collectives(gradients, 8, 8)
    kinds = {kind for kind, _ in found}
    assert kinds <= {"all-reduce", "reduce-scatter", "all-gather"}
    times = 2 if gradients == "replay" else 1
    small = [size for kind, size in found if kind == "all-reduce"]
    biases = [(1 if i else 3) * n for i in range(times) for n in (16, 3 * 16)]  # of the convolution and of the stack
    assert sorted(small) == sorted([*biases, 3 * 3 + 3])
    assert any(kind == "reduce-scatter" for kind, _ in found)
