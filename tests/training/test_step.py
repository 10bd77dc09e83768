"""The train step: meshes, skipped steps, absent regions, ways to combine, and the optimiser's rules."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import QUICK, assert_trees_close, assert_trees_equal

from fairhuman_jax.contract import System, sample_keys
from fairhuman_jax.devices.sharding import make_mesh, replicate, shard_batch
from fairhuman_jax.training.combining import FairConfig, init_fair
from fairhuman_jax.training.state import OptimizerConfig, init_state, learning_rate_schedule, make_optimizer
from fairhuman_jax.training.step import make_train_step

ADAM = make_optimizer(OptimizerConfig(learning_rate=0.1), 100)
SGD = optax.sgd(1.0)
FAIR = FairConfig()


@dataclasses.dataclass(frozen=True)
class Regression(System):
    """A noisy linear map as a system: three regions of its error are the objectives, by masks [B, 5]."""

    names: tuple[str, ...] = ("global", "face", "hand")

    def predict(self, trainable, frozen, batch, key):
        noise = jax.vmap(lambda k: jax.random.normal(k, (5,)))(sample_keys(key, batch))
        return {"error": batch["x"] @ trainable["kernel"] + trainable["bias"] - frozen["scale"] * noise}

    def objectives(self, prediction, batch):
        square = jnp.square(prediction["error"])
        losses = {"global": square.mean()}
        losses |= {name: jnp.mean(square * batch[f"{name}_mask"]) for name in ("face", "hand")}
        return {name: losses[name] for name in self.names}


THREE, ONE = Regression(), Regression(("global",))
FROZEN = {"scale": jnp.float32(0.5)}


def trainables():
    rng = np.random.default_rng(1)
    return {
        "kernel": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=5), jnp.float32),
    }


def batches(count: int, rows: int = 16, **replaced):
    """Batches whose masks differ from sample to sample."""
    rng = np.random.default_rng(2)
    for _ in range(count):
        batch = {"x": rng.normal(size=(rows, 4)).astype(np.float32)}
        for name in ("face_mask", "hand_mask"):
            batch[name] = rng.integers(0, 2, (rows, 5)).astype(np.float32)
        yield batch | replaced


@functools.cache
def compiled(devices, fsdp, fair, system, rule, clip_norm, ema_decay, accumulate):
    """(mesh, step) on the first devices, which tests share; compiled at its first call."""
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    step = make_train_step(system, rule, mesh, fair, accumulate=accumulate, clip_norm=clip_norm, ema_decay=ema_decay)
    programs = []

    def quick(*arguments):
        if not programs:
            programs.append(step.lower(*arguments).compile(QUICK))
        return programs[0](*arguments)

    return mesh, quick


def run(data, *, devices=1, fsdp=1, fair=FAIR, system=THREE, rule=ADAM, clip_norm=1.0, ema_decay=0.9, accumulate=1):
    """(state, metrics of each step) after one step a batch."""
    mesh, step = compiled(devices, fsdp, fair, system, rule, clip_norm, ema_decay, accumulate)
    combining = init_fair(fair, len(system.names))
    state = init_state(trainables(), rule, jax.random.key(5), ema=ema_decay is not None, fair=combining)
    state, frozen = replicate(mesh, (state, FROZEN))
    history = []
    for batch in data:
        state, metrics = step(state, frozen, shard_batch(mesh, batch))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


# ---- meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 1), (8, 8), (8, 2)])
def test_eight_devices_equal_one(devices, fsdp):
    alone, records = run(batches(3))
    state, found = run(batches(3), devices=devices, fsdp=fsdp)
    for part in ("trainable", "optimizers", "ema"):
        assert_trees_close(getattr(state, part), getattr(alone, part))
    assert state.step == 3 and state.skipped["all"] == 0
    for record, expected in zip(found, records, strict=True):
        assert record.keys() == expected.keys()
        names = [name for name in expected if name != "residual"]  # of the size of rounding
        np.testing.assert_allclose([record[name] for name in names], [expected[name] for name in names], rtol=1e-5)


def test_micro_batches_on_a_mesh_equal_one_batch():
    """Micro-batches on four devices train as one batch: a sample's noise goes by its place in the global batch."""
    alone, _ = run(batches(2))
    state, _ = run(batches(2), devices=4, accumulate=4)
    assert_trees_close((state.trainable, state.optimizers), (alone.trainable, alone.optimizers))


