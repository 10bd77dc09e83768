"""Shared layers: norms in half precision, low-rank updates, embeddings, rejected settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear, activation, timestep_embedding

torch = pytest.importorskip("torch")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_group_norm_equals_torch(dtype):
    """Torch computes in float32 from the same rounded input, so only the rounding of the output differs."""
    x = jnp.asarray(100 + normal(2, 4, 5, 12), dtype)
    params = {"scale": normal(12, seed=1), "bias": normal(12, seed=2)}
    out = GroupNorm(3, 1e-5, jnp.dtype(dtype)).apply({"params": params}, x)
    nchw = torch.from_numpy(np.moveaxis(np.asarray(x, np.float32), -1, 1).copy())
    scale, bias = torch.from_numpy(params["scale"]), torch.from_numpy(params["bias"])
    expected = np.moveaxis(torch.nn.functional.group_norm(nchw, 3, scale, bias, 1e-5).numpy(), 1, -1)
    assert out.dtype == jnp.dtype(dtype)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_equals_torch(dtype):
    x = jnp.asarray(100 + normal(2, 7, 12), dtype)
    params = {"scale": normal(12, seed=1), "bias": normal(12, seed=2)}
    out = LayerNorm(1e-5, jnp.dtype(dtype)).apply({"params": params}, x)
    wide, scale, bias = (torch.from_numpy(np.array(a, np.float32)) for a in (x, params["scale"], params["bias"]))
    expected = torch.nn.functional.layer_norm(wide, (12,), scale, bias, 1e-5).numpy()
    assert out.dtype == jnp.dtype(dtype)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=tolerance, atol=1e-4)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="12 channels do not divide into 5 groups"):
        GroupNorm(5).init(jax.random.key(0), jnp.ones((1, 2, 2, 12)))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dim", [8, 7])
def test_timestep_embedding_equals_diffusers(flip, shift, dim):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    times = np.array([0, 1, 17, 999])
    expected = embeddings.get_timestep_embedding(
        torch.from_numpy(times), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    found = timestep_embedding(jnp.asarray(times), dim, flip_sin_to_cos=flip, freq_shift=shift)
    assert found.dtype == jnp.float32
    # An angle of 999 rad carries a rounding error of 999 * 2^-24.
    np.testing.assert_allclose(found, expected.numpy(), atol=1.5e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_low_rank_update_equals_the_merged_kernel(use_bias):
    x, kernel, down, up = normal(3, 6), normal(6, 4, seed=1), normal(6, 2, seed=2), normal(2, 4, seed=3)
    layer = Linear(4, use_bias)
    params = {"kernel": kernel} | ({"bias": normal(4, seed=4)} if use_bias else {})
    plain = layer.apply({"params": params}, x)
    adapted = layer.apply({"params": params, "lora": {"down": down, "up": up}}, x)
    merged = layer.apply({"params": params | {"kernel": kernel + down @ up}}, x)
    np.testing.assert_allclose(adapted, merged, rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - plain).max() > 0.1
    unchanged = layer.apply({"params": params, "lora": {"down": down, "up": 0 * up}}, x)
    np.testing.assert_array_equal(unchanged, plain)


def test_layers_compute_in_their_dtype_and_keep_float32_parameters():
    for layer, x in ((Linear(4, dtype=jnp.bfloat16), normal(3, 6)), (Conv(4, dtype=jnp.bfloat16), normal(1, 3, 3, 2))):
        out, variables = layer.init_with_output(jax.random.key(0), x)
        assert out.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("strides", "padding"), [(1, 1), (2, 1), (2, ((0, 1), (0, 1)))])
def test_convolution_equals_torch(strides, padding):
    x, kernel, bias = normal(1, 6, 8, 3), normal(3, 3, 3, 5, seed=1), normal(5, seed=2)
    out = Conv(5, 3, strides, padding).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    (top, bottom), (left, right) = ((padding,) * 2,) * 2 if isinstance(padding, int) else padding
    padded = torch.nn.functional.pad(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), (left, right, top, bottom))
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    expected = torch.nn.functional.conv2d(padded, weight, torch.from_numpy(bias), stride=strides)
    np.testing.assert_allclose(out, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_activations_equal_torch_and_unknown_ones_are_refused():
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    wide = torch.from_numpy(x)
    for name, expected in [
        ("silu", torch.nn.functional.silu(wide)),
        ("relu", torch.relu(wide)),
        ("gelu", torch.nn.functional.gelu(wide)),
        ("quick_gelu", wide * torch.sigmoid(1.702 * wide)),
    ]:
        np.testing.assert_allclose(activation(name)(x), expected.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="unknown activation 'mish'; known: gelu, quick_gelu, relu, silu, swish"):
        activation("mish")
