"""Arm gestures: where the wrist goes, where the elbow points and how the hand is turned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Vector = Sequence[float]


class ArmTarget(NamedTuple):
    """World wrist position (m), elbow pole, hand direction and palm normal, each float32 [3]."""

    wrist: np.ndarray
    pole: np.ndarray
    direction: np.ndarray
    palm: np.ndarray


@dataclass(frozen=True)
class BodyFrame:
    """What gestures refer to, in the posed world; measures in metres from the shaped rest body.

    `shoulders` [2,3] and `arm_lengths` [2] (left, right); `hips`, `knees` [2,3]; rotations [3,3] of chest,
    head and root; `head` and `pelvis` positions; `weight` 0..1; `bulk` of the chest; half widths of torso and
    jaw; `clasp` [3]: belly front at hip height.
    """

    shoulders: np.ndarray
    arm_lengths: np.ndarray
    hips: np.ndarray
    knees: np.ndarray
    chest_rotation: np.ndarray
    head_rotation: np.ndarray
    root_rotation: np.ndarray
    head: np.ndarray
    pelvis: np.ndarray
    clasp: np.ndarray
    weight: float
    bulk: float
    torso_half_width: float
    head_half_width: float


@dataclass(frozen=True)
class Reach:
    """Gesture relative to the shoulder: wrist range (arm lengths), pole, hand direction range, palm."""

    low: Vector
    high: Vector
    pole: Vector
    direction_low: Vector
    direction_high: Vector
    palm: Vector


def _fixed(wrist: Vector, pole: Vector, direction: Vector, palm: Vector) -> Reach:
    return Reach(wrist, wrist, pole, direction, direction, palm)


# Left side, chest frame; the right side mirrors x.
REACHES: dict[str, Reach] = {
    "waving": Reach(
        (0.3, -0.28, 0.3), (0.6, -0.28, 0.55), (0.8, 0.2, -0.8), (-0.3, -0.1, 1), (0.5, -0.1, 1), (0, -1, 0)
    ),
    "sign": Reach(
        (0, -0.5, 0),
        (0.35, -0.5, 0.3),
        (0.7, 0.1, -0.8),
        (-0.25, -0.12, 1),
        (0.25, -0.12, 1),
        (-0.1, -1, -0.1),
    ),
    "thumbs up": Reach(
        (-0.15, -0.62, -0.22),
        (0.15, -0.62, -0.22),
        (0.8, 0.2, -0.6),
        (-0.75, -0.55, 0.1),
        (-0.75, -0.55, 0.1),
        (-0.45, 0.85, 0),
    ),
    "pointing outwards": _fixed((0.45, -0.6, 0.15), (0.6, 0.1, -0.8), (0.55, -0.25, 0.75), (-0.3, -0.9, 0)),
    "raised": _fixed((0.45, -0.1, 0.72), (0.8, 0.1, 0.1), (0.15, -0.05, 1), (-0.2, -1, 0)),
    "presenting": _fixed((0.35, -0.55, -0.25), (0.6, 0.3, -0.7), (0.4, -0.8, 0.25), (-0.1, -0.3, 1)),
}


def _mix(low: Vector, high: Vector, numbers: Sequence[float]) -> np.ndarray:
    a, b = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return a + (b - a) * np.asarray(numbers, np.float32)


def _down(body: BodyFrame, side: int, numbers: Sequence[float], swing: float) -> tuple:
    offset = np.array([0.10 + 0.10 * body.weight, -0.06 + swing, -0.97], np.float32) * body.arm_lengths[side]
    return body.shoulders[side], body.chest_rotation, offset, (0.5, 0.6, 0), (0, -0.12, -1), (-1, 0, 0)


def _hips(body: BodyFrame, side: int, numbers: Sequence[float], swing: float) -> tuple:
    offset = (body.torso_half_width + 0.06, 0.035, 0.09)
    return body.pelvis, body.root_rotation, offset, (1, 0.35, 0), (-0.12, -0.8, -0.4), (-1, -0.05, -0.05)


def _crossed(body: BodyFrame, side: int, numbers: Sequence[float], swing: float) -> tuple:
    y, z = (-0.235, -0.265) if numbers[0] >= 0.5 else (-0.185, -0.31)
    offset = (-0.065, y - body.bulk, z)
    centre = body.shoulders.mean(0)
    return centre, body.chest_rotation, offset, (0.9, -0.1, -0.75), (-1, 0.22, 0.1), (-0.1, 1, -0.1)


def _cheek(body: BodyFrame, side: int, numbers: Sequence[float], swing: float) -> tuple:
    offset = (body.head_half_width + 0.03, -0.085, -0.115)
    return body.head, body.head_rotation, offset, (0.5, -0.5, -0.9), (-0.02, 0.1, 1), (-1, 0.25, 0)


def _thinking(body: BodyFrame, side: int, numbers: Sequence[float], swing: float) -> tuple:
    offset = (0.06, -0.175, -0.185)
    return body.head, body.head_rotation, offset, (0.5, -0.5, -0.9), (-0.55, 0.05, 0.85), (-0.5, 0.85, -0.1)


def _thighs(body: BodyFrame, side: int, numbers: Sequence[float], swing: float) -> tuple:
    centre = body.hips[side] + np.float32(0.72) * (body.knees[side] - body.hips[side])
    offset = (0, 0.02, 0.125 + 0.03 * body.weight)
    return centre, body.root_rotation, offset, (0.9, 0.3, 0.1), (0, -0.95, -0.25), (0, 0.15, -1)


def _clasped(body: BodyFrame, side: int, numbers: Sequence[float], swing: float) -> tuple:
    offset = (0.085, -0.075 if numbers[0] >= 0.5 else -0.04, 0)
    return body.clasp, body.root_rotation, offset, (1, 0.2, -0.1), (-0.9, -0.25, -0.45), (-0.15, 1, -0.2)


# Gestures that touch the body: origin, frame, offset (m), pole, hand direction, palm normal.
PLACES: dict[str, Callable[[BodyFrame, int, Sequence[float], float], tuple]] = {
    "down": _down,
    "walking": _down,
    "hips": _hips,
    "crossed": _crossed,
    "cheek": _cheek,
    "thinking": _thinking,
    "thighs": _thighs,
    "clasped": _clasped,
}
ARM_GESTURES = (*REACHES, *PLACES)


def arm_target(name: str, body: BodyFrame, side: int, numbers: Sequence[float], swing: float = 0.0) -> ArmTarget:
    """Target of one arm (side 0 left, 1 right); `numbers` in 0..1 place it inside the gesture's range.

    `numbers[0:3]` mix the wrist, `[3:6]` the hand direction; "crossed" and "clasped" read `[0] >= .5` as the
    outer arm. KeyError for an unknown gesture.
    """
    mirror = np.array([1 if side == 0 else -1, 1, 1], np.float32)
    if name in REACHES:
        r = REACHES[name]
        origin, rotation = body.shoulders[side], body.chest_rotation
        offset = _mix(r.low, r.high, numbers[:3]) * body.arm_lengths[side]
        pole, palm = r.pole, r.palm
        direction = _mix(r.direction_low, r.direction_high, numbers[3:6])
    else:
        origin, rotation, offset, pole, direction, palm = PLACES[name](body, side, numbers, swing)
    world = (np.asarray([offset, pole, direction, palm], np.float32) * mirror) @ rotation.T
    return ArmTarget(origin + world[0], *world[1:])
