"""Lowered programs kept on disk: the same bits as `jax.jit`, found again, and left alone where they cannot be kept."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.devices.programs import KeptProgram
from fairhuman_jax.devices.sharding import BATCH_SPEC, make_mesh
from fairhuman_jax.diffusion import NoiseSchedule, add_noise

CLEAN, NOISE = (jax.random.normal(jax.random.key(seed), (4, 3)) for seed in range(2))
TIMES = jnp.array([0, 10, 500, 999])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    yield tmp_path / "fairhuman_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def program(schedule=None):
    return KeptProgram(partial(add_noise, schedule or NoiseSchedule()))


def files(folder):
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_a_kept_program_gives_the_bits_of_jit(folder):
    expected = jax.jit(partial(add_noise, NoiseSchedule()))(CLEAN, NOISE, TIMES)
    for _ in range(2):
        np.testing.assert_array_equal(program()(CLEAN, NOISE, TIMES), expected)
        assert len(files(folder)) == 1


def test_the_second_start_reads_the_file(folder):
    program()(CLEAN, NOISE, TIMES)
    program(NoiseSchedule(beta_end=0.5))(CLEAN, NOISE, TIMES)
    first, second = files(folder)
    contents = first.read_bytes(), second.read_bytes()
    assert contents[0] != contents[1]
    right = program()(CLEAN, NOISE, TIMES)
    for path, content in zip((first, second), reversed(contents), strict=True):
        path.write_bytes(content)
    assert not np.array_equal(program()(CLEAN, NOISE, TIMES), right), "the file decides"


def test_shapes_and_settings_have_programs_of_their_own(folder):
    program()(CLEAN, NOISE, TIMES)
    program()(CLEAN[:2], NOISE[:2], TIMES[:2])
    assert len(files(folder)) == 2
    with jax.default_matmul_precision("highest"):
        program()(CLEAN, NOISE, TIMES)
    assert len(files(folder)) == 3


def test_a_broken_file_is_traced_again(folder):
    expected = program()(CLEAN, NOISE, TIMES)
    files(folder)[0].write_bytes(b"broken")
    np.testing.assert_array_equal(program()(CLEAN, NOISE, TIMES), expected)


def test_functions_without_a_name_and_several_devices_are_traced(folder):
    factor = 3.0
    assert KeptProgram(lambda x: factor * x)(jnp.float32(2.0)) == 6.0
    rows = jax.NamedSharding(make_mesh(devices=jax.devices()[:2]), BATCH_SPEC)
    split = (jax.device_put(array, rows) for array in (CLEAN, NOISE, TIMES))
    np.testing.assert_allclose(program()(*split), add_noise(NoiseSchedule(), CLEAN, NOISE, TIMES), rtol=1e-6)
    assert files(folder) == []
