"""Bottom-up parsing on synthetic heat maps and tags: who is found, where, and whose joints are whose."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fairhuman_jax.annotate.bottom_up import (
    MEAN,
    STD,
    BottomUpSettings,
    adjust,
    estimate_poses,
    find_peaks,
    group,
    network_input,
    parse_maps,
    read_maps,
    smooth_logarithm,
)
from fairhuman_jax.keypoints.poses import MIRROR

SWAP = list(MIRROR["coco17"])
HEIGHT, WIDTH, SIGMA = 96, 128, 2.0
SMALL = BottomUpSettings(short_side=64, multiple=32)


def blobs(joints, height=HEIGHT, width=WIDTH, heat=0.8, sigma=SIGMA):
    """Heat maps [height, width, 17] of people [P, 17, 2 or 3]: the hottest of their Gaussians, a third column of 0 for
    missing joints."""
    y, x = np.mgrid[:height, :width]
    maps = np.zeros((height, width, 17), np.float32)
    for person in joints:
        for j, row in enumerate(person):
            if len(row) == 2 or row[2] > 0:
                spread = np.exp(-((x - row[0]) ** 2 + (y - row[1]) ** 2) / (2 * sigma**2))
                maps[..., j] = np.maximum(maps[..., j], heat * spread)
    return maps


def tag_maps(joints, values, height=HEIGHT, width=WIDTH, radius=6, background=40.0):
    """Tags [height, width, 17, 2]: the person's value in squares about its joints, with a little of its own in each."""
    rng = np.random.default_rng(3)
    maps = np.full((height, width, 17, 2), background, np.float32)
    for person, value in zip(joints, values, strict=True):
        for j, (x, y) in enumerate(np.rint(person[:, :2]).astype(int)):
            spot = slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1)
            maps[(*spot, j)] = value + rng.uniform(-0.1, 0.1, 2)
    return maps


