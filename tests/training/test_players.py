"""Steps of several players: a toy GAN by three phases, two optimisers, running statistics and the fair rule."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_models import assert_trees_close, assert_trees_equal

from fairhuman_jax.contract import Phase, System, sample_keys
from fairhuman_jax.devices.sharding import make_mesh, replicate, shard_batch
from fairhuman_jax.training.checkpoint import Checkpointer
from fairhuman_jax.training.combining import FairConfig, init_fair
from fairhuman_jax.training.state import init_state
from fairhuman_jax.training.step import due_phases, make_train_step

FAIR = FairConfig()


def numbers(batch, key, width=2):
    """Normal numbers [B, width], by the sample's place in the global batch."""
    return jax.vmap(lambda k: jax.random.normal(k, (width,)))(sample_keys(key, batch))


def judged(parts, points):
    hidden = jnp.tanh(points @ parts.trainable["judge"]["kernel"])
    return hidden @ parts.trainable["judge"]["out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Phase):
    """Two objectives of the generator: to be taken for real, and to have the real points' mean."""

    def predict(self, parts, batch, key):
        fake = numbers(batch, key) @ parts.trainable["generator"]["kernel"] + parts.trainable["generator"]["bias"]
        mean = parts.statistics["mean"]
        found = {"score": judged(parts, fake), "fake": fake, "mean": jnp.broadcast_to(mean, fake.shape)}
        return found, {"mean": 0.9 * mean + 0.1 * batch["real"].mean(axis=0)}

    def objectives(self, prediction, batch):
        away = jnp.square(prediction["fake"] - prediction["mean"])
        return {"adversarial": jax.nn.softplus(-prediction["score"]).mean(), "mean": away.mean()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(Phase):
    """The discriminator's logistic loss."""

    def predict(self, parts, batch, key):
        fake = numbers(batch, key) @ parts.trainable["generator"]["kernel"] + parts.trainable["generator"]["bias"]
        return {"fake": judged(parts, fake), "real": judged(parts, batch["real"])}, parts.statistics

    def objectives(self, prediction, batch):
        return {"logistic": (jax.nn.softplus(prediction["fake"]) + jax.nn.softplus(-prediction["real"])).mean()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalise(Phase):
    """The squared gradient of the discriminator at real points (R1)."""

    def predict(self, parts, batch, key):
        return jax.vmap(jax.grad(lambda point: judged(parts, point)))(batch["real"]), parts.statistics

    def objectives(self, prediction, batch):
        return {"r1": jnp.square(prediction).sum(axis=-1).mean()}


@dataclasses.dataclass(frozen=True)
class ToyGan(System):
    """Points in the plane: a linear generator against a small discriminator."""

    phases = (
        Generate(name="generator", trains=("generator",), player="generator"),
        Judge(name="judge", trains=("judge",), player="judge"),
        Penalise(name="penalty", trains=("judge",), player="judge", every=4),
    )

    def init(self, key):
        first, second, third = jax.random.split(key, 3)
        judge = {"kernel": jax.random.normal(first, (2, 8)), "out": jax.random.normal(second, (8,)) / 3.0}
        return {"generator": {"kernel": jax.random.normal(third, (2, 2)), "bias": jnp.zeros(2)}, "judge": judge}, {}

    def init_statistics(self, trainable, frozen):
        return {"mean": jnp.zeros(2)}


GAN = ToyGan()
PLAYERS = {"generator": optax.adam(3e-2), "judge": optax.sgd(0.1)}
COUNTS = {"generator": 2, "judge": 1, "penalty": 1}


def gan_state(fair=FAIR):
    trainable, frozen = GAN.init(jax.random.key(1))
    combining = {phase: init_fair(fair, count) for phase, count in COUNTS.items()}
    statistics = GAN.init_statistics(trainable, frozen)
    key = jax.random.key(5)
    return init_state(trainable, PLAYERS, key, ema=True, fair=combining, phases=GAN.phases, statistics=statistics)


def real(step, rows=16):
    points = np.random.default_rng(step).normal((3.0, -2.0), 0.5, (rows, 2))
    return {"real": points.astype(np.float32)}


@functools.cache
def gan_step(devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return mesh, make_train_step(GAN, PLAYERS, mesh, FAIR, ema_decay=0.9, clip_norm={"generator": 1.0, "judge": None})


def play(state, steps, *, devices=1, data=real):
    """(state, metrics of each step) after the given steps of the toy GAN."""
    mesh, step = gan_step(devices)
    state, history = replicate(mesh, state), []
    for index in steps:
        state, metrics = step(state, {}, shard_batch(mesh, data(index)), True, due_phases(GAN, index))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def test_a_gan_plays_by_phases_on_eight_devices_as_on_one():
    alone, records = play(gan_state(), range(6))
    state, found = play(gan_state(), range(6), devices=8)
    for part in ("trainable", "statistics", "optimizers", "ema", "ema_statistics", "fair"):
        assert_trees_close(getattr(state, part), getattr(alone, part), 2e-5)
    assert [("loss/penalty.r1" in record) for record in records] == [True, False, False, False, True, False]
    assert {"loss/generator.adversarial", "weight/generator.mean", "cosine/generator.adversarial_mean"} <= set(found[0])
    assert {"gradient_norm/generator", "gradient_norm/judge", "skipped"} <= set(found[1])
    assert set(state.optimizers) == {"generator", "judge"} and state.step == 6


def test_a_gan_learns_the_mean_of_its_points_and_keeps_it_as_a_statistic():
    state, records = play(gan_state(), range(150))
    assert np.linalg.norm(state.trainable["generator"]["bias"] - np.array((3.0, -2.0))) < 1.2  # 3.6 at the start
    expected = np.zeros(2)
    for index in range(150):
        expected = 0.9 * expected + 0.1 * real(index)["real"].mean(axis=0)
    np.testing.assert_allclose(state.statistics["mean"], expected, rtol=1e-4)
    weights = [records[-1][f"weight/generator.{name}"] for name in ("adversarial", "mean")]
    assert abs(weights[0] - weights[1]) > 1e-3, "the fair rule weighs the generator's two objectives"


def test_a_phase_moves_its_own_player_alone():
    start = gan_state()
    mesh, step = gan_step(1)
    state, _ = step(replicate(mesh, start), {}, shard_batch(mesh, real(0)), True, ("judge",))
    assert_trees_equal(state.trainable["generator"], gan_state().trainable["generator"])
    assert_trees_equal(state.statistics, gan_state().statistics)
    assert np.abs(state.trainable["judge"]["out"] - gan_state().trainable["judge"]["out"]).max() > 1e-4


def test_a_phase_that_is_not_finite_stays_while_the_others_move():
    def broken(index):
        return {"real": real(index)["real"] * np.float32(np.nan if index == 1 else 1.0)}

    before, _ = play(gan_state(), [0])
    state, records = play(gan_state(), [0, 1], data=broken)
    assert_trees_equal(state.trainable, before.trainable)
    assert_trees_equal(state.statistics, before.statistics)
    assert {name: int(count) for name, count in state.skipped.items()} == {"generator": 1, "judge": 1, "penalty": 0}
    assert records[1]["skipped"] == 2


def test_a_gan_resumes_bitwise(tmp_path):
    whole, _ = play(gan_state(), range(7))
    half, _ = play(gan_state(), range(3))
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    checkpoints.save(3, jax.tree.map(jnp.asarray, half), {"position": 3}, {})
    checkpoints.wait()
    restored, position = checkpoints.restore(gan_state())
    checkpoints.close()
    again, _ = play(restored, range(position["position"], 7))
    assert_trees_equal(again, whole)
