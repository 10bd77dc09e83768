"""OKS, AP and AR, the two forms of CAP, and the number of people."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from fairhuman_jax.evaluate.keypoint_metrics import (
    SIGMAS,
    cap,
    cap_reference,
    keypoint_scores,
    oks,
    people_count_error,
    pose_scores,
    visible_area,
)
from fairhuman_jax.keypoints.poses import Pose, make_pose

pytest.importorskip("pycocotools")


def points(seed: int, low=100.0, high=300.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(low, high, (17, 2)), np.ones(17)]).astype(np.float32)


def person(seed: int, score: float | None = None) -> Pose:
    return make_pose(points(seed), score)


def moved(pose: Pose, similarity: float, score: float = 1.0) -> Pose:
    """The pose with every joint moved to the right so that its OKS is `similarity`."""
    area = visible_area(pose.keypoints)
    far = pose.keypoints.copy()
    far[:, 0] += np.sqrt(-2 * area * math.log(similarity)) * 2 * SIGMAS
    return make_pose(far, score)


def nobody() -> tuple[Pose, ...]:
    return ()


def test_oks_closed_form():
    truth = points(0)
    truth[3:, 2] = 0
    found = truth.copy()
    found[0, 0] += 6.0
    found[1, 1] -= 2.0
    found[5] = 1e6  # not visible in the truth
    terms = [math.exp(-36 / (2 * 900 * 0.052**2)), math.exp(-4 / (2 * 900 * 0.05**2)), 1.0]
    assert oks(truth, found, 900.0) == pytest.approx(sum(terms) / 3)
    with pytest.raises(ValueError, match="needs a visible joint and an area, found 17 joints and 0 pixels"):
        oks(points(0), points(0), 0.0)


@pytest.mark.parametrize(("similarity", "passed"), [(0.99, 10), (0.72, 5), (0.57, 2), (0.4, 0)])
def test_scores_follow_the_thresholds(similarity, passed):
    """Of .50, .55, ..., .95 the thresholds up to the OKS are passed; our `oks` and pycocotools' agree on that."""
    truth = [(person(seed),) for seed in range(3)]
    found = [(moved(pose, similarity),) for (pose,) in truth]
    assert oks(truth[0][0].keypoints, found[0][0].keypoints, visible_area(truth[0][0].keypoints)) == pytest.approx(
        similarity, rel=1e-4
    )
    scores = keypoint_scores(found, truth)
    assert scores["AP"] == pytest.approx(passed / 10) and scores["AR"] == pytest.approx(passed / 10)
    assert scores["AP50"] == pytest.approx(float(passed > 0)) and scores["AP75"] == pytest.approx(float(passed > 5))
    assert scores["AP(L)"] == pytest.approx(passed / 10) and math.isnan(scores["AP(M)"])


def test_own_similarity_goes_through_the_same_protocol():
    rng = np.random.default_rng(0)
    truth = [tuple(person(10 * i + j) for j in range(i % 3)) for i in range(8)]
    found = [
        (*(moved(pose, rng.uniform(0.5, 1.0), rng.uniform()) for pose in people), person(900 + i, 0.3))
        for i, people in enumerate(truth)
    ]

    def same(true: np.ndarray, seen: np.ndarray) -> float:
        return oks(true, seen, visible_area(true))

    ours, theirs = keypoint_scores(found, truth, same), keypoint_scores(found, truth)
    assert 0.2 < theirs["AP"] < 0.9
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-9)


def test_empty_pictures_and_crowds():
    crowd = tuple(person(seed, 1 - seed / 100) for seed in range(30))
    scores = keypoint_scores([nobody(), crowd], [nobody(), crowd])
    assert scores["AP50"] < 1 and scores["AR50"] == pytest.approx(20 / 30), "20 people a picture are looked at"
    missed = keypoint_scores([nobody()], [(person(0),)])
    assert missed["AP"] == 0.0 and missed["AR"] == 0.0
    assert all(math.isnan(value) for value in keypoint_scores([(person(0),)], [nobody()]).values())


def test_areas_count_visible_joints_alone():
    """The published program's placeholders at (-1, -1) make a small person large, and its tolerance wide."""
    truth = points(1, 400.0, 440.0)
    truth[11:] = 0
    x, y = truth[:11, 0], truth[:11, 1]
    assert visible_area(truth) == pytest.approx(np.ptp(x) * np.ptp(y), rel=1e-5)
    assert visible_area(truth, "reference") == pytest.approx((x.max() + 1) * (y.max() + 1), rel=1e-5)
    pose = make_pose(truth)
    found = make_pose(truth + np.array([12, 0, 0], np.float32))
    assert keypoint_scores([(found,)], [(pose,)])["AP"] == 0.0
    lenient = keypoint_scores([(found,)], [(pose,)], compat="reference")
    assert lenient["AP"] > 0.8 and math.isnan(lenient["AP(M)"])