def crowd(count, seed=0):
    """`count` people [17, 2] whose joints keep 16 pixels' distance from the same joints of others."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(10, 20, (17, 2))
    shift = np.array([(0, 0), (55, 5), (25, 50), (85, 55)])[:count]
    return (base + shift[:, None] + rng.uniform(-3, 3, (count, 17, 2))).astype(np.float32)


def nearest_order(found, joints):
    """Which found person is each of `joints`, by the nose."""
    return [int(np.argmin(np.linalg.norm(found[:, 0, :2] - person[0, :2], axis=1))) for person in joints]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_people_are_found_to_a_tenth_of_a_pixel_and_kept_apart(count):
    joints = crowd(count, seed=count)
    people, scores = parse_maps(blobs(joints), tag_maps(joints, 3.0 * np.arange(count)))
    assert people.shape == (count, 17, 3)
    order = nearest_order(people, joints)
    assert sorted(order) == list(range(count))
    assert np.abs(people[order, :, :2] - joints).max() < 0.1
    np.testing.assert_allclose(people[order, :, 2], 0.8, rtol=0.13)  # the pixel nearest to the top
    np.testing.assert_allclose(scores, people[..., 2].mean(axis=1), rtol=1e-6)


def test_order_of_people_and_of_tags_does_not_matter():
    joints = crowd(3)
    people, _ = parse_maps(blobs(joints), tag_maps(joints, [1.0, 4.0, 7.0]))
    others, _ = parse_maps(blobs(joints[::-1]), tag_maps(joints[[2, 0, 1]], [-3.0, 20.0, 9.0]))
    np.testing.assert_allclose(
        people[nearest_order(people, joints)], others[nearest_order(others, joints)], rtol=0, atol=1e-5
    )


def test_nobody():
    people, scores = parse_maps(np.full((8, 8, 17), 0.1, np.float32), np.zeros((8, 8, 17, 2), np.float32))
    assert people.shape == (0, 17, 3) and scores.shape == (0,)  # heat of exactly the least is no candidate


def test_thirty_people_and_their_cheapest_assignment():
    rng = np.random.default_rng(0)
    turn = 2 * np.pi * rng.permutation(34) / 34
    tags = 20 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    heat = np.linspace(0.9, 0.4, 34)
    candidates = [
        np.column_stack([np.arange(34), np.full(34, j), heat, tags + rng.uniform(-0.2, 0.2, (34, 2))])
        for j in range(17)
    ]
    shuffled = [rows[rng.permutation(34)[:30]].astype(np.float32) for rows in candidates]
    shuffled[0] = candidates[0][:30].astype(np.float32)
    people = group(shuffled, BottomUpSettings())
    assert len(people) > 30  # more people are begun, though joints go to the first thirty alone
    for person in people[:30]:
        known = person[person[:, 2] > 0]
        assert len(known) > 8 and len(set(known[:, 0])) == 1  # x is the number of the person


def test_assignment_has_the_least_total_cost():
    rng = np.random.default_rng(5)
    for _ in range(20):
        seeds = np.column_stack([np.zeros((3, 2)), rng.uniform(0.2, 1, 3), rng.uniform(0, 2, 3)])
        rows = np.column_stack([np.ones((3, 2)), rng.uniform(0.2, 1, 3), rng.uniform(0, 2, 3)])
        candidates = [np.zeros((0, 4), np.float32) for _ in range(17)]
        candidates[0], candidates[1] = seeds.astype(np.float32), rows.astype(np.float32)
        distance = np.abs(candidates[1][:, 3, None] - candidates[0][:, 3])
        cost = np.round(distance) * 100 - candidates[1][:, 2:3]
        total = {order: sum(cost[i, order[i]] for i in range(3)) for order in itertools.permutations(range(3))}
        # Orders of the same cost are told apart by nothing: the total over matched pairs decides.
        people = group(candidates, BottomUpSettings(tag_distance=100.0))
        assert len(people) == 3 and (people[:, 1, 2] > 0).all()
        chosen = sum(np.round(abs(p[1, 3] - p[0, 3])) * 100 - p[1, 2] for p in people)
        assert chosen == pytest.approx(min(total.values()), abs=1e-4)


def test_a_joint_with_a_distant_tag_begins_a_person():
    row = np.array([[5, 6, 0.9, 0.0]], np.float32)
    none = np.zeros((0, 4), np.float32)
    for tag, count in ((0.99, 1), (1.01, 2)):
        candidates = [row, row + np.float32([0, 0, 0, tag])] + [none] * 15
        assert len(group(candidates, BottomUpSettings())) == count


def test_hips_come_before_elbows():
    none = np.zeros((0, 4), np.float32)
    candidates = [none] * 17
    for joint, tag in ((7, 0.9), (11, 0.0), (12, -0.9)):
        candidates[joint] = np.array([[5, 6, 0.9, tag]], np.float32)
    people = group(candidates, BottomUpSettings())
    assert [np.flatnonzero(person[:, 2]).tolist() for person in people] == [[11, 12], [7]]


def test_of_two_candidates_for_one_place_the_hotter_gets_it():
    none = np.zeros((0, 4), np.float32)
    rows = np.array([[1, 1, 0.3, 0.1], [2, 2, 0.6, 0.4]], np.float32)
    people = group([np.array([[5, 6, 0.9, 0]], np.float32), rows] + [none] * 15, BottomUpSettings())
    np.testing.assert_array_equal(people[:, 1], rows[::-1])


def test_means_of_tags_follow_those_who_joined():
    none = np.zeros((0, 4), np.float32)
    # 0, .9 and 1.4: too far from the first tag, near enough to the mean of both.
    chain = [np.array([[0, 0, 0.9, tag]], np.float32) for tag in (0.0, 0.9, 1.4)]
    assert len(group(chain + [none] * 14, BottomUpSettings())) == 1


def test_peaks_are_the_largest_of_five_by_five_and_the_hottest_of_all():
    heat = np.zeros((20, 20, 17), np.float32)
    heat[4, 4, 0], heat[6, 6, 0], heat[4, 7, 0], heat[0, 19, 0] = 0.9, 0.8, 0.5, 0.3
    tags = np.arange(20 * 20 * 17, dtype=np.float32).reshape(20, 20, 17, 1)
    peaks = find_peaks(heat, tags, BottomUpSettings())[0]
    np.testing.assert_array_equal(peaks[:, :2], [(4, 4), (19, 0)])
    np.testing.assert_array_equal(peaks[:, 3], [tags[4, 4, 0, 0], tags[0, 19, 0, 0]])
    assert len(find_peaks(heat, tags, BottomUpSettings(people=1))[0]) == 1
    assert len(find_peaks(heat, tags, BottomUpSettings(least_heat=0.3))[0]) == 1


@pytest.mark.parametrize("at", [(31.5, 20.25), (30.1, 20.9), (0.3, 46.8), (63.0, 0.0)])
def test_a_newton_step_finds_the_top_of_a_gaussian(at):
    heat = blobs([[at] * 17], 48, 64)
    person = np.zeros((1, 17, 4), np.float32)
    person[0, :, :3] = *np.rint(np.array(at)), 0.8
    error = np.abs(adjust(person, smooth_logarithm(heat))[0, :, :2] - at)
    inside = 3 < at[0] < 60
    assert error.max() < (0.01 if inside else 0.35)  # across a border: the pixel itself


def test_no_step_to_a_top_that_is_far_away_and_none_for_missing_joints():
    heat = np.repeat(np.exp(0.1 * np.arange(16) - 0.0005 * np.arange(16) ** 2 - 2)[:, None], 17, axis=1)
    flat = np.broadcast_to(heat, (16, 16, 17)).astype(np.float32)  # along y not even a curvature
    person = np.zeros((1, 17, 4), np.float32)
    person[0, :9, :3] = 8, 8, 0.5
    for maps in (flat, flat.swapaxes(0, 1), np.full_like(flat, 0.5)):
        np.testing.assert_array_equal(adjust(person, smooth_logarithm(maps)), person)


def weak_joint(value):
    """Two people, the first one's left wrist of heat `value`; maps, tags and their joints."""
    joints = crowd(2, seed=7)
    heat = np.concatenate([blobs(joints)[..., :9], blobs(joints[1:])[..., 9:10], blobs(joints)[..., 10:]], axis=-1)
    heat[..., 9] = np.maximum(heat[..., 9], blobs(joints[:1], heat=value)[..., 9])
    return heat, tag_maps(joints, [0.0, 5.0]), joints


