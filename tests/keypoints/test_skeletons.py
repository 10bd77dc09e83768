"""Control images: counts measured with OpenCV 5.0.0 on the published drawing rules, layers, missing and far points."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_people import COCO

from fairhuman_jax.keypoints.skeletons import (
    HAND_BONES,
    HUMANSD17,
    OPENPOSE18,
    control_image,
    draw_bodies,
    draw_hand,
    relative_depth,
)

BODY = np.stack([COCO[0], (COCO[5] + COCO[6]) / 2, *COCO[[6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]]])
FINGERS = ((-0.8, 0.5, 25), (-0.35, 1, 38), (0, 1, 42), (0.3, 1, 38), (0.6, 0.9, 30))
HAND = np.array([(130, 220), *((130 + x * k * s, 220 - y * k * s) for x, y, s in FINGERS for k in (1, 2, 3, 4))])


def black(height=512, width=512):
    return np.zeros((height, width, 3), np.uint8)


def drawn(picture):
    return int(picture.any(axis=-1).sum())


def confident(points, confidence=1.0):
    return np.concatenate([points, np.full((len(points), 1), confidence)], axis=1)


def test_humansd_skeleton_is_opencvs_to_the_pixel():
    picture = draw_bodies(black(), [confident(COCO)], HUMANSD17)
    assert drawn(picture) == 14_116
    assert picture.sum(axis=(0, 1)).tolist() == [1_907_389, 1_964_419, 2_527_018]
    probes = {
        (60, 256): (219, 144, 86),
        (130, 310): (86, 111, 219),
        (130, 202): (111, 86, 219),
        (300, 290): (160, 86, 219),
        (490, 300): (219, 86, 178),
    }
    assert {at: tuple(picture[at].tolist()) for at in probes} == probes
    assert HUMANSD17.limb_colours[0] == (219, 94, 86) and HUMANSD17.limb_colours[15] == (219, 86, 128)


def test_humansd_threshold_is_exclusive():
    people = confident(COCO)
    people[9, 2] = 0.05
    without = draw_bodies(black(), [people], HUMANSD17)
    people[9, 2] = 0.0501
    assert drawn(without) < drawn(draw_bodies(black(), [people], HUMANSD17)) == 14_116
    assert not without[300, 360].any()


def test_openpose_skeleton_is_opencvs_within_a_fifth_of_a_percent():
    one = control_image((512, 512), [BODY], scale=1.0)
    assert abs(drawn(one) / 10_244 - 1) < 2e-3
    np.testing.assert_allclose(one.sum(axis=(0, 1)), [570_639, 1_170_552, 744_906], rtol=3e-3)
    two = control_image((512, 512), [BODY, BODY + np.array([40.3, -12.7])], scale=1.0)
    assert abs(drawn(two) / 20_071 - 1) < 2e-3
    np.testing.assert_allclose(two.sum(axis=(0, 1)), [1_109_148, 2_306_730, 1_486_905], rtol=3e-3)


def test_limbs_are_dimmed_and_joints_are_not():
    picture = control_image((512, 512), [BODY], scale=1.0)
    right_forearm = (BODY[3] + BODY[4]) / 2
    assert picture[int(right_forearm[1]), int(right_forearm[0])].tolist() == [153, 153, 0]
    for (x, y), colour in zip(BODY, OPENPOSE18.joint_colours, strict=True):
        assert tuple(picture[int(y), int(x)].tolist()) == colour
    # A disc of radius 4 has 49 pixels, one of radius 3 has 29.
    lone = np.full((18, 2), np.nan)
    lone[4] = 100, 100
    assert drawn(control_image((512, 512), [lone], scale=1.0)) == 49
    assert drawn(control_image((512, 512), faces=[lone], scale=1.0)) == 29


def test_hand_is_opencvs_to_the_pixel():
    picture = control_image((256, 256), hands=[HAND], scale=1.0)
    assert drawn(picture) == 2_642
    assert picture.sum(axis=(0, 1)).tolist() == [175_833, 218_618, 488_051]
    for x, y in HAND:
        assert picture[int(y), int(x)].tolist() == [0, 0, 255]
    assert HAND_BONES[:5] == ((0, 1), (1, 2), (2, 3), (3, 4), (0, 5)) and HAND_BONES[-1] == (19, 20)


@pytest.mark.parametrize("missing", [(0.01, 200.0), (200.0, 0.0), (-1.0, -1.0), (np.nan, 200.0), (202.0, np.inf)])
def test_missing_points_take_their_limbs_with_them(missing):
    points = BODY.astype(np.float64)
    points[3] = missing  # the right elbow: upper arm and forearm go too
    picture = control_image((512, 512), [points], scale=1.0)
    hidden = confident(BODY)
    hidden[3, 2] = 0
    np.testing.assert_array_equal(picture, control_image((512, 512), [hidden], scale=1.0))
    full = control_image((512, 512), [BODY], scale=1.0)
    for colour in ((153, 102, 0), (153, 153, 0), (255, 255, 0)):  # limbs 2-3 and 3-4, dimmed, and the elbow's disc
        assert (full == colour).all(axis=-1).any() and not (picture == colour).all(axis=-1).any()


def test_what_lies_outside_is_cut():
    wide = control_image((512, 512), [BODY], hands=[HAND], faces=[COCO], scale=1.0)
    corner = control_image((200, 280), [BODY], hands=[HAND], faces=[COCO], scale=1.0)
    np.testing.assert_array_equal(corner, wide[:200, :280])
    assert drawn(control_image((64, 64), [BODY + 600], hands=[HAND + 600])) == 0
    far = control_image((64, 64), [np.where(np.arange(18)[:, None] == 2, 1e30, 32.0) * np.ones((18, 2))])
    assert far.shape == (64, 64, 3)
    assert drawn(control_image((64, 96))) == 0
    corner = np.full((18, 2), np.nan)
    corner[4] = 1, 2
    disc = control_image((9, 9), [corner], scale=1.0).any(axis=-1)
    columns, rows = np.meshgrid(np.arange(9), np.arange(9))
    np.testing.assert_array_equal(disc, (columns - 1) ** 2 + (rows - 2) ** 2 <= 16)


def test_sizes_follow_the_picture():
    large = control_image((1024, 1024), [BODY * 2])
    np.testing.assert_array_equal(large, control_image((1024, 1024), [BODY * 2], scale=1.0))
    small = control_image((64, 64), [BODY / 8], hands=[HAND / 8])
    thick = control_image((64, 64), [BODY / 8], hands=[HAND / 8], scale=1.0)
    assert drawn(small) < 0.5 * drawn(thick)
    # Limbs of three pixels across, joints of five, bones of one.
    only = np.full((18, 2), np.nan)
    only[[2, 3]] = (20, 30), (50, 30)
    assert control_image((64, 64), [only])[:, 35].any(axis=-1).sum() == 3
    only[3] = np.nan
    assert drawn(control_image((64, 64), [only])) == 5
    finger = np.full((21, 2), np.nan)
    finger[[0, 1]] = (20, 30), (50, 30)
    thin = control_image((64, 64), hands=[finger])
    assert thin[:, 35].any(axis=-1).sum() == 1
    canvas = black(64, 64)
    assert draw_hand(canvas, finger) is canvas
    np.testing.assert_array_equal(canvas, thin)


def test_layers_lie_in_the_published_order():
    depth = np.zeros((256, 256, 1), np.float32)
    depth[10:240, 10:240] = 0.4
    body = np.full((18, 2), np.nan)
    body[[2, 3]] = (20, 20), (250, 250)
    layers = {"faces": [HAND[:1] - 20], "hand_depth": depth, "mesh_hands": [HAND]}
    picture = control_image((256, 256), [body], hands=[HAND - 30], **layers, scale=1.0)
    np.testing.assert_array_equal(picture, control_image((256, 256), [body], **layers, scale=1.0))
    assert picture[20, 20].tolist() == picture[200, 110].tolist() == [102, 102, 102]  # over body and face
    assert picture[250, 250].tolist() == [255, 255, 0]  # no depth there
    assert picture[220, 130].tolist() == [0, 0, 255]  # under the hand
    face = control_image((256, 256), [body], hands=[HAND], faces=[body[[2]], HAND[:1]], scale=1.0)
    assert face[20, 20].tolist() == face[220, 130].tolist() == [255, 255, 255]
    assert face[224, 130].tolist() == [0, 0, 255]  # the joint's disc is larger than the point
    # A hand that was detected lies over the body.
    meeting = control_image((256, 256), [body], hands=[HAND - HAND[0] + 20], scale=1.0)
    assert meeting[20, 20].tolist() == [0, 0, 255]


def test_relative_depth_is_255_near_and_51_far():
    z = np.array([[[0.9], [1.0], [1.5], [2.0], [9.0]]], np.float32)
    inside = np.array([[[False], [True], [True], [True], [False]]])
    values = relative_depth(z, inside)
    np.testing.assert_allclose(values[0, :, 0], [0, 1, 0.6, 0.2, 0], atol=1e-6)
    grey = control_image((1, 5), hand_depth=values)
    assert grey[0, :, 0].tolist() == [0, 255, 153, 51, 0]
    assert (relative_depth(np.full((2, 2), 3.0), np.ones((2, 2), bool)) == 1).all()
    assert not relative_depth(z, np.zeros_like(inside)).any()


def test_later_people_and_limbs_lie_on_top():
    left, right = np.full((17, 2), -1.0), np.full((17, 2), -1.0)
    left[[0, 1]], right[[0, 2]] = ((100, 100), (200, 100)), ((150, 50), (150, 150))
    order = [confident(np.where(p < 0, 0, p), 1.0) for p in (left, right)]
    for person, points in zip(order, (left, right), strict=True):
        person[points[:, 0] < 0, 2] = 0
    assert draw_bodies(black(), order, HUMANSD17)[100, 150].tolist() == list(HUMANSD17.limb_colours[1])
    assert draw_bodies(black(), order[::-1], HUMANSD17)[100, 150].tolist() == list(HUMANSD17.limb_colours[0])
