"""Checkpoints: bitwise round trips, torn and missing ones, and those of another model."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import assert_trees_equal

from fairhuman_jax.devices.sharding import make_mesh, place, replicate
from fairhuman_jax.training.checkpoint import Checkpointer, has_checkpoint
from fairhuman_jax.training.state import OptimizerConfig, init_state, make_optimizer

POSITION = {"step": 12, "batch_size": 4, "seed": 3, "shuffle": True, "samples": 9, "shards": 1}
CONFIG = {"type": "RunConfig", "output": "somewhere"}


def make_state(seed: int, *, width: int = 3, ema: bool = True):
    """A state in which no array is zero."""
    rng = np.random.default_rng(seed)
    tree = {"unet": {"to_q": {"down": jnp.ones((4, width)), "up": jnp.ones((2, width, 5), jnp.bfloat16)}}}
    optimizer = make_optimizer(OptimizerConfig(schedule="cosine", warmup_steps=2), 100)
    state = init_state(tree, optimizer, jax.random.key(seed), ema=ema)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return jnp.asarray(100 * rng.random(leaf.shape) + 1, leaf.dtype)

    return jax.tree.map(draw, state)


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 8 and 12, those of states 8 and 12."""
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    for step in (8, 12):
        checkpoints.save(step, make_state(step), POSITION | {"step": step}, CONFIG)
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored(folder, template):
    checkpoints = Checkpointer(folder)
    try:
        return checkpoints.restore(template)
    finally:
        checkpoints.close()


def test_restores_the_newest_bit_for_bit(folder):
    state, position = restored(folder, make_state(0))
    assert_trees_equal(state, make_state(12))
    assert position == POSITION
    same = [jax.random.normal(s.key, (3,)) for s in (state, make_state(12))]
    np.testing.assert_array_equal(*same)


def test_restores_without_an_average(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state(1, ema=False), POSITION, CONFIG)
    checkpoints.close()
    state, _ = restored(tmp_path, make_state(2, ema=False))
    assert state.ema is None
    assert_trees_equal(state, make_state(1, ema=False))


def test_arrays_are_those_at_the_time_of_saving_and_land_on_the_mesh(tmp_path):
    mesh = make_mesh(2)
    state = replicate(mesh, make_state(1))
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s.replace(key=None)), donate_argnums=0)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, state, POSITION, CONFIG)
    jax.block_until_ready(donate(state))  # overwrites the saved buffers at once, as the next step does
    checkpoints.close()
    state, _ = restored(tmp_path, replicate(mesh, make_state(2)))
    assert_trees_equal(state, make_state(1))
    for leaf in jax.tree.leaves(state.replace(key=None)):
        assert len(leaf.sharding.device_set) == 8 and leaf.sharding.is_fully_replicated


def test_only_the_last_ones_are_kept(folder):
    checkpoints = Checkpointer(folder, keep=1)
    checkpoints.save(20, make_state(20), POSITION, CONFIG)
    checkpoints.close()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["20"]


def test_nothing_to_resume_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint to resume from in .*; start without --resume") as error:
        restored(tmp_path / "empty", make_state(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"width": 4}, {"ema": False}], ids=["shape", "structure"])
def test_another_model_is_one_clear_line(folder, change):
    with pytest.raises(ValueError, match=r"12 does not fit this configuration .*; resume with the config") as error:
        restored(folder, make_state(0, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tear", ["renamed", "no_state"])
def test_a_torn_checkpoint_is_not_restored(folder, tear):
    """A save that was killed lies under a temporary name; a step folder without its arrays is no checkpoint either."""
    if tear == "renamed":
        os.rename(folder / "12", folder / "12.orbax-checkpoint-tmp-1")
    else:
        shutil.rmtree(folder / "12" / "state")
        (folder / "12" / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
        os.rename(folder / "12", folder / "12.orbax-checkpoint-tmp")
    state, position = restored(folder, make_state(0))
    assert position["step"] == 8
    assert_trees_equal(state, make_state(8))


@pytest.mark.parametrize(("saved", "loaded"), [(1, 8), (8, 2), (2, 1)], ids=["8x1-1x8", "1x8-4x2", "4x2-8x1"])
def test_another_mesh_restores_bit_for_bit(tmp_path, saved, loaded):
    """Data 8, fsdp 8 and 4 x 2: every leaf that can be split is, and lands as the new mesh splits it."""
    meshes = [make_mesh(fsdp) for fsdp in (saved, loaded)]
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, place(meshes[0], make_state(1, width=16), split_above=0), POSITION, CONFIG)
    checkpoints.close()
    template = place(meshes[1], make_state(2, width=16), split_above=0)
    state, _ = restored(tmp_path, template)
    assert_trees_equal(state, make_state(1, width=16))
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert found.sharding.is_equivalent_to(expected.sharding, found.ndim)
    kernel = state.trainable["unet"]["to_q"]["down"]
    assert kernel.addressable_shards[0].data.size * loaded == kernel.size


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(folder):
    checkpoints = Checkpointer(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = make_state(20, width=20_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"a checkpoint could not be written .*; that of step 12 is complete"
        ) as error:
            checkpoints.save(20, large, POSITION, CONFIG)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with contextlib.suppress(OSError):
        checkpoints.close()
    assert "\n" not in str(error.value)
    state, position = restored(folder, make_state(0))
    assert position["step"] == 12
    assert_trees_equal(state, make_state(12))


def test_a_step_is_saved_once(folder):
    checkpoints = Checkpointer(folder)
    checkpoints.save(12, make_state(1), POSITION, CONFIG)
    checkpoints.save(20, make_state(20), POSITION, CONFIG)
    checkpoints.save(20, make_state(1), POSITION, CONFIG)
    checkpoints.wait()
    assert checkpoints.latest_step == 20
    checkpoints.close()
    assert_trees_equal(restored(folder, make_state(0))[0], make_state(20))


def test_a_folder_with_a_complete_checkpoint_is_known(folder, tmp_path):
    assert has_checkpoint(str(tmp_path)) and not has_checkpoint(str(tmp_path / "other"))
    for step in (8, 12):
        os.rename(folder / str(step), folder / f"{step}.orbax-checkpoint-tmp")
    assert not has_checkpoint(str(tmp_path))