def test_a_missing_joint_is_looked_for_where_the_tags_are_its_persons():
    heat, tags, joints = weak_joint(0.06)
    without, scores = parse_maps(heat, tags, BottomUpSettings(refine=False))
    first = nearest_order(without, joints)[0]
    assert without[first, 9].tolist() == [0, 0, 0]
    people, same = parse_maps(heat, tags)
    np.testing.assert_array_equal(scores, same)  # found without it: 16 / 17 of the other's
    assert scores[first] < 0.96 * scores[1 - first]
    assert np.abs(people[first, 9, :2] - joints[0, 9]).max() < 0.8
    assert people[first, 9, 2] == pytest.approx(0.06, rel=0.13)
    # A quarter of a pixel towards the hotter neighbour.
    peak = np.rint(joints[0, 9])
    np.testing.assert_array_equal(people[first, 9, :2] - peak, np.where(joints[0, 9] > peak, 0.25, -0.25))
    others = [j for j in range(17) if j != 9]
    np.testing.assert_array_equal(people[:, others], without[:, others])


def test_on_the_originals_cpu_refinement_finds_nothing():
    heat, tags, joints = weak_joint(0.06)
    people, _ = parse_maps(heat, tags, compat="reference_cpu")
    assert people[nearest_order(people, joints)[0], 9].tolist() == [0, 0, 0]
    assert (parse_maps(heat, tags, compat="reference")[0][..., 2] > 0).all()


