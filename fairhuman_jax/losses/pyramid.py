"""Absolute error over the levels of a Laplacian pyramid: edges and colours as terms of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pyramid_loss(error: jax.Array, weight: jax.Array, levels: int = 3) -> jax.Array:
    """sum_k 2^k mean(w_k |e_k - up(e_k+1)|) + 2^levels mean(w_levels |e_levels|), a scalar in float32.

    e_0 is `error` [B, H, W, C] and w_0 is `weight` [B, H, W, 1] (or of shapes that broadcast to it); e_k+1 and w_k+1
    are their means over 2 x 2 pixels, and `up` repeats each pixel 2 x 2 times. The term of one level sees the error of
    one band of frequencies, so that a sharp edge pays off before all colours are right.
    Source: Burt and Adelson 1983 (the pyramid); Bojanowski et al. 2018, arXiv 1707.05776 (the loss, with factors 4^k on
    sums, which are 1 on means).

    Raises ValueError: sides that 2^levels does not divide.
    """
    height, width = error.shape[1:3]
    if height % 2**levels or width % 2**levels:
        raise ValueError(f"pyramid_loss: {height} x {width} pixels do not divide by {2**levels}")
    rest = error.astype(jnp.float32)
    share = jnp.broadcast_to(weight, (*error.shape[:3], 1)).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for level in range(levels):
        coarse = halved(rest)
        band = rest - coarse.repeat(2, axis=1).repeat(2, axis=2)
        total = total + 2.0**level * jnp.mean(share * jnp.abs(band))
        rest, share = coarse, halved(share)
    return total + 2.0**levels * jnp.mean(share * jnp.abs(rest))


def halved(x: jax.Array) -> jax.Array:
    """Means over 2 x 2 pixels: [B, H, W, C] -> [B, H/2, W/2, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
