"""The control image of a rendered person: what a pose detector and a hand mesh would give, drawn from exact labels."""

from __future__ import annotations

import numpy as np

from fairhuman_jax.data.people.labels import SIDES
from fairhuman_jax.data.pose_drawing import control_image

LEAST_JOINTS = 4  # visible joints of a hand that is drawn, all of it
HEAD_POINTS = (0, 14, 15, 16, 17)  # of OpenPose-18: nose, eyes, ears


def skeleton(sample: dict) -> np.ndarray:
    """FairHuman's control image of a sample of `render`, uint8 [S, S, 3]: body, face points, hand depth, hands.

    As with detectors, joints outside the frame are missing and hidden joints of the body are not, but the points of a
    head that is turned away are; a hand is drawn whole, with its depth, if more than three of its joints are visible.
    The face has five points where FairHuman's has 68. Colours tell left from right, so the mirrored control image of a
    mirrored sample names the sides the wrong way: draw again from exchanged points, or train without mirroring.
    """
    size = len(sample["image"])
    points = sample["keypoints"]
    body = points["openpose18"].copy()
    at = body[:, :2]
    head = np.isin(np.arange(len(body)), HEAD_POINTS)
    body[:, 2] = np.where(head, body[:, 2], ((at >= 0) & (at < size)).all(axis=1))
    shown = [side for side in SIDES if points[f"hand_{side}"][:, 2].sum() >= LEAST_JOINTS]
    inside = np.zeros((size, size, 1), bool)
    for side in shown:
        inside |= sample[f"hand_mask_{side}"] > 0
    return control_image(
        (size, size),
        bodies=[body],
        faces=[points["face5"]],
        hand_depth=sample["hand_depth"] * inside,
        mesh_hands=[points[f"hand_{side}"][:, :2] for side in shown],
    )