def test_maps_of_the_mirror_image_are_turned_back():
    joints = crowd(2)
    heat, tags = blobs(joints), tag_maps(joints, [0.0, 5.0])[..., 0]
    fine = np.stack([heat, heat[:, ::-1][..., SWAP]])
    coarse = np.concatenate([fine, np.stack([tags, tags[:, ::-1][..., SWAP]])], axis=-1)
    merged, both = read_maps(coarse, fine)
    np.testing.assert_allclose(merged, heat, rtol=0, atol=1e-6)
    assert both.shape == (HEIGHT, WIDTH, 17, 2)
    np.testing.assert_allclose(both, np.stack([tags, tags], axis=-1), rtol=0, atol=1e-4)
    alone, one = read_maps(coarse[:1], fine[:1])
    np.testing.assert_allclose(alone, heat, rtol=0, atol=1e-6)
    assert one.shape == (HEIGHT, WIDTH, 17, 1)


def test_mirrored_maps_give_mirrored_people():
    joints = crowd(3, seed=4)
    heat, tags = blobs(joints), tag_maps(joints, [0.0, 5.0, 9.0])
    people, _ = parse_maps(heat, tags)
    mirrored, _ = parse_maps(heat[:, ::-1][..., SWAP], tags[:, ::-1][:, :, SWAP])
    turned = mirrored[:, SWAP] * (-1, 1, 1) + (WIDTH - 1, 0, 0)
    assert np.abs(turned[nearest_order(turned, joints)] - people[nearest_order(people, joints)]).max() < 1e-3


@pytest.mark.parametrize(
    ("size", "wanted"), [((512, 512), (512, 512)), ((720, 1280), (512, 960)), ((4000, 1737), (1216, 512))]
)
def test_size_of_the_input(size, wanted):
    pixels, extent = network_input(np.zeros((*size, 3), np.uint8), BottomUpSettings())
    assert pixels.shape == (*wanted, 3) and pixels.dtype == np.float32
    short = int(np.argmin(size))
    assert extent[1 - short] == size[short] - 1  # corner to corner along the short side
    assert (wanted[0] - 1) / extent[1] == pytest.approx((wanted[1] - 1) / extent[0])  # and the same scale along both


def test_the_input_shows_the_picture_by_the_size_minus_one_rule():
    picture = np.stack([*np.meshgrid(2 * np.arange(100), 3 * np.arange(70)), np.full((70, 100), 255)], -1).astype(
        np.uint8
    )
    pixels, extent = network_input(picture, SMALL)
    assert pixels.shape == (64, 96, 3)
    plain = (pixels * STD + MEAN) * 255
    columns = np.linspace(0, extent[0], 96)
    inside = columns <= 99
    np.testing.assert_allclose(plain[30, inside, 0], 2 * columns[inside], atol=1e-3)
    np.testing.assert_allclose(plain[:, 30, 1], 3 * np.linspace(0, 69, 64), atol=1e-3)
    assert not inside[-1] and np.abs(plain[:, -1]).max() < 1e-3  # black beyond the picture
    same = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_allclose((network_input(same, SMALL)[0] * STD + MEAN) * 255, same, atol=1e-3)


def corner_to_corner(layer, size):
    """A layer [h, w] at another size, bilinear, corners upon corners."""
    for axis, count in enumerate(size):
        at = np.linspace(0, layer.shape[axis] - 1, count)
        layer = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, layer)
    return layer


