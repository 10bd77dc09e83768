"""Facial colours by formula on the canonical head: no textures, so borders are smooth at every resolution.

x below is |x| of the canonical point in metres; "a of c" means the colour moves towards c by the share a.
"""

from __future__ import annotations

import numpy as np

from fairhuman_jax.data.people import palette
from fairhuman_jax.data.people.garments import smoothstep

EYE_X, EYE_Z = 0.031, 0.7285
IRIS_RADIUS, PUPIL_RADIUS = 0.0074, 0.0032
FACE_FRONT = -0.085
BEARD_FRONT = -0.02
OLD = 0.6


def blend(colour: np.ndarray, share: np.ndarray, towards: np.ndarray) -> None:
    """colour += share (towards - colour), in place; colour [n, 3], share [n], towards [3] or [n, 3]."""
    colour += share[:, None] * (towards - colour)


def _bump(x: np.ndarray, z: np.ndarray, at: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    return np.exp(-(((x - at[0]) / radii[0]) ** 2) - ((z - at[1]) / radii[1]) ** 2)


def _beard(colour: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, hair: np.ndarray) -> None:
    upper = 0.672 - 0.35 * np.clip(0.06 - x, 0, 0.03) + 0.25 * np.clip(x - 0.03, 0, 0.05)
    share = smoothstep(-0.002, 0.003, upper - z) * smoothstep(0.600, 0.607, z) * smoothstep(-0.012, -0.03, y)
    moustache = smoothstep(0.0065, 0.0045, np.abs(z - 0.6755)) * smoothstep(0.032, 0.028, x)
    moustache *= y < FACE_FRONT
    blend(colour, 0.82 * np.maximum(share, moustache), 0.9 * hair)


def _skin_tints(colour: np.ndarray, x: np.ndarray, z: np.ndarray, skin: np.ndarray) -> None:
    blend(colour, 0.45 * _bump(x, z, (0.048, 0.685), (0.022, 0.020)), skin * [1.02, 0.72, 0.68])
    blend(colour, 0.35 * _bump(x, z, (0.0, 0.695), (0.017, 0.018)), skin * [1.0, 0.85, 0.80])


def _brows(colour: np.ndarray, x: np.ndarray, z: np.ndarray, hair: np.ndarray, width: float) -> None:
    arch = 0.7515 + 0.004 * np.sin(np.pi * (x - 0.012) / 0.042) - 0.004 * smoothstep(0.035, 0.055, x)
    along = smoothstep(0.009, 0.013, x) * smoothstep(0.056, 0.050, x)
    across = smoothstep(width + 0.0012, width - 0.0012, np.abs(z - arch))
    blend(colour, 0.9 * along * across, 0.85 * hair)


def _eye_surround(colour: np.ndarray, x: np.ndarray, z: np.ndarray, skin: np.ndarray, woman: bool) -> None:
    e = ((x - EYE_X) / 0.0215) ** 2 + ((z - EYE_Z) / 0.0105) ** 2
    # Soft towards the edge, or a blink looks bruised.
    blend(colour, 0.6 * smoothstep(1.1, 0.55, e), 0.55 * skin)
    if woman:
        lash = smoothstep(0.0022, 0.0008, np.abs(z - EYE_Z - 0.0052 + 14 * (x - EYE_X) ** 2))
        blend(colour, 0.55 * lash * smoothstep(0.019, 0.014, np.abs(x - EYE_X)), 0.25 * skin)


def _lips(colour: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, skin: np.ndarray, woman: bool) -> None:
    height = np.where(z < 0.66, 0.0125, 0.0085)
    e = (x / 0.0265) ** 2 + ((z - 0.6605) / height) ** 2
    tone = skin * [0.88, 0.52, 0.52] + (np.array([0.10, 0.02, 0.03]) if woman else 0)
    blend(colour, 0.9 * smoothstep(1.12, 0.88, e) * (y < -0.128), np.clip(tone, 0, 1))


def _wrinkles(colour: np.ndarray, x: np.ndarray, z: np.ndarray, skin: np.ndarray) -> None:
    lines = np.minimum(np.abs(z - 0.775 - 1.5 * x**2), np.abs(z - 0.786 - 1.5 * x**2))
    forehead = smoothstep(0.0018, 0.0006, lines) * smoothstep(0.037, 0.033, x)
    fold = np.abs(x - 0.024 - 0.45 * np.clip(0.690 - z, 0, 0.04))
    smile = smoothstep(0.0022, 0.0008, fold) * smoothstep(0.662, 0.668, z) * smoothstep(0.692, 0.686, z)
    bag = np.abs(z - 0.7145 - 12 * (x - EYE_X) ** 2)
    bag = smoothstep(0.0016, 0.0006, bag) * smoothstep(0.016, 0.012, np.abs(x - EYE_X))
    blend(colour, 0.5 * np.maximum(np.maximum(forehead, 0.8 * smile), 0.7 * bag), 0.72 * skin)


def paint_head(colour: np.ndarray, canon: np.ndarray, person: dict) -> None:
    """Paint head-skin pixels in place: colour [n, 3] (starts as skin), canonical points [n, 3],
    spec["identity"]."""
    skin, hair = np.array(palette.SKIN[person["skin"]]), np.array(palette.HAIR[person["hair_colour"]])
    skin, hair = skin.astype(np.float32), hair.astype(np.float32)
    woman = person["sex"] == "woman"
    x, y, z = np.abs(canon[:, 0]), canon[:, 1], canon[:, 2]
    front = np.flatnonzero(y < FACE_FRONT)
    part, fx, fy, fz = colour[front], x[front], y[front], z[front]
    _skin_tints(part, fx, fz, skin)
    if person["age"] > OLD:
        _wrinkles(part, fx, fz, skin)
    colour[front] = part
    if person["beard"]:
        jaw = np.flatnonzero((y < BEARD_FRONT) & (z < 0.70))
        part_jaw = colour[jaw]
        _beard(part_jaw, x[jaw], y[jaw], z[jaw], hair)
        colour[jaw] = part_jaw
        part = colour[front]
    _eye_surround(part, fx, fz, skin, woman)
    _lips(part, fx, fy, fz, skin, woman)
    _brows(part, fx, fz, hair, 0.0034 if woman else 0.0048)
    colour[front] = part


def paint_eyes(canon: np.ndarray, iris: np.ndarray) -> np.ndarray:
    """Colours [n, 3] of eyeball pixels. Iris and pupil sit on the eyeball, so turning the eye moves the
    gaze."""
    colour = np.full((len(canon), 3), (0.96, 0.95, 0.93), dtype=np.float32)
    r = np.hypot(np.abs(canon[:, 0]) - EYE_X, canon[:, 2] - EYE_Z)
    front = canon[:, 1] < -0.118
    blend(colour, front * smoothstep(IRIS_RADIUS + 0.0006, IRIS_RADIUS - 0.0006, r), 0.55 * iris)
    blend(colour, front * smoothstep(IRIS_RADIUS - 0.0006, IRIS_RADIUS - 0.0024, r), iris)
    blend(
        colour,
        front * smoothstep(PUPIL_RADIUS + 0.0005, PUPIL_RADIUS - 0.0005, r),
        np.float32(0.03) * np.ones(3),
    )
    return colour
