"""What MediaPipe's detectors say: boxes with key points at the cells of grids, and those that are one thing merged.

Source: MediaPipe, its calculators for tensors to detections and for non-maximum suppression.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.special import expit

from fairhuman_jax.annotate.squares import cell_centres

LEAST_SCORE = 0.5  # default of every detector: least score of what counts as found
OVERLAP = 0.3  # from this intersection over union on, two boxes are one thing


@functools.cache
def anchors(layers: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Centres (x, y) [A, 2] of a detector's cells in unit coordinates, row by row, layer after layer.

    layers: (cells a side, anchors a cell) of each.
    """
    cells = [np.repeat(cell_centres(n, n).reshape(-1, 2) / n, per_cell, 0) for n, per_cell in layers]
    centres = np.concatenate(cells)
    centres.flags.writeable = False  # one array for all callers
    return centres


def decode_detections(
    boxes: np.ndarray, logits: np.ndarray, threshold: float, centres: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Detections above `threshold`: (scores [N], values [N, 4 + 2K] in unit coordinates of the detector's input).

    boxes: [A, 4 + 2K], centre, width and height of the box and K key points, each (x, y) relative to its anchor, in
    pixels of the input, which has `side` of them; logits: [A, 1]; centres: of the `anchors`. Values: left, top, right,
    bottom and the key points.
    """
    scores = expit(logits[:, 0].astype(np.float64))
    kept = scores > threshold
    values = boxes[kept].astype(np.float64).reshape(-1, boxes.shape[1] // 2, 2) / side
    centre, half = values[:, 0] + centres[kept], values[:, 1] / 2
    points = values[:, 2:] + centres[kept, None]
    return scores[kept], np.concatenate(
        [centre - half, centre + half, points.reshape(len(points), boxes.shape[1] - 4)], axis=1
    )


def merge_detections(scores: np.ndarray, values: np.ndarray, overlap: float = OVERLAP) -> tuple[np.ndarray, np.ndarray]:
    """Weighted non-maximum suppression: (scores [M], values [M, V]), best first.

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
    return np.array([score for score, _ in found]), np.array([value for _, value in found]).reshape(-1, values.shape[1])


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union [N] of a box [4] with boxes [N, 4]."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    common = np.maximum(sides, 0).prod(axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - common
    return common / np.maximum(union, 1e-12)
