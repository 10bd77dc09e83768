"""Painted clothes and hair: signed distance fields on the canonical body and the inflation they cause.

All fields are positive inside and in metres of the canonical (base-mesh) position, so they follow shape and
pose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairhuman_jax.data.people import palette
from fairhuman_jax.data.people.pack import BODY, FOOT, HAND_L, HAND_R, HEAD, SKIRT

SHOULDER = np.array([0.168, -0.015, 0.525])
ELBOW = np.array([0.313, -0.013, 0.349])
WRIST = np.array([0.431, -0.176, 0.245])
HIP = np.array([0.110, -0.012, 0.049])
KNEE = np.array([0.158, -0.032, -0.369])
ANKLE = np.array([0.220, 0.001, -0.745])
ELSEWHERE = -1.0
SHOE_HEIGHT = -0.725
# Canonical hairline: height z over depth y.
HAIRLINE_Y = np.array([-0.16, -0.125, -0.105, -0.06, -0.045, -0.015, 0.03, 0.06], dtype=np.float32)
HAIRLINE_Z = np.array([0.806, 0.800, 0.785, 0.742, 0.71, 0.69, 0.655, 0.64], dtype=np.float32)
HAIR_VOLUME = {"bald": 0.0, "short": 0.012, "buzzed": 0.003, "curly": 0.026, "bob": 0.018, "long": 0.012}
CROWN = 0.60  # above it the body may carry hair
HANGING = ("bob", "long")
LOWEST_HAIR = {"long": 0.40}
INFLATION_EDGE = 0.006


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, t^2 (3 - 2t) between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _along(points: np.ndarray, joints: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Position [n] of points [n, 3] along a two-segment chain: 0, 1, 2 at its joints, linear beyond both
    ends."""
    gaps, places = [], []
    for k in range(2):
        start, step = joints[k], joints[k + 1] - joints[k]
        t = (points - start) @ step / (step @ step)
        gaps.append(np.linalg.norm(points - start - np.clip(t, 0, 1)[:, None] * step, axis=1))
        places.append(np.minimum(t, 1) if k == 0 else np.maximum(t, 0) + 1)
    return np.where(gaps[1] < gaps[0], places[1], places[0])


@dataclass(frozen=True)
class BodyFields:
    """Per-vertex fields that no draw changes: `arm`, `leg` [V] (0, 1, 2 at the joints, -1 elsewhere),
    `hand` [V] in 0..1, `foot`, `head`, `may_grow` (where hair can be), `skirt` [V] bool, `normals` [V, 3]
    of the mean adult at rest."""

    arm: np.ndarray
    leg: np.ndarray
    hand: np.ndarray
    foot: np.ndarray
    head: np.ndarray
    may_grow: np.ndarray
    skirt: np.ndarray
    normals: np.ndarray


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted unit normals float32 [V, 3]."""
    corners = vertices[faces]
    ab, ac = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = np.empty_like(ab)
    for k, (i, j) in enumerate(((1, 2), (2, 0), (0, 1))):
        normal[:, k] = ab[:, i] * ac[:, j] - ab[:, j] * ac[:, i]
    flat, count = faces.ravel(), len(vertices)
    total = np.stack([np.bincount(flat, np.repeat(normal[:, k], 3), count) for k in range(3)], axis=1)
    length = np.sqrt(np.einsum("ij,ij->i", total, total))
    return (total / np.maximum(length, 1e-20)[:, None]).astype(np.float32)


def body_fields(
    canon: np.ndarray, vertices: np.ndarray, faces: np.ndarray, face_part: np.ndarray, arm_weight: np.ndarray
) -> BodyFields:
    """Fields of a pack; `arm_weight` [V] is each vertex's skinning weight on arm and hand bones."""
    count = len(canon)
    parts = {p: np.bincount(faces[face_part == p].ravel(), minlength=count) > 0 for p in range(11)}
    mirrored = np.abs(canon) * [1, 0, 0] + canon * [0, 1, 1]
    share = smoothstep(0.15, 0.45, arm_weight)
    arm = ELSEWHERE + share * (_along(mirrored, (SHOULDER, ELBOW, WRIST)) - ELSEWHERE)
    leg = np.where((canon[:, 2] < 0.02) & (arm_weight < 0.3), _along(mirrored, (HIP, KNEE, ANKLE)), ELSEWHERE)
    hands = parts[HAND_L] | parts[HAND_R]
    hand = np.where(hands, np.where(parts[BODY], 0.5, 1.0), 0.0)
    return BodyFields(
        arm=arm.astype(np.float32),
        leg=leg.astype(np.float32),
        hand=hand.astype(np.float32),
        foot=parts[FOOT],
        head=parts[HEAD],
        may_grow=(parts[HEAD] | parts[BODY]) & (arm_weight < 0.3),
        skirt=parts[SKIRT],
        normals=vertex_normals(vertices, faces),
    )


