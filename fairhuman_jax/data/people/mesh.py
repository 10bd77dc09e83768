"""The drawable body: dressed and posed vertices, the faces to draw, and per-vertex attributes for
painting."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fairhuman_jax.data.people import pack as parts
from fairhuman_jax.data.people.garments import BodyFields, Wardrobe, body_fields, smoothstep, vertex_normals
from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.surface import ATTRIBUTES, STOOL

ARM_BONES = ("upperarm", "lowerarm", "wrist", "metacarpal", "finger")
SMOOTHINGS = 6
STOOL_HALF_WIDTH, STOOL_HALF_DEPTH = 0.19, 0.17


@dataclass(frozen=True)
class Static:
    """What depends on the pack alone: `fields`, `palm` [V] (0..1), smoothing of the shoes (`foot` rows =
    `smooth` @ `support` rows), and the drawn (faces, parts) by (hair strips, skirt)."""

    fields: BodyFields
    palm: np.ndarray
    foot: np.ndarray
    support: np.ndarray
    smooth: np.ndarray
    drawn: dict[tuple[bool, bool], tuple[np.ndarray, np.ndarray]]


def _shoe_smoothing(pack: PeoplePack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the foot vertices after six averagings over neighbours: (foot ids, support ids, matrix)."""
    foot = np.flatnonzero(pack.part_vertices(parts.FOOT))
    near = pack.faces[np.isin(pack.faces, foot).any(axis=1)]
    support = np.unique(near)
    place = np.full(len(pack.verts), -1)
    place[support] = np.arange(len(support))
    links = np.zeros((len(support), len(support)), dtype=np.float32)
    local = place[near]
    for i, j in ((0, 1), (1, 2), (2, 0)):
        links[local[:, i], local[:, j]] = 1
        links[local[:, j], local[:, i]] = 1
    step = links / links.sum(axis=1, keepdims=True)
    fixed = np.setdiff1d(np.arange(len(support)), place[foot])
    step[fixed] = 0
    step[fixed, fixed] = 1
    return foot, support, np.linalg.matrix_power(step, SMOOTHINGS)[place[foot]]


def _drawn(pack: PeoplePack) -> dict[tuple[bool, bool], tuple[np.ndarray, np.ndarray]]:
    y, z = pack.canon[:, 1], pack.canon[:, 2]
    # Front strips would hang over the face, side strips show as ribbons.
    aside = ((y > -0.01) & (z > 0.40))[pack.faces].all(axis=1)
    strip, skirt = pack.face_part == parts.HAIR, pack.face_part == parts.SKIRT
    out = {}
    for strips in (False, True):
        for skirts in (False, True):
            keep = (~strip | (strips & aside)) & (~skirt | skirts)
            out[strips, skirts] = (np.ascontiguousarray(pack.faces[keep]), pack.face_part[keep])
    return out


@functools.lru_cache(maxsize=4)
def static(pack: PeoplePack) -> Static:
    """Derived arrays of a pack, computed once."""
    arm = np.array([name.startswith(ARM_BONES) for name in pack.names["bones"]])
    arm_weight = (pack.weights * arm[pack.weight_bones]).sum(axis=1)
    foot, support, smooth = _shoe_smoothing(pack)
    rest = pack.verts.copy()
    rest[foot] = smooth @ rest[support]
    fields = body_fields(pack.canon, rest, pack.faces, pack.face_part, arm_weight)
    wrist, index, little = (pack.joints[pack.point[f"{n}.L"]] for n in ("wrist", "finger2-1", "finger5-1"))
    inwards = np.cross(index - wrist, little - wrist)
    inwards *= -np.sign(inwards[0]) / np.linalg.norm(inwards)
    mirror = np.where(pack.canon[:, :1] > 0, [1, 1, 1], [-1, 1, 1])
    palm = (fields.hand > 0) * smoothstep(-0.1, 0.5, (fields.normals * mirror) @ inwards)
    return Static(fields, palm.astype(np.float32), foot, support, smooth, _drawn(pack))


