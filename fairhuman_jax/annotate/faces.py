"""MediaPipe's face networks: find faces, five points of each.

Source: MediaPipe, modules/face_detection and modules/face_landmark (its graphs; BlazeFace, arXiv 1907.05047; face mesh,
arXiv 1907.06724).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit

from fairhuman_jax.annotate.boxes import LEAST_SCORE, anchors, decode_detections, merge_detections
from fairhuman_jax.annotate.models import MODELS, LiteModel
from fairhuman_jax.annotate.squares import Square, check_picture, cut, letterbox

# (cells a side, anchors a cell): strides 8 and three times 16 for near faces, 4 for far ones.
DETECTORS = {
    "face_detection_short_range": ((16, 2), (8, 6)),
    "face_detection_full_range_sparse": ((48, 1),),
}
RIGHT_EYE, LEFT_EYE = 0, 1  # key points of a detection
FACE_SCALE = 1.5  # side of the face's square / longer side of its box
# Corners of each eye, tip of the nose, and each end of the mouth among the 468 points, the person's right side first.
FIVE = ((33, 133), (362, 263), (1,), (61,), (291,))
PRESENT = 0.5  # least probability that a square holds a face


@dataclass(frozen=True, eq=False)
class Face:
    """A face in pixels of the picture: `box` [4] (left, top, right, bottom) and `points` [5, 2] (x, y): the person's
    right and left eye, tip of the nose, right and left end of the mouth; `score`: of the detection."""

    box: np.ndarray
    points: np.ndarray
    score: float

    @property
    def area(self) -> float:
        """Of the box."""
        return float(np.prod(self.box[2:] - self.box[:2]))


def face_square(box: np.ndarray, right_eye: np.ndarray, left_eye: np.ndarray) -> Square:
    """The square of a face around its box [4], turned so that the eyes are level."""
    x, y = (left_eye - right_eye).tolist()
    (left, top), (right, bottom) = box[:2].tolist(), box[2:].tolist()
    centre = ((left + right) / 2, (top + bottom) / 2)
    return Square(centre, FACE_SCALE * max(right - left, bottom - top), math.atan2(y, x))


def five_points(mesh: np.ndarray) -> np.ndarray:
    """Eyes, nose and ends of the mouth [5, 2] of a face's 468 points [468, 3]; an eye is the middle of its corners."""
    return np.stack([mesh[list(group), :2].mean(axis=0) for group in FIVE])


class MediaPipeFaces:
    """Finds the faces on a picture uint8 [H, W, 3] of any size, near and far ones.

    folder: of the networks, default the cache; threshold: least score of a detection; threads: of LiteRT.
    Raises: as `LiteModel`; ValueError for what is no such picture.
    """

    def __init__(self, folder: Path | None = None, threshold: float = LEAST_SCORE, threads: int | None = None) -> None:
        self.threshold = threshold
        self._detectors = {name: LiteModel(name, folder, threads) for name in DETECTORS}
        self._mesh = LiteModel("face_landmark", folder, threads)

    def detect(self, picture: np.ndarray) -> list[Face]:
        """Every face found, the largest first; none for a picture without."""
        check_picture(picture)
        whole = letterbox(*picture.shape[:2])
        seen = [self._decoded(name, picture, whole) for name in DETECTORS]
        all_scores, all_values = (np.concatenate(part) for part in zip(*seen, strict=True))
        scores, values = merge_detections(all_scores, all_values)
        corners = whole.to_picture(values.reshape(len(values), values.shape[1] // 2, 2))
        found = [self._face(picture, at, float(score)) for at, score in zip(corners, scores, strict=True)]
        return sorted((face for face in found if face is not None), key=lambda face: -face.area)

    def _decoded(self, name: str, picture: np.ndarray, whole: Square) -> tuple[np.ndarray, np.ndarray]:
        side = MODELS[name].side
        boxes, logits = self._detectors[name](cut(picture, whole, side, "black"))
        return decode_detections(boxes, logits, self.threshold, anchors(DETECTORS[name]), side)

    def _face(self, picture: np.ndarray, at: np.ndarray, score: float) -> Face | None:
        """The face of a detection [8, 2] in pixels: two corners and six key points; None where the mesh sees none."""
        box, points = at[:2].ravel(), at[2:]
        square, side = face_square(box, points[RIGHT_EYE], points[LEFT_EYE]), MODELS["face_landmark"].side
        mesh, present = self._mesh(cut(picture, square, side, "edge"))
        if expit(present.item()) < PRESENT:
            return None
        return Face(box, square.to_picture(five_points(mesh.reshape(-1, 3)) / side), score)
