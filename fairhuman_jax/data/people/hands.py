"""Hand shapes: joint angles in degrees and the local finger rotations they mean."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.rotations import axis_angle, cross, rotation_vector, unit

SIDES = ("L", "R")


@dataclass(frozen=True)
class HandShape:
    """Flexion (MCP, PIP, DIP) and spread of index to little; thumb (opposition, abduction, MCP, IP)."""

    flexion: tuple[tuple[float, float, float], ...]
    spread: tuple[float, float, float, float]
    thumb: tuple[float, float, float, float]


_NO_SPREAD = (0.0, 0.0, 0.0, 0.0)
_STRAIGHT = (-4.0, -8.0, -4.0)
HAND_SHAPES: dict[str, HandShape] = {
    "open": HandShape(((-4, -6, -4),) * 4, (9, 2, -5, -12), (-12, 8, -8, -8)),
    "relaxed": HandShape(((8, 14, 8), (12, 18, 10), (16, 22, 12), (18, 24, 12)), (2, 0, -1, -2), (6, 8, 6, 8)),
    "flat": HandShape(((-3, -8, -6),) * 4, (1, 0, -1, -2), (6, 0, 0, 0)),
    "fist": HandShape(((72, 88, 55), (76, 90, 58), (78, 90, 58), (80, 86, 55)), _NO_SPREAD, (40, 22, 32, 38)),
    "pointing": HandShape((_STRAIGHT, (76, 90, 58), (78, 90, 58), (80, 86, 55)), _NO_SPREAD, (42, 22, 36, 36)),
    "peace": HandShape((_STRAIGHT, _STRAIGHT, (76, 90, 58), (78, 86, 55)), (12, -9, 0, 0), (46, 22, 38, 36)),
    "ok": HandShape(((53, 32, 18), (4, 6, 4), (-2, 0, 0), (-6, -4, 0)), (0, 2, -6, -14), (20, 2, 9, 26)),
    "thumbs up": HandShape(((70, 88, 55), (74, 90, 58), (76, 90, 58), (78, 86, 55)), _NO_SPREAD, (-26, -14, -10, -12)),
}


@functools.lru_cache(maxsize=4)
def finger_bones(pack: PeoplePack) -> tuple[np.ndarray, np.ndarray]:
    """Points [2 sides, 5 fingers, 3 joints] where each phalanx starts (a bone) and ends (a joint or tip)."""
    chains = np.asarray(
        [[[pack.point[f"finger{f}-{k}.{side}"] for k in (1, 2, 3, "tip")] for f in range(1, 6)] for side in SIDES]
    )
    return chains[..., :3], chains[..., 1:]


def hand_axes(pack: PeoplePack, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rest hand direction, palm normal (out of the palm), little-to-index direction: [2 sides, 3] each."""
    start, _ = finger_bones(pack)
    wrist = joints[[pack.bone["wrist.L"], pack.bone["wrist.R"]]]
    index, middle, little = (joints[start[:, f, 0]] for f in (1, 2, 4))
    d = unit(middle - wrist)
    q = cross(index - wrist, little - wrist)
    q = unit(q - (q * d).sum(-1, keepdims=True) * d)
    # Palms of the hanging rest pose look inwards: the left one to -x, the right one to +x.
    q = q * np.where(q[:, :1] * np.array([[-1], [1]], np.float32) < 0, np.float32(-1), np.float32(1))
    return d, q, unit(index - little)


def finger_rotations(
    pack: PeoplePack, joints: np.ndarray, shapes: tuple[str, str], jitter: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bones [2,5,3] and local rotations float32 [2,5,3,3,3] of hand shapes (left, right).

    Fingers: flexion about phalanx x palm normal, the knuckle then spread about hand direction x index side.
    Thumb: flexion about phalanx x across, across ~ -.85 (index side) + .5 palm; joint 1 also abducts.
    `jitter` is a rotation vector in degrees per bone, broadcastable to [2,5,3,3]. KeyError: unknown shape.
    """
    start, end = finger_bones(pack)
    d, q, index_side = hand_axes(pack, joints)
    angles = np.zeros((2, 5, 3), np.float32)
    second = np.zeros((2, 5), np.float32)
    for side, name in enumerate(shapes):
        shape = HAND_SHAPES[name]
        angles[side, 0] = shape.thumb[0], shape.thumb[2], shape.thumb[3]
        angles[side, 1:] = shape.flexion
        second[side] = shape.thumb[1], *shape.spread
    phalanx = unit(joints[end] - joints[start])
    towards = np.repeat(q[:, None], 5, 1)
    towards[:, 0] = unit(-0.85 * index_side + 0.5 * q)
    local = axis_angle(unit(cross(phalanx, towards[:, :, None])), np.deg2rad(angles))
    second_axis = np.repeat(unit(cross(d, index_side))[:, None], 5, 1)
    second_axis[:, 0] = unit(cross(phalanx[:, 0, 0], q))
    extra = axis_angle(second_axis, np.deg2rad(second))
    local[:, 1:, 0] = extra[:, 1:] @ local[:, 1:, 0]
    local[:, 0, 0] = local[:, 0, 0] @ extra[:, 0]
    noise = np.broadcast_to(np.deg2rad(np.asarray(jitter, np.float32)), (2, 5, 3, 3))
    return start, local @ rotation_vector(noise)