def test_people_without_extent_are_left_out():
    line = points(2)
    line[:, 0] = 50.0
    assert keypoint_scores([(person(1),)], [(person(1), make_pose(line))])["AP"] == pytest.approx(1.0)


def test_the_set_is_measured_whole():
    """A sure mistake in one batch of ten spoils that batch alone under compat, and the whole set otherwise."""
    truth = [(person(seed),) for seed in range(20)]
    found = [(person(seed, 0.5),) for seed in range(20)]
    found[0] = (*found[0], *(person(100 + i, 0.9) for i in range(10)))
    assert keypoint_scores(found, truth)["AP"] == pytest.approx(20 / 30, abs=0.01)
    assert keypoint_scores(found, truth, compat="reference")["AP"] == pytest.approx((0.5 + 1.0) / 2, abs=0.01)


def test_corrected_cap():
    """A perfect detection scores 1 at any place and size; another shape scores less."""
    for seed in range(10):
        truth = points(seed)
        assert cap(truth, truth) == pytest.approx(1.0)
        assert cap(truth, truth * np.array([3, 0.5, 1]) + 7) == pytest.approx(1.0, abs=1e-6)
        for axis in (0, 1):
            other = truth.copy()
            other[:, axis] = points(seed + 50)[:, axis]
            assert cap(truth, other) < 0.97
    unrelated = [cap(points(seed), points(seed + 1)) for seed in range(200)]
    assert np.mean(unrelated) == pytest.approx(0.711, abs=0.03) and np.std(unrelated) == pytest.approx(0.06, abs=0.02)


def test_corrected_cap_of_poses_without_extent():
    line, dot = points(0), points(0)
    line[:, 0] = 5.0
    dot[1:, 2] = 0
    assert cap(line, line) == pytest.approx(1.0)
    assert cap(line, points(1)) < 0.99
    assert cap(points(1), dot * [0, 0, 1]) == 0.0
    assert cap(dot, dot) == 0.0


def test_reference_cap():
    """The published variant scores a perfect detection below 1, and may shuffle y / sigma over the joints."""
    for seed in range(10):
        truth, found = points(seed), points(seed + 50)
        perfect = cap_reference(truth, truth)
        assert 0.8 < perfect < 0.99
        for pose, expected in ((truth, perfect), (found, cap_reference(truth, found))):
            shuffled = pose.astype(np.float64)
            shuffled[:, 1] = SIGMAS * np.random.default_rng(seed).permutation(shuffled[:, 1] / SIGMAS)
            assert cap_reference(truth, shuffled) == pytest.approx(expected, abs=1e-9)
    shifted = truth.copy()
    shifted[:, 0] = points(77)[:, 0]
    assert abs(cap_reference(truth, shifted) - cap_reference(truth, truth)) > 0.01


def test_reference_cap_without_extent_counts_as_a_match():
    dot = points(0)
    dot[1:, 2] = 0
    assert math.isnan(cap_reference(dot, dot))
    scores = keypoint_scores([(person(5),)], [(make_pose(dot),)], cap_reference, "reference")
    assert scores["AP"] == pytest.approx(1.0)


def test_number_of_people():
    unseen = make_pose(points(0) * [1, 1, 0], 0.5)
    truth = [nobody(), (person(0), unseen), (person(1), person(2)), nobody()]
    found = [(person(0),), (person(0),), nobody(), (person(3), person(4))]
    assert people_count_error(found, truth) == pytest.approx((1 + 0 + 2 + 2) / 4)
    # Two pictures have people, so the published program looks at the first two, whichever these are.
    assert people_count_error(found, truth, "reference") == pytest.approx((1 + 0) / 2)


def test_all_of_it():
    truth = [(person(seed),) for seed in range(4)]
    scores = pose_scores(truth, truth)
    assert scores["oks"]["AP"] == scores["cap"]["AP"] == pytest.approx(1.0)
    assert scores["cap_reference"]["AP"] < 1.0
    assert scores["people"] == {"true": 4.0, "found": 4.0, "count_error": 0.0}


def test_refusals(monkeypatch):
    truth = [(person(0),), (person(1),)]
    with pytest.raises(ValueError, match="key points of 1 generated pictures and of 2 true ones"):
        pose_scores(truth[:1], truth)
    with pytest.raises(ValueError, match="no picture at all"):
        keypoint_scores([], [])
    broken = Pose(points(0) * np.nan, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"picture 1 \(found\): key points must be finite \[17, 3\]"):
        keypoint_scores([truth[0], (broken,)], truth)
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(ValueError, match=r"pycocotools is missing; pip install 'fairhuman_jax\[evaluate\]'"):
        keypoint_scores(truth, truth)
