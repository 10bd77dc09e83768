"""What the painter and the labels know about every covered pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairhuman_jax.data.people import pack as parts
from fairhuman_jax.data.people.garments import CROWN, LOWEST_HAIR, hair_field

STOOL = 11  # follows the parts of the pack
NOTHING, SKIN, TOP, BOTTOM, SHOES, HEAD_SKIN, HAIR, HAND_LEFT, HAND_RIGHT = range(9)
CLASS_NAMES = ("background", "skin", "top", "bottom", "shoes", "head skin", "hair", "left hand", "right hand")


@dataclass(frozen=True)
class Surface:
    """Interpolated attributes of n covered pixels: `part` uint8 [n] (part of the mesh, 11 = stool), `canon`
    [n, 3], `normal` [n, 3] (world), `hand`, `top`, `bottom`, `shoe`, `palm`, `hair` [n] (fields, positive
    inside; `hand` and `palm` in 0..1)."""

    part: np.ndarray
    canon: np.ndarray
    normal: np.ndarray
    hand: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    shoe: np.ndarray
    palm: np.ndarray
    hair: np.ndarray


ATTRIBUTES = 11


def interpolate(attributes: np.ndarray, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Attribute rows [V, C] at the pixels of `corners` int [n, 3] with `weights` [n, 3] -> float32 [n, C]."""
    out = attributes[corners[:, 0]] * weights[:, :1]
    for k in (1, 2):
        out += attributes[corners[:, k]] * weights[:, k : k + 1]
    return out


def surface(values: np.ndarray, part: np.ndarray, hairline_shift: float, hair_style: str) -> Surface:
    """Split interpolated rows [n, 11] = canon, normal, hand, top, bottom, shoe, palm; evaluate the hair
    field."""
    canon = values[:, :3]
    hair = np.full(len(values), np.float32(-0.05))
    can_grow = (part == parts.HEAD) | (part == parts.BODY)
    crown = np.flatnonzero(can_grow & (canon[:, 2] > LOWEST_HAIR.get(hair_style, CROWN)))
    hair[crown] = hair_field(canon[crown], hairline_shift, hair_style)
    rows = values.T
    return Surface(part, canon, values[:, 3:6], rows[6], rows[7], rows[8], rows[9], rows[10], hair)


def classify(s: Surface, hair_style: str) -> np.ndarray:
    """Class uint8 [n] of every covered pixel (constants above; the stool is NOTHING)."""
    cloth = np.where(s.bottom > 0, np.uint8(BOTTOM), np.uint8(SKIN))
    cloth[s.shoe > 0] = SHOES
    cloth[(s.bottom > 0) & (s.shoe < 0.0)] = BOTTOM
    cloth[s.top > 0] = TOP
    label = cloth
    head = (s.part == parts.HEAD) | (s.part == parts.EYE) | (s.part >= parts.MOUTH)
    label[head] = HEAD_SKIN
    if hair_style != "bald":
        label[s.hair > 0] = HAIR
    label[s.part == parts.FOOT] = SHOES
    label[s.part == parts.HAIR] = HAIR
    label[s.part == parts.SKIRT] = BOTTOM
    label[(s.part == parts.HAND_L) & (s.hand >= 0.5)] = HAND_LEFT
    label[(s.part == parts.HAND_R) & (s.hand >= 0.5)] = HAND_RIGHT
    label[s.part == STOOL] = NOTHING
    return label


def is_face(s: Surface, label: np.ndarray) -> np.ndarray:
    """Head pixels [n] in front of the ears, above the chin and below the default hairline: never hair,
    never scalp."""
    y, z = s.canon[:, 1], s.canon[:, 2]
    face = (label == HEAD_SKIN) & (y < -0.045) & (z > 0.612)
    near = np.flatnonzero(face)
    # The default curve, so that a receding hairline or a bald scalp does not enlarge the face.
    face[near] = hair_field(s.canon[near], 0.0) < 0
    return face
