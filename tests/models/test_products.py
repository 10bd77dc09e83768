"""Products and convolutions in bfloat16 on CPUs: rounded once, differentiable, without conversion to float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import printed_on_cpu

from fairhuman_jax.models import products
from fairhuman_jax.models.layers import Conv, Linear
from fairhuman_jax.models.products import FEW_CHANNELS, convolution, product


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def close_to_rounding(found, exact, inner):
    """Check that each value is rounded once to bfloat16, from float32 sums over `inner` terms."""
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8, atol=1e-5 * inner**0.5)


def exact_convolution(x, kernel, strides, padding):
    """Convolution in float32 by jax's own function."""
    x, kernel = (a.astype(jnp.float32) for a in (x, kernel))
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (strides,) * 2, padding, dimension_numbers=dimensions)


@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [
        (1, 1, ((0, 0), (0, 0))),
        (1, 2, ((0, 0), (0, 0))),
        (3, 1, ((1, 1), (1, 1))),
        (3, 1, ((0, 0), (0, 0))),
        (3, 2, ((1, 1), (1, 1))),
        (3, 2, ((0, 1), (0, 1))),
        (3, 2, ((1, 0), (0, 2))),
        (4, 3, ((2, 1), (0, 3))),
    ],
)
def test_a_convolution_is_its_float32_self_rounded_once(size, strides, padding):
    x, kernel = normal(2, 7, 10, FEW_CHANNELS), normal(size, size, FEW_CHANNELS, FEW_CHANNELS + 2, seed=1)
    program = jax.jit(lambda x, kernel: convolution(x, kernel, strides, padding))
    close_to_rounding(program(x, kernel), exact_convolution(x, kernel, strides, padding), size**2 * FEW_CHANNELS)
    assert "stablehlo.convolution" not in program.lower(x, kernel).as_text()


def test_a_product_is_its_float32_self_rounded_once():
    x, kernel = normal(2, 5, 700), normal(700, 9, seed=1)
    exact = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    close_to_rounding(product(x, kernel), exact, 700)


@pytest.mark.parametrize("channels", [(FEW_CHANNELS - 1, FEW_CHANNELS), (FEW_CHANNELS, FEW_CHANNELS - 1)])
def test_few_channels_stay_a_convolution(channels):
    x, kernel = normal(1, 4, 4, channels[0]), normal(3, 3, *channels, seed=1)
    assert _convolutions(x, kernel) == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize(("strides", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1))), (2, ((2, 0), (1, 1)))])
def test_a_convolution_is_the_same_in_blocks_of_any_rows(monkeypatch, strides, padding, rows):
    """The results have seven or four rows of pixels, so that some last blocks are not full."""
    x, kernel = normal(2, 7, 6, FEW_CHANNELS), normal(3, 3, FEW_CHANNELS, FEW_CHANNELS + 2, seed=1)
    exact = exact_convolution(x, kernel, strides, padding)
    row_bytes = 2 * exact.shape[2] * 9 * FEW_CHANNELS * x.dtype.itemsize
    monkeypatch.setattr(products, "BLOCK_BYTES", rows * row_bytes)
    close_to_rounding(convolution(x, kernel, strides, padding), exact, 9 * FEW_CHANNELS)


def test_compiled_for_a_cpu_a_convolution_holds_few_patches():
    """All copies together would take 72 MiB."""
    x = jax.ShapeDtypeStruct((1, 256, 256, FEW_CHANNELS), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, FEW_CHANNELS, FEW_CHANNELS), jnp.bfloat16)
    program = jax.jit(lambda x, kernel: convolution(x, kernel, 1, ((1, 1), (1, 1)))).lower(x, kernel).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**20 * 72


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_stay_a_convolution(dtype):
    x, kernel = normal(1, 4, 4, FEW_CHANNELS), normal(3, 3, FEW_CHANNELS, FEW_CHANNELS, seed=1)
    assert _convolutions(x.astype(dtype), kernel.astype(dtype)) == 1


