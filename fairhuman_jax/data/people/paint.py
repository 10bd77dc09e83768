"""Base colours of every covered pixel and of the background."""

from __future__ import annotations

import numpy as np

from fairhuman_jax.data.people import pack as parts
from fairhuman_jax.data.people import palette
from fairhuman_jax.data.people.face_paint import blend, paint_eyes, paint_head
from fairhuman_jax.data.people.garments import smoothstep
from fairhuman_jax.data.people.surface import BOTTOM, HAIR, HAND_LEFT, HEAD_SKIN, SHOES, STOOL, TOP, Surface

STOOL_COLOUR = (0.46, 0.33, 0.22)
MOUTH_COLOUR = (0.30, 0.06, 0.06)
TEETH_COLOUR = (0.97, 0.95, 0.90)
SPECULAR_EYE = 3.0
# By class: nothing (stool), skin, top, bottom, shoes, head, hair, hands.
SPECULAR = np.array([0.2, 1, 0.25, 0.25, 0.8, 1, 0.8, 0.8, 0.8], dtype=np.float32)


def colour_of(table: dict, name: str) -> np.ndarray:
    """Colour float32 [3] of a word; KeyError naming the word when the table lacks it."""
    return np.array(table[name], dtype=np.float32)


def _paint_hair(s: Surface, label: np.ndarray, colour: np.ndarray, person: dict) -> None:
    rows = np.flatnonzero(label == HAIR)
    x, y, z = s.canon[rows].T
    hair, skin = colour_of(palette.HAIR, person["hair_colour"]), colour_of(palette.SKIN, person["skin"])
    strands = 1 + 0.12 * np.sin(420 * x + 2 * np.sin(60 * z))
    if person["hair_style"] == "curly":
        strands = 1 + 0.22 * np.sin(300 * x + 3 * np.sin(90 * z)) * np.sin(280 * z + 2 * np.sin(120 * y))
    painted = np.clip(hair * strands[:, None], 0, 1)
    # The first millimetres above the hairline are thin: no hard cap edge.
    cover = np.where(s.part[rows] == parts.HAIR, 1, smoothstep(-0.001, 0.006, s.hair[rows]))
    if person["hair_style"] == "buzzed":
        cover = 0.8 * cover
    out = np.broadcast_to(skin, painted.shape).copy()
    blend(out, cover, painted)
    colour[rows] = out


def _paint_top(s: Surface, label: np.ndarray, colour: np.ndarray, outfit: dict) -> None:
    rows = np.flatnonzero(label == TOP)
    base = colour_of(palette.TOPS, outfit["top_colour"])
    x, y, z = s.canon[rows].T
    out = np.broadcast_to(base, (len(rows), 3)).copy()
    if outfit["striped"]:
        blend(out, smoothstep(0.1, 0.3, np.sin(150 * z)), colour_of(palette.TOPS, outfit["stripe_colour"]))
    if outfit["top"] == "shirt":
        front = (y < -0.03) & (z < 0.56)
        seam = smoothstep(0.0022, 0.001, np.abs(np.abs(x) - 0.014)) * front
        button = np.hypot(x, (z + 0.01) % 0.075 - 0.0375)
        blend(out, 0.35 * seam, 0.4 * base)
        blend(
            out,
            smoothstep(0.0062, 0.0045, button) * front,
            np.where(base.mean() > 0.5, 0.25, 0.9) * np.ones(3),
        )
    # A seam along neck, sleeves and hem: the field is the distance to the nearest of them.
    blend(out, 0.22 * smoothstep(0.008, 0.005, s.top[rows]), 0.3 * base)
    colour[rows] = out


def _paint_bottom(s: Surface, label: np.ndarray, colour: np.ndarray, outfit: dict) -> None:
    rows = np.flatnonzero(label == BOTTOM)
    table = palette.TOPS if outfit["bottom"] == "dress" else palette.BOTTOMS
    base = colour_of(table, outfit["bottom_colour"])
    x, y, z = s.canon[rows].T
    out = np.broadcast_to(base, (len(rows), 3)).copy()
    if outfit["bottom"] == "dress" and outfit["striped"]:
        blend(out, smoothstep(0.1, 0.3, np.sin(150 * z)), colour_of(palette.TOPS, outfit["stripe_colour"]))
    if outfit["bottom"] == "jeans":
        worn = np.exp(-(((np.abs(x) - 0.135) / 0.045) ** 2)) * smoothstep(0.0, -0.05, z) * (y < -0.02)
        blend(out, 0.25 * worn, np.clip(1.7 * base, 0, 1))
    colour[rows] = out


def paint(s: Surface, label: np.ndarray, spec: dict) -> tuple[np.ndarray, np.ndarray]:
    """Base colour float32 [n, 3] in 0..1 and specular factor float32 [n] of pixels with class `label` [n]."""
    person, outfit = spec["identity"], spec["outfit"]
    skin = colour_of(palette.SKIN, person["skin"])
    colour = np.broadcast_to(skin, (len(label), 3)).copy()
    palms = np.flatnonzero((label >= HAND_LEFT) & (s.palm > 0))
    blushed = colour[palms]
    # Palms are hardly pigmented: the darker the skin, the larger the difference.
    blend(blushed, s.palm[palms] * (0.10 + 0.35 * (1 - skin[0])), np.array([0.95, 0.70, 0.58], np.float32))
    colour[palms] = blushed
    head = np.flatnonzero((label == HEAD_SKIN) & (s.part == parts.HEAD))
    face = colour[head]
    paint_head(face, s.canon[head], person)
    colour[head] = face
    _paint_hair(s, label, colour, person)
    _paint_top(s, label, colour, outfit)
    _paint_bottom(s, label, colour, outfit)
    colour[label == SHOES] = colour_of(palette.SHOES, outfit["shoe_colour"])
    eyes = np.flatnonzero(s.part == parts.EYE)
    colour[eyes] = paint_eyes(s.canon[eyes], colour_of(palette.IRIS, person["iris"]))
    colour[s.part == parts.EYE_CAVITY] = 0.2 * skin + 0.8 * 0.4 * skin
    colour[s.part == parts.MOUTH] = MOUTH_COLOUR
    colour[s.part == parts.TEETH] = TEETH_COLOUR
    colour[s.part == STOOL] = STOOL_COLOUR
    shine = SPECULAR[label]
    shine[eyes] = SPECULAR_EYE
    return colour, shine


def background(entry: dict, size: int) -> np.ndarray:
    """Background float32 [size, size, 3] of a spec's `background` entry: plain, vertical gradient, or wall
    and floor."""
    base = colour_of(palette.BACKGROUNDS, entry["colour"])
    second = np.clip(base * entry["gain"], 0, 1)
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    share = {
        "plain": np.zeros_like(y),
        "gradient": y,
        "two-tone": (y > entry["floor"]).astype(np.float32),
    }[entry["kind"]]
    rows = base + share[:, None] * (second - base)
    return np.broadcast_to(rows[:, None], (size, size, 3)).astype(np.float32)
