"""Results kept on disk: descriptions of inputs, folders that cannot be written, and shapes of parameters."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_pipeline

from fairhuman_jax import kept as module
from fairhuman_jax.diffusion import NoiseSchedule, add_noise
from fairhuman_jax.kept import Undescribed, describe, kept
from fairhuman_jax.models import CLIPText
from fairhuman_jax.weights import expected_params


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fairhuman_jax"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1.0),
        ((1, 2), [1, 2]),
        ("1", 1),
        (np.arange(3), np.arange(3.0)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        ({"a": 1}, {"a": 2}),
        (NoiseSchedule(), NoiseSchedule(beta_end=0.03)),
        (CLIPText(10), CLIPText(10, dtype=jnp.bfloat16)),
        (NoiseSchedule().to_config, NoiseSchedule(beta_end=0.03).to_config),
        (partial(add_noise, NoiseSchedule()), partial(add_noise, NoiseSchedule(steps_offset=1))),
    ],
)
def test_different_values_are_described_differently(first, second):
    assert describe(first) == describe(first)
    assert describe(first) != describe(second)


def test_parameters_of_a_base_are_no_part_of_its_description():
    one, other = tiny_pipeline(), tiny_pipeline()
    assert describe(one) == describe(other)


@pytest.mark.parametrize("value", [lambda x: x, object(), np.sin, partial(lambda x: x, 1), object().__str__])
def test_what_has_no_description_is_refused(value):
    with pytest.raises(Undescribed):
        describe(value)


def test_a_result_is_made_once_for_each_input_and_source(cache, monkeypatch):
    made = []

    def make():
        made.append(b"x")
        return b"result"

    assert [kept("kind", inputs, make) for inputs in "aab"] == [b"result"] * 3
    assert len(made) == 2
    assert len(list((cache / "kind").iterdir())) == 2
    monkeypatch.setattr(module, "source_digest", lambda: "another source")
    kept("kind", "a", make)
    assert len(made) == 3


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept("kind", "a", lambda: b"result") == b"result"


def test_kept_shapes_are_the_traced_ones(cache):
    network = tiny_pipeline().unet
    traced = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())["params"]
    for _ in range(2):
        found = expected_params(network)
        assert jax.tree.structure(found) == jax.tree.structure(traced)
        assert jax.tree.leaves(found) == jax.tree.leaves(traced)
    (path,) = (cache / "shapes").iterdir()
    path.write_bytes(b"[[")
    assert jax.tree.leaves(expected_params(network)) == jax.tree.leaves(traced)
