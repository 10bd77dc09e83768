"""Forward kinematics, arms by two-bone inverse kinematics and linear blend skinning."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairhuman_jax.data.people.gestures import ArmTarget, BodyFrame, arm_target
from fairhuman_jax.data.people.hands import SIDES, finger_rotations, hand_axes
from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.rotations import axis_angle, cross, euler, frame, twist_angle, unit
from fairhuman_jax.data.people.shape import Shaped, front, half_width, head_vertices, torso_vertices

LOWER_ARM_TWIST = {"lowerarm01": 0.25, "lowerarm02": 0.65}  # shares of the wrist's turn
SEAT_RADIUS = 0.10  # metres around the hips that rest on a seat


@dataclass(frozen=True, eq=False)
class Posed:
    """A posed person, float32, metres.

    `vertices` [V,3]; `bone_rotations` [77,3,3] world rotations relative to rest; `points` [92,3] bone heads,
    then extra points; `seat` [3] middle of the seat's top surface, None unless sitting.
    """

    vertices: np.ndarray
    bone_rotations: np.ndarray
    points: np.ndarray
    seat: np.ndarray | None


def forward_kinematics(pack: PeoplePack, joints: np.ndarray, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World rotations G_b = G_parent L_b [77,3,3] and heads p_b = p_parent + G_parent (h_b - h_parent).

    Returns float32 [77,3,3] and [77,3]. `joints` [>=77,3] rest heads, `local` [77,3,3] rotations
    in rest axes; the root's head stays where it is.
    """
    rotations = np.array(local, np.float32)
    heads = np.array(joints[: len(pack.parents)], np.float32)
    offset = heads - heads[pack.parents]
    for level in pack.levels[1:]:
        parent = pack.parents[level]
        heads[level] = heads[parent] + (rotations[parent] @ offset[level, :, None])[..., 0]
        rotations[level] = rotations[parent] @ rotations[level]
    return rotations, heads


@functools.lru_cache(maxsize=4)
def _dense_weights(pack: PeoplePack) -> np.ndarray:
    dense = np.zeros((len(pack.verts), len(pack.parents)), np.float32)
    np.add.at(dense, (np.arange(len(dense))[:, None], pack.weight_bones), pack.weights)
    return dense


def skin(pack: PeoplePack, vertices: np.ndarray, joints: np.ndarray, rotations: np.ndarray, heads: np.ndarray):
    """Linear blend skinning x' = sum_k w_k (G_k (x - h_k) + p_k), float32 [V,3]."""
    shift = heads - (rotations @ joints[: len(heads), :, None])[..., 0]
    blended = _dense_weights(pack) @ np.concatenate([rotations.reshape(-1, 9), shift], 1)
    turned = np.matmul(blended[:, :9].reshape(-1, 3, 3), vertices[:, :, None])[..., 0]
    return turned + blended[:, 9:]


