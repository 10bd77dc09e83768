"""Layouts of points, where people go on a canvas, and how they are drawn."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from fairhuman_jax.data.people.labels import COCO17, OPENPOSE18
from fairhuman_jax.keypoints.drawing import draw_poses
from fairhuman_jax.keypoints.poses import make_pose, place_poses, rescale, resize_image, resized_size, to_openpose18
from fairhuman_jax.keypoints.skeletons import HUMANSD17, draw_bodies

# The person of the published counts, on 512 x 512, COCO-17.
STANDING = np.array(
    [
        (256, 60), (270, 50), (242, 50), (290, 60), (222, 60), (310, 130), (202, 130), (340, 220), (172, 220),
        (360, 300), (152, 300), (290, 300), (222, 300), (295, 400), (217, 400), (300, 490), (212, 490),
    ],
    np.float32,
)  # fmt: skip
PERSON = np.concatenate([STANDING, np.full((17, 1), 0.9, np.float32)], axis=1)


def people(count):
    return [PERSON + np.float32([40 * i, 3 * i, -0.01 * i]) for i in range(count)]


def test_openpose_points_of_a_person():
    names = [COCO17.index(name) if name in COCO17 else None for name in OPENPOSE18]  # as the people world labels them
    out = to_openpose18(PERSON)
    for point, joint in zip(out, names, strict=True):
        expected = (PERSON[5] + PERSON[6]) / 2 if joint is None else PERSON[joint]
        np.testing.assert_allclose(point, expected)
    weak = PERSON.copy()
    weak[6, 2] = 0.05
    out = to_openpose18(weak, 0.05)
    assert out[1, 2] == out[2, 2] == 0 and (np.delete(out[:, 2], [1, 2]) > 0).all()


def test_sizes_of_the_published_canvas():
    assert resized_size((3072, 2048)) == (768, 512)
    assert resized_size((1737, 4000)) == (512, 1152)
    assert resized_size((720, 1280)) == (512, 896)
    assert resized_size((512, 512)) == (512, 512)
    assert resized_size((3, 3), 8, 64) == (64, 64)
    with pytest.raises(ValueError, match="no pixels"):
        resized_size((0, 5))


def test_pictures_are_resized_without_being_shifted():
    ramp = np.repeat(np.tile(np.arange(0, 200, dtype=np.uint8), (100, 1))[..., None], 3, axis=2)
    shrunk = resize_image(ramp, 50, 10)
    assert shrunk.shape == (50, 100, 3)
    np.testing.assert_allclose(shrunk[25, :, 0], 2 * np.arange(100) + 0.5, atol=0.51)
    grown = resize_image(ramp, 200, 10)
    assert grown.shape == (200, 400, 3)
    np.testing.assert_allclose(grown[100, 10:-10, 0], (np.arange(400)[10:-10] + 0.5) / 2 - 0.5, atol=0.6)
    assert resize_image(ramp, 100, 100) is ramp
    board = np.repeat((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_allclose(resize_image(board, 32, 32), 127.5, atol=1)
    assert len(np.unique(resize_image(board, 128, 64))) > 10


def test_poses_follow_their_picture():
    pose = make_pose(PERSON)
    (moved,) = rescale([pose], (512, 256), (768, 512))
    np.testing.assert_allclose(moved.keypoints, PERSON * (2, 1.5, 1), rtol=1e-6)
    assert moved.area == pytest.approx(3 * pose.area) and moved.score == pose.score
    (kept,) = rescale([pose], (512, 256), (768, 512), keep_aspect=True)
    np.testing.assert_allclose(kept.keypoints, PERSON * (1.5, 1.5, 1) + (64, 0, 0), rtol=1e-6)
    with pytest.raises(ValueError, match="not positive"):
        rescale([pose], (0, 512), (64, 64))


def test_people_on_a_canvas(caplog):
    poses = [make_pose(PERSON, 0.06), make_pose(PERSON, 0.05), make_pose(PERSON + np.float32([600, 400, 0]), 0.5)]
    with caplog.at_level(logging.WARNING):
        placed = place_poses(poses, (512, 512))
    assert placed == [poses[0], poses[2]]  # a score of exactly the threshold is too low
    assert "1 of 2 people have no joint on the canvas 512x512" in caplog.text
    assert len(place_poses(poses * 10, (512, 512))) == 20
    far = place_poses([poses[2]], (512, 512), size=(1024, 2048))
    np.testing.assert_allclose(far[0].keypoints[:, :2], (STANDING + np.float32([600, 400])) / 4 + np.float32([0, 128]))


def test_nobody_on_a_canvas(caplog):
    with caplog.at_level(logging.WARNING):
        assert place_poses([], (512, 512)) == []
    assert "the skeleton picture is black" in caplog.text
    with pytest.raises(ValueError) as error:
        place_poses([make_pose(PERSON, 0.04)], (512, 512))
    assert str(error.value) == "none of 1 people scores above 0.05 (the best 0.04); lower it"
    outside = [make_pose(PERSON + np.float32([588, 386, 0])) for _ in range(3)]
    with pytest.raises(ValueError) as error:
        place_poses(outside, (512, 512))
    assert str(error.value) == (
        "all 3 people lie outside the canvas 512x512 (height x width; points reach x = 948, y = 876); "
        "give the size of the picture in which they were found"
    )
    assert place_poses(outside, (512, 512), compat="reference") == outside
    assert place_poses(outside, (512, 512), size=(876, 1100), compat="reference") == outside


def test_drawing():
    pose = make_pose(PERSON)
    np.testing.assert_array_equal(
        draw_poses([pose], (512, 512)), draw_bodies(np.zeros((512, 512, 3), np.uint8), [PERSON], HUMANSD17)
    )
    assert draw_poses([pose], (512, 512)).any(axis=-1).sum() == 14_116  # OpenCV's count of the published rules
    assert draw_poses([], (64, 96)).shape == (64, 96, 3) and not draw_poses([], (64, 96)).any()
    many = draw_poses([make_pose(points) for points in people(30)], (512, 512))
    assert many.any(axis=-1).sum() > 20 * 512
    weak = make_pose(PERSON * np.float32([1, 1, 0.05]))
    assert not draw_poses([weak], (512, 512)).any()
    assert draw_poses([weak], (512, 512), threshold=0.02).any(axis=-1).sum() == 14_116
    assert not draw_poses([make_pose(PERSON + np.float32([600, 0, 0]))], (512, 512)).any()


def test_limbs_grow_with_the_canvas_unless_as_published():
    (large,) = rescale([make_pose(PERSON)], (512, 512), (1024, 1024))
    wide, thin = (draw_poses([large], (1024, 1024), compat=compat).any(axis=-1) for compat in (None, "reference"))
    assert wide[800].sum() > 1.8 * thin[800].sum() > 0


def test_drawing_for_other_models():
    picture = draw_poses([make_pose(PERSON)], (512, 512), "openpose")
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert (255, 85, 0) in colours  # the neck's disc
    assert not draw_poses([make_pose(PERSON * np.float32([1, 1, 0.05]))], (512, 512), "openpose").any()
    with pytest.raises(ValueError, match=r"no skeleton style 'stick'; there are"):
        draw_poses([], (8, 8), "stick")
