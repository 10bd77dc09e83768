"""Pose network: targets at exact places, grouping loss by hand, learning, and an export that needs no batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import QUICK, assert_trees_close, quick_jit

from fairhuman_jax.contract import Parts, PreviewConfig
from fairhuman_jax.data.people import PeopleDataset
from fairhuman_jax.data.people.conditions import detected_points
from fairhuman_jax.devices.sharding import make_mesh
from fairhuman_jax.models import stage_mean
from fairhuman_jax.systems.shipped.pose_network import PoseNetworkConfig, gaussians, tag_loss, to_cells
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.state import init_state
from fairhuman_jax.training.step import make_train_step
from fairhuman_jax.weights.mmpose import load_pose_network

KEY = jax.random.key(4)
SIZE = 16
TINY = {
    "joints": 2,
    "stem_channels": 4,
    "widths": [4, 6],
    "bottlenecks": 1,
    "stage_modules": [1],
    "blocks": 1,
    "head_blocks": 1,
}


def pose_batch(count: int = 4) -> dict:
    """Dark pictures with a bright square at joint 0 and a dim one at joint 1 of a first person; no second one."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 40, (count, SIZE, SIZE, 3), dtype=np.uint8)
    keypoints = np.tile(np.float32([-1.0, -1.0, 0.0]), (count, 2, 2, 1))
    for row in range(count):
        for joint, level in enumerate((250, 120)):
            x, y = rng.integers(2, SIZE - 2, 2)
            image[row, y - 1 : y + 2, x - 1 : x + 2] = level
            keypoints[row, 0, joint] = x + 0.5, y + 0.5, 1.0
    return {"image": image, "keypoints": keypoints, "position": np.arange(count, dtype=np.int32)}


@pytest.fixture(scope="module")
def system():
    return PoseNetworkConfig(network=TINY).build()


@pytest.fixture(scope="module")
def run(system):
    """(parameters after 40 steps on one batch, losses, statistics)."""
    start, frozen = system.init(jax.random.key(0))
    mesh, rule = make_mesh(devices=jax.devices()[:1]), optax.adam(1e-2)
    state = init_state(start, rule, KEY, ema=False, statistics=system.init_statistics(start, frozen))
    batch = pose_batch()
    program = make_train_step(system, rule, mesh, FairConfig()).lower(state, frozen, batch).compile(QUICK)
    losses = []
    for _ in range(40):
        state, metrics = program(state, frozen, batch)
        losses.append(float(metrics["loss/pose"]))
    return state.trainable, losses, state.statistics


def test_corner_cells_are_corner_pixels():
    corners = jnp.asarray([[0.5, 0.5], [63.5, 31.5], [32.0, 16.0]])
    np.testing.assert_allclose(to_cells(corners, (32, 64), (16, 32)), [[0, 0], [31, 15], [15.5, 7.5]], atol=1e-5)


def test_heat_maps_of_people_who_share_a_joint():
    people = np.zeros((1, 3, 2, 3), np.float32)
    people[0, 0, 0] = 0.5, 0.5, 1.0
    people[0, 1, 0] = 15.5, 7.5, 0.3
    people[0, 2, 1] = 8.0, 4.0, 0.0
    found = np.asarray(gaussians(jnp.asarray(people), (8, 16), (8, 16), 2.0))
    y, x = np.mgrid[:8, :16]
    first, second = np.exp(-(x**2 + y**2) / 8), np.exp(-((x - 15) ** 2 + (y - 7) ** 2) / 8)
    assert found.shape == (1, 8, 16, 2)
    np.testing.assert_allclose(found[0, ..., 0], np.maximum(first, second), atol=1e-6)
    assert not found[..., 1].any()


def test_tags_of_a_person_agree_and_those_of_two_differ():
    tags = np.zeros((1, 4, 4, 2), np.float32)
    tags[0, 0, 0, 0], tags[0, 0, 3, 1] = 1.0, 2.0  # the first person's, one of variance 1/4
    tags[0, 3, 0, 0] = 2.0  # the second's, who has one joint
    tags[0, 3, 3, 1] = 100.0  # of a joint that is not seen
    people = np.zeros((1, 4, 2, 3), np.float32)
    people[0, 0, 0], people[0, 0, 1] = (0.5, 0.5, 1), (3.5, 0.5, 1)
    people[0, 1, 0], people[0, 1, 1] = (0.5, 3.5, 1), (3.5, 3.5, 0)
    people[0, 2, 0] = -1, -1, 0
    people[0, 3, 0] = 30.0, 2.0, 1  # outside the picture
    nobody = np.tile(people[:, 2:3], (1, 4, 1, 1))
    expected = 0.25 / 2 + 0.5 * np.exp(-(0.5**2))
    loss = quick_jit(lambda people: tag_loss(jnp.tile(tags, (2, 1, 1, 1)), people, (4, 4)))
    assert float(loss(np.concatenate([people, people]))) == pytest.approx(expected)
    assert float(loss(np.concatenate([people, nobody]))) == pytest.approx(expected / 2)
    assert float(loss(np.concatenate([nobody, nobody]))) == 0.0