def test_meshes_and_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="fsdp=3 does not divide 8 devices"):
        make_mesh(3)
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 8 devices"):
        shard_batch(make_mesh(), {"x": np.zeros((6, 1))})


# ---- steps that are skipped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "face_mask", "hand_mask"])
def test_a_gradient_that_is_not_finite_changes_nothing(where, bad):
    """A value that is not finite in one sample of one task on one device is enough to skip the step."""
    first, broken = list(batches(2))
    broken[where] = broken[where].copy()
    broken[where][9, 0] = bad
    before, _ = run([first], devices=8)
    state, records = run([first, broken], devices=8)
    for part in ("trainable", "optimizers", "ema"):
        assert_trees_equal(getattr(state, part), getattr(before, part))
    assert (state.step, state.skipped["all"], before.skipped["all"]) == (2, 1, 0)
    assert [record["skipped"] for record in records] == [0, 1]


def test_steps_after_a_skipped_one_train_on():
    first, broken, last = list(batches(3))
    broken["x"] = broken["x"] * np.nan
    state, records = run([first, broken, last])
    assert state.skipped["all"] == 1 and state.step == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.trainable, state.ema)))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.trainable, run([first])[0].trainable)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert np.isnan(records[1]["loss/global"]) and np.isfinite(records[2]["loss/global"])


def test_one_objective_skips_too():
    first, broken = list(batches(2))
    broken["x"] = broken["x"] * np.inf
    state, _ = run([first, broken], system=ONE)
    assert_trees_equal(state.trainable, run([first], system=ONE)[0].trainable)
    assert state.skipped["all"] == 1


# ---- combining -------------------------------------------------------------------------------------------------------


def gradient_of(data, **options):
    """The gradient that a step applies, read off a descent step of rate 1, and its metrics."""
    state, (metrics,) = run(data, rule=SGD, ema_decay=None, **{"clip_norm": None} | options)
    return jax.tree.map(jnp.subtract, trainables(), state.trainable), metrics


def plain_gradients(batch, names):
    """Gradients of the named losses and their sum, by plain differentiation."""
    system = THREE
    placed = batch | {"position": np.arange(len(batch["x"]))}
    key = jax.random.fold_in(jax.random.key(5), 0)

    def total(tree):
        losses = system.objectives(system.predict(tree, FROZEN, placed, key), placed)
        return sum(losses[name] for name in names)

    return jax.grad(total)(trainables())


def test_sum_is_the_gradient_of_the_summed_losses_and_mpd_is_not():
    """The combined gradient of the plain sum is that of the summed losses; the fair rule turns it."""
    data = list(batches(1))
    summed = plain_gradients(data[0], ("global", "face", "hand"))
    assert_trees_close(gradient_of(data, fair=FairConfig(method="sum"))[0], summed)
    fair, metrics = gradient_of(data)
    cosine = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (fair, summed)), strict=True))
    cosine = cosine / (optax.global_norm(fair) * optax.global_norm(summed))
    assert 0 < cosine < 0.9999
    weights = [metrics[f"weight/{name}"] for name in ("global", "face", "hand")]
    assert max(weights) > 1.1 * min(weights) > 0


def test_single_and_one_objective_are_plain_training():
    data = list(batches(1))
    plain = plain_gradients(data[0], ("global",))
    single, metrics = gradient_of(data, fair=FairConfig(method="single"))
    assert_trees_close(single, plain)
    assert [metrics[f"weight/{name}"] for name in ("global", "face", "hand")] == [1, 0, 0]
    alone, metrics = gradient_of(data, system=ONE)
    assert_trees_close(alone, plain)
    assert {name for name in metrics if name.startswith("weight/")} == {"weight/global"}
    assert metrics["weight/global"] == 1
    np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(plain), rtol=1e-5)