@functools.lru_cache(maxsize=8)
def _hem_donors(pack: PeoplePack, hem: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Skirt vertices below `hem`, the nearest one above it in the same direction for each, and the drop
    between (m)."""
    skirt = np.flatnonzero(static(pack).fields.skirt)
    z = pack.canon[skirt, 2]
    low, ring = skirt[z < hem], skirt[(z >= hem) & (z < hem + 0.12)]
    angle = np.arctan2(pack.canon[:, 0], -pack.canon[:, 1])
    turn = np.abs(angle[low, None] - angle[None, ring])
    turn = np.minimum(turn, 2 * np.pi - turn)
    donor = ring[(turn + 0.5 * (pack.canon[ring, 2] - hem)).argmin(axis=1)]
    return low, donor, (pack.canon[donor, 2] - hem).astype(np.float32)


def dressed_rest(pack: PeoplePack, rest: np.ndarray, wardrobe: Wardrobe) -> np.ndarray:
    """Shaped rest vertices [V, 3] with shoes smoothed and cloth and hair inflated along the rest normals."""
    fixed = static(pack)
    out = rest.copy()
    out[fixed.foot] = fixed.smooth @ rest[fixed.support]
    out += wardrobe.offset
    return out


def lift_hem(pack: PeoplePack, posed: np.ndarray, hem: float) -> np.ndarray:
    """Posed vertices with the skirt below `hem` gathered at the hem: dropping its triangles would leave a
    ragged edge."""
    low, donor, drop = _hem_donors(pack, hem)
    out = posed.copy()
    out[low] = posed[donor]
    out[low, 2] -= drop
    return out


def stool(top: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box from height `floor` up to the middle `top` [3] of its upper side (m): 24 vertices (own corners
    for every side), 12 faces, normals."""
    half = np.array([STOOL_HALF_WIDTH, STOOL_HALF_DEPTH, 0.5 * (top[2] - floor)])
    centre = np.array([top[0], top[1], 0.5 * (top[2] + floor)])
    vertices, normals = [], []
    for axis in range(3):
        for sign in (1.0, -1.0):
            u, v = np.eye(3)[(axis + 1) % 3], np.eye(3)[(axis + 2) % 3] * sign
            out = np.eye(3)[axis] * sign
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                vertices.append(centre + half * (out + a * u + b * v))
                normals.append(out)
    faces = np.concatenate([[[4 * k, 4 * k + 1, 4 * k + 2], [4 * k, 4 * k + 2, 4 * k + 3]] for k in range(6)])
    return np.array(vertices, np.float32), faces, np.array(normals, np.float32)


@dataclass(frozen=True)
class Drawable:
    """Vertices float32 [V, 3] (m, world), faces [F, 3], part uint8 [F], attributes float32 [V, 11]."""

    vertices: np.ndarray
    faces: np.ndarray
    part: np.ndarray
    attributes: np.ndarray


def drawable(pack: PeoplePack, posed: np.ndarray, wardrobe: Wardrobe, seat: np.ndarray | None) -> Drawable:
    """Mesh to draw for posed, dressed vertices [V, 3]; `seat` [3] is the top of the stool of a sitting
    person."""
    fixed = static(pack)
    faces, part = fixed.drawn[wardrobe.strips, wardrobe.skirt_hem is not None]
    if wardrobe.skirt_hem is not None:
        posed = lift_hem(pack, posed, wardrobe.skirt_hem)
    attributes = np.empty((len(posed), ATTRIBUTES), dtype=np.float32)
    attributes[:, :3] = pack.canon
    attributes[:, 3:6] = vertex_normals(posed, faces)
    columns = (fixed.fields.hand, wardrobe.top, wardrobe.bottom, wardrobe.shoe, fixed.palm)
    for k, column in enumerate(columns):
        attributes[:, 6 + k] = column
    if seat is None:
        return Drawable(posed, faces, part, attributes)
    floor = float(posed[~fixed.fields.skirt, 2].min())
    box, box_faces, box_normals = stool(seat + np.array([0, 0.03, 0.01], np.float32), floor)
    rows = np.full((len(box), ATTRIBUTES), -9.0, dtype=np.float32)
    rows[:, 3:6] = box_normals
    return Drawable(
        np.concatenate([posed, box]),
        np.concatenate([faces, box_faces.astype(faces.dtype) + len(posed)]),
        np.concatenate([part, np.full(len(box_faces), STOOL, np.uint8)]),
        np.concatenate([attributes, rows]),
    )
