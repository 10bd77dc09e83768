"""MediaPipe's body networks: find people, 33 points and a mask for each, from LiteRT outputs to pixels of the picture.

Source: MediaPipe, modules/pose_detection and modules/pose_landmark (its graphs; BlazePose, arXiv 2006.10204).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit

from fairhuman_jax.annotate.boxes import LEAST_SCORE, anchors, decode_detections, merge_detections
from fairhuman_jax.annotate.models import MODELS, LiteModel
from fairhuman_jax.annotate.squares import Square, check_picture, cut, letterbox, paste
from fairhuman_jax.keypoints.poses import COCO17_IN_MEDIAPIPE33, Pose, make_pose

ANCHOR_LAYERS = ((28, 2), (14, 2), (7, 6))  # cells a side, anchors a cell: strides 8, 16 and three times 32
DETECTOR_SIDE, LANDMARK_SIDE, SEGMENTATION_SIDE = (
    MODELS[name].side for name in ("pose_detection", "pose_landmark_full", "selfie_segmentation")
)
BODY_SCALE = 2.5  # side of the body's square / distance of key points 0 and 1
HIPS, REACH = 0, 1  # key points of a detection: middle of the hips, end of the circle around the body
LANDMARKS, BODY_POINTS = 39, 33
KERNEL, SURE = 7, 0.5  # window on a heat map, and its least maximum for a point to be moved
SAME = 0.1  # two bodies whose points lie so near each other are one
PRESENT = 0.5  # least probability that a square holds a body


def body_square(hips: np.ndarray, reach: np.ndarray) -> Square:
    """The square of a body from two key points in pixels: centred on the hips, its up towards `reach`."""
    x, y = (reach - hips).tolist()
    return Square((float(hips[0]), float(hips[1])), BODY_SCALE * math.hypot(x, y), math.atan2(x, -y))


def decode_landmarks(raw: np.ndarray, heat_maps: np.ndarray) -> np.ndarray:
    """Points [33, 4] (x, y in unit coordinates of the body's square, visibility, presence).

    raw: [195], 39 points of x, y, z in pixels of 256 and two logits; heat_maps: logits [64, 64, 39]. A point moves to
    the centre of mass of its heat map in a window of 7 x 7 around it, if that exceeds one half anywhere in there.
    """
    values = raw.astype(np.float64).reshape(LANDMARKS, 5)[:BODY_POINTS]
    points = np.concatenate([values[:, :2] / LANDMARK_SIDE, expit(values[:, 3:])], axis=1)
    side = len(heat_maps)
    for i, (column, row) in enumerate((points[:, :2] * side).astype(int).tolist()):
        if not (0 <= column < side and 0 <= row < side):
            continue
        top, first = max(0, row - KERNEL // 2), max(0, column - KERNEL // 2)
        heat = expit(heat_maps[top : row + KERNEL // 2 + 1, first : column + KERNEL // 2 + 1, i].astype(np.float64))
        if heat.max() >= SURE:
            mass = heat.sum()
            # Indices, not centres of cells: so the network's own runtime has it.
            points[i, 0] = (heat.sum(0) @ np.arange(first, first + heat.shape[1])) / mass / side
            points[i, 1] = (heat.sum(1) @ np.arange(top, top + heat.shape[0])) / mass / side
    return points


def coco_pose(points: np.ndarray, height: int, width: int) -> Pose:
    """The pose of MediaPipe's points [33, 4] (x, y in pixels, visibility, presence) on a picture of that size."""
    points = points[list(COCO17_IN_MEDIAPIPE33), :3]
    inside = ((points[:, :2] >= 0) & (points[:, :2] < (width, height))).all(axis=1)
    points[:, 2] *= inside
    return make_pose(points)


@dataclass(frozen=True, eq=False)
class Body:
    """One person as the networks see them. points: [33, 4] (x, y in pixels, visibility, presence); presence:
    probability that it is one; mask: float [256, 256] in [0, 1] over `square`."""

    points: np.ndarray
    presence: float
    mask: np.ndarray
    square: Square


def distinct(bodies: list[Body]) -> list[Body]:
    """`bodies` without those that an earlier one has found already: half of their points, or more, lie within SAME of
    its own, in sides of its square. The detector knows people by their faces and may see two in one."""
    kept: list[Body] = []
    for body in bodies:
        apart = [np.median(np.hypot(*(body.points - other.points)[:, :2].T)) / other.square.side for other in kept]
        if all(distance > SAME for distance in apart):
            kept.append(body)
    return kept


class MediaPipePoses:
    """A `PoseDetector` of MediaPipe's networks: any number of people, one after the other; masks of them besides.

    folder: of the networks, default the cache; threshold: least score of a detection; threads: of LiteRT.
    Raises: as `LiteModel`; ValueError for what is no picture uint8 [H, W, 3].
    """

    def __init__(self, folder: Path | None = None, threshold: float = LEAST_SCORE, threads: int | None = None) -> None:
        self.threshold = threshold
        self._detector = LiteModel("pose_detection", folder, threads)
        self._landmarks = LiteModel("pose_landmark_full", folder, threads)
        self._segmentation = LiteModel("selfie_segmentation", folder, threads)

    def detect(self, picture: np.ndarray) -> list[Pose]:
        """Everybody found, most certain detection first. A point's confidence is its visibility, and 0 outside the
        picture, where the network guesses."""
        return [coco_pose(body.points, *picture.shape[:2]) for body in self.bodies(picture)]

    def person_mask(self, picture: np.ndarray) -> np.ndarray:
        """Probability that a pixel shows a person, float32 [H, W, 1]: the largest of all bodies', or that of the whole
        picture's segmentation where no body is found."""
        height, width = picture.shape[:2]
        masks = [paste(body.mask, body.square, height, width) for body in self.bodies(picture)]
        if not masks:
            box = letterbox(height, width)
            (mask,) = self._segmentation(cut(picture, box, SEGMENTATION_SIDE, "black"))
            masks = [paste(mask[..., 0], box, height, width)]
        return np.max(masks, axis=0)

    def bodies(self, picture: np.ndarray) -> list[Body]:
        """Everybody found, with all 33 points and a mask."""
        check_picture(picture)
        box = letterbox(*picture.shape[:2])
        boxes, logits = self._detector(cut(picture, box, DETECTOR_SIDE, "black"))
        _, found = merge_detections(
            *decode_detections(boxes, logits, self.threshold, anchors(ANCHOR_LAYERS), DETECTOR_SIDE)
        )
        points = box.to_picture(found[:, 4:].reshape(-1, 4, 2))
        bodies = [self._body(picture, body_square(at[HIPS], at[REACH])) for at in points]
        return distinct([body for body in bodies if body.presence >= PRESENT])

    def _body(self, picture: np.ndarray, square: Square) -> Body:
        raw, presence, mask, heat_maps, _ = self._landmarks(cut(picture, square, LANDMARK_SIDE, "edge"))
        points = decode_landmarks(raw, heat_maps)
        points[:, :2] = square.to_picture(points[:, :2])
        return Body(points, float(presence[0]), expit(mask[..., 0]), square)
