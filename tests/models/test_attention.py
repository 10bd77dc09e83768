"""attention and batchable_backward: values, gradients, and pull-backs vmapped over cotangents only."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fairhuman_jax.models.attention import attention, batchable_backward, fitting, unsplit


def inputs(length: int = 5, dtype=np.float32):
    """query [2, 4, 3, 8], key and value [2, length, 3, 8]."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 3, 8), (2, length, 3, 8), (2, length, 3, 8)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def written_out(query, key, value, causal=False):
    """Compute softmax(q k^T / sqrt(d)) v in numpy, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            scores = query[b, :, h] @ key[b, :, h].T / np.sqrt(query.shape[-1])
            if causal:
                scores[np.triu_indices_from(scores, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value[b, :, h]
    return out


def test_equals_the_formula():
    query, key, value = inputs()
    np.testing.assert_allclose(attention(query, key, value), written_out(query, key, value), atol=1e-6)


def test_causal_positions_see_no_later_ones():
    query, key, value = inputs(length=4)
    out = attention(query, key, value, causal=True)
    np.testing.assert_allclose(out, written_out(query, key, value, causal=True), atol=1e-6)
    changed = attention(query, key.at[:, 2:].add(5.0), value.at[:, 2:].add(5.0), causal=True)
    np.testing.assert_array_equal(changed[:, :2], out[:, :2])
    assert np.abs(changed[:, 2:] - out[:, 2:]).max() > 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [512, 700])
def test_blocks_of_queries_equal_the_whole(length, causal):
    query, key, value = self_attention(length)
    plain, blocked = (
        jax.vjp(partial(attention, implementation=name, causal=causal), query, key, value)
        for name in ("xla", "blocked")
    )
    np.testing.assert_allclose(blocked[0], plain[0], atol=1e-6)
    for ours, theirs in zip(blocked[1](query), plain[1](query), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_half_precision_keeps_scores_in_float32():
    query, key, value = inputs(dtype=jnp.bfloat16)
    query = query * 40  # scores of hundreds, where bfloat16 scores would be off by whole units
    out = attention(query, key, value)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), written_out(query, key, value), atol=0.02)


def self_attention(length: int, heads: int = 2, width: int = 8):
    rng = np.random.default_rng(2)
    return tuple(jnp.asarray(rng.normal(size=(1, length, heads, width)), jnp.float32) for _ in range(3))


@pytest.mark.parametrize("length", [1024, 1100])
def test_the_tpu_kernel_interpreted_equals_the_formula(length):
    """1100 tokens are padded to blocks, and no query may attend to the padding."""
    x = self_attention(length)
    cotangents = jnp.asarray(np.random.default_rng(3).normal(size=(2, *x[0].shape)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def values_and_pull_backs(implementation, x):
        out, pull_back = jax.vjp(partial(attention, implementation=implementation), *x)
        return out, jax.vmap(pull_back)(cotangents)

    found, expected = values_and_pull_backs("splash", x), values_and_pull_backs("xla", x)
    for ours, plain in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert "pallas_call" in str(jax.make_jaxpr(partial(attention, implementation="splash"))(*x))


@pytest.mark.parametrize("implementation", ["splash", "auto"])
def test_short_cross_and_causal_attention_stay_with_the_plain_implementation(implementation):
    query, key, value = self_attention(1024)
    for given, causal in (
        ((query[:, :512], key[:, :512], value[:, :512]), False),
        ((query, key[:, :77], value[:, :77]), False),
        ((query, key, value), True),
    ):
        chosen = jax.make_jaxpr(partial(attention, implementation=implementation, causal=causal))(*given)
        plain = jax.make_jaxpr(partial(attention, implementation="xla", causal=causal))(*given)
        assert str(chosen) == str(plain)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "length", "chosen"),
    [
        ("gpu", "9.0", "bfloat16", 160, 64, "cudnn"),
        ("gpu", "8.0", "bfloat16", 160, 64, "xla"),
        ("gpu", "8.0", "float16", 40, 78, "cudnn"),
        ("gpu", "8.0", "float16", 40, 77, "xla"),
        ("gpu", "7.5", "float16", 64, 64, "xla"),
        ("gpu", "9.0", "float32", 64, 64, "xla"),
        ("gpu", "9.0", "bfloat16", 12, 64, "xla"),
        ("gpu", "gfx90a", "bfloat16", 64, 64, "xla"),
        ("tpu", "", "bfloat16", 64, 4096, "splash"),
        ("tpu", "", "bfloat16", 64, 1000, "xla"),
        ("cpu", "", "bfloat16", 64, 4096, "blocked"),
        ("cpu", "", "float32", 64, 1000, "xla"),
    ],
)
def test_auto_chooses_by_platform_and_shape(platform, capability, dtype, width, length, chosen):
    query = jax.ShapeDtypeStruct((1, length, 2, width), jnp.dtype(dtype))
    assert fitting(query, query, False, platform, capability, True) == chosen
    assert fitting(query, query, False, platform, capability, False) == (chosen if platform == "gpu" else "xla")


@pytest.mark.parametrize(("keys", "causal", "kernels"), [(96, False, 2), (96, True, 2), (77, False, 0)])
def test_cudnn_can_be_pulled_back_over_several_cotangents(cudnn_to_trace, keys, causal, kernels):
    """Traced for a GPU, since the kernel runs only there; odd lengths, which jax 0.10 rejects, use `xla`."""
    x = jax.ShapeDtypeStruct((1, 96, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, keys, 2, 64), jnp.bfloat16)
    cotangents = jax.ShapeDtypeStruct((3, *x.shape), jnp.bfloat16)

    def pulled(query, key, value, cotangents):
        _, pull_back = jax.vjp(partial(attention, implementation="cudnn", causal=causal), query, key, value)
        return jax.vmap(pull_back)(cotangents)

    program = jax.make_jaxpr(pulled)(x, key, key, cotangents)
    assert len(set(re.findall(r"dot_product_attention_[fb]wd", str(program)))) == kernels
    assert [value.shape for value in program.out_avals] == [(3, *given.shape) for given in (x, key, key)]


def test_a_program_is_one_devices_own_inside_a_shard_map_only():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    seen = []

    def look(x):
        seen.append(unsplit())
        return x

    x = np.zeros(jax.device_count(), np.float32)
    split = PartitionSpec("data")
    jax.eval_shape(look, x)
    jax.eval_shape(jax.shard_map(look, mesh=mesh, in_specs=split, out_specs=split), x)
    assert seen == [jax.device_count() == 1, True]


def test_unknown_implementations_are_refused():
    with pytest.raises(
        ValueError, match="unknown attention implementation 'flash'; known: auto, xla, blocked, cudnn, splash"
    ):
        attention(*inputs(), implementation="flash")


# ---- the pull-back of fused kernels ----------------------------------------------------------------------------------


@jax.custom_vjp
def stubborn(query, key, value):
    """Attention whose backward pass, as cuDNN's, cannot be batched over the cotangent only."""
    return attention(query, key, value)


