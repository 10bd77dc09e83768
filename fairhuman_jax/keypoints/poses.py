"""Poses of people: the common record, conversions between layouts of points, and places on a canvas."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

_LOG = logging.getLogger(__name__)
Size = tuple[int, int]
JOINTS = 17  # COCO-17: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, left before right
THRESHOLD = 0.05  # of a person's score and of a joint's confidence, when sampling

# Which point of another layout is each of COCO-17's.
COCO17_IN_OPENPOSE18 = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)
COCO17_IN_OPENPOSE25 = (0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11)
COCO17_IN_MEDIAPIPE33 = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
NECK, SHOULDERS = 1, (5, 6)  # OpenPose-18 has a neck, half way between the shoulders of COCO-17


@dataclass(frozen=True, eq=False)
class Pose:
    """One person. keypoints: float32 [17, 3] (x, y, confidence), COCO-17, in pixels, confidence 0 = missing; score:
    how sure the person is, by most estimators the mean confidence; area: of the known points' box, in pixels."""

    keypoints: np.ndarray
    score: float
    area: float


def make_pose(keypoints: np.ndarray, score: float | None = None, area: float | None = None) -> Pose:
    """A pose of points [17, 3]; score: by default their mean confidence; area: by default that of the box of the
    points whose confidence is above 0. Raises: ValueError on another shape and on numbers that are not finite."""
    if np.iscomplexobj(keypoints):
        raise ValueError("key points are complex numbers; expected x, y and confidence")
    with np.errstate(over="ignore"):  # what is too large becomes infinite and is refused below
        keypoints = np.asarray(keypoints, np.float32)
    if keypoints.shape != (JOINTS, 3):
        raise ValueError(f"key points {list(keypoints.shape)}; expected [{JOINTS}, 3]: x, y and confidence")
    score = float(keypoints[:, 2].mean()) if score is None else float(score)
    if not (np.isfinite(keypoints).all() and np.isfinite([score, float(area or 0)]).all()):
        raise ValueError("key points, score or area that are not finite numbers")
    if area is None:
        known = keypoints[keypoints[:, 2] > 0, :2].astype(np.float64)
        area = float(np.ptp(known, axis=0).prod()) if len(known) else 0.0
    return Pose(keypoints, score, float(area))


def to_openpose18(keypoints: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """COCO-17 [17, 3] -> OpenPose-18 [18, 3]; points not above `threshold` get confidence 0.

    The neck is the mean of the shoulders, with the smaller confidence of the two. Source: HumanSD, pose drawing for
    ControlNet and T2I-Adapter.
    """
    keypoints = np.where(keypoints[:, 2:] > threshold, keypoints, keypoints * (1, 1, 0)).astype(np.float32)
    out = np.zeros((18, 3), np.float32)
    out[list(COCO17_IN_OPENPOSE18)] = keypoints
    shoulders = keypoints[list(SHOULDERS)]
    out[NECK] = *shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()
    return out


def rescale(poses: Iterable[Pose], from_size: Size, to_size: Size, keep_aspect: bool = False) -> list[Pose]:
    """Poses of a picture of `from_size` (height, width) on one of `to_size`: x' = x W' / W, y' = y H' / H.

    keep_aspect: both by the smaller of the two factors, and in the middle, so that nobody is stretched.
    Raises: ValueError if a size is not positive.
    """
    if min(*from_size, *to_size) <= 0:
        raise ValueError(f"poses cannot go from {_text(from_size)} to {_text(to_size)} (height x width): not positive")
    source, target = np.array(from_size[::-1], np.float64), np.array(to_size[::-1], np.float64)
    factor = target / source
    factor = np.full(2, factor.min()) if keep_aspect else factor
    offset = (target - source * factor) / 2
    moved = []
    for pose in poses:
        keypoints = pose.keypoints.copy()
        keypoints[:, :2] = keypoints[:, :2] * factor + offset
        moved.append(Pose(keypoints, pose.score, float(pose.area * factor.prod())))
    return moved


def place_poses(
    poses: Sequence[Pose],
    canvas: Size,
    size: Size | None = None,
    threshold: float = THRESHOLD,
    compat: Literal["reference"] | None = None,
) -> list[Pose]:
    """The people to draw on a canvas (height, width): those that score above `threshold`, where they belong on it.

    size: of the picture that the points were found in; they are rescaled to the canvas with its proportions kept.
    None: the points are pixels of the canvas already. compat "reference": never rescaled, never refused, as published.
    Nobody at all is allowed. Raises: ValueError if nobody passes the threshold, or everybody lies outside the canvas.
    """
    kept = [pose for pose in poses if pose.score > threshold]
    if compat == "reference":
        return kept
    if not poses:
        _LOG.warning("no people: the skeleton picture is black")
        return []
    if not kept:
        best = max(pose.score for pose in poses)
        raise ValueError(f"none of {len(poses)} people scores above {threshold:g} (the best {best:.3g}); lower it")
    if size is not None:
        kept = rescale(kept, size, canvas, keep_aspect=True)
    outside = sum(not on_canvas(pose, canvas, threshold) for pose in kept)
    if outside == len(kept):
        reach = np.concatenate([pose.keypoints for pose in kept])
        known = reach[reach[:, 2] > threshold]
        where = f"points reach x = {known[:, 0].max():.0f}, y = {known[:, 1].max():.0f}" if len(known) else "no points"
        raise ValueError(
            f"all {outside} people lie outside the canvas {_text(canvas)} (height x width; {where}); give the size of "
            "the picture in which they were found"
        )
    if outside:
        _LOG.warning("%d of %d people have no joint on the canvas %s", outside, len(kept), _text(canvas))
    return kept


def on_canvas(pose: Pose, canvas: Size, threshold: float = THRESHOLD) -> bool:
    """Whether a joint with confidence above `threshold` lies on the canvas (height, width)."""
    x, y, confidence = pose.keypoints.T
    return bool(np.any((confidence > threshold) & (x >= 0) & (y >= 0) & (x < canvas[1]) & (y < canvas[0])))


def resized_size(size: Size, short_side: int = 512, multiple: int = 64) -> Size:
    """Size (height, width) with the short side brought to `short_side`, both rounded to multiples of `multiple`.

    round(side short_side / (min(size) multiple)) multiple, halves to even. Source: ControlNet's resize_image, used by
    HumanSD: 1737 x 4000 -> 512 x 1152. Raises: ValueError on an empty picture.
    """
    if min(size) < 1:
        raise ValueError(f"a picture of {_text(size)} (height x width) has no pixels")
    height, width = (max(1, round(side * short_side / min(size) / multiple)) * multiple for side in size)
    return height, width


def resize_image(image: np.ndarray, short_side: int = 512, multiple: int = 64) -> np.ndarray:
    """uint8 [H, W, 3] at `resized_size`: Lanczos where it grows, means over areas where it shrinks."""
    size = image.shape[0], image.shape[1]
    height, width = resized_size(size, short_side, multiple)
    if (height, width) == size:
        return image
    grows = short_side > min(size)
    method = Image.Resampling.LANCZOS if grows else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), method))


def _text(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


# Left-right partners within a set of key points. COCO-17: nose, eyes, ears, shoulders, elbows, wrists, hips,
# knees, ankles, left before right. OpenPose-18: nose, neck, right arm, left arm, right leg, left leg, eyes,
# ears.
MIRROR = {
    "coco17": (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15),
    "openpose18": (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16),
    "face5": (1, 0, 2, 4, 3),
    "hand_left": tuple(range(21)),
    "hand_right": tuple(range(21)),
}
