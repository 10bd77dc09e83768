"""Whether people are where they should be: pose AP and AR by OKS or by a cosine (CAP), and the error of their number.

Poses are COCO-17 key points in pixels of one picture size; a joint of the truth is visible where its confidence is
above 0. Source: HumanSD (Ju et al. 2023), section 5.1; utils/metrics/{pose_metrics,coco_similarity}.py.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from fairhuman_jax.keypoints.poses import JOINTS, Pose

# Spread of COCO's annotators by joint, relative to the root of a person's area.
SIGMAS = np.array(
    [
        0.026,
        0.025,
        0.025,
        0.035,
        0.035,
        0.079,
        0.079,
        0.072,
        0.072,
        0.062,
        0.062,
        0.107,
        0.107,
        0.087,
        0.087,
        0.089,
        0.089,
    ]
)
MISSING = -1.0  # where HumanSD's data put the joints that are not there
REFERENCE_BATCH = 10
STATISTICS = ("AP", "AP50", "AP75", "AP(M)", "AP(L)", "AR", "AR50", "AR75", "AR(M)", "AR(L)")

Compat = Literal["reference"] | None
Similarity = Callable[[np.ndarray, np.ndarray], float]
People = Sequence[Pose]


def oks(truth: np.ndarray, found: np.ndarray, area: float) -> float:
    """Object key point similarity in 0..1 of two people [17, 3]; area: of the true one, in pixels.

    Mean over the visible joints of exp(-d^2 / (2 area (2 sigma)^2)). Raises: ValueError for no visible joint, or no
    area.
    """
    visible = truth[:, 2] > 0
    if not visible.any() or area <= 0:
        raise ValueError(f"OKS: needs a visible joint and an area, found {visible.sum()} joints and {area:g} pixels")
    squared = np.square(truth[:, :2].astype(np.float64) - found[:, :2]).sum(1)
    return float(np.exp(-squared / (2.0 * area * np.square(2.0 * SIGMAS)))[visible].mean())


def cap(truth: np.ndarray, found: np.ndarray) -> float:
    """Cosine similarity in 0..1 of the shapes of two people [17, 3], whatever their place and size.

    Over the joints visible in the truth, x and y of each person are brought to 0..1, made unit vectors, and compared
    by the mean of the two cosines. An axis without extent in the truth says nothing and is left out; 0 if both are.
    Unrelated poses score .7 on average, so differences count and not values. HumanSD, without what `cap_reference`
    has wrong.
    """
    visible = truth[:, 2] > 0
    cosines = []
    for axis in (0, 1):
        wanted, seen = (_unit_range(points[visible, axis].astype(np.float64)) for points in (truth, found))
        if wanted.any():
            norm = np.linalg.norm(wanted) * np.linalg.norm(seen)
            cosines.append(wanted @ seen / norm if norm else 0.0)
    return float(np.mean(cosines)) if cosines else 0.0


def _unit_range(values: np.ndarray) -> np.ndarray:
    extent = np.ptp(values) if len(values) else 0.0
    return (values - values.min()) / extent if extent else np.zeros_like(values)


def cap_reference(truth: np.ndarray, found: np.ndarray) -> float:
    """HumanSD's similarity as its program computes it, which is no evidence; NaN for a truth without extent.

    Coordinates are divided by the joints' sigma first, so that the pattern of sigma dominates; the vector of the found
    y is that of x divided by the norm of y, so y counts by its norm alone. A perfect detection gets about .94.
    Source: utils/metrics/coco_similarity.py.
    """
    visible = truth[:, 2] > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y, found_x, found_y = (
            _stretched(points[visible, axis] / SIGMAS[visible]) for points in (truth, found) for axis in (0, 1)
        )
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        found_x = found_x / np.linalg.norm(found_x)
        wanted, seen = np.concatenate([x, y]), np.concatenate([found_x, found_x / np.linalg.norm(found_y)])
        return float(wanted @ seen / (np.linalg.norm(wanted) * np.linalg.norm(seen)))


def _stretched(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / np.ptp(values)


def visible_area(keypoints: np.ndarray, compat: Compat = None) -> float:
    """Area in pixels of the box around a person's visible joints [17, 3].

    compat "reference": around all joints, those that are not visible at (-1, -1), which makes areas larger and OKS
    lenient.
    """
    visible = keypoints[:, 2] > 0
    places = np.where(visible[:, None], keypoints[:, :2], MISSING) if compat else keypoints[visible, :2]
    return float(np.ptp(places.astype(np.float64), axis=0).prod()) if len(places) else 0.0


def keypoint_scores(
    found: Sequence[People], truth: Sequence[People], similarity: Similarity | None = None, compat: Compat = None
) -> dict[str, float]:
    """`STATISTICS` of a set of pictures: precision and recall by the protocol of COCO, 0..1, NaN where undefined.

    found, truth: people by picture. similarity: None for OKS, or `cap`, `cap_reference`. Thresholds .50 to .95, at
    most 20 people a picture, those found taken by score; medium: 32^2 to 96^2 pixels of area, large: above.
    True people whose visible joints span no area cannot be compared and are left out.
    compat "reference": means over batches of 10 pictures, and the areas of `visible_area` under it.
    Raises: ValueError for sets of different sizes; numbers that are not finite; pycocotools is not installed.
    """
    _check(found, truth)
    if not compat:
        return _set_scores(found, truth, similarity, compat)
    starts = range(0, len(truth), REFERENCE_BATCH)
    ends = [slice(start, start + REFERENCE_BATCH) for start in starts]
    rows = [_set_scores(found[part], truth[part], similarity, compat) for part in ends]
    return {name: _mean([row[name] for row in rows]) for name in STATISTICS}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _set_scores(
    found: Sequence[People], truth: Sequence[People], similarity: Similarity | None, compat: Compat
) -> dict[str, float]:
    evaluation = _package("pycocotools.cocoeval").COCOeval

    class Evaluation(evaluation):
        def computeOks(self, imgId: int, catId: int) -> Any:
            """The table [found, true] of one picture."""
            if similarity is None:
                return super().computeOks(imgId, catId)
            true, seen = self._gts[imgId, catId], self._dts[imgId, catId]
            order = np.argsort([-person["score"] for person in seen], kind="mergesort")
            kept = [seen[i] for i in order[: self.params.maxDets[-1]]]
            pairs = [[similarity(_points(person), _points(other)) for person in true] for other in kept]
            return np.array(pairs) if true and kept else []

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it returns
        measured = Evaluation(_as_coco(truth, True, compat), _as_coco(found, False, compat), "keypoints")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    values = [float("nan") if value < 0 else float(value) for value in measured.stats]
    return dict(zip(STATISTICS, values, strict=True))


def _points(annotation: dict[str, Any]) -> np.ndarray:
    return np.asarray(annotation["keypoints"]).reshape(JOINTS, 3)


def _as_coco(pictures: Sequence[People], truth: bool, compat: Compat) -> Any:
    """pycocotools' own record of people; found ones have the area of all their joints, as it gives them."""
    people = []
    for number, poses in enumerate(pictures):
        for pose in poses:
            points = pose.keypoints.astype(np.float64)
            places = points[:, :2] if not truth else points[points[:, 2] > 0, :2]
            area = visible_area(points, compat) if truth else float(np.ptp(places, axis=0).prod())
            if truth and (not len(places) or area <= 0):
                continue
            low, high = places.min(0), places.max(0)
            record = {"id": len(people) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, "score": pose.score}
            record |= {"keypoints": points.ravel().tolist(), "num_keypoints": len(places), "area": area}
            people.append(record | {"bbox": [*low, *(high - low)]})
    held = _package("pycocotools.coco").COCO()
    held.dataset = {
        "images": [{"id": number} for number in range(len(pictures))],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": people,
    }
    held.createIndex()
    return held


