"""MediaPipe's face networks: geometry on made-up tensors; with `-m network`, they themselves on photographs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fairhuman_jax.annotate.boxes import anchors, decode_detections
from fairhuman_jax.annotate.faces import DETECTORS, MediaPipeFaces, face_square, five_points
from fairhuman_jax.annotate.models import MODELS, fetch_models

COUNTS = {"face_detection_short_range": 896, "face_detection_full_range_sparse": 2304}


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_lie_at_the_cells_of_their_network(name):
    centres, side = anchors(DETECTORS[name]), MODELS[name].side
    assert len(centres) == COUNTS[name]
    boxes, logits = np.zeros((len(centres), 16)), np.full((len(centres), 1), -9.0)
    boxes[7, :4], boxes[7, 4:6], logits[7] = (0, 0, side / 2, side / 4), (side / 8, 0), 3.0
    scores, values = decode_detections(boxes, logits, 0.5, centres, side)
    x, y = centres[7]
    assert scores.shape == (1,) and values.shape == (1, 16)
    np.testing.assert_allclose(values[0, :6], [x - 0.25, y - 0.125, x + 0.25, y + 0.125, x + 0.125, y])


@pytest.mark.parametrize("angle", [0.0, 0.4, -1.0])
def test_eyes_are_level_in_the_square_of_a_face(angle):
    turn = 10 * np.array([math.cos(angle), math.sin(angle)])
    square = face_square(np.array([30.0, 20.0, 70.0, 50.0]), 50 - turn, 50 + turn)
    assert square.centre == (50, 35) and square.side == pytest.approx(60)
    (first, second) = square.from_picture(np.stack([50 - turn, 50 + turn]))
    assert first[1] == pytest.approx(second[1]) and first[0] < second[0]


def test_five_points_of_the_mesh():
    mesh = np.zeros((468, 3))
    mesh[[33, 133], 0], mesh[[362, 263], 1], mesh[1, 0], mesh[61, 0], mesh[291, 1] = (2, 4), (6, 8), 5, 7, 9
    assert five_points(mesh).tolist() == [[3, 0], [0, 7], [5, 0], [7, 0], [0, 9]]


@pytest.mark.network
def test_faces_of_photographs(photographs):
    fetch_models()
    faces = MediaPipeFaces()
    for portrait, picture in photographs.values():
        found = faces.detect(picture)
        assert len(found) == 1
        left, top, right, bottom = portrait.faces[0]
        eyes, nose, mouth = found[0].points[:2], found[0].points[2], found[0].points[3:]
        assert ((found[0].points > (left, top)) & (found[0].points < (right, bottom))).all()
        assert eyes[:, 1].max() < nose[1] < mouth[:, 1].min()
        assert eyes[0, 0] < nose[0] < eyes[1, 0], "the person's right eye is on the left of the picture"
        small = faces.detect(picture[::2, ::2])
        np.testing.assert_allclose(2 * small[0].points, found[0].points, atol=0.05 * (right - left))
    assert faces.detect(np.zeros((40, 60, 3), np.uint8)) == []
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float32"):
        faces.detect(np.zeros((40, 60, 3), np.float32))