def top_field(canon: np.ndarray, arm: np.ndarray, top: palette.Top, hem: float) -> np.ndarray:
    """Upper garment [n] at canonical points [n, 3] with their arm coordinate [n]."""
    z = canon[:, 2]
    # A radius about the neck axis, not a height alone: shoulders differ between people.
    radius = np.hypot(canon[:, 0], canon[:, 1] + 0.012)
    neck = np.minimum(np.maximum(radius - top.neck_radius, top.neck_height - z), 0.60 - z)
    return np.minimum(np.minimum(neck, z - hem), (top.sleeve - arm) / 4)


def bottom_field(canon: np.ndarray, leg: np.ndarray, arm: np.ndarray, leg_hem: float, hem: float) -> np.ndarray:
    """Lower garment [n]; hands hang beside the hips in no canonical position, but arms are excluded all the
    same."""
    field = np.minimum(0.4 * (leg_hem - leg), hem + 0.005 - canon[:, 2])
    return np.where(arm > ELSEWHERE + 0.5, -0.05, field)


def shoe_field(canon: np.ndarray, foot: np.ndarray) -> np.ndarray:
    """Shoes [n]: the foot part and everything below the ankle."""
    low = SHOE_HEIGHT - canon[:, 2]
    return np.where(foot, np.maximum(low, 0.01), low)


def hairline(y: np.ndarray, shift: float) -> np.ndarray:
    """Height z of the hairline at canonical depth y; the part in front of the ears moves by `shift`."""
    height = np.interp(y, HAIRLINE_Y, HAIRLINE_Z).astype(np.float32)
    return height + shift * smoothstep(-0.05, -0.09, y) if shift else height


def is_ear(canon: np.ndarray) -> np.ndarray:
    """Canonical points [n, 3] on an ear (bool [n])."""
    x, y, z = np.abs(canon[:, 0]), canon[:, 1], canon[:, 2]
    return (x > 0.0705) & (y > -0.075) & (y < 0) & (z > 0.66) & (z < 0.758)


def hair_field(canon: np.ndarray, shift: float, style: str = "short") -> np.ndarray:
    """Signed distance [n] (m) into the hair. Bob and long hair cover the ears and hang to the jaw, long
    hair falls on over neck and back; the other styles end at the hairline and spare the ears."""
    x, y, z = np.abs(canon[:, 0]), canon[:, 1], canon[:, 2]
    line = hairline(y, shift)
    if style not in HANGING:
        return np.where(is_ear(canon), np.float32(-0.05), np.minimum(z - line, 4 * (z - CROWN)))
    # Behind the cheek the hair hangs down past the ear, receding from temple to jaw.
    behind = y + 0.080 - 0.42 * np.clip(0.745 - z, 0, 0.1)
    field = np.minimum(np.maximum(z - line, np.minimum(behind, z - 0.632)), 4 * (z - CROWN))
    if style == "long":
        ends = LOWEST_HAIR["long"] + 0.012 * np.sin(130 * canon[:, 0]) + 1.5 * np.maximum(x - 0.05, 0)
        front = y + 0.028 - 1.4 * np.clip(0.575 - z, 0, 0.045)
        field = np.maximum(field, np.minimum(np.minimum(front, z - ends), 0.105 - x))
    return field


