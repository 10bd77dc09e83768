"""Labels of rendered people: exact, and in agreement with each other under every framing and view."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fairhuman_jax.data.people import PeopleDataset, PeoplePack, render, sample_spec
from fairhuman_jax.data.people.labels import COCO17, FACE5, HAND21, OPENPOSE18, tolerance
from fairhuman_jax.data.people.palette import FRAMINGS
from fairhuman_jax.data.people.render import identity_vector
from fairhuman_jax.data.people.surface import HAIR, HAND_LEFT, HAND_RIGHT, HEAD_SKIN, SKIN, TOP

SETS = {
    "coco17": COCO17,
    "openpose18": OPENPOSE18,
    "face5": FACE5,
    "hand_left": tuple(f"{name}.L" for name in HAND21),
    "hand_right": tuple(f"{name}.R" for name in HAND21),
}
AZIMUTHS = (-45, 0, 45)


@pytest.fixture(scope="module")
def pack():
    return PeoplePack.load()


@pytest.fixture(scope="module")
def samples(pack):
    """Every framing under three azimuths, four people each, as (spec, sample)."""
    out = []
    for f, framing in enumerate(FRAMINGS):
        for a, azimuth in enumerate(AZIMUTHS):
            for k in range(4):
                spec = sample_spec(7, 100 * f + 10 * a + k, framing)
                spec["camera"]["azimuth"] = float(azimuth)
                out.append((spec, render(pack, spec, 96)))
    return out


def dilated(mask):
    padded = np.pad(mask[..., 0] > 0, 1)
    h, w = mask.shape[:2]
    return np.any([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def in_frame(points, size):
    at = np.floor(points[:, :2]).astype(int)
    return ((at >= 0) & (at < size)).all(axis=1), np.clip(at, 0, size - 1)


def test_masks_partition_the_person(samples):
    for _, s in samples:
        part, person = s["part_map"], s["person_mask"]
        assert set(np.unique(person)) <= {0, 1}
        np.testing.assert_array_equal(part > 0, person > 0)
        assert sum((part == k).sum() for k in range(1, 9)) == person.sum()
        np.testing.assert_array_equal(part == HAND_LEFT, s["hand_mask_left"] > 0)
        np.testing.assert_array_equal(part == HAND_RIGHT, s["hand_mask_right"] > 0)
        np.testing.assert_array_equal(s["hand_mask"], s["hand_mask_left"] + s["hand_mask_right"])
        assert not (s["face_mask"] & s["hand_mask"]).any()
        assert (part[s["face_mask"] > 0] == HEAD_SKIN).all()
    seen = np.unique(np.concatenate([np.unique(s["part_map"]) for _, s in samples]))
    assert list(seen) == list(range(9))


def test_depth_and_boxes_agree_with_the_masks(samples):
    for _, s in samples:
        depth = s["depth"]
        assert depth.dtype == np.float32 and np.isfinite(depth).all()
        assert (depth[s["person_mask"] > 0] > 0.1).all()
        np.testing.assert_array_equal(s["hand_depth"] > 0, s["hand_mask"] > 0)
        for side in ("left", "right"):
            mask = s[f"hand_mask_{side}"] > 0
            if mask.sum() >= 4:
                left, top, right, bottom = s["boxes"][f"hand_{side}"]
                assert mask[top:bottom, left:right].sum() == mask.sum()
                assert mask[top, left:right].any() and mask[top:bottom, left].any()
            if mask.sum() > 1:
                values = s["hand_depth"][mask]
                assert values.max() == 1 and abs(values.min() - 0.2) < 1e-6
                d = depth[mask]
                np.testing.assert_allclose(values, 1 - 0.8 * (d - d.min()) / np.ptp(d), atol=1e-4)
            else:
                assert s["boxes"][f"hand_{side}"] is None


def test_visible_flags_agree_with_the_depth_map(samples, pack):
    from fairhuman_jax.data.people.camera import frame
    from fairhuman_jax.data.people.render import assemble

    hidden = 0
    for spec, s in samples:
        _, points, landmarks = assemble(pack, spec)
        camera = frame(spec["camera"], landmarks)
        for key, names in SETS.items():
            pixels, depths = camera.project(np.stack([points[name] for name in names]), 96)
            np.testing.assert_allclose(s["keypoints"][key][:, :2], pixels, rtol=1e-6)
            inside, at = in_frame(pixels, 96)
            surface = s["depth"][at[:, 1], at[:, 0], 0]
            allowed = np.array([tolerance(name) for name in names])
            close = (surface == 0) | (depths < surface + allowed)
            np.testing.assert_array_equal(s["keypoints"][key][:, 2] > 0, inside & close)
            hidden += int((inside & ~close).sum())
    assert hidden > 100


def test_visible_hand_points_lie_in_the_dilated_hand_mask(samples):
    hits, total = 0, 0
    for _, s in samples:
        for side in ("left", "right"):
            points = s["keypoints"][f"hand_{side}"]
            _, at = in_frame(points, 96)
            near = dilated(s[f"hand_mask_{side}"])[at[:, 1], at[:, 0]]
            visible = points[:, 2] > 0
            hits, total = hits + int((near & visible).sum()), total + int(visible.sum())
    assert total > 400
    assert hits / total > 0.97


def test_left_and_right_are_the_persons(samples):
    frontal = [s for spec, s in samples if spec["camera"]["azimuth"] == 0]
    for s in frontal:
        coco = s["keypoints"]["coco17"]
        assert coco[5, 0] > coco[6, 0]
        # Alignment order: the first eye is the one on the image's left.
        assert s["keypoints"]["face5"][0, 0] < s["keypoints"]["face5"][1, 0]


def test_face_points_lie_on_the_face(samples):
    hits, total = 0, 0
    for spec, s in samples:
        if spec["camera"]["azimuth"] == 0 and spec["camera"]["framing"] in ("portrait", "upper body"):
            inside, at = in_frame(s["keypoints"]["face5"], 96)
            ok = dilated(s["face_mask"] | s["hand_mask"])[at[:, 1], at[:, 0]]
            hits, total = hits + int((ok & inside).sum()), total + int(inside.sum())
    assert total > 20 and hits / total > 0.97


def test_same_seed_and_index_give_identical_bytes(pack):
    def flat(sample):
        return pickle.dumps([(k, sample[k]) for k in sorted(sample)])

    first, again = (flat(render(pack, sample_spec(3, 5), 64)) for _ in range(2))
    assert first == again
    assert flat(render(pack, sample_spec(3, 6), 64)) != first


def test_every_hand_and_garment_is_painted(pack):
    """Nobody is drawn without clothes: the torso is never skin, whatever is worn."""
    for i in range(60):
        spec = sample_spec(21, i, "half body")
        if spec["pose"]["gesture"] in ("clasped", "crossed", "sitting"):
            continue  # arms cross the hips
        s = render(pack, spec, 64)
        part = s["part_map"][..., 0]
        assert (part == TOP).sum() > 0.5 * (part == SKIN).sum()
        x, y, _ = s["keypoints"]["openpose18"][[8, 11]].mean(axis=0)
        column, row = int(np.clip(x, 0, 63)), int(np.clip(y, 0, 63))
        assert part[row, column] not in (SKIN, HEAD_SKIN, HAIR)


def test_identity_is_drawn_apart_from_everything_else(pack):
    one = sample_spec(1, 2, identity=(9, 9))
    two = sample_spec(4, 8, identity=(9, 9))
    other = sample_spec(4, 8)
    np.testing.assert_array_equal(identity_vector(one["identity"]), identity_vector(two["identity"]))
    a, b, c = (render(pack, s, 32) for s in (one, two, other))
    assert a["identity_hash"] == b["identity_hash"] != c["identity_hash"]
    assert not np.array_equal(a["image"], b["image"])


def test_hair_styles_and_sitting_are_drawn(pack):
    sitting = next(s for i in range(500) if (s := sample_spec(2, i, "full body"))["pose"]["legs"] == "sitting")
    sample = render(pack, sitting, 96)
    stool = (sample["depth"] > 0) & (sample["person_mask"] == 0)
    assert stool.sum() > 50
    long = next(s for i in range(500) if (s := sample_spec(2, i, "portrait"))["identity"]["hair_style"] == "long")
    share = {}
    for style in ("bald", "buzzed", "long"):
        changed = long | {"identity": long["identity"] | {"hair_style": style}}
        share[style] = (render(pack, changed, 64)["part_map"] == HAIR).sum()
    assert share["bald"] == 0 < share["buzzed"] < share["long"]


def test_dataset_is_a_random_access_source():
    data = PeopleDataset(32, 5, seed=4, start=10)
    copy = pickle.loads(pickle.dumps(data))
    assert len(copy) == 5
    np.testing.assert_array_equal(copy[2]["image"], PeopleDataset(32, 1, seed=4, start=12)[0]["image"])
    np.testing.assert_array_equal(data[-1]["image"], data[np.int64(4)]["image"])
    for index in (5, -6):
        with pytest.raises(IndexError, match="5 samples"):
            data[index]


def test_render_refuses_sizes_that_make_no_picture(pack):
    with pytest.raises(ValueError, match="at least 8"):
        render(pack, sample_spec(0, 0), 4)


def test_supersampled_labels_are_the_coverage_of_single_samples(pack):
    """Two by two samples at 64 px are the pixels of one sample each at 128 px."""

    def blocks(image):
        return image[..., 0].reshape(64, 2, 64, 2).swapaxes(1, 2).reshape(64, 64, 4)

    covered = 0
    for i in range(25):
        spec = sample_spec(13, i, "close-up of a hand and the face" if i % 2 else None)
        fine, coarse = render(pack, spec, 128, supersample=1), render(pack, spec, 64, supersample=2)
        for name in ("person_mask", "hand_mask"):
            np.testing.assert_array_equal(coarse[name][..., 0], blocks(fine[name]).sum(axis=-1) >= 2)
        part, depth = blocks(fine["part_map"]), blocks(fine["depth"])
        for side, label in (("left", HAND_LEFT), ("right", HAND_RIGHT)):
            inside = coarse[f"hand_mask_{side}"][..., 0] > 0
            nearest = np.where(part == label, depth, np.inf).min(axis=-1)
            np.testing.assert_array_equal(coarse["depth"][inside, 0], nearest[inside])
            mixed = (part > 0) & (part != label) & (depth < nearest[..., None])
            covered += int((mixed.any(axis=-1) & inside).sum())
    assert covered > 10
