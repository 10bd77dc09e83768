"""Joints through resize, mirroring and crop; skeletons drawn after it; HumanSD's published augmentation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_people import COCO

from fairhuman_jax.data import JointTransform
from fairhuman_jax.data.keypoint_transforms import PEOPLE, PoseTransform, inside, padded, rotate
from fairhuman_jax.keypoints.poses import MIRROR
from fairhuman_jax.keypoints.skeletons import HUMANSD17, draw_bodies

FILL = np.tile(np.array([-1, -1, 0], np.float32), (17, 1))
LEFT_FOREARM, RIGHT_FOREARM = HUMANSD17.limb_colours[8], HUMANSD17.limb_colours[9]


def person(scale=1.0, shift=(0, 0), confidence=0.9):
    points = np.full((17, 3), confidence, np.float32)
    points[:, :2] = COCO * scale + shift
    return points


def posed(people, height=512, width=512, image=None):
    image = np.zeros((height, width, 3), np.uint8) if image is None else image
    return {"image": image, "keypoints": {"coco17": np.array(people, np.float32).reshape(-1, 17, 3)}}


def has(picture, colour):
    return (picture == colour).all(axis=-1)


def rng(seed=0):
    return np.random.default_rng(seed)


def spots(height, width, seed=1):
    """A picture with one bright pixel for each joint of a person, and the person; and each joint's number as red."""
    places = rng(seed).permutation(height * width)[:17]
    points = np.stack([places % width + 0.5, places // width + 0.5, np.full(17, 0.5)], -1).astype(np.float32)
    image = np.zeros((height, width, 3), np.uint8)
    image[places // width, places % width, 0] = np.arange(1, 18)
    return image, points


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_joints_stay_on_their_pixels_and_outer_ones_are_dropped(flip, crop):
    image, points = spots(24, 40)
    transform = PoseTransform(24, crop, flip)
    out = transform(posed([points], image=image), rng(5))
    assert out["keypoints"].shape == (PEOPLE, 17, 3) and out["keypoints"].dtype == np.float32
    (same, *others), found = out["keypoints"], set()
    for joint, (x, y, confidence) in enumerate(same):
        old = MIRROR["coco17"][joint] if flip else joint
        if confidence:
            assert confidence == 0.5 and out["image"][int(y), int(x), 0] == old + 1
            found.add(old + 1)
        else:
            assert (x, y) == (-1, -1)
    assert found == set(np.unique(out["image"])) - {0} and 5 < len(found) < 17
    np.testing.assert_array_equal(others, np.tile(FILL, (PEOPLE - 1, 1, 1)))


@pytest.mark.parametrize("shape", [32, (48, 16)])
def test_picture_and_masks_are_those_of_the_joint_transform(shape):
    """The same crop boxes from the same generator, sizes and masks included."""
    sample = posed([person(0.1)], image=rng().integers(0, 256, (60, 90, 3), np.uint8))
    sample["face_mask"] = rng(1).integers(0, 2, (60, 90, 1), np.uint8)
    options = {"crop": "random", "flip": 0.5}
    for seed in range(6):
        plain = JointTransform(shape, **options)(sample, rng(seed))
        out = PoseTransform(shape, **options)(sample, rng(seed))
        assert out.keys() == plain.keys() | {"conditioning_image", "keypoints"}
        for name in plain:
            np.testing.assert_array_equal(out[name], plain[name])
        assert out["conditioning_image"].shape == out["image"].shape


def test_the_golden_skeleton_is_drawn_after_the_transform():
    """Fact 13 of the specification: 14 116 pixels at 512; a picture of twice the size gives the same."""
    out = PoseTransform(512)(posed([person()]), rng())
    assert np.count_nonzero(out["conditioning_image"].any(axis=-1)) == 14_116
    np.testing.assert_array_equal(out["keypoints"][0], person())
    twice = PoseTransform(512)(posed([person(2.0)], 1024, 1024), rng())
    np.testing.assert_array_equal(twice["conditioning_image"], out["conditioning_image"])
    small = PoseTransform(128)(posed([person()]), rng())["conditioning_image"]
    assert small.shape == (128, 128, 3)
    assert np.count_nonzero(small.any(axis=-1)) == pytest.approx(14_116 / 16, rel=0.1)


def test_mirrored_skeletons_name_the_sides_rightly():
    """The picture's left shows the left arm's colour in the mirrored picture; without the exchange it would not."""
    plain = PoseTransform(512)(posed([person()]), rng())["conditioning_image"]
    mirrored = PoseTransform(512, flip=1.0)(posed([person()]), rng())["conditioning_image"]
    assert has(plain, LEFT_FOREARM)[:, 256:].any() and not has(plain, LEFT_FOREARM)[:, :256].any()
    assert has(mirrored, LEFT_FOREARM)[:, 256:].any() and not has(mirrored, LEFT_FOREARM)[:, :256].any()
    assert not np.array_equal(mirrored, plain[:, ::-1])


def test_joints_of_little_confidence_are_missing():
    sure = person()
    sure[7, 2], sure[9, 2], sure[8, 2] = 0.02, 0.0201, np.nan
    out = PoseTransform(512)(posed([sure]), rng())
    np.testing.assert_array_equal(out["keypoints"][0, [7, 8]], FILL[:2])
    assert out["keypoints"][0, 9, 2] == np.float32(0.0201)
    assert not has(out["conditioning_image"], LEFT_FOREARM).any()
    faint = PoseTransform(512)(posed([person(confidence=0.03)]), rng())  # of less than sampling asks for
    assert np.count_nonzero(faint["conditioning_image"].any(axis=-1)) == 14_116
    none = PoseTransform(512, threshold=0.9)(posed([person()]), rng())
    assert not none["conditioning_image"].any() and (none["keypoints"] == FILL).all()


def test_points_outside_are_dropped_with_their_limbs():
    leaning = person(shift=(220, 0))  # the left arm is out of the picture
    out = PoseTransform(512)(posed([leaning]), rng())
    kept = out["keypoints"][0]
    assert (kept[[5, 7, 9]] == FILL[:3]).all() and kept[6, 2] > 0
    assert (
        not has(out["conditioning_image"], LEFT_FOREARM).any() and has(out["conditioning_image"], RIGHT_FOREARM).any()
    )
    far = np.where(np.arange(17)[:, None] % 2, (1e30, 3, 1), (3, -np.inf, np.inf))
    away = PoseTransform(512)(posed([far, person(shift=(2000, 0)), person()]), rng())
    np.testing.assert_array_equal(away["keypoints"][0], person())
    assert (away["keypoints"][1:] == FILL).all()


def test_nobody_gives_a_black_picture_and_empty_rows():
    for compat in ({}, {"crop": "random", "masks": (), "compat": "reference"}):
        out = PoseTransform(64, **compat)(posed([], 90, 64), rng(1))
        assert not out["conditioning_image"].any() and out["conditioning_image"].shape == (64, 64, 3)
        np.testing.assert_array_equal(out["keypoints"], np.tile(FILL, (PEOPLE, 1, 1)))


def test_thirty_people_are_all_drawn_and_the_first_ten_handed_out():
    crowd = [person(0.15, (16 * i, 100 if i % 2 else 200)) for i in range(30)]
    out = PoseTransform(512)(posed(crowd), rng())
    np.testing.assert_array_equal(out["keypoints"], crowd[:10])
    everybody = draw_bodies(np.zeros((512, 512, 3), np.uint8), crowd, HUMANSD17)
    np.testing.assert_array_equal(out["conditioning_image"], everybody)
    reference = PoseTransform(512, "random", masks=(), compat="reference")
    for seed in range(100):
        published = reference(posed(crowd), rng(seed))
        if np.array_equal(published["keypoints"], crowd[:10]):
            ten = draw_bodies(np.zeros((512, 512, 3), np.uint8), crowd[:10], HUMANSD17)
            np.testing.assert_array_equal(published["conditioning_image"], ten)
            break
    else:
        pytest.fail("never left as it was")


def test_what_is_asked_for_comes():
    sample = posed([person(0.1)], 64, 64)
    assert "conditioning_image" not in PoseTransform(64, draw=False)(sample, rng())
    assert "keypoints" not in PoseTransform(64, targets=False)(sample, rng())
    one = PoseTransform(64)({"image": sample["image"], "keypoints": {"coco17": person(0.1)}}, rng())
    np.testing.assert_array_equal(one["keypoints"], PoseTransform(64)(sample, rng())["keypoints"])
    with pytest.raises(ValueError, match="no key points coco17"):
        PoseTransform(64)({"image": sample["image"]}, rng())
    with pytest.raises(ValueError, match="compat = 'published': use 'reference' or None"):
        PoseTransform(64, compat="published")
    for wrong in ({"crop": "center", "masks": ()}, {"crop": "random", "flip": 0.5, "masks": ()}, {"crop": "random"}):
        with pytest.raises(ValueError, match="own flips and no masks"):
            PoseTransform(64, compat="reference", **wrong)


def test_helpers():
    people = inside(np.array([[[0, 0, 1], [7.99, 5, 1], [8, 5, 1], [3, 6, 1], [-0.01, 1, 1]]], np.float32), (6, 8), 0.5)
    assert people[0, :, 2].tolist() == [1, 1, 0, 0, 0] and (people[0, 2:] == FILL[:3]).all()
    assert padded(np.zeros((0, 17, 3))).shape == padded(np.zeros((30, 17, 3))).shape == (10, 17, 3)


@pytest.mark.parametrize("degrees", [90.0, -90.0, 35.0, -70.0])
def test_rotation_takes_points_with_their_pixels(degrees):
    """A bright square and the point in its middle; borders are reflected, so nothing becomes black."""
    image = np.full((80, 60, 3), 40, np.uint8)
    image[20:27, 33:40] = 250
    turned, moved = rotate(image, np.array([[36.5, 23.5]]), degrees)
    assert turned.shape == image.shape and turned.min() >= 39
    rows, columns = np.nonzero(turned[..., 0] > 145)
    np.testing.assert_allclose(moved[0], (columns.mean() + 0.5, rows.mean() + 0.5), atol=0.35)
    assert len(rows) == pytest.approx(49, abs=5)


# -- what was published -----------------------------------------------------------------------------------------------

REFERENCE = PoseTransform(64, "random", masks=(), compat="reference")


def test_published_augmentation_keeps_sides_and_turns_pictures():
    """Of 300 draws a fifth is mirrored, a tenth upside down and a tenth rotated; each joint keeps its number."""
    points = person(0.125)
    counts = {"mirrored": 0, "upside down": 0, "rotated": 0}
    for seed in range(300):
        at = replace(REFERENCE, draw=False)(posed([points], 64, 64), rng(seed))["keypoints"][0, :, :2]
        plain = [np.array_equal(at[:, axis], points[:, axis]) for axis in (0, 1)]
        flipped = [np.array_equal(at[:, axis], 64 - points[:, axis]) for axis in (0, 1)]
        counts["mirrored"] += flipped[0]
        counts["upside down"] += flipped[1]
        counts["rotated"] += not all(a or b for a, b in zip(plain, flipped, strict=True))
    assert 30 < counts["mirrored"] < 80 and all(12 < counts[name] < 50 for name in ("upside down", "rotated"))


def test_published_augmentation_puts_outer_joints_into_a_corner():
    out_of_it = person(0.1)
    out_of_it[10, :2] = -40, 20
    corners = set()
    for seed in range(60):
        x, y, confidence = REFERENCE(posed([out_of_it], 64, 64), rng(seed))["keypoints"][0, 10]
        if confidence:
            corners.add((float(x), float(y)))
    assert {(0.5, 0.5), (63.5, 0.5), (0.5, 63.5)} <= corners
    assert PoseTransform(64)(posed([out_of_it], 64, 64), rng())["keypoints"][0, 10, 2] == 0


def test_published_rows_stay_in_place_and_colours_change():
    people = [person(0.1, (500, 0)), person(0.1)]
    people[0][:, 2] = 0
    out = REFERENCE(posed(people, 64, 64), rng(4))
    assert (out["keypoints"][0] == FILL).all() and out["keypoints"][1, :, 2].any()
    assert set(out) == {"image", "conditioning_image", "keypoints", "time_ids"}
    grey = np.full((64, 64, 3), (120, 100, 80), np.uint8)
    values = [REFERENCE(posed([], image=grey), rng(seed))["image"] for seed in range(200)]
    changed = [value for value in values if not np.array_equal(value, grey)]
    # recoloured 0.4, relit 0.2, either 0.52
    assert 98 < len(changed) < 125
    assert max(np.abs(value.astype(int) - grey).max() for value in changed) < 120
    assert len({value.tobytes() for value in changed}) == len(changed)
    assert all(np.ptp(value.reshape(-1, 3), axis=0).max() == 0 for value in changed)


def test_published_skeletons_come_from_the_mirrored_points():
    """The accident: the left arm's colour lies on the picture's other side."""
    seen = set()
    for seed in range(40):
        picture = PoseTransform(512, "random", masks=(), compat="reference")(posed([person()]), rng(seed))
        there = has(picture["conditioning_image"], LEFT_FOREARM)
        seen.add((bool(there[:, :200].any()), bool(there[:, 312:].any())))
    assert {(True, False), (False, True)} <= seen