def test_the_objective_is_zero_at_the_targets_and_weighs_tags():
    batch = pose_batch()
    heat = [np.asarray(gaussians(batch["keypoints"], (SIZE, SIZE), (n, n), 1.0)) for n in (SIZE // 4, SIZE // 2)]

    def losses(**config):
        system = PoseNetworkConfig(network=TINY, **config).build()
        loss = quick_jit(lambda prediction: system.objectives(prediction, batch)["pose"])

        def of(coarse, tags, fine):
            return float(loss({"coarse": np.concatenate([coarse, tags], axis=-1), "fine": fine}))

        return of

    loss, same = losses(tag_weight=2.0), np.ones_like(heat[0])
    tags = np.random.default_rng(0).normal(size=same.shape).astype(np.float32)
    assert loss(heat[0], same, heat[1]) == pytest.approx(0.0, abs=1e-9)
    assert loss(heat[0] + 0.5, same, heat[1]) == pytest.approx(0.25, rel=1e-4)
    assert loss(heat[0], same, heat[1] - 0.1) == pytest.approx(0.01, rel=1e-4)
    grouping = float(tag_loss(tags, batch["keypoints"], (SIZE, SIZE)))
    assert loss(heat[0], tags, heat[1]) == pytest.approx(2 * grouping, rel=1e-4) and grouping > 0.05
    assert losses(sigma=2.0)(heat[0], same, heat[1]) > 0.01


def test_the_loss_falls_on_one_batch(run):
    assert run[1][-1] < 0.3 * run[1][0]


def test_the_export_gives_the_same_maps_one_picture_at_a_time(system, run, tmp_path):
    trained = run[0]
    batch = pose_batch()
    seen = quick_jit(lambda tree: system.predict(tree, {}, batch, KEY))(trained)
    statistics = system.update_statistics(system.init_statistics(trained, {}), seen)
    folder = system.export(Parts(trained, statistics, {}), tmp_path / "pose", batch)
    module, variables = load_pose_network(folder, dtype="float32")
    assert module == system.network
    images = module.normalise(batch["image"] / 255.0)
    found = quick_jit(module.apply)(variables, images[1:2])
    expected = quick_jit(lambda tree: system.predict(tree, {}, batch, KEY))(trained)
    for ours, wanted in zip(found, (expected["coarse"], expected["fine"]), strict=True):
        np.testing.assert_allclose(ours, wanted[1:2], atol=0.03)


def test_running_moments_are_the_mean_of_the_first_batches_and_then_forget(system):
    params, _ = system.init(jax.random.key(0))
    statistics = system.init_statistics(params, {})
    rng = np.random.default_rng(3)
    seen = [
        jax.tree.map(lambda m: rng.normal(size=m.shape).astype(np.float32), statistics["moments"]) for _ in range(22)
    ]
    for moments in seen[:20]:
        statistics = system.update_statistics(statistics, {"moments": moments})
    mean = jax.tree.map(lambda *rows: np.mean(rows, axis=0), *seen[:20])
    assert_trees_close(statistics["moments"], mean, 1e-5)
    for moments in seen[20:]:
        mean = jax.tree.map(lambda old, new: 0.95 * old + 0.05 * new, mean, moments)
        statistics = system.update_statistics(statistics, {"moments": moments})
    assert_trees_close(statistics["moments"], mean, 1e-5)


def test_training_keeps_the_moments_of_its_batches(run):
    statistics = run[2]
    assert statistics["steps"] == 40
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(statistics["moments"]))


def test_previews_show_where_joints_are_found(system, run):
    request, titles = system.preview(PreviewConfig(), pose_batch())
    assert titles == [""] * 4
    shown = np.asarray(quick_jit(lambda tree: system.sample(tree, {}, request, KEY))(run[0]))
    assert shown.shape == (4, SIZE, SIZE, 3) and np.abs(shown).max() <= 1.0
    for row, person in enumerate(pose_batch()["keypoints"][:, 0]):
        redness = shown[row, ..., 0] - shown[row, ..., 2]
        x, y = np.floor(person[0, :2]).astype(int)
        assert redness[y, x] > np.median(redness) + 0.3


def test_the_shipped_network_finds_the_joints_of_people_it_has_not_seen():
    count = 24
    people = PeopleDataset(64, count, seed=5)
    module, variables = load_pose_network("people")
    samples = [people[i] for i in range(count)]
    images = module.normalise(np.stack([sample["image"] for sample in samples]) / 255.0)
    heat = np.asarray(stage_mean(*quick_jit(module.apply)(variables, images)))
    wanted = np.stack([detected_points(sample, "coco17") for sample in samples])
    rows, columns = np.divmod(heat.reshape(count, -1, 17).argmax(axis=1), heat.shape[2])
    scale = 63 / (heat.shape[1] - 1)
    off = np.hypot(columns * scale + 0.5 - wanted[..., 0], rows * scale + 0.5 - wanted[..., 1])
    seen, peaks = wanted[..., 2] > 0, heat.max(axis=(1, 2))
    assert np.median(off[seen]) < 2.0
    assert np.mean(off[seen] < 5.0) > 0.8
    assert np.mean(peaks[seen]) > 3 * np.mean(peaks[~seen])