def carry_points(pack: PeoplePack, joints: np.ndarray, rotations: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Bone heads followed by the extra points p_b + G_b (point - h_b), float32 [92,3]."""
    b = pack.point_bones
    extra = heads[b] + (rotations[b] @ (joints[len(heads) :] - joints[b])[..., None])[..., 0]
    return np.concatenate([heads, extra])


def two_bone_ik(
    shoulder: np.ndarray, target: np.ndarray, upper: float, lower: float, pole: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Elbow and wrist [3] by the law of cosines, the elbow bent towards `pole`.

    cos a = (l1^2 + D^2 - l2^2) / (2 l1 D) with D clipped to [1.15 |l1 - l2| + .02, .995 (l1 + l2)] m.
    """
    to_target = target - shoulder
    distance = float(np.sqrt(to_target @ to_target))
    u = to_target / max(distance, 1e-6)
    d = min(max(distance, 1.15 * abs(upper - lower) + 0.02), 0.995 * (upper + lower))
    bend = unit(pole - (pole @ u) * u)
    cosine = min(max((upper**2 + d**2 - lower**2) / (2 * upper * d), -1.0), 1.0)
    sine = (1 - cosine**2) ** 0.5
    elbow = shoulder + np.float32(upper * cosine) * u + np.float32(upper * sine) * bend
    return elbow.astype(np.float32), (shoulder + np.float32(d) * u).astype(np.float32)


def leg_rotations(
    pack: PeoplePack, joints: np.ndarray, rotations: Mapping[str, Sequence[float]], splay: Sequence[float]
):
    """Thigh rotations {bone: [3,3]}: the rest splay about y is reduced to `splay` degrees, then Rz Ry Rx."""
    out = {}
    for i, side in enumerate(SIDES):
        name = f"upperleg01.{side}"
        leg = joints[pack.bone[f"foot.{side}"]] - joints[pack.bone[name]]
        sign = 1.0 if i == 0 else -1.0
        turn = np.arctan2(leg[0], -leg[2]) - sign * np.deg2rad(splay[i])
        out[name] = euler(rotations.get(name, (0, 0, 0))) @ axis_angle(np.array([0, 1, 0], np.float32), turn)
    return out


def body_frame(pack: PeoplePack, shaped: Shaped, rotations: np.ndarray, heads: np.ndarray, identity: Mapping[str, Any]):
    """What the arm gestures refer to, from the posed trunk and the shaped rest body."""
    joints, bone = shaped.joints, pack.bone
    pairs = {
        k: [bone[f"{k}.{s}"] for s in SIDES] for k in ("upperarm01", "lowerarm01", "wrist", "upperleg01", "lowerleg01")
    }
    chain = joints[[pairs["upperarm01"], pairs["lowerarm01"], pairs["wrist"]]]
    segments = chain[1:] - chain[:-1]
    root, pelvis, head = bone["root"], bone["pelvis.L"], bone["head"]
    torso = torso_vertices(pack)
    hip_height = float(joints[pairs["upperleg01"], 2].mean())
    belly = np.array([0, front(shaped, torso, hip_height), hip_height], np.float32)
    weight, woman = float(identity["weight"]), float(identity["gender"]) > 0.5
    return BodyFrame(
        shoulders=heads[pairs["upperarm01"]],
        arm_lengths=np.sqrt((segments**2).sum(-1)).sum(0),
        hips=heads[pairs["upperleg01"]],
        knees=heads[pairs["lowerleg01"]],
        chest_rotation=rotations[bone["spine01"]],
        head_rotation=rotations[head],
        root_rotation=rotations[root],
        head=heads[head],
        pelvis=heads[pelvis],
        clasp=heads[root] + rotations[root] @ (belly - joints[root]),
        weight=weight,
        bulk=0.05 * weight + (0.03 if woman else 0.0),
        torso_half_width=half_width(shaped, torso, float(joints[pelvis, 2]) + 0.09),
        head_half_width=half_width(shaped, head_vertices(pack), float(joints[head, 2]) - 0.115),
    )


@dataclass(frozen=True)
class _Arm:
    """World rotations of one arm's bones and the wrist's turn about the forearm in radians."""

    upper: np.ndarray
    lower: np.ndarray
    wrist: np.ndarray
    twist: float
    axis: np.ndarray


def _solve_arm(pack: PeoplePack, joints: np.ndarray, shoulder: np.ndarray, target: ArmTarget, side: int, axes) -> _Arm:
    rest = joints[[pack.bone[f"{b}.{SIDES[side]}"] for b in ("upperarm01", "lowerarm01", "wrist")]]
    rest_upper, rest_lower = rest[1] - rest[0], rest[2] - rest[1]
    upper_length, lower_length = (float(np.sqrt(v @ v)) for v in (rest_upper, rest_lower))
    elbow, wrist = two_bone_ik(shoulder, target.wrist, upper_length, lower_length, target.pole)
    # The rest elbow is bent, so the bend normal exists there; targets stay short of a straight arm.
    rest_normal = cross(rest_upper, rest_lower)
    normal = cross(elbow - shoulder, wrist - elbow)
    upper = frame(elbow - shoulder, normal) @ frame(rest_upper, rest_normal).T
    lower = frame(wrist - elbow, normal) @ frame(rest_lower, rest_normal).T
    hand = frame(target.direction, target.palm) @ frame(axes[0][side], axes[1][side]).T
    axis = rest_lower / np.float32(lower_length)
    return _Arm(upper, lower, hand, twist_angle(lower.T @ hand, axis), axis)


def _local_rotations(pack: PeoplePack, joints: np.ndarray, pose: Mapping[str, Any]) -> np.ndarray:
    local = np.tile(np.eye(3, dtype=np.float32), (len(pack.parents), 1, 1))
    rotations = pose["rotations"]
    if rotations:
        local[[pack.bone[name] for name in rotations]] = euler(np.asarray(list(rotations.values()), np.float32))
    for name, rotation in leg_rotations(pack, joints, rotations, pose["splay"]).items():
        local[pack.bone[name]] = rotation
    shapes = (pose["arms"]["left"]["shape"], pose["arms"]["right"]["shape"])
    jitter = np.asarray(pose["fingers"], np.float32).reshape(2, 5, 3, 3)
    bones, fingers = finger_rotations(pack, joints, shapes, jitter)
    local[bones] = fingers
    return local


def pose_body(pack: PeoplePack, shaped: Shaped, spec: Mapping[str, Any]) -> Posed:
    """Poses a shaped person by `spec["pose"]` (arms, legs, trunk, fingers; see `sample_spec`).

    Arms take prescribed world rotations, everything else G_b = G_parent L_b. The forearm's twist bones turn
    about the elbow-wrist axis without moving the wrist, so targets are met exactly.
    """
    joints, pose, bone = shaped.joints, spec["pose"], pack.bone
    local = _local_rotations(pack, joints, pose)
    rotations, heads = forward_kinematics(pack, joints, local)
    body = body_frame(pack, shaped, rotations, heads, spec["identity"])
    axes = hand_axes(pack, joints)
    arms = []
    for side, name in enumerate(("left", "right")):
        given = pose["arms"][name]
        target = arm_target(given["gesture"], body, side, given["numbers"], given["swing"])
        arm = _solve_arm(pack, joints, body.shoulders[side], target, side, axes)
        arms.append(arm)
        upper, lower, wrist = (bone[f"{b}.{SIDES[side]}"] for b in ("upperarm01", "lowerarm01", "wrist"))
        local[upper] = rotations[pack.parents[upper]].T @ arm.upper
        local[lower] = arm.upper.T @ arm.lower
        local[wrist] = arm.lower.T @ arm.wrist
    rotations, heads = forward_kinematics(pack, joints, local)
    for side, arm in zip(SIDES, arms, strict=True):
        for name, share in LOWER_ARM_TWIST.items():
            rotations[bone[f"{name}.{side}"]] = arm.lower @ axis_angle(arm.axis, share * arm.twist)
    vertices = skin(pack, shaped.vertices, joints, rotations, heads)
    seat = _seat(pack, vertices, body) if pose["legs"] == "sitting" else None
    return Posed(vertices, rotations, carry_points(pack, joints, rotations, heads), seat)


def _seat(pack: PeoplePack, vertices: np.ndarray, body: BodyFrame) -> np.ndarray:
    """Middle of the hips at the height of the lowest torso or thigh vertex near them."""
    hips = body.hips.mean(0)
    near = vertices[pack.part_vertices(0)]
    near = near[np.abs(near[:, 1] - hips[1]) < SEAT_RADIUS]
    near = near[np.abs(near[:, 0] - hips[0]) < 2 * SEAT_RADIUS]
    near = near[np.abs(near[:, 2] - hips[2]) < 2 * SEAT_RADIUS]
    return np.array([hips[0], hips[1], near[:, 2].min()], np.float32)
