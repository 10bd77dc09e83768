"""Control images of the people world: on the body, sides named rightly, in agreement with the masks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fairhuman_jax.data import FolderDataset
from fairhuman_jax.data.people import PeopleDataset, PeoplePack, render, sample_spec
from fairhuman_jax.data.people.__main__ import main
from fairhuman_jax.data.people.conditions import detected_points, humansd_skeleton, skeleton
from fairhuman_jax.keypoints.skeletons import HUMANSD17, OPENPOSE18

SIZE = 96
RIGHT_WRIST, LEFT_WRIST = OPENPOSE18.joint_colours[4], OPENPOSE18.joint_colours[7]


@pytest.fixture(scope="module")
def samples():
    pack = PeoplePack.load()
    framings = ("full body", "half body", "upper body", None)
    return [render(pack, sample_spec(17, i, framings[i % 4]), SIZE) for i in range(48)]


def has(picture, colour):
    return (picture == colour).all(axis=-1)


def grown(mask, by):
    padded = np.pad(mask[..., 0] > 0, by)
    span = range(2 * by + 1)
    return np.any([padded[i : i + SIZE, j : j + SIZE] for i in span for j in span], axis=0)


def test_the_drawing_lies_on_the_person(samples):
    for sample in samples:
        picture = skeleton(sample)
        assert picture.dtype == np.uint8 and picture.shape == (SIZE, SIZE, 3)
        outside = picture.any(axis=-1) & ~grown(sample["person_mask"], 3)
        assert outside.sum() <= 0.02 * picture.any(axis=-1).sum()


def test_every_drawn_hand_lies_in_its_mask(samples):
    """The joints that are visible, and the depth of a hand that is drawn."""
    hits = total = 0
    for sample in samples:
        picture = skeleton(sample)
        for side in ("left", "right"):
            points, mask = sample["keypoints"][f"hand_{side}"], sample[f"hand_mask_{side}"]
            if points[:, 2].sum() <= 3:
                continue
            assert picture[mask[..., 0] > 0].any(axis=-1).all()
            at = points[points[:, 2] > 0, :2].astype(int)
            joints = has(picture, (0, 0, 255))[at[:, 1], at[:, 0]]
            assert joints.mean() > 0.9  # the other hand may lie over some
            hits, total = hits + int(grown(mask, 1)[at[:, 1], at[:, 0]].sum()), total + len(at)
    assert total > 400 and hits / total > 0.97


def test_hands_that_are_not_seen_are_not_drawn(samples):
    hidden = 0
    for sample in samples:
        seen = [sample["keypoints"][f"hand_{side}"][:, 2].sum() > 3 for side in ("left", "right")]
        bare = skeleton(sample | {"hand_depth": np.zeros_like(sample["hand_depth"])})
        if not any(seen):
            assert not has(bare, (0, 0, 255)).any()
            np.testing.assert_array_equal(bare, skeleton(sample))
            hidden += 1
    assert hidden > 2


def test_sides_are_the_persons(samples):
    """A wrist that only the right arm shows has the right wrist's colour, and the other way round."""
    seen = {"left": 0, "right": 0}
    for sample in samples:
        body = sample["keypoints"]["openpose18"]
        at = np.floor(body[:, :2]).astype(int)
        inside = ((at >= 0) & (at < SIZE)).all(axis=1)
        without_hands = dict.fromkeys(("hand_left", "hand_right"), np.zeros((21, 3), np.float32))
        picture = skeleton(sample | {"keypoints": sample["keypoints"] | without_hands})
        for side, row, colour in (("left", 7, LEFT_WRIST), ("right", 4, RIGHT_WRIST)):
            hand = sample[f"hand_mask_{side}"]
            if not inside[row] or hand.sum() < 9:
                assert inside[row] or not has(picture, colour).any()
                continue
            rows, columns = np.nonzero(hand[..., 0])
            y, x = np.argwhere(has(picture, colour)).mean(axis=0)
            assert np.hypot(columns - x, rows - y).min() < 0.1 * SIZE
            seen[side] += 1
    assert min(seen.values()) > 5