def test_other_platforms_keep_their_programs():
    """Operations of a program traced for a TPU, as in ahead-of-time compilation."""
    device = jax.sharding.AbstractDevice("TPU v5p", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    x, kernel = normal(1, 4, 4, FEW_CHANNELS), normal(3, 3, FEW_CHANNELS, FEW_CHANNELS, seed=1)
    with jax.sharding.use_abstract_mesh(mesh):
        assert _convolutions(x, kernel) == 1
        assert "f32" not in str(jax.make_jaxpr(product)(x, kernel[0, 0]))
    assert _convolutions(x, kernel) == 0
    assert "f32" in str(jax.make_jaxpr(product)(x, kernel[0, 0]))


def _convolutions(x, kernel, padding=((1, 1), (1, 1))):
    traced = jax.make_jaxpr(lambda x, kernel: convolution(x, kernel, 1, padding))(x, kernel)
    return str(traced).count("conv_general_dilated[")


@pytest.mark.parametrize(("strides", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_gradients_of_a_convolution_are_the_float32_ones(strides, padding):
    x, kernel = normal(1, 6, 6, FEW_CHANNELS), normal(3, 3, FEW_CHANNELS, FEW_CHANNELS, seed=1)
    out, pull_back = jax.vjp(lambda x, kernel: convolution(x, kernel, strides, padding), x, kernel)
    cotangents = normal(3, *out.shape, seed=2)
    exact = jax.vjp(lambda x, kernel: exact_convolution(x, kernel, strides, padding), *wide(x, kernel))[1]
    for found, expected in zip(jax.vmap(pull_back)(cotangents), jax.vmap(exact)(*wide(cotangents)), strict=True):
        close_to_rounding(found, expected, 9 * FEW_CHANNELS)


def test_gradients_of_a_product_are_the_float32_ones():
    x, kernel = normal(3, 5, 70), normal(70, 9, seed=1)
    out, pull_back = jax.vjp(product, x, kernel)
    cotangent = normal(*out.shape, seed=2)
    exact = jax.vjp(jnp.matmul, *wide(x, kernel))[1](*wide(cotangent))
    for found, expected in zip(pull_back(cotangent), exact, strict=True):
        close_to_rounding(found, expected, 70)


def wide(*arrays):
    return tuple(a.astype(jnp.float32) for a in arrays)


def test_the_backward_pass_keeps_no_patches():
    x, kernel = normal(1, 8, 8, FEW_CHANNELS), normal(3, 3, FEW_CHANNELS, FEW_CHANNELS, seed=1)
    pull_back = jax.vjp(lambda x, kernel: convolution(x, kernel, 1, ((1, 1), (1, 1))), x, kernel)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(pull_back)) == x.size + kernel.size


@pytest.mark.parametrize("layer", [Linear(FEW_CHANNELS), Conv(FEW_CHANNELS)])
def test_low_rank_updates_in_bfloat16(layer):
    x = normal(1, 4, 4, FEW_CHANNELS)
    params = layer.init(jax.random.key(0), x.astype(jnp.float32))["params"]
    lora = {"down": normal(*params["kernel"].shape[:-1], 2, seed=1), "up": normal(2, FEW_CHANNELS, seed=2)}
    found = layer.clone(dtype=jnp.bfloat16).apply({"params": params, "lora": lora}, x)
    exact = layer.apply({"params": params, "lora": lora}, x.astype(jnp.float32))
    # The kernel, both factors' results and their sum are rounded too: allow a few roundings of the largest value.
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, atol=2**-7 * np.abs(exact).max())


def test_compiled_for_a_cpu_nothing_is_widened_before_a_product():
    """With the doors' choice of kernels, a float32 operand would appear as a float32 copy of the kernel."""
    code = (
        "from fairhuman_jax.devices.kernels import choose_cpu_kernels\n"
        "choose_cpu_kernels('bfloat16')\n"
        "import jax, jax.numpy as jnp\n"
        "from fairhuman_jax.models.layers import Conv, Linear\n"
        "dtype = jnp.bfloat16\n"
        "for layer, shape in ((Conv(72, dtype=dtype), (2, 8, 8, 64)), (Linear(72, dtype=dtype), (64, 576))):\n"
        "    x = jnp.ones(shape, dtype)\n"
        "    params = jax.tree.map(lambda a: a.astype(dtype), layer.init(jax.random.key(0), x))\n"
        "    text = jax.jit(layer.apply).lower(params, x).compile().as_text()\n"
        "    print('ynn_fusion' in text, 'convolution(' in text, 'f32[576,72]' in text)"
    )
    assert printed_on_cpu(code) == ["True", "False", "False"] * 2


def test_compiled_for_a_cpu_a_scanned_stack_of_kernels_has_no_float32_copy():
    """With the doors' choice of passes; by default XLA converts the whole stack to float32 before the loop."""
    code = (
        "from fairhuman_jax.devices.kernels import choose_cpu_kernels\n"
        "choose_cpu_kernels('bfloat16')\n"
        "import jax, jax.numpy as jnp\n"
        "from fairhuman_jax.models.products import product\n"
        "stack = jnp.ones((6, 256, 256), jnp.bfloat16)\n"
        "loop = jax.jit(lambda x, stack: jax.lax.scan(lambda x, kernel: (product(x, kernel), None), x, stack)[0])\n"
        "memory = loop.lower(jnp.ones((8, 256), jnp.bfloat16), stack).compile().memory_analysis()\n"
        "print(memory.temp_size_in_bytes < stack.nbytes)"
    )
    assert printed_on_cpu(code) == ["True"]
