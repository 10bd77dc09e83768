"""The rasteriser against a pixel-by-pixel, triangle-by-triangle oracle."""

from __future__ import annotations

import numpy as np
import pytest

from fairhuman_jax.data.people.camera import Camera, view_rotation
from fairhuman_jax.data.people.raster import rasterise


def oracle(points, depth, faces, width, height):
    """Nearest front face of every pixel centre by plain loops: (triangle ids, depths), float64."""
    winner, best = np.full((height, width), -1), np.full((height, width), np.inf)
    for t, (i, j, k) in enumerate(faces):
        (ax, ay), (bx, by), (cx, cy) = points[i], points[j], points[k]
        area = (cx - ax) * (by - ay) - (bx - ax) * (cy - ay)
        if area <= 0:
            continue
        for y in range(height):
            for x in range(width):
                px, py = x + 0.5, y + 0.5
                wb = ((cx - ax) * (py - ay) - (px - ax) * (cy - ay)) / area
                wc = ((px - ax) * (by - ay) - (bx - ax) * (py - ay)) / area
                if min(wb, wc, 1 - wb - wc) < 0:
                    continue
                z = 1 / ((1 - wb - wc) / depth[i] + wb / depth[j] + wc / depth[k])
                if z <= best[y, x]:
                    winner[y, x], best[y, x] = t, z
    return winner, best


@pytest.mark.parametrize("spread", [0.8, 4.0, 30.0])
def test_rasterise_agrees_with_the_oracle(spread):
    rng = np.random.default_rng(int(spread))
    width, height, count = 21, 17, 200 if spread < 1 else 60
    centre = rng.uniform(-3, 24, (count, 1, 2))
    points = (centre + rng.normal(0, spread, (count, 3, 2))).reshape(-1, 2).astype(np.float32)
    depth = rng.uniform(0.5, 3, 3 * count).astype(np.float32)
    faces = np.arange(3 * count).reshape(-1, 3)
    got = rasterise(points, depth, faces, width, height)
    winner, best = oracle(points.astype(float), depth.astype(float), faces, width, height)
    ids, z = np.full(width * height, -1), np.full(width * height, np.inf)
    ids[got.pixel], z[got.pixel] = got.triangle, got.depth
    assert (winner >= 0).sum() > 20
    np.testing.assert_array_equal(ids.reshape(height, width), winner)
    np.testing.assert_allclose(z.reshape(height, width), best, rtol=2e-5)


def test_weights_recover_the_pixel_centres():
    rng = np.random.default_rng(3)
    points = rng.uniform(0, 16, (90, 2)).astype(np.float32)
    faces = np.arange(90).reshape(-1, 3)
    got = rasterise(points, np.full(90, 2.0), faces, 16, 16)
    at = np.einsum("nk,nkc->nc", got.weights, points[faces[got.triangle]])
    centres = np.stack([got.pixel % 16 + 0.5, got.pixel // 16 + 0.5], axis=1)
    np.testing.assert_allclose(at, centres, atol=1e-3)
    assert got.weights.min() >= -1e-6


def test_back_faces_and_triangles_behind_the_camera_are_not_drawn():
    # Counter-clockwise seen with y up means clockwise in the y-down image.
    points = np.array([[1, 1], [1, 9], [9, 9]], np.float32)
    front, back = np.array([[0, 1, 2]]), np.array([[0, 2, 1]])
    assert len(rasterise(points, np.ones(3), front, 10, 10).pixel) > 20
    assert len(rasterise(points, np.ones(3), back, 10, 10).pixel) == 0
    assert len(rasterise(points, np.array([1.0, 1.0, -1.0]), front, 10, 10).pixel) == 0


def test_no_pixel_of_a_closed_surface_is_left_without_a_winner():
    # A fan of slivers around a centre: each inner pixel must be won although depths differ only by rounding.
    angle = -np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.stack([32 + 30.3 * np.cos(angle), 32 + 30.3 * np.sin(angle)], axis=1)
    points = np.concatenate([[[32.1, 31.9]], ring]).astype(np.float32)
    faces = np.array([[0, 1 + k, 1 + (k + 1) % 40] for k in range(40)])
    got = rasterise(points, 1.7 + 0.3 * np.sin(np.arange(41)), faces, 64, 64)
    y, x = np.mgrid[:64, :64] + 0.5
    inside = np.hypot(x - 32, y - 32) < 29.5
    assert np.isin(np.flatnonzero(inside), got.pixel).all()


def test_camera_puts_the_persons_left_on_the_right_and_up_on_top():
    camera = Camera(view_rotation(0, 0), np.zeros(3), 0.5, 2.0)
    pixels, depth = camera.project(np.array([[0, 0, 0], [0.5, 0, 0], [0, 0, 0.5], [0, -0.4, 0]]), 100)
    np.testing.assert_allclose(pixels[:3], [[50, 50], [100, 50], [50, 0]], atol=1e-4)
    np.testing.assert_allclose(depth, [2, 2, 2, 1.6], atol=1e-6)
