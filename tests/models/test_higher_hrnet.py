"""HigherHRNet: published size, shapes, batch moments, and what it refuses."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit, random_params

from fairhuman_jax.models import HigherHRNet, presets
from fairhuman_jax.models.higher_hrnet import BatchNorm

TINY = {
    "joints": 2,
    "stem_channels": 4,
    "widths": [4, 6],
    "bottlenecks": 1,
    "stage_modules": [1],
    "blocks": 1,
    "head_blocks": 1,
}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_w48_has_the_parameters_and_outputs_of_the_published_network():
    module = HigherHRNet.from_config(presets.HIGHER_HRNET_W48)
    images = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.float32)
    outputs, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    params = variables["params"]
    assert count(params["backbone"]) == 63_594_912
    assert count(params["keypoint_head"]) == 232_227
    assert count(params) == 63_827_139
    assert [output.shape for output in outputs] == [(2, 128, 128, 34), (2, 256, 256, 17)]


def test_batch_moments_are_handed_out_and_serve_as_stored_ones():
    """With the batch's own moments stored, evaluation of that batch is what its own moments made of it."""
    module = HigherHRNet.from_config(TINY)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 24, 3)), jnp.float32)
    params = random_params(module, 0)["params"]
    own = quick_jit(
        lambda tree: module.apply({"params": tree}, images, use_running_average=False, mutable=["batch_stats"])
    )
    outputs, state = own(params)
    stored = quick_jit(lambda tree: module.apply(tree, images))({"params": params, **state})
    for found, expected in zip(stored, outputs, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batch_norm_against_its_formula():
    x = np.random.default_rng(1).normal(3.0, 2.0, size=(2, 3, 4, 5)).astype(np.float32)
    scale, bias = np.arange(1.0, 6.0, dtype=np.float32), np.arange(5.0, dtype=np.float32)
    params = {"scale": scale, "bias": bias}
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))

    def expected(mean, variance):
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias

    found, state = BatchNorm().apply({"params": params}, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected(mean, variance), atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["var"], variance, atol=1e-5)
    stored = {"mean": bias, "var": scale}
    found = BatchNorm().apply({"params": params, "batch_stats": stored}, x, True)
    np.testing.assert_allclose(found, expected(bias, scale), atol=1e-5)


def test_pictures_are_normalised_as_the_config_says():
    module = HigherHRNet.from_config(TINY | {"image_mean": [0.5, 0.0, 1.0], "image_std": [0.5, 1.0, 2.0]})
    np.testing.assert_allclose(module.normalise(jnp.ones((1, 1, 1, 3)))[0, 0, 0], [1.0, 1.0, 0.0])


def test_refusals():
    with pytest.raises(ValueError, match="unknown config keys depth"):
        HigherHRNet.from_config({"depth": 3})
    with pytest.raises(ValueError, match="is of class 'AutoencoderKL'"):
        HigherHRNet.from_config({"_class_name": "AutoencoderKL"})
    with pytest.raises(ValueError, match=r"widths \[4, 6\] want"):
        HigherHRNet.from_config(TINY | {"stage_modules": [1, 1]})
    module = HigherHRNet.from_config(TINY)
    with pytest.raises(ValueError, match=r"images are \[16, 20, 3\], but must have sides that 8 divides"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 20, 3)))
