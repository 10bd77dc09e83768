"""Control images of a rendered person: what a pose detector and a hand mesh would give, drawn from exact labels."""

from __future__ import annotations

import numpy as np

from fairhuman_jax.data.people.labels import SIDES
from fairhuman_jax.keypoints.skeletons import HUMANSD17, control_image, draw_bodies

LEAST_JOINTS = 4  # visible joints of a hand that is drawn, all of it
HEAD_POINTS = {"openpose18": (0, 14, 15, 16, 17), "coco17": (0, 1, 2, 3, 4)}  # nose, eyes, ears


def detected_points(sample: dict, layout: str) -> np.ndarray:
    """The body points of a sample of `render` as a detector gives them: float32 [K, 3], confidence 1 or 0.

    Joints outside the frame are missing and hidden joints are not, but the points of a head that is turned away are.
    `layout`: "openpose18" or "coco17".
    """
    points = sample["keypoints"][layout].copy()
    at, head = points[:, :2], np.isin(np.arange(len(points)), HEAD_POINTS[layout])
    inside = ((at >= 0) & (at < len(sample["image"]))).all(axis=1)
    points[:, 2] = np.where(head, points[:, 2], inside)
    return points


def humansd_skeleton(sample: dict) -> np.ndarray:
    """HumanSD's control image of a sample of `render`, uint8 [S, S, 3]: 16 coloured limbs between COCO's joints, those
    of `detected_points`. For mirrored samples draw again, as with `skeleton`."""
    canvas = np.zeros((*sample["image"].shape[:2], 3), np.uint8)
    return draw_bodies(canvas, [detected_points(sample, "coco17")], HUMANSD17)


def skeleton(sample: dict) -> np.ndarray:
    """FairHuman's control image of a sample of `render`, uint8 [S, S, 3]: body, face points, hand depth, hands.

    The body is that of `detected_points`; a hand is drawn whole, with its depth, if more than three of its joints are
    visible.
    The face has five points where FairHuman's has 68. Colours tell left from right, so the mirrored control image of a
    mirrored sample names the sides the wrong way: draw again from exchanged points, or train without mirroring.
    """
    size = len(sample["image"])
    points = sample["keypoints"]
    shown = [side for side in SIDES if points[f"hand_{side}"][:, 2].sum() >= LEAST_JOINTS]
    inside = np.zeros((size, size, 1), bool)
    for side in shown:
        inside |= sample[f"hand_mask_{side}"] > 0
    return control_image(
        (size, size),
        bodies=[detected_points(sample, "openpose18")],
        faces=[points["face5"]],
        hand_depth=sample["hand_depth"] * inside,
        mesh_hands=[points[f"hand_{side}"][:, :2] for side in shown],
    )


CONDITIONS = {"fairhuman": skeleton, "humansd": humansd_skeleton}
