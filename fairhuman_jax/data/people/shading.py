"""Light: one directional lamp, sky ambience, highlights and contact darkening."""

from __future__ import annotations

import numpy as np

TINT = np.array([1.02, 1.0, 0.97], dtype=np.float32)
HIGHLIGHT, SHININESS = 0.13, 28
WRAP = 0.15
CONTACT, CONTACT_RADIUS, CONTACT_REACH = 0.42, 0.02, 0.10
BACKDROP = 1.5


def light_direction(azimuth: float, elevation: float) -> np.ndarray:
    """Unit vector [3] towards the lamp in view axes (x right, y away, z up); 0, 0 is at the camera.
    Degrees."""
    a, e = np.radians([azimuth, elevation])
    return np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)], dtype=np.float32)


def shade(colour: np.ndarray, normal: np.ndarray, shine: np.ndarray, rotation: np.ndarray, light: dict) -> np.ndarray:
    """Lit colours [n, 3]: colour (amb (.75 + .25 (.5 + .5 n_z)) + (1.06 - amb) wrapped n.l) tint + highlight.

    `colour` [n, 3], world `normal` [n, 3] (any length), `shine` [n], world -> view `rotation` [3, 3], spec
    `light`."""
    view = normal @ rotation.T.astype(np.float32)
    view *= 1 / np.maximum(np.sqrt(np.einsum("ij,ij->i", view, view)), 1e-6)[:, None]
    lamp = light_direction(light["azimuth"], light["elevation"])
    half = lamp + np.array([0, -1, 0], dtype=np.float32)
    half /= np.linalg.norm(half)
    ambient = np.float32(light["ambient"])
    direct = np.clip((view @ lamp + WRAP) / (1 + WRAP), 0, 1)
    lit = ambient * (0.875 + 0.125 * view[:, 2]) + (1.06 - ambient) * direct
    shiny = HIGHLIGHT * shine * np.maximum(view @ half, 0) ** SHININESS
    return colour * lit[:, None] * TINT + shiny[:, None]


def box_blur(image: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a (2 radius + 1)^2 window cut at the border; image float32 [H, W]."""
    for axis in (0, 1):
        n = image.shape[axis]
        total = np.concatenate([np.zeros_like(image.take([0], axis)), np.cumsum(image, axis, dtype=np.float32)], axis)
        high, low = np.minimum(np.arange(n) + radius + 1, n), np.maximum(np.arange(n) - radius, 0)
        count = (high - low).astype(np.float32)
        image = (total.take(high, axis) - total.take(low, axis)) / (count[:, None] if axis == 0 else count)
    return image


def contact(depth: np.ndarray, covered: np.ndarray, distance: float, half_height: float) -> np.ndarray:
    """Darkening factor [H, W] where a surface lies behind its surroundings: separates hand from face,
    finger from finger.

    `depth` float32 [H, W] (m, anything where not `covered`), camera `distance` and `half_height` (m).
    """
    filled = np.where(covered, depth, np.float32(distance + BACKDROP))
    blurred = box_blur(filled, max(1, round(CONTACT_RADIUS * depth.shape[1])))
    return 1 - CONTACT * np.clip((filled - blurred) / (CONTACT_REACH * half_height), 0, 1)