def brightness(batch):
    """Stands for a network: every joint is where the picture is bright, and all tags are the same."""
    light = np.clip(batch[..., 1] * STD[1] + MEAN[1], 0, 1)
    height, width = light.shape[1:]
    fine, rough = (
        np.repeat([corner_to_corner(one, (height // k, width // k))[..., None] for one in light], 17, -1)
        for k in (2, 4)
    )
    return np.concatenate([rough, np.zeros_like(rough)], axis=-1), fine


def lit_picture(height, width, at, radius):
    """Grey picture with a Gaussian light at (x, y), pixel centres at +.5."""
    y, x = np.mgrid[:height, :width] + 0.5
    light = 230 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * radius**2))
    return np.repeat(np.rint(light)[..., None], 3, -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "at", "radius"),
    [
        ((64, 64), (40.3, 21.7), 6),
        ((50, 90), (60.2, 30.6), 5),
        ((200, 150), (49.5, 140.4), 14),
        ((32, 32), (12.6, 20), 3),
    ],
)
def test_key_points_are_pixels_of_the_picture_given(size, at, radius):
    (pose,) = estimate_poses(lit_picture(*size, at, radius), brightness, SMALL)
    assert np.abs(pose.keypoints[:, :2] - at).max() < 0.1 * max(1, min(size) / 64)
    assert pose.score == pytest.approx(0.87, abs=0.05) and pose.area < 0.1
    (published,) = estimate_poses(lit_picture(*size, at, radius), brightness, SMALL, compat="reference")
    np.testing.assert_allclose(published.keypoints, pose.keypoints - (0.5, 0.5, 0), atol=0.02)
    (single,) = estimate_poses(lit_picture(*size, at, radius), brightness, BottomUpSettings(64, 32, flip=False))
    np.testing.assert_allclose(single.keypoints, pose.keypoints, atol=0.02)


def test_a_mirrored_picture_gives_mirrored_points():
    picture = lit_picture(60, 60, (22.3, 31.2), 5)
    (pose,), (turned,) = (estimate_poses(view, brightness, SMALL) for view in (picture, picture[:, ::-1]))
    np.testing.assert_allclose(60 - turned.keypoints[:, 0], pose.keypoints[:, 0], atol=1e-3)


def test_the_original_looks_at_blue_for_red():
    seen = []

    def network(batch):
        seen.append(batch)
        return brightness(batch)

    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    estimate_poses(picture, network, SMALL)
    estimate_poses(picture, network, SMALL, compat="reference")
    ours, theirs = ((batch * STD + MEAN) * 255 for batch in seen)
    np.testing.assert_allclose(ours[0], picture, atol=1e-3)
    np.testing.assert_allclose(ours[1], picture[:, ::-1], atol=1e-3)
    np.testing.assert_allclose(theirs[0], picture[..., ::-1], atol=1e-3)


def test_people_come_by_score():
    joints = crowd(2)
    heat = np.maximum(blobs(joints[:1], heat=0.4), blobs(joints[1:]))
    maps = np.concatenate([heat, tag_maps(joints, [0.0, 5.0])[..., 0]], axis=-1)[None]
    poses = estimate_poses(
        np.zeros((192, 256, 3), np.uint8), lambda batch: (maps, heat[None]), BottomUpSettings(192, 64, flip=False)
    )
    assert poses[0].score > 1.5 * poses[1].score
    # The map has half the pixels and corners that fall upon those of the picture.
    np.testing.assert_allclose(poses[0].keypoints[:, :2], joints[1] * (255 / 127, 191 / 95) + 0.5, atol=0.25)
    assert poses[0].area == pytest.approx(np.ptp(joints[1] * 2.01, axis=0).prod(), rel=0.05)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((8, 8), np.uint8), "picture uint8 [8, 8]; expected uint8 [H, W, 3]"),
        (np.zeros((8, 8, 4), np.uint8), "picture uint8 [8, 8, 4]; expected"),
        (np.zeros((8, 8, 3), np.float32), "picture float32 [8, 8, 3]; expected"),
        (np.zeros((0, 8, 3), np.uint8), "picture uint8 [0, 8, 3]; expected"),
        (np.zeros((10, 90, 3), np.uint8), "picture of 10x90 (height x width): too narrow"),
    ],
)
def test_what_is_no_picture(picture, message):
    with pytest.raises(ValueError) as error:
        estimate_poses(picture, brightness, SMALL)
    assert str(error.value).startswith(message)


def test_maps_that_are_not_finite():
    with pytest.raises(ValueError, match="maps are not finite"):
        parse_maps(np.full((8, 8, 17), np.nan, np.float32), np.zeros((8, 8, 17, 1), np.float32))
