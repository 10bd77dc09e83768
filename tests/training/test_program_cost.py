"""flops and collectives: what a program does, loops times their trips."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from fairhuman_jax.devices.sharding import AXES, make_mesh
from fairhuman_jax.models.attention import attention
from fairhuman_jax.training.program_cost import Traffic, collectives, flops

X, W = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))
PRODUCT = 2 * 8 * 16 * 16


def scanned(x, w):
    return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0]


def test_a_scanned_body_counts_as_often_as_it_runs():
    assert flops(jax.make_jaxpr(scanned)(X, W)) == 5 * PRODUCT
    assert flops(jax.make_jaxpr(jax.jit(jax.grad(lambda x: scanned(x, W).sum())))(X)) == 10 * PRODUCT


def test_recomputation_counts():
    def loss(x, body):
        return jnp.sin(jax.lax.scan(lambda h, layer: (body(h, layer), None), x, W)[0]).sum()

    def body(h, layer):
        return jnp.tanh(jnp.tanh(h @ layer) @ layer)

    plain, remat = (flops(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(X, f)) for f in (body, jax.checkpoint(body)))
    assert plain == 20 * PRODUCT
    assert remat == 25 * PRODUCT + 5 * PRODUCT


def test_of_branches_the_dearest():
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ W[0], lambda x: x @ W[0] @ W[1], x)

    assert flops(jax.make_jaxpr(f)(X)) == 2 * PRODUCT


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_as_the_compiler_counts_them(stride, dilation):
    """Without padding, whose products the compiler leaves out; inserted zeros are counted by neither."""

    def f(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, ((0, 0),) * 2, (dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = jnp.zeros((2, 10, 10, 3)), jnp.zeros((3, 3, 3, 4))
    ours = flops(jax.make_jaxpr(f)(x, kernel))
    theirs = jax.jit(f).lower(x, kernel).cost_analysis()["flops"]
    assert ours == pytest.approx(theirs, rel=0.15)


def test_kernels_count_once_a_grid_point():
    """Attention of 1024 tokens by the TPU kernel, forward: the two products of the plain one."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    kernel, plain = (
        flops(jax.make_jaxpr(partial(attention, implementation=name))(x, x, x)) for name in ("splash", "xla")
    )
    assert kernel == plain == 2 * (2 * 2 * 1024 * 1024 * 64)


def test_cudnns_attention_counts_as_the_products_it_stands_for(cudnn_to_trace):
    """Two forwards; pulled back four, and the scores once more."""
    query, key = (jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16) for length in (96, 32))

    def both_ways(query, key):
        out, pull_back = jax.vjp(partial(attention, implementation="cudnn"), query, key, key)
        return pull_back(out)

    assert flops(jax.make_jaxpr(both_ways)(query, key)) == (2 + 5) * (2 * 2 * 4 * 96 * 32 * 64)


def test_collectives_of_a_compiled_loop():
    """Four devices on fsdp, two on data: a gather a layer, twice under remat, a scatter a layer and one reduction."""
    mesh = make_mesh(4)

    def local(w, x):
        @jax.checkpoint
        def layer(h, part):
            return jnp.tanh(h @ jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)), None

        gradient = jax.grad(lambda w: jnp.square(jax.lax.scan(layer, x, w)[0]).mean())(w)
        return jax.lax.psum(gradient, "data")

    split = PartitionSpec(None, "fsdp")
    step = jax.shard_map(local, mesh=mesh, in_specs=(split, PartitionSpec(AXES)), out_specs=split, check_vma=False)
    text = jax.jit(step).lower(W, X).compile().as_text()
    layer = 16 * 16 * 4
    assert collectives(text) == {
        "all-reduce": Traffic(1, 5 * layer // 4),
        "all-gather": Traffic(10, 10 * layer),
        "reduce-scatter": Traffic(5, 5 * layer // 4),
    }


def test_what_starts_an_asynchronous_collective_lists_its_operands_first():
    text = """HloModule m
ENTRY %main (p: bf16[4,8]) -> bf16[8,8] {
  %s = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[8,8]{1,0}) all-gather-start(%p), dimensions={0}
  %d = bf16[8,8]{1,0} all-gather-done(%s)
  %c = (f32[2], f32[2], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), source_target_pairs={{0,1}}
  ROOT %r = (f32[3], pred[5]) all-reduce(%a, %b), to_apply=%add
}
"""
    assert collectives(text) == {
        "all-reduce": Traffic(1, 17),
        "all-gather": Traffic(1, 128),
        "collective-permute": Traffic(1, 8),
    }
