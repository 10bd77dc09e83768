"""MediaPipe's body networks: find people, 33 points and a mask for each, from LiteRT outputs to pixels of the picture.

Source: MediaPipe, modules/pose_detection and modules/pose_landmark (its graphs; BlazePose, arXiv 2006.10204).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.special import expit

from fairhuman_jax.annotate.models import MODELS, LiteModel
from fairhuman_jax.annotate.poses import COCO17_IN_MEDIAPIPE33, Pose, make_pose

ANCHOR_LAYERS = ((28, 2), (14, 2), (7, 6))  # cells a side, anchors a cell: strides 8, 16 and three times 32
DETECTOR_SIDE, LANDMARK_SIDE, SEGMENTATION_SIDE = (
    MODELS[name].side for name in ("pose_detection", "pose_landmark_full", "selfie_segmentation")
)
OVERLAP = 0.3  # from this intersection over union on, two boxes are one person
BODY_SCALE = 2.5  # side of the body's square / distance of key points 0 and 1
HIPS, REACH = 0, 1  # key points of a detection: middle of the hips, end of the circle around the body
LANDMARKS, BODY_POINTS = 39, 33
KERNEL, SURE = 7, 0.5  # window on a heat map, and its least maximum for a point to be moved
SAME = 0.1  # two bodies whose points lie so near each other are one
PRESENT = 0.5  # least probability that a square holds a body


@dataclass(frozen=True)
class Square:
    """A turned square of a picture: centre (x, y) and side in pixels; its up is the picture's up turned clockwise by
    `angle` (radians). Unit coordinates run over it from (0, 0), its top left corner, to (1, 1)."""

    centre: tuple[float, float]
    side: float
    angle: float = 0.0

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """Pixels (x, y) of points [..., 2] in unit coordinates."""
        return (points - 0.5) @ self._turn().T * self.side + self.centre

    def from_picture(self, points: np.ndarray) -> np.ndarray:
        """Unit coordinates of points [..., 2] in pixels."""
        return (points - self.centre) @ self._turn() / self.side + 0.5

    def _turn(self) -> np.ndarray:
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.array([[cos, -sin], [sin, cos]])


def letterbox(height: int, width: int) -> Square:
    """The upright square around a whole picture."""
    return Square((width / 2, height / 2), max(height, width))


def cut(picture: np.ndarray, square: Square, side: int, outside: str) -> np.ndarray:
    """What `square` shows of a picture uint8 [H, W, 3], as float32 [side, side, 3] in [0, 1].

    outside: "black", or "edge" for the nearest pixel of the picture. Bilinear, after box averages where it shrinks.
    """
    factor = max(1, int(square.side / side))
    if factor > 1:
        picture = np.asarray(Image.fromarray(picture).reduce(factor))
    at = square.to_picture(_centres(side, side) / side) / factor
    mode = "grid-constant" if outside == "black" else "nearest"
    return np.stack([_bilinear(picture[..., i], at, mode) for i in range(3)], axis=-1) / 255


def paste(mask: np.ndarray, square: Square, height: int, width: int) -> np.ndarray:
    """A mask [S, S] that covers `square`, on a picture: float32 [height, width, 1], 0 outside the square."""
    at = square.from_picture(_centres(height, width)) * len(mask)
    return _bilinear(mask, at, "grid-constant")[..., None]


def _bilinear(layer: np.ndarray, at: np.ndarray, mode: str) -> np.ndarray:
    """Values float32 [h, w] of a layer [H, W] at points [h, w, 2] (x, y), pixel centres at +.5."""
    return map_coordinates(layer, np.moveaxis(at[..., ::-1], 2, 0) - 0.5, np.float32, order=1, mode=mode)


def _centres(height: int, width: int) -> np.ndarray:
    """Centres (x, y) of all pixels [height, width, 2]."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.stack([columns, rows], axis=-1)


def anchors() -> np.ndarray:
    """Centres (x, y) [2254, 2] of the detector's cells in unit coordinates, row by row, layer after layer."""
    return np.concatenate([np.repeat(_centres(n, n).reshape(-1, 2) / n, per_cell, 0) for n, per_cell in ANCHOR_LAYERS])


def decode_detections(boxes: np.ndarray, logits: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Detections above `threshold`: (scores [N], values [N, 12] in unit coordinates of the detector's input).

    boxes: [2254, 12], centre, width and height of the face and four key points, each (x, y) relative to its anchor, in
    pixels of the input; logits: [2254, 1]. Values: left, top, right, bottom and the key points.
    """
    scores = expit(logits[:, 0].astype(np.float64))
    kept = scores > threshold
    values = boxes[kept].astype(np.float64).reshape(-1, 6, 2) / DETECTOR_SIDE
    centre, half = values[:, 0] + anchors()[kept], values[:, 1] / 2
    points = values[:, 2:] + anchors()[kept, None]
    return scores[kept], np.concatenate([centre - half, centre + half, points.reshape(-1, 8)], axis=1)


def merge_detections(scores: np.ndarray, values: np.ndarray, overlap: float = OVERLAP) -> tuple[np.ndarray, np.ndarray]:
    """Weighted non-maximum suppression: (scores [M], values [M, 12]), best first.

    The best detection takes with it all whose box overlaps its own by more than `overlap` (intersection over union);
    they become their mean, weighted by score, with the best one's score; then the same with those that are left.
    """
    left = np.argsort(-scores, kind="stable")
    found = []
    while len(left):
        same = _overlaps(values[left[0], :4], values[left, :4]) > overlap
        same[0] = True  # a box without area overlaps nothing, not even itself
        group = left[same]
        found.append((scores[left[0]], np.average(values[group], axis=0, weights=scores[group])))
        left = left[~same]
    return np.array([score for score, _ in found]), np.array([value for _, value in found]).reshape(-1, 12)


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union [N] of a box [4] with boxes [N, 4]."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    common = np.maximum(sides, 0).prod(axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - common
    return common / np.maximum(union, 1e-12)


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
    """A `PoseDetector` (annotate/detector.py) of MediaPipe's networks: any number of people, one after the other.

    folder: of the networks, default the cache; threshold: least score of a detection; threads: of LiteRT.
    Errors: those of `LiteModel`; ValueError for what is no picture uint8 [H, W, 3].
    """

    def __init__(self, folder: Path | None = None, threshold: float = 0.5, threads: int | None = None) -> None:
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
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise ValueError(f"a picture is uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
        box = letterbox(*picture.shape[:2])
        boxes, logits = self._detector(cut(picture, box, DETECTOR_SIDE, "black"))
        _, found = merge_detections(*decode_detections(boxes, logits, self.threshold))
        points = box.to_picture(found[:, 4:].reshape(-1, 4, 2))
        bodies = [self._body(picture, body_square(at[HIPS], at[REACH])) for at in points]
        return distinct([body for body in bodies if body.presence >= PRESENT])

    def _body(self, picture: np.ndarray, square: Square) -> Body:
        raw, presence, mask, heat_maps, _ = self._landmarks(cut(picture, square, LANDMARK_SIDE, "edge"))
        points = decode_landmarks(raw, heat_maps)
        points[:, :2] = square.to_picture(points[:, :2])
        return Body(points, float(presence[0]), expit(mask[..., 0]), square)