def people_count_error(found: Sequence[People], truth: Sequence[People], compat: Compat = None) -> float:
    """Mean over pictures of | number of true people - number of people found |; a true one has a visible joint.

    compat "reference": in each batch of 10, over the first n pictures where n is the number of those with a true
    person, wherever these are; a mean over batches.
    """
    _check(found, truth)
    numbers = [sum(bool((pose.keypoints[:, 2] > 0).any()) for pose in people) for people in truth]
    errors = [abs(number - len(people)) for number, people in zip(numbers, found, strict=True)]
    if not compat:
        return _mean(errors)
    means = []
    for start in range(0, len(errors), REFERENCE_BATCH):
        part = slice(start, start + REFERENCE_BATCH)
        means.append(_mean(errors[part][: np.count_nonzero(numbers[part])]))
    return _mean(means)


def pose_scores(found: Sequence[People], truth: Sequence[People], compat: Compat = None) -> dict[str, dict[str, float]]:
    """All of this module for one set: {"oks": ..., "cap": ..., "cap_reference": ...} by `keypoint_scores`, and
    {"people": {"true", "found", "count_error"}}. Raises: ValueError, as `keypoint_scores`."""
    similarities: dict[str, Similarity | None] = {"oks": None, "cap": cap, "cap_reference": cap_reference}
    scores = {name: keypoint_scores(found, truth, measure, compat) for name, measure in similarities.items()}
    people = {name: float(sum(map(len, side))) for name, side in (("true", truth), ("found", found))}
    return scores | {"people": people | {"count_error": people_count_error(found, truth, compat)}}


def _check(found: Sequence[People], truth: Sequence[People]) -> None:
    if len(found) != len(truth):
        raise ValueError(f"key points of {len(found)} generated pictures and of {len(truth)} true ones; needs as many")
    if not truth:
        raise ValueError("key points of no picture at all")
    for side, pictures in (("found", found), ("true", truth)):
        for number, poses in enumerate(pictures):
            for pose in poses:
                if pose.keypoints.shape != (JOINTS, 3) or not np.isfinite([*pose.keypoints.ravel(), pose.score]).all():
                    shape = list(pose.keypoints.shape)
                    raise ValueError(
                        f"picture {number} ({side}): key points must be finite [{JOINTS}, 3], found {shape} or NaN"
                    )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError("pose metrics: pycocotools is missing; pip install 'fairhuman_jax[evaluate]'") from error
