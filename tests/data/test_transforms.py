from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairhuman_jax.data import Geometry, JointTransform, dilate_mask
from fairhuman_jax.keypoints.poses import MIRROR


def sample(height: int, width: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2, (2, height, width, 1), np.uint8)
    return {
        "image": rng.integers(0, 256, (height, width, 3), np.uint8),
        "conditioning_image": rng.integers(0, 256, (height, width, 3), np.uint8),
        "face_mask": masks[0],
        "hand_mask": masks[1],
        "caption": "",
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.booleans(), st.sampled_from(["center", "random"]))
def test_masking_and_cropping_commute(seed, extra, wide, crop):
    """The same pixels are picked for image, control image and both masks, bit for bit."""
    size = 24
    height, width = (size, size + extra) if wide else (size + extra, size)
    whole = sample(height, width, seed % 7)
    transform = JointTransform(size, crop, flip=0.5)
    plain = transform(whole, np.random.default_rng(seed))
    for mask in ("face_mask", "hand_mask"):
        for image in ("image", "conditioning_image"):
            masked = transform(whole | {image: whole[image] * whole[mask]}, np.random.default_rng(seed))
            np.testing.assert_array_equal(masked[image], plain[image] * plain[mask])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 90), st.integers(20, 90))
def test_resized_layers_stay_aligned(seed, height, width):
    """A mask painted into the image is found at the same place after resize, flip and crop."""
    mask = np.zeros((height, width, 1), np.uint8)
    rows = np.sort(np.random.default_rng(seed).integers(0, height, 2))
    columns = np.sort(np.random.default_rng(seed + 1).integers(0, width, 2))
    mask[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = 1
    whole = {"image": np.repeat(mask * np.uint8(255), 3, -1), "face_mask": mask}
    out = JointTransform(32, "random", flip=0.5)(whole, np.random.default_rng(seed))
    np.testing.assert_array_equal(out["image"][..., :1] >= 128, out["face_mask"] == 1)
    assert (
        out["image"].shape == (32, 32, 3) and out["hand_mask"].sum() == 0 and set(np.unique(out["face_mask"])) <= {0, 1}
    )


@pytest.mark.parametrize(("high", "wide"), [(16, 16), (16, 40), (100, 33), (64, 64), (7, 5)])
def test_sizes_and_time_ids(high, wide):
    rng = np.random.default_rng(0)
    transform = JointTransform(32, "random")
    geometry = transform.geometry(high, wide, np.random.default_rng(0))
    assert min(geometry.resized) == 32 and max(geometry.resized) == 32 * max(high, wide) // min(high, wide)
    out = transform(sample(high, wide), rng)
    assert out["time_ids"].dtype == np.float32
    assert out["time_ids"].tolist() == [high, wide, geometry.top, geometry.left, 32, 32]
    assert all(out[name].dtype == np.uint8 for name in ("image", "face_mask", "hand_mask", "conditioning_image"))


def test_random_crop_reaches_both_ends_and_center_does_not_move():
    tops = {JointTransform(8, "random").geometry(12, 8, np.random.default_rng(s)).top for s in range(200)}
    assert tops == {0, 1, 2, 3, 4}
    assert {JointTransform(8).geometry(13, 8, np.random.default_rng(s)).top for s in range(20)} == {2}
    flips = [JointTransform(8, flip=0.25).geometry(8, 8, np.random.default_rng(s)).flip for s in range(400)]
    assert 60 < sum(flips) < 140
    plain = [JointTransform(8, "random").geometry(40, 8, np.random.default_rng(s)).top for s in range(20)]
    assert plain == [JointTransform(8, "random", 1.0).geometry(40, 8, np.random.default_rng(s)).top for s in range(20)]


def test_latent_mask_of_the_specification():
    """x 101...299, y 200...400 at 1024: rows 25...50, columns 13...37, 650 cells after stride 8."""
    mask = np.zeros((1024, 1024, 1), np.uint8)
    mask[200:401, 101:300] = 1
    out = JointTransform(1024)({"image": np.repeat(mask, 3, -1), "face_mask": mask}, np.random.default_rng(0))
    cells = out["face_mask"][::8, ::8, 0]
    assert cells.sum() == 650
    assert np.flatnonzero(cells.any(1))[[0, -1]].tolist() == [25, 50]
    assert np.flatnonzero(cells.any(0))[[0, -1]].tolist() == [13, 37]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_points_follow_the_pixels_and_change_sides(flip):
    """Each key point sits on its own pixel before and after, under the partner's name if mirrored."""
    spots = np.random.default_rng(1).permutation(24 * 40)[:17]
    points = np.stack([spots % 40 + 0.5, spots // 40 + 0.5, np.ones(17)], -1)
    image = np.zeros((24, 40, 3), np.uint8)
    image[spots // 40, spots % 40, 0] = np.arange(1, 18)
    transform = JointTransform(24, "random", flip, keypoints=("coco17",))
    out = transform({"image": image, "keypoints": {"coco17": points}}, np.random.default_rng(5))
    inside = 0
    for new, (x, y, visible) in enumerate(out["keypoints"]["coco17"]):
        old = MIRROR["coco17"][new] if flip else new
        assert visible == 1
        if 0 <= x < 24 and 0 <= y < 24:
            inside += 1
            assert out["image"][int(y), int(x), 0] == old + 1
    assert inside > 5


def test_points_scale_and_hands_swap():
    geometry = Geometry(original=(50, 100), resized=(25, 50), top=0, left=5, flip=True, size=(25, 25))
    left, right = np.full((21, 3), (10, 20, 1)), np.full((21, 3), (90, 20, 0))
    moved = geometry.keypoints({"hand_left": left, "hand_right": right})
    np.testing.assert_array_equal(moved["hand_right"][0], (50 - 5 - 5, 10, 1))
    np.testing.assert_array_equal(moved["hand_left"][0], (50 - 45 - 5, 10, 0))


def test_further_masks_and_maps_share_the_geometry():
    whole = sample(20, 30)
    names = ("hand_mask_left", "hand_mask_right")
    whole |= {name: whole[mask] for name, mask in zip(names, ("face_mask", "hand_mask"), strict=True)}
    whole["hand_depth"] = whole["image"][..., :1].astype(np.float32) / 255
    transform = JointTransform(20, "random", 1.0, masks=("face_mask", "hand_mask", *names), maps=("hand_depth",))
    out = transform(whole, np.random.default_rng(0))
    np.testing.assert_array_equal(out["hand_mask_left"], out["hand_mask"])
    np.testing.assert_array_equal(out["hand_mask_right"], out["face_mask"])
    np.testing.assert_allclose(out["hand_depth"], out["image"][..., :1] / 255, atol=1e-6)
    shrunk = JointTransform(10, maps=("hand_depth",))(whole, np.random.default_rng(0))
    assert shrunk["hand_depth"].dtype == np.float32
    np.testing.assert_allclose(shrunk["hand_depth"], shrunk["image"][..., :1] / 255, atol=1 / 255)


def test_people_keep_their_labels_in_place():
    """Key points of a rendered hand lie within its mask, before and after a mirrored and shrunken crop."""
    from fairhuman_jax.data.people import PeopleDataset

    people = PeopleDataset(96, 8, seed=1)
    names = ("hand_left", "hand_right")
    masks = ("face_mask", "hand_mask", "hand_mask_left", "hand_mask_right")
    transform = JointTransform(64, "random", 1.0, masks=masks, keypoints=names)
    visible, hits = 0, 0
    for index in range(len(people)):
        out = transform(people[index], np.random.default_rng(index))
        for name in names:
            mask = dilate_mask(out[name.replace("hand", "hand_mask")], 3)[..., 0]
            x, y, seen = out["keypoints"][name].T
            column, row = np.floor(x).astype(int), np.floor(y).astype(int)
            inside = (seen > 0) & (column >= 0) & (column < 64) & (row >= 0) & (row < 64)
            visible, hits = visible + inside.sum(), hits + mask[row[inside], column[inside]].sum()
    assert visible > 30 and hits > 0.9 * visible


@pytest.mark.parametrize("layout", sorted(MIRROR))
def test_mirror_tables_are_their_own_inverse(layout):
    table = np.asarray(MIRROR[layout])
    np.testing.assert_array_equal(table[table], np.arange(len(table)))


def test_openpose_mirror_agrees_with_coco():
    openpose_from_coco = {0: 0, 2: 6, 3: 8, 4: 10, 5: 5, 6: 7, 7: 9, 8: 12, 9: 14, 10: 16}
    openpose_from_coco |= {11: 11, 12: 13, 13: 15, 14: 2, 15: 1, 16: 4, 17: 3}
    for ours, coco in openpose_from_coco.items():
        assert openpose_from_coco[MIRROR["openpose18"][ours]] == MIRROR["coco17"][coco]


@pytest.mark.parametrize(("size", "first", "last"), [(16, 94, 307), (8, 98, 303), (1, 101, 299)])
def test_dilation_of_the_specification(size, first, last):
    mask = np.zeros((500, 320, 1), np.uint8)
    mask[101:300, 101:300] = 1
    grown = dilate_mask(mask, size)
    for axis in (0, 1):
        assert np.flatnonzero(grown[..., 0].any(axis))[[0, -1]].tolist() == [
            first,
            min(last, grown.shape[1 - axis] - 1),
        ]
    assert grown.sum() == (last - first + 1) ** 2
    batch = dilate_mask(np.stack([mask, np.zeros_like(mask)]), size)
    np.testing.assert_array_equal(batch[0], grown)
    assert batch[1].sum() == 0 and batch.dtype == np.uint8


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="'center' or 'random'"):
        JointTransform(8, crop="centre")
    with pytest.raises(ValueError, match="flip = 2"):
        JointTransform(8, flip=2)
    with pytest.raises(ValueError, match="unknown set 'coco'"):
        JointTransform(8, keypoints=("coco",))
    with pytest.raises(ValueError, match="no key points face5; it has none"):
        JointTransform(8, keypoints=("face5",))(sample(8, 8), np.random.default_rng(0))
    with pytest.raises(ValueError, match="no 'person_mask'; it has image"):
        JointTransform(8, masks=("person_mask",))(sample(8, 8), np.random.default_rng(0))
    with pytest.raises(ValueError, match="face_mask is"):
        JointTransform(8)(sample(8, 9) | {"face_mask": np.zeros((8, 8, 1), np.uint8)}, np.random.default_rng(0))