def test_joints_out_of_the_frame_are_missing_and_hidden_ones_are_not(samples):
    hidden = 0
    for sample in samples:
        body = sample["keypoints"]["openpose18"]
        at = np.floor(body[:, :2]).astype(int)
        without_hands = dict.fromkeys(("hand_left", "hand_right"), np.zeros((21, 3), np.float32))
        points = sample["keypoints"] | without_hands | {"face5": np.zeros((5, 3), np.float32)}
        picture = skeleton(sample | {"keypoints": points})
        for row, (x, y) in enumerate(at):
            found = has(picture, OPENPOSE18.joint_colours[row]).any()
            if not (0 <= x < SIZE and 0 <= y < SIZE):
                assert not found
            elif row in range(1, 14) and body[row, 2] == 0:
                hidden += int(found)
            elif body[row, 2] == 0:
                assert not found
    assert hidden > 5


def test_dataset_adds_the_picture_and_changes_nothing_else():
    plain, both = PeopleDataset(32, 3, seed=2), PeopleDataset(32, 3, seed=2, conditioning="fairhuman")
    assert "conditioning_image" not in plain[1]
    sample = both[1]
    np.testing.assert_array_equal(sample.pop("conditioning_image"), skeleton(plain[1]))
    assert pickle.dumps(sample) == pickle.dumps(plain[1])
    assert "conditioning='fairhuman'" in repr(both)
    assert pickle.loads(pickle.dumps(both)).conditioning == "fairhuman"


def test_export_and_sheet_with_conditions(tmp_path):
    options = ["--count", "2", "--size", "48", "--seed", "3", "--conditioning"]
    main(["export", str(tmp_path / "people"), *options])
    data, source = (
        FolderDataset(tmp_path / "people", on_error="stop"),
        PeopleDataset(48, 2, 3, conditioning="fairhuman"),
    )
    for i in range(2):
        np.testing.assert_array_equal(data[i]["conditioning_image"], source[i]["conditioning_image"])
    assert data[0]["conditioning_image"].any() and data.missing == {}
    main(["sheet", str(tmp_path / "sheet.png"), *options])
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_humansd_skeletons_lie_on_the_person_and_name_the_sides(samples):
    """Upper arms have colours of their own, which lie where the arm's two joints are; from ears to shoulders limbs may
    leave the person."""
    seen = off = whole = 0
    for sample in samples:
        picture, points = humansd_skeleton(sample), detected_points(sample, "coco17")
        assert picture.dtype == np.uint8 and picture.shape == (SIZE, SIZE, 3)
        body = picture.any(axis=-1)
        for limb in (4, 5):
            body &= ~has(picture, HUMANSD17.limb_colours[limb])
        off, whole = off + (body & ~grown(sample["person_mask"], 3)).sum(), whole + body.sum()
        for limb, (first, last) in ((6, (5, 7)), (7, (6, 8))):
            drawn = has(picture, HUMANSD17.limb_colours[limb])
            assert not drawn.any() or (points[[first, last], 2] == 1).all()
            if drawn.sum() > 12:
                y, x = np.argwhere(drawn).mean(axis=0)
                assert np.hypot(*(points[[first, last], :2].mean(axis=0) - (x, y))) < 0.12 * SIZE
                seen += 1
    assert seen > 40 and off < 0.02 * whole


def test_detected_points_agree_between_layouts_and_with_the_labels(samples):
    hidden = 0
    for sample in samples:
        coco, openpose = (detected_points(sample, layout) for layout in ("coco17", "openpose18"))
        np.testing.assert_array_equal(coco[[0, 1, 5, 8, 13, 16]], openpose[[0, 15, 5, 3, 12, 10]])
        labels = sample["keypoints"]["coco17"]
        np.testing.assert_array_equal(coco[:, :2], labels[:, :2])
        assert (coco[:, 2] >= labels[:, 2]).all() and (coco[:5, 2] == labels[:5, 2]).all()
        inside = ((coco[:, :2] >= 0) & (coco[:, :2] < SIZE)).all(axis=1)
        assert not coco[~inside, 2].any() and coco[5:][inside[5:], 2].all()
        hidden += int((coco[:, 2] > labels[:, 2]).sum())
    assert hidden > 5


def test_styles_of_conditions(tmp_path):
    people = PeopleDataset(32, 2, seed=2, conditioning="humansd")
    sample = people[0]
    np.testing.assert_array_equal(sample["conditioning_image"], humansd_skeleton(sample))
    with pytest.raises(ValueError, match=r"conditioning 'openpose'; use fairhuman, humansd or None"):
        PeopleDataset(32, 2, seed=2, conditioning="openpose")
    main(["export", str(tmp_path), "--count", "2", "--size", "32", "--seed", "2", "--conditioning", "humansd"])
    written = FolderDataset(tmp_path, on_error="stop")[0]["conditioning_image"]
    np.testing.assert_array_equal(written, sample["conditioning_image"])
