"""MediaPipe's networks: what surrounds them on made-up tensors; with `-m network`, they themselves on photographs."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.annotate import __main__ as door
from fairhuman_jax.annotate import mediapipe as mp
from fairhuman_jax.annotate.boxes import anchors, decode_detections, merge_detections
from fairhuman_jax.annotate.models import MODELS, LiteModel, fetch_models, model_path
from fairhuman_jax.annotate.squares import Square, cut, letterbox, paste
from fairhuman_jax.keypoints.readers import read_poses
from fairhuman_jax.packages import holds

TURNED = Square((31.5, 20.25), 24.0, 0.7)
RNG = np.random.default_rng(0)


def decoded(boxes: np.ndarray, logits: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the detector of people."""
    return decode_detections(boxes, logits, threshold, anchors(mp.ANCHOR_LAYERS), mp.DETECTOR_SIDE)


def ramp(height: int, width: int) -> np.ndarray:
    """A smooth picture uint8 [H, W, 3]: x, y and their mean, in the picture's own pixels."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([3 * x, 4 * y, 1.5 * x + 2 * y], axis=-1).astype(np.uint8)


def test_square_maps_to_the_picture_and_back():
    points = RNG.uniform(-5, 70, (7, 2))
    assert np.allclose(TURNED.to_picture(TURNED.from_picture(points)), points, atol=1e-10)
    top, corner = TURNED.to_picture(np.array([[0.5, 0.0], [0.0, 0.0]]))
    assert np.allclose(top, (31.5 + 12 * math.sin(0.7), 20.25 - 12 * math.cos(0.7))), "up is turned clockwise"
    assert np.isclose(np.hypot(*(corner - TURNED.centre)), 12 * math.sqrt(2))


def test_letterbox_shows_the_whole_picture_between_black_bars():
    picture = ramp(20, 40)
    box = letterbox(20, 40)
    shown = cut(picture, box, 40, "black")
    assert np.allclose(255 * shown[10:30], picture, atol=1e-3) and not shown[:10].any() and not shown[30:].any()
    assert np.allclose(cut(picture, box, 40, "edge")[0] * 255, picture[0], atol=1e-3)
    corners = np.array([[0, 0], [40, 20], [0, 20]])
    assert np.allclose(box.from_picture(corners), [[0, 0.25], [1, 0.75], [0, 0.75]])


def test_cut_turns_and_averages_where_it_shrinks():
    picture = ramp(32, 32)
    quarter = Square((16, 16), 32, math.pi / 2)  # its up is the picture's right
    assert np.allclose(255 * cut(picture, quarter, 32, "edge"), np.rot90(picture), atol=1e-3)
    checks = np.kron(np.indices((32, 32)).sum(0) % 2 * 255, np.ones((2, 2)))[..., None].repeat(3, -1).astype(np.uint8)
    small = cut(checks, letterbox(64, 64), 16, "edge")
    assert np.abs(small - 0.5).max() < 0.01, "point samples of a checkerboard are black or white"


def test_paste_undoes_cut():
    y, x = np.mgrid[:48, :64] + 0.5
    blob = np.exp(-((x - 33) ** 2 + (y - 19) ** 2) / 30)
    seen = cut((255 * blob[..., None].repeat(3, -1)).astype(np.uint8), TURNED, 96, "black")[..., 0]
    back = paste(seen, TURNED, 48, 64)
    assert back.shape == (48, 64, 1) and back.dtype == np.float32
    inside = (np.abs(TURNED.from_picture(np.stack([x, y], -1)) - 0.5) < 0.45).all(-1)
    assert inside.sum() > 400 and np.abs(back[..., 0] - blob)[inside].max() < 0.03
    assert not back[:, :8].any() and not back[40:].any()


def test_anchors_are_2254_cell_centres():
    centres = anchors(mp.ANCHOR_LAYERS)
    assert centres.shape == (2254, 2) and (centres > 0).all() and (centres < 1).all()
    assert np.allclose(centres[:4] * 28, [[0.5, 0.5], [0.5, 0.5], [1.5, 0.5], [1.5, 0.5]])
    assert np.allclose(centres[1568:1570] * 14, 0.5) and np.allclose(centres[-6:] * 7, 6.5)


def test_decode_detections_reads_offsets_in_pixels_of_the_input():
    boxes, logits = np.zeros((2254, 12), np.float32), np.full((2254, 1), -9.0, np.float32)
    boxes[1] = (22.4, 0, 44.8, 22.4, 0, 56, 0, -56, 11.2, 0, 0, 0)
    logits[1], logits[5] = math.log(3), -0.1
    scores, values = decoded(boxes, logits, 0.5)
    at = 0.5 / 28
    expected = [at, at - 0.05, at + 0.2, at + 0.05, at, at + 0.25, at, at - 0.25, at + 0.05, at, at, at]
    assert np.allclose(scores, [0.75]) and np.allclose(values, [expected], atol=1e-6)
    assert len(decoded(boxes, logits, 0.4)[0]) == 2
    scores, values = merge_detections(*decoded(boxes, logits, 0.9))
    assert scores.shape == (0,) and values.shape == (0, 12)


def test_merge_weighs_one_persons_boxes_by_score_and_keeps_others():
    near, nearer, far = (np.r_[x, 0, x + 1.0, 1, np.full(8, x)] for x in (0.0, 0.2, 3.0))
    chain = np.r_[0.6, 0, 1.6, 1, np.full(8, 0.6)]  # overlaps `nearer` by 0.43, but not the best one by 0.3
    scores, values = merge_detections(np.array([0.6, 0.7, 0.8, 0.5]), np.array([nearer, far, near, chain]))
    assert scores.tolist() == [0.8, 0.7, 0.5]
    assert np.allclose(values[0], (0.8 * near + 0.6 * nearer) / 1.4)
    assert np.allclose(values[1:], [far, chain])


def test_body_square_has_the_hips_in_its_middle_and_the_head_above():
    for angle in (0.0, 0.5, math.pi / 2, 3.0, -2.0):
        hips = np.array([100.0, 80.0])
        reach = hips + 20 * np.array([math.sin(angle), -math.cos(angle)])
        square = mp.body_square(hips, reach)
        assert math.isclose(square.side, 50) and np.allclose(
            square.from_picture(np.stack([hips, reach])), [[0.5, 0.5], [0.5, 0.1]]
        )


def landmark_tensors() -> tuple[np.ndarray, np.ndarray]:
    raw = np.zeros((39, 5), np.float32)
    raw[:, :2], raw[:, 3], raw[:, 4] = 128, math.log(3), math.log(4)
    return raw, np.full((64, 64, 39), -20, np.float32)


def test_landmarks_move_to_sure_heat_nearby_only():
    raw, heat = landmark_tensors()
    heat[33, 30, 1] = heat[33, 31, 1] = 3  # within three cells of (32, 32)
    heat[32, 33, 2] = -0.5  # not sure
    heat[32, 36, 3] = 3  # too far
    raw[4, :2] = -40  # outside its square
    heat[0, 0, 4] = 3
    points = mp.decode_landmarks(raw.ravel(), heat)
    assert points.shape == (33, 4)
    assert np.allclose(points[1, :2] * 64, (30.5, 33), atol=1e-3)
    assert np.allclose(points[[0, 2, 3], :2], 0.5) and np.allclose(points[4, :2], -40 / 256)
    assert np.allclose(points[:, 2], 0.75) and np.allclose(points[:, 3], 0.8)


def test_landmarks_at_the_border_use_what_there_is_of_the_window():
    raw, heat = landmark_tensors()
    raw[0, :2], raw[1, :2] = (1, 255), (255, 1)
    heat[63, 1, 0] = heat[1, 63, 1] = 3
    points = mp.decode_landmarks(raw.ravel(), heat)
    assert np.allclose(points[:2, :2] * 64, [[1, 63], [63, 1]], atol=1e-3)


def test_coco_pose_orders_points_and_drops_those_outside():
    points = np.stack([np.arange(33) + 0.5, np.full(33, 7.0), np.full(33, 0.9), np.ones(33)], axis=1)
    pose = mp.coco_pose(points, 8, 24)
    order = [0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28]
    assert np.array_equal(pose.keypoints[:, 0], np.array(order) + 0.5)
    assert np.allclose(pose.keypoints[:, 2], [0.9] * 12 + [0.0] * 5)
    assert not mp.coco_pose(points, 7, 24).keypoints[:, 2].any()


def test_distinct_drops_a_second_body_in_the_same_place():
    points = RNG.uniform(0, 100, (33, 4))
    first = mp.Body(points, 0.9, np.zeros((4, 4)), Square((50, 50), 100))
    again, other = replace(first, points=points + 6), replace(first, points=points + 30)
    half = np.where(np.arange(33)[:, None] < 20, points + 2, points + 60)
    assert mp.distinct([first, again, other, replace(first, points=half)]) == [first, other]


def test_networks_that_are_missing_or_others_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"pose_detection\.tflite does not exist; .*fairhuman_jax\.annotate fetch"
    ):
        model_path("pose_detection", tmp_path)
    (tmp_path / "pose_detection.tflite").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not pose_detection of mediapipe==0\.10\.21 .*sha256 differs"):
        model_path("pose_detection", tmp_path)


def test_without_litert_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ValueError, match=r"pip install 'fairhuman_jax\[annotate\]'"):
        LiteModel("pose_detection", tmp_path)


def test_door_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path))
    for pictures, message in ((["a.png"], "fetch it once with"), (["a.png", "b/a.jpg"], "two pictures are named a")):
        with pytest.raises(SystemExit) as stopped:
            door.main(["pose", *pictures, "--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> mp.MediaPipePoses:
    folder = tmp_path_factory.mktemp("models")
    fetch_models(folder)
    assert all(holds(model_path(name, folder), model.sha256) for name, model in MODELS.items())
    return mp.MediaPipePoses(folder)


@pytest.mark.network
def test_portraits(detector, photographs):
    for portrait, photo in photographs.values():
        (pose,) = detector.detect(photo)
        left, top, right, bottom = portrait.faces[0]
        x, y, confidence = pose.keypoints.T
        head = slice(0, 3)
        assert ((x > left) & (x < right) & (y > top) & (y < bottom) & (confidence > 0.9))[head].all()
        assert x[5] > x[0] > x[6], "the left shoulder is on the right of the picture"
        mask = detector.person_mask(photo)[..., 0] > 0.5
        assert mask[int((top + bottom) / 2), int((left + right) / 2)] and 0.2 < mask.mean() < 0.8
        assert not mask[: top // 2, :20].any()


@pytest.mark.network
def test_rendered_people_at_64_pixels(detector):
    from fairhuman_jax.data.people import PeopleDataset

    people = PeopleDataset(64, 12, seed=5, framing="upper body")
    errors, overlaps = [], []
    for i in range(12):
        sample = people[i]
        known = sample["keypoints"]["coco17"]
        poses, mask = detector.detect(sample["image"]), detector.person_mask(sample["image"]) > 0.5
        truth = sample["person_mask"] > 0
        overlaps.append((mask & truth).sum() / (mask | truth).sum())
        errors += [np.hypot(*(poses[0].keypoints - known)[known[:, 2] > 0, :2].T)] if poses else []
    assert len(errors) >= 10 and np.median(np.concatenate(errors)) < 2.5 and np.median(overlaps) > 0.9


@pytest.mark.network
def test_door_writes_what_the_readers_read(detector, tmp_path):
    from fairhuman_jax.data.people import PeopleDataset

    picture = PeopleDataset(96, 1, seed=5, framing="upper body")[0]["image"]
    Image.fromarray(picture).save(tmp_path / "one.png")
    poses, entry = door.annotate_picture(detector, tmp_path / "one.png", tmp_path / "out", draw=True)
    found = read_poses(tmp_path / "out" / "one.npz")
    assert found.size == (96, 96) and np.array_equal(found.poses[0].keypoints, poses[0].keypoints)
    assert np.array(Image.open(tmp_path / "out" / "one_pose.png")).any()
    rows = [door.coco_row(pose, 1, i) for i, pose in enumerate(poses, 1)]
    (tmp_path / "k.json").write_text(json.dumps({"images": [{"id": 1} | entry], "annotations": rows}))
    again = read_poses(Path(tmp_path / "k.json"))
    assert again.size == (96, 96) and np.allclose(again.poses[0].keypoints, poses[0].keypoints, atol=1e-3)