def test_a_batch_without_hands_is_a_step_of_two_tasks():
    """An absent region takes no part; rescaling by "n_tasks" would multiply by 3 here and by 2 there."""
    data = list(batches(1, hand_mask=np.zeros((16, 5), np.float32)))
    fair = FairConfig(rescale="none")
    three, metrics = gradient_of(data, fair=fair)
    two, others = gradient_of(data, fair=fair, system=Regression(("global", "face")))
    assert metrics["weight/hand"] == 0 and metrics["loss/hand"] == 0 and metrics["skipped"] == 0
    assert_trees_close(three, two)
    for name in ("global", "face"):
        np.testing.assert_allclose(metrics[f"weight/{name}"], others[f"weight/{name}"], rtol=1e-5)


def rule_runs(method, accumulate=1, steps=4, **options):
    state, records = run(batches(steps), fair=FairConfig(method=method, **options), devices=4, accumulate=accumulate)
    alone, _ = run(batches(steps), fair=FairConfig(method=method, **options))
    return state, alone, records


@pytest.mark.parametrize(
    ("method", "accumulate"),
    [("log_sum", 2), ("uncertainty", 1), ("famo", 2), ("rlw", 1), ("mgda", 2), ("pcgrad", 1), ("nash_mtl", 1)],
)
def test_every_rule_trains_the_same_on_devices_and_micro_batches(method, accumulate):
    state, alone, records = rule_runs(method, accumulate)
    assert_trees_close((state.trainable, state.fair), (alone.trainable, alone.fair), 1e-4)
    assert records[-1]["loss/global"] < records[0]["loss/global"] and records[-1]["skipped"] == 0


def test_graddrop_trains():
    state, records = run(batches(4), fair=FairConfig(method="graddrop"), devices=4)
    assert records[-1]["loss/global"] < records[0]["loss/global"] and state.skipped["all"] == 0


def test_the_state_of_a_rule_stays_where_a_gradient_was_not_finite():
    first, broken = list(batches(2))
    broken["x"] = broken["x"] * np.nan
    fair = FairConfig(method="uncertainty", options=(("learning_rate", 0.1),))
    before, _ = run([first], fair=fair)
    assert_trees_equal(run([first, broken], fair=fair)[0].fair, before.fair)
    assert np.abs(before.fair["all"].rule["value"]).min() > 0.05


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_filed_under_their_own_objectives(accumulate):
    """The order of the objectives is not that of the alphabet."""
    data = list(batches(1, face_mask=np.zeros((16, 5), np.float32)))
    _, (metrics,) = run(data, accumulate=accumulate)
    assert metrics["weight/face"] == metrics["loss/face"] == 0
    assert min(metrics[f"{kind}/{name}"] for kind in ("weight", "loss") for name in ("global", "hand")) > 0


def test_priority_moves_the_weights():
    data = list(batches(1))
    _, plain = gradient_of(data)
    _, moved = gradient_of(data, fair=FairConfig(priority=(1.0, 1.0, 8.0)))
    assert moved["weight/hand"] > 1.2 * plain["weight/hand"]


def test_clip_cuts_the_norm_and_keeps_the_direction():
    data = list(batches(1))
    free, metrics = gradient_of(data)
    norm = metrics["gradient_norm"]
    np.testing.assert_allclose(norm, optax.global_norm(free), rtol=1e-5)
    cut, metrics = gradient_of(data, clip_norm=0.25)
    assert norm > 1 and metrics["gradient_norm"] == pytest.approx(norm)
    assert_trees_close(cut, jax.tree.map(lambda leaf: leaf * (0.25 / norm), free))


