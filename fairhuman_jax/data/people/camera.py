"""Perspective camera and the framings of the people world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DISTANCE = {
    "full body": 4.0,
    "half body": 3.0,
    "upper body": 2.4,
    "portrait": 1.6,
    "close-up of a hand": 1.6,
    "close-up of a hand and the face": 1.6,
}
GROWTH_LIMIT = 1.5


@dataclass(frozen=True)
class Camera:
    """q = R (p - centre); depth = d + q_y; s = d / (depth h); x = (1 + s q_x) S/2, y = (1 - s q_z) S/2.

    `rotation` [3, 3], `centre` [3] (m), `half_height` h: half of the frame's height at the subject (m),
    `distance` d (m).
    """

    rotation: np.ndarray
    centre: np.ndarray
    half_height: float
    distance: float

    def project(self, points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """World points [n, 3] -> float32 pixels [n, 2] (y down) and float32 depth [n] (m)."""
        q = ((points - self.centre) @ self.rotation.T).astype(np.float32)
        depth = q[:, 1] + np.float32(self.distance)
        scale = np.float32(self.distance / self.half_height) / depth
        half = np.float32(size / 2)
        pixels = np.stack([(1 + scale * q[:, 0]) * half, (1 - scale * q[:, 2]) * half], axis=1)
        return pixels, depth


def view_rotation(azimuth: float, elevation: float) -> np.ndarray:
    """World -> view [3, 3]: turn about z by `azimuth`, then about x by `elevation` (degrees)."""
    a, e = np.radians([azimuth, elevation])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
    return tilt @ turn


@dataclass(frozen=True)
class Landmarks:
    """What framings aim at: `points` {name: [3]} posed skeleton points, `hands` {"left"|"right": [k, 3]},
    `raised` (sides whose hand must be seen), `low` and `high` [3]: corners of the box of the posed body
    (m)."""

    points: dict[str, np.ndarray]
    hands: dict[str, np.ndarray]
    raised: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray


def _aim(framing: str, body: Landmarks, hand: str, close: float) -> tuple[np.ndarray, float]:
    """Centre [3] and half height (m) of a framing before growth and jitter."""
    head, top = body.points["head"], body.points["head top"]
    middle = 0.5 * (body.low + body.high)
    if framing == "full body":
        return middle, 0.58 * float(body.high[2] - body.low[2])
    if framing in ("half body", "upper body"):
        if framing == "half body":
            hips = 0.5 * (body.points["upperleg01.L"] + body.points["upperleg01.R"])
            bottom, share, ceiling = hips[2] - 0.05, 0.56, top[2]
        else:
            bottom, share, ceiling = body.points["spine02"][2], 0.55, top[2] + 0.06
        centre = np.array([middle[0] * 0.3 + top[0] * 0.7, top[1], 0.5 * (bottom + ceiling)])
        return centre, share * float(ceiling - bottom)
    if framing == "portrait":
        return head + 0.28 * (top - head), 1.30 * float(np.linalg.norm(top - head))
    fingers = body.hands[hand]
    if framing == "close-up of a hand":
        return fingers.mean(axis=0), 0.14 + 0.05 * close
    face = 0.5 * (head + top)
    centre = 0.55 * fingers.mean(axis=0) + 0.45 * face
    offset = np.abs(np.concatenate([fingers, face[None], top[None]]) - centre)[:, [0, 2]].max()
    return centre, max(0.20, 0.62 * float(offset) + 0.10)


def _grow(centre: np.ndarray, half: float, rotation: np.ndarray, body: Landmarks) -> tuple[np.ndarray, float]:
    """Widen the frame so that the raised hands fit, at most `GROWTH_LIMIT` times."""
    if not body.raised:
        return centre, half
    hands = (np.concatenate([body.hands[side] for side in body.raised]) - centre) @ rotation.T
    low = np.minimum(hands.min(axis=0) - 0.03, [-half, 0, -half])
    high = np.maximum(hands.max(axis=0) + 0.03, [half, 0, half])
    wanted = 0.5 * float((high - low)[[0, 2]].max())
    grown = min(wanted, GROWTH_LIMIT * half)
    shift = 0.5 * (low + high) * [1, 0, 1]
    # When the limit binds, the union no longer fits: move only as far as the old frame stays inside the new
    # one.
    shift = np.clip(shift, half - grown - 1e-9, grown - half + 1e-9) * [1, 0, 1]
    return centre + shift @ rotation, grown


def frame(camera: dict, body: Landmarks) -> Camera:
    """Camera of a spec's `camera` entry for a posed body. Unknown framing: KeyError naming it."""
    framing = camera["framing"]
    rotation = view_rotation(camera["azimuth"], camera["elevation"])
    centre, half = _aim(framing, body, camera["hand"], camera["close"])
    if camera["keep_hands"] and not framing.startswith("close-up"):
        centre, half = _grow(centre, half, rotation, body)
    half *= camera["zoom"]
    sideways, vertical = camera["shift"]
    centre = centre + half * (np.array([sideways, 0, vertical]) @ rotation)
    return Camera(rotation, centre, half, DISTANCE[framing])
