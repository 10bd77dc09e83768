from __future__ import annotations

import copy

import numpy as np
import pytest

from fairhuman_jax.data.people.gestures import ARM_GESTURES
from fairhuman_jax.data.people.hands import HAND_SHAPES, finger_rotations, hand_axes
from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.posing import body_frame, carry_points, forward_kinematics, pose_body, skin, two_bone_ik
from fairhuman_jax.data.people.rotations import axis_angle, euler, rotation_vector, twist_angle
from fairhuman_jax.data.people.shape import shape_body
from fairhuman_jax.data.people.spec import GESTURES, sample_spec

SPECS = [sample_spec(7, i) for i in range(40)]


@pytest.fixture(scope="module")
def pack() -> PeoplePack:
    return PeoplePack.load()


def shaped_of(pack, spec):
    return shape_body(pack, spec["identity"], spec["expression"]["coefficients"])


def identity_pose():
    return np.tile(np.eye(3, dtype=np.float32), (77, 1, 1))


def test_identity_rotations_return_the_shaped_person(pack):
    shaped = shaped_of(pack, SPECS[0])
    rotations, heads = forward_kinematics(pack, shaped.joints, identity_pose())
    np.testing.assert_allclose(skin(pack, shaped.vertices, shaped.joints, rotations, heads), shaped.vertices, atol=2e-6)
    np.testing.assert_allclose(carry_points(pack, shaped.joints, rotations, heads), shaped.joints, atol=1e-6)


def test_turning_a_parent_moves_only_its_children(pack):
    shaped = shaped_of(pack, SPECS[0])
    local = identity_pose()
    local[pack.bone["lowerleg01.L"]] = euler([50, 0, 0])
    _, heads = forward_kinematics(pack, shaped.joints, local)
    moved = np.linalg.norm(heads - shaped.joints[:77], axis=1)
    names = pack.names["bones"]
    assert {n for n, d in zip(names, moved, strict=True) if d > 1e-5} == {"lowerleg02.L", "foot.L"}


def test_root_rotation_is_rigid(pack):
    by_gesture = {s["pose"]["gesture"]: s for s in (sample_spec(8, i) for i in range(300))}
    assert set(by_gesture) == set(GESTURES)
    for spec in by_gesture.values():
        shaped = shaped_of(pack, spec)
        plain = pose_body(pack, shaped, spec)
        turned_spec = copy.deepcopy(spec)
        turned_spec["pose"]["rotations"]["root"] = [10.0, -20.0, 70.0]
        turned = pose_body(pack, shaped, turned_spec)
        rotation, root = euler([10, -20, 70]), shaped.joints[pack.bone["root"]]
        np.testing.assert_allclose(turned.vertices, (plain.vertices - root) @ rotation.T + root, atol=2e-5)
        np.testing.assert_allclose(turned.points, (plain.points - root) @ rotation.T + root, atol=2e-5)


def test_bone_lengths_never_change(pack):
    owner = np.concatenate([pack.parents[1:], pack.point_bones])
    child = np.arange(1, 92)
    for spec in SPECS:
        shaped = shaped_of(pack, spec)
        posed = pose_body(pack, shaped, spec)
        rest = np.linalg.norm(shaped.joints[child] - shaped.joints[owner], axis=1)
        np.testing.assert_allclose(np.linalg.norm(posed.points[child] - posed.points[owner], axis=1), rest, atol=1e-5)


def test_rotations_are_rotations_and_results_float32(pack):
    for spec in SPECS[:10]:
        posed = pose_body(pack, shaped_of(pack, spec), spec)
        r = posed.bone_rotations
        np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.broadcast_to(np.eye(3), r.shape), atol=1e-5)
        assert np.linalg.det(r).min() > 0.999
        assert posed.vertices.dtype == posed.points.dtype == r.dtype == np.float32


@pytest.mark.parametrize("side", [0, 1])
def test_index_curl_goes_towards_the_palm(pack, side):
    letter = "LR"[side]
    joints = shaped_of(pack, SPECS[0]).joints
    local = identity_pose()
    bones, _ = finger_rotations(pack, joints, ("relaxed", "relaxed"), np.zeros(3))
    knuckle = bones[side, 1, 0]
    straight = joints[pack.point[f"finger2-2.{letter}"]] - joints[knuckle]
    palm = hand_axes(pack, joints)[1][side]
    axis = np.cross(straight, palm)
    # The same sense as the hand shapes': a fist turns the knuckle about this axis by a positive angle.
    fist = finger_rotations(pack, joints, ("fist", "fist"), np.zeros(3))[1][side, 1, 0]
    assert twist_angle(fist, axis / np.linalg.norm(axis)) > np.deg2rad(60)
    local[knuckle] = axis_angle(axis / np.linalg.norm(axis), np.pi / 2)
    rotations, heads = forward_kinematics(pack, joints, local)
    tip = pack.point[f"finger2-tip.{letter}"]
    travel = (carry_points(pack, joints, rotations, heads)[tip] - joints[tip]) @ palm
    assert travel > 0.03
    # Palms of the hanging hands look at each other.
    assert palm[0] * (1 if side == 0 else -1) < 0