def test_unknown_names_are_refused_before_the_step_runs():
    data = list(batches(1))
    for fair, message in [
        (FairConfig(method="max"), "unknown method 'max'; known: mpd, sum, single"),
        (FairConfig(rescale="big"), "unknown rescale 'big'; known"),
        (FairConfig(priority=(1.0, 2.0)), r"priority has shape \(2,\); expected \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            gradient_of(data, fair=fair)
        assert "\n" not in str(error.value)


# ---- optimiser -------------------------------------------------------------------------------------------------------


def test_matrices_decay_and_stacked_biases_do_not():
    tree = {
        "linear": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "layers": {"norm": {"scale": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))}, "kernel": jnp.ones((2, 3, 3))},
        "lora": {"down": jnp.ones((3, 2)), "up": jnp.ones((2, 3))},
    }
    rule = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, tree), rule.init(tree), tree)
    decayed = jax.tree.map(lambda leaf: float(leaf.max()), updates)
    assert decayed["linear"] == {"kernel": pytest.approx(-0.05), "bias": 0.0}
    assert decayed["layers"] == {"norm": {"scale": 0.0, "bias": 0.0}, "kernel": pytest.approx(-0.05)}
    assert decayed["lora"] == {"down": pytest.approx(-0.05), "up": pytest.approx(-0.05)}


def test_learning_rates_by_step():
    def rates(**changes):
        schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **changes), 110)
        return [float(schedule(step)) for step in (0, 5, 10, 60, 110)]

    assert rates() == [1.0] * 5
    assert rates(warmup_steps=10) == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    cosine = rates(schedule="cosine", warmup_steps=10, final_fraction=0.2)
    assert cosine == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])
    linear = rates(schedule="linear", warmup_steps=10, final_fraction=0.2)
    assert linear == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])
    with pytest.raises(ValueError, match=r"optimizer\.schedule='step'; known: constant, linear, cosine"):
        rates(schedule="step")


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_every_optimiser_goes_downhill_and_decays_kernels_alone(name):
    tree = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
    rule = make_optimizer(OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5), 10)
    still, _ = rule.update(jax.tree.map(jnp.zeros_like, tree), rule.init(tree), tree)
    assert float(still["kernel"].max()) == pytest.approx(-0.05) and float(jnp.abs(still["bias"]).max()) == 0.0
    moved, _ = rule.update(tree, rule.init(tree), tree)
    assert all(float(leaf.max()) < -0.05 for leaf in moved.values())


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_parts_of_the_trainables_have_rates_of_their_own(name):
    tree = {"unet": {"kernel": jnp.ones((4, 5))}, "pose_kernel": jnp.ones((4, 5))}
    plain = make_optimizer(OptimizerConfig(name=name), 10)
    scaled = make_optimizer(OptimizerConfig(name=name, rate_scales=(("pose_kernel", 20.0),)), 10)
    expected, _ = plain.update(tree, plain.init(tree), tree)
    found, _ = scaled.update(tree, scaled.init(tree), tree)
    assert_trees_close(found, {"unet": expected["unet"], "pose_kernel": 20.0 * expected["pose_kernel"]})
    with pytest.raises(ValueError, match=r"rate_scales names 'pose_kernel', but the trainables are unet"):
        scaled.init({"unet": tree["unet"]})


def test_first_moments_in_half_precision():
    tree = {"kernel": jnp.ones((4, 5))}
    state = make_optimizer(OptimizerConfig(moment_dtype="bfloat16"), 10).init(tree)
    assert sorted(leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim) == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, r"optimizer\.name='adam'; known: adamw, lion, adafactor"),
        ({"moment_dtype": "int8"}, r"optimizer\.moment_dtype='int8'; known: float32, bfloat16"),
    ],
)
def test_unknown_optimisers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**changes), 10)


def test_the_average_follows_quickly_at_first_and_slowly_later():
    state, _ = run(batches(1))
    start = trainables()
    moved = jax.tree.map(lambda new, old: new - old, state.trainable, start)
    expected = jax.tree.map(lambda old, move: old + 0.9 * move, start, moved)
    assert_trees_close(state.ema, expected)  # decay min(0.9, 1 / 10) at step 0
    assert_trees_equal(state.averaged, state.ema)
    assert run(batches(1), ema_decay=None)[0].ema is None
