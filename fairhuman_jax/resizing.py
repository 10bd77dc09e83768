"""Resizes of pictures and maps, each a product with a constant matrix: bicubic, bilinear, average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

CUBIC = -0.75  # torch's parameter of the cubic kernel; jax.image.resize has -0.5

SHARE = jax.lax.Precision.HIGHEST  # small matrices whose rounding would show in counts of joints
Array = jax.Array


def resize_bicubic(pixels: Array, size: Sequence[int]) -> Array:
    """Bicubic resize [B, h, w, C] -> fp32 [B, *size, C] as torch's: a = -0.75, half-pixel centres, no antialiasing."""
    return _resize(pixels, size, _bicubic_matrix)


def resize_aligned(pixels: Array, size: Sequence[int]) -> Array:
    """Bilinear resize [B, h, w, C] -> fp32 [B, *size, C] that maps corner to corner (torch's align_corners)."""
    return _resize(pixels, size, _aligned_matrix)


def average_area(pixels: Array, size: Sequence[int]) -> Array:
    """Area average [B, h, w, C] -> fp32 [B, *size, C] for any sizes: each cell's mean over the part it covers."""
    return _resize(pixels, size, _area_matrix)


def _resize(pixels: Array, size: Sequence[int], matrix: Callable[[int, int], np.ndarray]) -> Array:
    rows, columns = matrix(pixels.shape[1], size[0]), matrix(pixels.shape[2], size[1])
    tall = jnp.einsum("oh,bhwc->bowc", rows, pixels.astype(jnp.float32), precision=SHARE)
    return jnp.einsum("pw,bowc->bopc", columns, tall, precision=SHARE)


def _bicubic_matrix(size: int, wanted: int) -> np.ndarray:
    """fp32 [wanted, size]; what lies beyond the border is the border."""
    matrix = np.zeros((wanted, size))
    for row in range(wanted):
        position = (row + 0.5) * size / wanted - 0.5
        first = math.floor(position) - 1
        for column in range(first, first + 4):
            matrix[row, min(max(column, 0), size - 1)] += _cubic(abs(position - column))
    return matrix.astype(np.float32)


def _cubic(x: float) -> float:
    """Keys' convolution kernel (1981) at a distance of 0 to 2 pixels."""
    if x <= 1.0:
        return (CUBIC + 2.0) * x**3 - (CUBIC + 3.0) * x**2 + 1.0
    return CUBIC * (x**3 - 5.0 * x**2 + 8.0 * x - 4.0)


def _aligned_matrix(size: int, wanted: int) -> np.ndarray:
    positions = np.arange(wanted) * ((size - 1) / max(wanted - 1, 1))
    return np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(size))).astype(np.float32)


def _area_matrix(size: int, wanted: int) -> np.ndarray:
    edges, cells = np.arange(wanted + 1) * (size / wanted), np.arange(size)
    overlap = np.minimum(edges[1:, None], cells + 1.0) - np.maximum(edges[:-1, None], cells)
    return (np.maximum(overlap, 0.0) * (wanted / size)).astype(np.float32)