def test_fist_is_closed_and_open_hand_is_open(pack):
    spec = copy.deepcopy(SPECS[0])
    shaped = shaped_of(pack, spec)
    spread = {}
    for name in HAND_SHAPES:
        spec["pose"]["arms"] = {
            s: {"gesture": "sign", "shape": name, "numbers": [0.5] * 6, "swing": 0.0} for s in ("left", "right")
        }
        spec["pose"]["fingers"] = [[0.0] * 3] * 30
        points = pose_body(pack, shaped, spec).points
        spread[name] = [
            np.linalg.norm(points[pack.point[f"finger3-tip.{s}"]] - points[pack.bone[f"wrist.{s}"]]) for s in "LR"
        ]
        if name == "ok":
            gap = points[pack.point["finger1-tip.L"]] - points[pack.point["finger2-tip.L"]]
            assert np.linalg.norm(gap) < 0.03
    assert max(spread["fist"]) < 0.6 * min(spread["open"])
    assert min(spread["peace"]) > 0.9 * max(spread["flat"])


def test_reachable_targets_are_reached_and_far_ones_clipped():
    rng = np.random.default_rng(0)
    shoulder = np.float32([0.17, 0, 0.5])
    upper, lower = 0.24, 0.26
    for _ in range(50):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        pole = rng.normal(size=3)
        target = (shoulder + rng.uniform(0.08, 0.49) * direction).astype(np.float32)
        elbow, wrist = two_bone_ik(shoulder, target, upper, lower, pole)
        assert np.linalg.norm(wrist - target) < 1e-3
        assert np.linalg.norm(elbow - shoulder) == pytest.approx(upper, abs=1e-5)
        assert np.linalg.norm(wrist - elbow) == pytest.approx(lower, abs=1e-5)
        u = direction
        assert (elbow - shoulder) @ (pole - (pole @ u) * u) > 0
        _, far = two_bone_ik(shoulder, shoulder + np.float32(3) * direction, upper, lower, pole)
        assert np.linalg.norm(far - shoulder) == pytest.approx(0.995 * (upper + lower), abs=1e-5)


def test_posed_wrists_meet_their_targets(pack):
    """Twisting the forearm must not move the wrist away from where the gesture put it."""
    spec = copy.deepcopy(SPECS[1])
    shaped = shaped_of(pack, spec)
    for side in ("left", "right"):
        spec["pose"]["arms"][side] = {
            "gesture": "presenting",
            "shape": "open",
            "numbers": [0.5] * 6,
            "swing": 0.0,
        }
    posed = pose_body(pack, shaped, spec)
    body = body_frame(pack, shaped, posed.bone_rotations, posed.points[:77], spec["identity"])
    for i, letter in enumerate("LR"):
        offset = np.float32([0.35 * (1 - 2 * i), -0.55, -0.25]) * body.arm_lengths[i]
        target = body.shoulders[i] + body.chest_rotation @ offset
        assert np.linalg.norm(posed.points[pack.bone[f"wrist.{letter}"]] - target) < 1e-3


def test_every_gesture_poses_both_sides_as_mirror_images(pack):
    """Without random angles and with a symmetric body, right is left mirrored."""
    spec = copy.deepcopy(SPECS[0])
    spec["identity"]["face"] = [0.0] * 16
    spec["pose"] |= {"rotations": {}, "splay": [2.0, 2.0], "fingers": [[0.0] * 3] * 30, "legs": "standing"}
    shaped = shape_body(pack, spec["identity"])
    left = [i for n, i in pack.point.items() if n.endswith(".L")]
    right = [i for n, i in pack.point.items() if n.endswith(".R")]
    for name in ARM_GESTURES:
        arm = {"gesture": name, "shape": "relaxed", "numbers": [0.3] * 6, "swing": 0.0}
        spec["pose"]["arms"] = {"left": arm, "right": arm}
        points = pose_body(pack, shaped, spec).points
        assert np.isfinite(points).all()
        np.testing.assert_allclose(points[left], points[right] * [-1, 1, 1], atol=4e-3, err_msg=name)


def test_sitting_has_a_seat_below_the_hips(pack):
    sitting = [s for s in (sample_spec(9, i) for i in range(120)) if s["pose"]["gesture"] == "sitting"]
    assert sitting
    for spec in sitting:
        posed = pose_body(pack, shaped_of(pack, spec), spec)
        hip, knee = (posed.points[pack.bone[f"{b}.L"]] for b in ("upperleg01", "lowerleg01"))
        assert knee[1] < hip[1] - 0.25 and abs(knee[2] - hip[2]) < 0.2
        assert 0.04 < hip[2] - posed.seat[2] < 0.3


def test_rotation_helpers():
    axis = np.float32([1, 2, -2]) / 3
    for angle in (-3.0, -0.4, 0.0, 1.3, 3.0):
        assert twist_angle(axis_angle(axis, angle), axis) == pytest.approx(angle, abs=1e-4)
    np.testing.assert_allclose(euler([-90, 0, 0]) @ [0, 0, -1], [0, -1, 0], atol=1e-6)
    np.testing.assert_allclose(rotation_vector(np.zeros(3, np.float32)), np.eye(3), atol=1e-7)