def hair_offset(canon: np.ndarray, normals: np.ndarray, field: np.ndarray, style: str) -> np.ndarray:
    """Displacement [n, 3] (m) of a hair style at canonical points with rest normals [n, 3] and hair field
    [n]."""
    inside = smoothstep(-0.004, 0.02, field)
    amount = HAIR_VOLUME[style] * inside
    x, y, z = canon.T
    if style == "curly":
        amount = amount * (1 + 0.35 * np.sin(190 * x) * np.sin(170 * y + 1) * np.sin(180 * z))
    if style not in HANGING:
        return amount[:, None] * normals
    low = smoothstep(0.80, 0.74, z)
    amount = amount + inside * low * (0.018 if style == "bob" else 0.014 - 0.008 * smoothstep(0.56, 0.53, z))
    offset = amount[:, None] * normals
    # Ears vanish under hanging hair: press them flat and lift them with their surroundings.
    ears = np.flatnonzero(is_ear(canon * np.array([1.03, 1, 1], np.float32)))
    side = np.sign(x[ears])
    offset[ears] = 0
    offset[ears, 0] = side * (0.068 - np.abs(x[ears]) + amount[ears])
    return offset


@dataclass(frozen=True)
class Wardrobe:
    """Fields of one outfit per vertex: `top`, `bottom`, `shoe` [V] (positive inside), `offset` [V, 3] (m at
    rest), `skirt_hem` (canonical m) or None when no skirt is drawn, `strips`: whether hair strips are
    drawn."""

    top: np.ndarray
    bottom: np.ndarray
    shoe: np.ndarray
    offset: np.ndarray
    skirt_hem: float | None
    strips: bool


def dress(canon: np.ndarray, fields: BodyFields, spec: dict) -> Wardrobe:
    """Clothes and hair of a spec on the canonical vertices [V, 3]."""
    outfit, person = spec["outfit"], spec["identity"]
    top, bottom = palette.TOP_GARMENTS[outfit["top"]], palette.BOTTOM_GARMENTS[outfit["bottom"]]
    sitting = spec["pose"]["legs"] == "sitting"
    hem = palette.TOP_HEM if bottom.skirt_hem is None and not sitting else palette.TOP_HEM_OVER_SKIRT
    # A shell of skirt cannot follow lifted legs, so a sitting skirt is painted on the thighs instead.
    leg_hem = 1.08 if sitting and bottom.skirt_hem is not None else bottom.leg_hem
    tops = top_field(canon, fields.arm, top, hem)
    bottoms = bottom_field(canon, fields.leg, fields.arm, leg_hem, hem)
    shoes = shoe_field(canon, fields.foot)
    tops[fields.head], bottoms[fields.head] = -0.05, -0.05
    edge = INFLATION_EDGE
    lift = np.maximum(top.loose * smoothstep(-edge, edge, tops), bottom.loose * smoothstep(-edge, edge, bottoms))
    lift = np.maximum(lift, palette.SHOE_LOOSE * smoothstep(-edge, edge, shoes))
    lift[fields.skirt] = bottom.loose
    offset = lift[:, None].astype(np.float32) * fields.normals
    style = person["hair_style"]
    crown = np.flatnonzero((canon[:, 2] > LOWEST_HAIR.get(style, CROWN)) & fields.may_grow)
    hair = hair_field(canon[crown], person["hairline_shift"], style)
    offset[crown] += hair_offset(canon[crown], fields.normals[crown], hair, style)
    skirt_hem = None if sitting else bottom.skirt_hem
    return Wardrobe(tops, bottoms, shoes, offset, skirt_hem, style == "long")
