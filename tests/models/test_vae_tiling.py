"""tiled_decode: small latents, exact results with a linear decoder, the number of decoded shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.models import tiled_decode


def doubled(latents: jax.Array) -> jax.Array:
    """A decoder of factor 2 that reads one pixel at a time, so that overlapping tiles agree."""
    return jnp.tile(latents.repeat(2, axis=1).repeat(2, axis=2), 3)


def latents(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, height, width, 1)).astype(np.float32)


@pytest.mark.parametrize("size", [(8, 8), (9, 5), (13, 21), (40, 7)])
def test_tiles_of_a_local_decoder_join_without_a_seam(size):
    z = latents(*size)
    image = quick_jit(lambda z: tiled_decode(doubled, z, tile=8))(z)
    np.testing.assert_allclose(image, np.tile(z.repeat(2, axis=1).repeat(2, axis=2), 3), atol=1e-6)


def test_small_latents_are_decoded_whole_and_large_ones_once_a_shape():
    shapes = []

    def decode(z):
        shapes.append(z.shape[1:3])
        return doubled(z)

    jax.eval_shape(lambda z: tiled_decode(decode, z, tile=8), latents(8, 3))
    assert shapes == [(8, 3)]
    shapes.clear()
    out = jax.eval_shape(lambda z: tiled_decode(decode, z, tile=8), latents(26, 16))
    assert out.shape == (2, 52, 32, 3)
    assert set(shapes) == {(8, 8), (8, 4), (2, 8), (2, 4)}
    assert len(shapes) <= 8


def test_a_tile_fades_linearly_out_of_the_one_above():
    """With a decoder that fills each tile with its first value, the result shows the fading weights."""
    z = np.concatenate([np.zeros((1, 4, 8, 1)), np.ones((1, 8, 8, 1))], axis=1)
    paint = quick_jit(lambda z: tiled_decode(lambda z: z[:, :1, :1] + 0 * z, z, tile=8, overlap=0.5))
    np.testing.assert_allclose(paint(z)[0, :, 0, 0], [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1], atol=1e-6)


def test_an_overlap_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match=r"tile=8 and overlap=1\.0 leave no step"):
        tiled_decode(doubled, latents(9, 9), tile=8, overlap=1.0)