def _stubborn_backward(residuals, cotangent):
    return backward(*residuals, cotangent)


stubborn.defvjp(lambda *arguments: (attention(*arguments), arguments), _stubborn_backward)


@jax.custom_batching.custom_vmap
def backward(query, key, value, cotangent):
    return jax.vjp(attention, query, key, value)[1](cotangent)


@backward.def_vmap
def _refuse(axis_size, batched, *arguments):
    raise ValueError(f"backward: batched only in {batched}")


def model(kernel, weights, x):
    """A projection, the kernel, a projection: computation before and after the kernel."""
    query, key, value = (jnp.einsum("blhd,de->blhe", y, weights) for y in x)
    return jnp.einsum("blhd,de->blhe", kernel(query, key, value), weights)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=(8, 8)) / 3, jnp.float32)
    cotangents = jnp.asarray(rng.normal(size=(3, 2, 4, 3, 8)), jnp.float32)
    return weights, inputs(), cotangents


def test_wrapped_kernel_has_the_same_values_and_gradients(problem):
    weights, x, _ = problem

    def loss(kernel):
        return jax.value_and_grad(lambda w, y: jnp.sum(jnp.sin(model(kernel, w, y))), argnums=(0, 1))(weights, x)

    for ours, plain in zip(*map(jax.tree.leaves, (loss(batchable_backward(stubborn)), loss(attention))), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_pull_back_vmapped_over_cotangents_equals_the_loop(problem, checkpoint):
    weights, x, cotangents = problem

    @partial(jax.jit, static_argnums=0)
    def pulled(kernel, weights, x, cotangents):
        forward = partial(model, kernel)
        _, pull_back = jax.vjp(jax.checkpoint(forward) if checkpoint else forward, weights, x)
        return jax.vmap(pull_back)(cotangents)

    found = pulled(batchable_backward(stubborn), weights, x, cotangents)
    _, pull_back = jax.vjp(partial(model, attention), weights, x)
    one_by_one = [pull_back(cotangent) for cotangent in cotangents]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="backward: batched only in"):
        pulled(stubborn, weights, x, cotangents)
