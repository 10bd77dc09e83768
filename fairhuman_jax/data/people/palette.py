"""Words, colours (RGB 0..1) and parameters of everything the people world can draw.

The words are those of the captions. Every table keeps its order: draws index into it.
"""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[float, float, float]

SKIN: dict[str, RGB] = {
    "very light": (0.97, 0.83, 0.74),
    "light": (0.93, 0.75, 0.63),
    "tan": (0.82, 0.61, 0.46),
    "brown": (0.61, 0.41, 0.28),
    "dark brown": (0.42, 0.27, 0.19),
    "deep": (0.30, 0.19, 0.14),
}
# Ancestry order is that of the pack's factor values: african, asian, caucasian.
SKIN_TONE_BY_ANCESTRY = (4.2, 1.3, 0.6)

HAIR: dict[str, RGB] = {
    "black": (0.07, 0.06, 0.06),
    "dark brown": (0.17, 0.10, 0.06),
    "brown": (0.32, 0.19, 0.10),
    "blond": (0.80, 0.62, 0.32),
    "red": (0.55, 0.22, 0.09),
    "grey": (0.58, 0.58, 0.57),
    "white": (0.88, 0.87, 0.85),
}
IRIS: dict[str, RGB] = {
    "dark brown": (0.25, 0.14, 0.07),
    "brown": (0.35, 0.22, 0.10),
    "blue": (0.22, 0.38, 0.60),
    "green": (0.25, 0.42, 0.28),
    "grey": (0.35, 0.38, 0.40),
}
TOPS: dict[str, RGB] = {
    "red": (0.78, 0.13, 0.14),
    "blue": (0.15, 0.28, 0.70),
    "green": (0.14, 0.50, 0.25),
    "yellow": (0.93, 0.78, 0.18),
    "white": (0.93, 0.93, 0.92),
    "black": (0.10, 0.10, 0.11),
    "grey": (0.50, 0.51, 0.53),
    "purple": (0.46, 0.20, 0.58),
    "orange": (0.92, 0.46, 0.12),
    "pink": (0.94, 0.55, 0.68),
    "teal": (0.10, 0.52, 0.55),
    "brown": (0.42, 0.27, 0.16),
}
BOTTOMS: dict[str, RGB] = {
    "blue": (0.17, 0.25, 0.45),
    "black": (0.10, 0.10, 0.12),
    "grey": (0.40, 0.41, 0.43),
    "brown": (0.38, 0.27, 0.18),
    "beige": (0.76, 0.67, 0.52),
    "white": (0.90, 0.90, 0.88),
    "green": (0.25, 0.33, 0.20),
}
SHOES: dict[str, RGB] = {
    "black": (0.08, 0.08, 0.09),
    "brown": (0.30, 0.19, 0.11),
    "white": (0.88, 0.88, 0.87),
    "red": (0.62, 0.12, 0.12),
    "blue": (0.16, 0.24, 0.48),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (0.95, 0.95, 0.95),
    "grey": (0.62, 0.63, 0.65),
    "blue": (0.55, 0.72, 0.90),
    "green": (0.58, 0.78, 0.60),
    "beige": (0.88, 0.80, 0.68),
    "pink": (0.95, 0.78, 0.80),
    "dark": (0.20, 0.21, 0.25),
}
BACKGROUND_KINDS = ("plain", "gradient", "two-tone")

HAIR_STYLES = ("short", "buzzed", "curly", "long", "bob")

# Expression -> (probability, amplitudes of the pack's expression units).
EXPRESSIONS: dict[str, tuple[float, dict[str, float]]] = {
    "neutral": (0.30, {}),
    "smiling": (0.30, {"smile": 0.9}),
    "laughing": (0.12, {"smile": 1.0, "open": 0.35, "brow_up": 0.2}),
    "frowning": (0.08, {"frown": 1.0, "brow_down": 0.9}),
    "surprised": (0.07, {"open": 0.7, "brow_up": 1.0, "wide": 0.9}),
    "sleepy": (0.05, {"blink_L": 0.75, "blink_R": 0.75}),
    "angry": (0.05, {"brow_down": 1.2, "frown": 0.5}),
    "kissing": (0.03, {"pucker": 0.9}),
}


@dataclass(frozen=True)
class Top:
    """Upper garment: looseness (m), sleeve end on the arm coordinate 0..2, neck radius and height (m)."""

    loose: float
    sleeve: float
    neck_radius: float
    neck_height: float


@dataclass(frozen=True)
class Bottom:
    """Lower garment: looseness (m), hem on the leg coordinate 0..2, skirt hem height (m) or None."""

    loose: float
    leg_hem: float
    skirt_hem: float | None = None


TOP_GARMENTS: dict[str, Top] = {
    "t-shirt": Top(0.007, 0.55, 0.088, 0.535),
    "shirt": Top(0.008, 1.93, 0.074, 0.56),
    "sweater": Top(0.011, 1.93, 0.078, 0.55),
    "tank top": Top(0.004, -0.02, 0.112, 0.50),
    "dress": Top(0.004, 0.16, 0.118, 0.495),
}
# "dress" as a bottom is the skirt part of the dress: it takes the colour of the top and no word of its own.
BOTTOM_GARMENTS: dict[str, Bottom] = {
    "trousers": Bottom(0.010, 1.93),
    "jeans": Bottom(0.006, 1.93),
    "shorts": Bottom(0.012, 0.72),
    "skirt": Bottom(0.010, 0.15, -0.30),
    "dress": Bottom(0.004, 0.15, -0.42),
}
TOP_HEM = 0.03
TOP_HEM_OVER_SKIRT = 0.10
SHOE_LOOSE = 0.006
JEANS_COLOUR = "blue"
# Clothes nearer than this to the skin (RGB distance) would hide the edges of hands.
MIN_SKIN_DISTANCE = 0.12

# Framing -> share of the draws; a close-up shows a hand alone or a hand and the face, half each.
FRAMINGS: dict[str, float] = {
    "full body": 0.05,
    "half body": 0.20,
    "upper body": 0.25,
    "portrait": 0.20,
    "close-up of a hand": 0.15,
    "close-up of a hand and the face": 0.15,
}
