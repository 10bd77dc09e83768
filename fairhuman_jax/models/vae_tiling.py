"""Decoding of large latents in overlapping tiles, so that the memory of one tile bounds the autoencoder's."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Decode = Callable[[jax.Array], jax.Array]


def tiled_decode(decode: Decode, latents: jax.Array, tile: int = 64, overlap: float = 0.25) -> jax.Array:
    """`decode(latents)` [B, h, w, C] -> [B, f h, f w, 3], in tiles of `tile` latents where a side is longer than that.

    Tiles start every `tile (1 - overlap)` latents and are cut off at the lower and right border. In the overlap with
    the tile above, then with the tile to the left, a tile is faded in linearly: weight y / n in row y of n. This is the
    tiling of diffusers' `enable_tiling`, smaller border tiles included, so results are equal to its (which takes
    sample_size / downscale of the autoencoder's config for `tile`). Tiles of one shape are decoded by one loop, and
    `decode` is compiled once a shape: once for a full tile, and for borders at most eight times more.
    Images are smooth but not equal to those of a whole decode, since group norms and attention see one tile each.
    Raises: ValueError for a tile or overlap that leaves no step.
    """
    step = int(tile * (1 - overlap))
    if not 0 < step <= tile:
        raise ValueError(f"tiled_decode: tile={tile} and overlap={overlap} leave no step; 64 and 0.25 do")
    height, width = latents.shape[1:3]
    if height <= tile and width <= tile:
        return decode(latents)
    starts = [(top, left) for top in range(0, height, step) for left in range(0, width, step)]
    tiles = {(top, left): latents[:, top : top + tile, left : left + tile] for top, left in starts}
    images = _decoded(decode, tiles)
    factor = images[0, 0].shape[1] // tiles[0, 0].shape[1]
    fade = int(tile * factor * overlap)
    keep = tile * factor - fade
    rows: dict[int, list[jax.Array]] = {}
    for top, left in starts:
        image = images[top, left]
        if top:
            image = _faded(images[top - step, left], image, fade, axis=1)
        if left:
            image = _faded(images[top, left - step], image, fade, axis=2)
        images[top, left] = image  # the next tiles fade out of what is seen here
        rows.setdefault(top, []).append(image[:, :keep, :keep])
    return jnp.concatenate([jnp.concatenate(row, axis=2) for row in rows.values()], axis=1)


def _decoded(decode: Decode, tiles: dict[tuple[int, int], jax.Array]) -> dict[tuple[int, int], jax.Array]:
    """The image of every tile; tiles of one shape go through one `lax.map`."""
    by_shape: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, tile in tiles.items():
        by_shape.setdefault(tile.shape, []).append(place)
    images = {}
    for places in by_shape.values():
        stack = jax.lax.map(decode, jnp.stack([tiles[place] for place in places]))
        images.update(zip(places, stack, strict=True))
    return images


def _faded(before: jax.Array, image: jax.Array, length: int, axis: int) -> jax.Array:
    """`image` whose first rows (or columns) come linearly out of the last ones of `before`."""
    length = min(length, before.shape[axis], image.shape[axis])
    shape = [1] * image.ndim
    shape[axis] = length
    weight = (jnp.arange(length) / length).reshape(shape)
    end = jax.lax.slice_in_dim(before, before.shape[axis] - length, before.shape[axis], axis=axis)
    start, rest = jnp.split(image, [length], axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
