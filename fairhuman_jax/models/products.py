"""Products and convolutions of the layers, on CPUs in bfloat16 in the only form with fast code.

XLA's CPU backend (jax 0.10) converts the operands of bfloat16 products and convolutions to float32. Only products with
a float32 result go to YNNPACK, which uses the processor's bfloat16 instructions. So a product is summed in float32 and
then rounded, and a convolution is computed as a product. Other dtypes and platforms use the plain operations.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from fairhuman_jax.models.attention import target

Padding = tuple[tuple[int, int], tuple[int, int]]
FEW_CHANNELS = 64  # with fewer of them in or out, a convolution is no faster as a product
BLOCK_BYTES = 10 * 2**20  # copies of the input made at a time, which fit in a processor's cache


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x kernel`: [..., K] and [K, N] of one dtype -> [..., N] of that dtype."""
    if not _is_widened(x):
        return x @ kernel
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def convolution(x: jax.Array, kernel: jax.Array, strides: int, padding: Padding) -> jax.Array:
    """2-D convolution: `x` [B, H, W, C] and `kernel` [h, w, C, F] of one dtype -> [B, H', W', F] of that dtype.

    `padding` is ((top, bottom), (left, right)). Its gradient is that of XLA's own convolution in every dtype, so
    the forward pass need not keep its copies of the input.
    """
    if _is_widened(x) and min(kernel.shape[2:]) >= FEW_CHANNELS:
        return _by_patches(x, kernel, strides, padding)
    return _whole(x, kernel, strides, padding)


def _is_widened(x: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and target()[0] == "cpu"


def _size(x: jax.Array, kernel: jax.Array, strides: int, padding: Padding) -> tuple[int, int]:
    """Rows and columns of the result."""
    rows, columns = (
        (length + sum(added) - width) // strides + 1
        for length, added, width in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True)
    )
    return rows, columns


def _whole(x: jax.Array, kernel: jax.Array, strides: int, padding: Padding) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=dimensions)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_patches(x: jax.Array, kernel: jax.Array, strides: int, padding: Padding) -> jax.Array:
    """Multiply the input's patch at each pixel, [B, H', W', h w C], by the kernel, some rows of pixels at a time."""
    height, width, channels, features = kernel.shape
    rows, columns = _size(x, kernel, strides, padding)
    row_bytes = x.shape[0] * columns * height * width * channels * x.dtype.itemsize
    most = max(min(BLOCK_BYTES // row_bytes, rows), 1)
    # Rows per block. Where no number divides the rows evenly, the last block extends beyond the result.
    taken = next((n for n in range(most, most // 2, -1) if rows % n == 0), most)
    blocks = -(-rows // taken)
    lines, reach = (taken - 1) * strides + 1, (columns - 1) * strides + 1
    top, bottom = padding[0]
    needed = (blocks * taken - 1) * strides + height - top - x.shape[1]  # lines below the input
    added = ((0, 0), (top, max(bottom, needed)), padding[1], (0, 0))
    # Copy integers, because XLA would convert copies of bfloat16 to float32 as well.
    bits = jnp.pad(jax.lax.bitcast_convert_type(x, jnp.uint16), added)

    def block(first: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(bits, first, lines + height - 1, axis=1)
        views = [part[:, i : i + lines : strides, j : j + reach : strides] for i in range(height) for j in range(width)]
        patches = jax.lax.bitcast_convert_type(jnp.concatenate(views, axis=-1), x.dtype)
        return jax.lax.bitcast_convert_type(product(patches, kernel.reshape(-1, features)), jnp.uint16)

    found = jax.lax.map(block, jnp.arange(blocks) * (taken * strides)).swapaxes(0, 1)
    found = found.reshape(x.shape[0], blocks * taken, columns, features)[:, :rows]
    return jax.lax.bitcast_convert_type(found, x.dtype)


def _forward(
    x: jax.Array, kernel: jax.Array, strides: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _by_patches(x, kernel, strides, padding), (x, kernel)


def _backward(
    strides: int, padding: Padding, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(lambda x, kernel: _whole(x, kernel, strides, padding), *kept)[1](cotangent)


_by_patches.defvjp(_forward, _backward)
