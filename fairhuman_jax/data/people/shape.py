"""Phenotype, face identity and expression to rest vertices and joints."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairhuman_jax.data.people.pack import BODY, HEAD, PeoplePack

# Factor -> number of anchors, in the order of the columns of `phen_mask`; ancestry fills the last three.
FACTORS = {"gender": 2, "age": 2, "muscle": 3, "weight": 3, "height": 2, "proportions": 2}
LIMB_BONES = ("upperarm", "lowerarm", "wrist", "metacarpal", "finger", "upperleg", "lowerleg", "foot")
SLICE_HALF_HEIGHT = 0.04  # metres


@dataclass(frozen=True, eq=False)
class Shaped:
    """One person at rest, float32 metres: `vertices` [V,3], `joints` [92,3] (bone heads, extra points)."""

    vertices: np.ndarray
    joints: np.ndarray


def factor_weights(identity: Mapping[str, Any]) -> np.ndarray:
    """Factor values f float32 [17]: hat weights of each scalar in 0..1, then ancestry normalised to sum 1."""
    values: list[float] = []
    for name, anchors in FACTORS.items():
        x = min(max(float(identity[name]), 0.0), 1.0) * (anchors - 1)
        values += [max(0.0, 1.0 - abs(x - a)) for a in range(anchors)]
    ancestry = [float(a) for a in identity["ancestry"]]
    return np.asarray(values + [a / sum(ancestry) for a in ancestry], np.float32)


def shape_body(pack: PeoplePack, identity: Mapping[str, Any], expression: Mapping[str, float] | None = None) -> Shaped:
    """Rest shape v = mean + c B + face F + expression E, with c = w P - c0 and w_k = prod_j f_j over term k.

    `identity` holds gender, age, muscle, weight, height, proportions (0..1), ancestry [3] and face [16];
    `expression` maps expression units to amplitudes. KeyError for an unknown unit.
    """
    w = np.where(pack.phen_mask, factor_weights(identity), np.float32(1)).prod(1)
    c = w @ pack.phen_proj - pack.phen_c0
    f = np.asarray(identity["face"], np.float32)
    vertices = pack.verts + np.tensordot(c, pack.shape_basis, 1) + np.tensordot(f, pack.face_basis, 1)
    for unit, amplitude in (expression or {}).items():
        vertices += np.float32(amplitude) * pack.expr_basis[pack.expression[unit]]
    joints = pack.joints + np.tensordot(c, pack.joint_shape, 1) + np.tensordot(f, pack.joint_face, 1)
    return Shaped(vertices, joints)


@functools.lru_cache(maxsize=4)
def torso_vertices(pack: PeoplePack) -> np.ndarray:
    """Bool [V]: body vertices whose strongest bone belongs to neither arm nor leg."""
    limb = np.asarray([name.startswith(LIMB_BONES) for name in pack.names["bones"]])
    strongest = np.take_along_axis(pack.weight_bones, pack.weights.argmax(1)[:, None], 1)[:, 0]
    return pack.part_vertices(BODY) & ~limb[strongest]


@functools.lru_cache(maxsize=4)
def head_vertices(pack: PeoplePack) -> np.ndarray:
    """Bool [V]: vertices of the head part."""
    return pack.part_vertices(HEAD)


def half_width(shaped: Shaped, where: np.ndarray, height: float) -> float:
    """Largest |x| in metres of the rest vertices `where` within 4 cm of `height`."""
    return float(np.abs(_slice(shaped, where, height)[:, 0]).max())


def front(shaped: Shaped, where: np.ndarray, height: float) -> float:
    """Smallest y in metres (the front) of the rest vertices `where` within 4 cm of `height`."""
    return float(_slice(shaped, where, height)[:, 1].min())


def _slice(shaped: Shaped, where: np.ndarray, height: float) -> np.ndarray:
    """The vertices `where` within 4 cm of `height`, or, on rare bodies that have none there, the nearest ones."""
    vertices = shaped.vertices[where]
    distance = np.abs(vertices[:, 2] - height)
    return vertices[distance <= max(SLICE_HALF_HEIGHT, float(distance.min()))]
