"""Depth-buffered triangle rasteriser in plain numpy.

Every pixel centre of every triangle's bounding box is a candidate; the nearest candidate wins its pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEAR = 0.1


@dataclass(frozen=True)
class Fragments:
    """Covered pixels of one picture, one row each.

    `pixel` int64 [n] (flat index y * width + x, ascending), `triangle` int64 [n], `weights` float32 [n, 3]
    (screen-space barycentric), `depth` float32 [n] (along the view axis, in the unit of the input).
    """

    pixel: np.ndarray
    triangle: np.ndarray
    weights: np.ndarray
    depth: np.ndarray


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [m] give (owner, rank) of every unit: owner repeats i counts[i] times, rank runs
    0..counts[i]-1."""
    owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    start = (np.cumsum(counts) - counts).astype(np.int32)
    return owner, np.arange(len(owner), dtype=np.int32) - start[owner]


def _setup(points: np.ndarray, depth: np.ndarray, faces: np.ndarray, width: int, height: int):
    """Cull back faces, clipped and empty triangles; give (face id, corner xy, inverse area, box)."""
    a, b, c = (points[faces[:, k]] for k in range(3))
    ab, ac = b - a, c - a
    # Outward faces are counter-clockwise with z up; the image's y points down, which flips the sign of the
    # area.
    area = ac[:, 0] * ab[:, 1] - ab[:, 0] * ac[:, 1]
    half, limit = np.float32(0.5), np.array([width - 1, height - 1], dtype=np.float32)
    lower = np.maximum(np.ceil(np.minimum(np.minimum(a, b), c) - half), 0)
    upper = np.minimum(np.floor(np.maximum(np.maximum(a, b), c) - half), limit)
    near = depth <= NEAR
    keep = (area > 1e-9) & (upper[:, 0] >= lower[:, 0]) & (upper[:, 1] >= lower[:, 1])
    ids = np.flatnonzero(keep & ~near[faces].any(axis=1) if near.any() else keep)
    corners = np.stack([a[ids], b[ids], c[ids]], axis=1)
    return ids, corners, 1.0 / area[ids], lower[ids].astype(np.int32), upper[ids].astype(np.int32)


def _candidates(points: np.ndarray, depth: np.ndarray, faces: np.ndarray, width: int, height: int):
    """Pixels inside triangles: (flat pixel, face id, weight 1, weight 2, inverse depth), all [n]."""
    ids, corners, scale, lower, upper = _setup(points, depth, faces, width, height)
    size = upper - lower + 1
    row_of, row = _expand(size[:, 1])
    owner_row, column = _expand(size[row_of, 0])
    owner = row_of[owner_row]
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    # weight_k(x, y) = base_k + slope_x_k x + slope_y_k y, measured from the first pixel centre of the box
    first = lower + np.float32(0.5) - a
    sx1, sy1 = -(c[:, 1] - a[:, 1]) * scale, (c[:, 0] - a[:, 0]) * scale
    sx2, sy2 = (b[:, 1] - a[:, 1]) * scale, -(b[:, 0] - a[:, 0]) * scale
    base1 = first[:, 0] * sx1 + first[:, 1] * sy1
    base2 = first[:, 0] * sx2 + first[:, 1] * sy2
    row1 = base1[row_of] + row * sy1[row_of]
    row2 = base2[row_of] + row * sy2[row_of]
    w1 = row1[owner_row] + column * sx1[owner]
    w2 = row2[owner_row] + column * sx2[owner]
    inside = np.flatnonzero((w1 >= 0) & (w2 >= 0) & (w1 + w2 <= 1))
    owner, w1, w2 = owner[inside], w1[inside], w2[inside]
    y = (lower[row_of, 1] + row)[owner_row[inside]]
    pixel = y * np.int32(width) + lower[owner, 0] + column[inside]
    inverse = (1.0 / depth)[faces[ids]]
    i0 = inverse[:, 0]
    near = i0[owner] + w1 * (inverse[:, 1] - i0)[owner] + w2 * (inverse[:, 2] - i0)[owner]
    return pixel, ids[owner], w1, w2, near


def rasterise(points: np.ndarray, depth: np.ndarray, faces: np.ndarray, width: int, height: int) -> Fragments:
    """Nearest front-facing triangle under every pixel centre (x + .5, y + .5).

    `points` float [V, 2] in pixels (y down), `depth` float [V] along the view axis, `faces` int [F, 3] wound
    counter-clockwise seen from outside with y up. Inverse depth is interpolated; of equals the later face
    wins."""
    points = np.ascontiguousarray(points, dtype=np.float32)
    depth = np.ascontiguousarray(depth, dtype=np.float32)
    pixel, face, w1, w2, near = _candidates(points, depth, faces, width, height)
    # Both passes must compare the same float32 numbers, or rounding leaves pixels without a winner.
    near = near.astype(np.float32)
    buffer = np.zeros(width * height, dtype=np.float32)
    np.maximum.at(buffer, pixel, near)
    won = np.flatnonzero(near == buffer[pixel])
    winner = np.full(width * height, -1, dtype=np.int64)
    np.maximum.at(winner, pixel[won], won)
    hit = np.flatnonzero(winner >= 0)
    chosen = winner[hit]
    w1, w2 = w1[chosen], w2[chosen]
    weights = np.stack([1 - w1 - w2, w1, w2], axis=1)
    return Fragments(hit, face[chosen], weights, 1.0 / buffer[hit])
