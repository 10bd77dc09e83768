"""Draws of everything that defines one picture, as a JSON-able dictionary.

`sample_spec(seed, index)` returns:

- `seed`, `index`: int; `identity_key`: [seed, index] the identity was drawn from; `identity_hash`: 16 hex
  digits.
- `identity`: {`sex`: "man" | "woman", `gender`: 0 man .. 1 woman, `age` 0 young adult .. 1 old, `muscle`,
  `weight`, `height`, `proportions`: 0..1, `ancestry`: [african, asian, caucasian] sum 1, `face`: 16 floats,
  `skin`: name in SKIN, `iris`: name in IRIS, `hair_style`: name in HAIR_STYLES or "bald", `hair_colour`:
  name in HAIR, `hairline_shift`: metres, added to the hairline height at the front, `beard`: bool}
- `outfit`: {`top`: name in TOP_GARMENTS, `top_colour`: name in TOPS, `striped`: bool, `stripe_colour`: name
  in TOPS, `bottom`: name in BOTTOM_GARMENTS ("dress" when top is "dress"), `bottom_colour`: name in BOTTOMS
  (TOPS for a dress), `shoe_colour`: name in SHOES}
- `pose`: {`gesture`: "down" | "walking" | "waving" | "sign" | "two signs" | "raised" | "presenting" |
  "hips" | "crossed" | "cheek" | "thinking" | "sitting" | "clasped", `legs`: "standing" | "walking" |
  "sitting", `arms`: {`left`, `right`: {`gesture`: name in `gestures.ARM_GESTURES`, `shape`: name in
  `hands.HAND_SHAPES`, `numbers`: 6 floats in 0..1 placing the arm inside the gesture's range, `swing`:
  added to the wrist's y, in arm lengths (negative = forward)}}, `rotations`: {bone name: [x, y, z] degrees,
  applied as Rz Ry Rx in rest axes}, `splay`: outward degrees of each leg, `fingers`: 30 x 3 degrees of
  jitter, left hand first}.
  `raised_sides(spec)` lists the sides whose hand is shown: not hanging, not on hips or thighs, not relaxed.
- `expression`: {`name`: word, `coefficients`: {expression unit: amplitude}} (units: smile, open, frown,
  pucker, brow_up, brow_down, blink_L, blink_R, wide)
- `camera`: {`framing`: name in FRAMINGS, `azimuth`, `elevation`: degrees, `hand`: "left" | "right"
  (close-ups: the hand shown), `shift`: [sideways, vertical] in units of h, `zoom`: factor on h, `close`:
  0..1 (hand alone: h = .14 + .05 close m), `keep_hands`: bool (grow the frame to hold the raised hands)}
- `light`: {`azimuth`, `elevation`: degrees, `ambient`: .38-.55}
- `background`: {`colour`: name in BACKGROUNDS, `kind`: name in BACKGROUND_KINDS, `floor`: height share of
  the floor line from the top, .55-.85, `gain`: factor on the second tone}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fairhuman_jax.data.people import palette

FACE_COEFFICIENTS = 16
SIGN_SHAPES = ("open", "peace", "pointing", "ok", "fist", "thumbs up", "pointing outwards")
GESTURES = {
    "down": 0.08,
    "walking": 0.08,
    "waving": 0.13,
    "hips": 0.06,
    "crossed": 0.06,
    "cheek": 0.09,
    "thinking": 0.06,
    "sign": 0.20,
    "two signs": 0.10,
    "raised": 0.04,
    "sitting": 0.06,
    "clasped": 0.02,
    "presenting": 0.02,
}
CLOSE_UP_GESTURES = {
    "sign": 0.42,
    "two signs": 0.18,
    "waving": 0.12,
    "cheek": 0.10,
    "thinking": 0.08,
    "crossed": 0.05,
    "presenting": 0.05,
}
PORTRAIT_GESTURES = {"cheek": 0.35, "sign": 0.30, "thinking": 0.25, "waving": 0.10}
LOW_GESTURES = ("down", "walking", "thighs", "hips")
SIDE_NAMES = ("left", "right")


def stream(seed: int, index: int, name: str) -> np.random.Generator:
    """Counter-based generator of one named stream of one sample: Philox keyed by (seed, index, name)."""
    key = hashlib.sha256(f"{int(seed)}/{int(index)}/{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))


def _pick(rng: np.random.Generator, table: Mapping[str, float] | tuple[str, ...]) -> str:
    if not isinstance(table, Mapping):
        return table[int(rng.integers(len(table)))]
    p = np.asarray(list(table.values()))
    return list(table)[int(rng.choice(len(p), p=p / p.sum()))]


def _clip(x: float, low: float = 0.0, high: float = 1.0) -> float:
    return float(min(max(x, low), high))


def _round(values: Any) -> list[float]:
    return [round(float(v), 6) for v in np.ravel(values)]


def _hair_colour(rng: np.random.Generator, age: float, tone: int) -> str:
    if age > 0.6 and rng.random() < 0.7:
        return _pick(rng, {"grey": 0.6, "white": 0.4})
    if tone >= 3:
        return _pick(rng, {"black": 0.8, "dark brown": 0.2})
    return _pick(rng, {"black": 0.25, "dark brown": 0.25, "brown": 0.22, "blond": 0.18, "red": 0.10})


def draw_identity(rng: np.random.Generator) -> dict[str, Any]:
    """Phenotype scalars, face, skin, iris, hair and beard of one adult."""
    woman = bool(rng.random() < 0.5)
    band = rng.random()
    low, high = (0.0, 0.25) if band < 0.6 else (0.3, 0.6) if band < 0.8 else (0.75, 1.0)
    age = float(rng.uniform(low, high))
    normal = {"muscle": (0.5, 0.2), "weight": (0.48, 0.2), "height": (0.5, 0.15), "proportions": (0.6, 0.2)}
    scalars = {k: round(_clip(rng.normal(*v)), 6) for k, v in normal.items()}
    gender = round(_clip((0.95 if woman else 0.05) + rng.normal(0, 0.05)), 6)
    ancestry = rng.dirichlet([0.6] * 3)
    tone = round(float(ancestry @ np.asarray(palette.SKIN_TONE_BY_ANCESTRY)) + float(rng.normal(0, 0.5)))
    tone = min(max(tone, 0), len(palette.SKIN) - 1)
    styles = (
        {"short": 0.15, "curly": 0.2, "long": 0.35, "bob": 0.3}
        if woman
        else {"short": 0.4, "buzzed": 0.25, "curly": 0.25}
    )
    if not woman:
        styles |= {"long": 0.05, "bald": 0.05 + (0.2 if age > 0.6 else 0.0)}
    style = _pick(rng, styles)
    iris = {"dark brown": 0.7, "brown": 0.3} if tone >= 3 else dict.fromkeys(palette.IRIS, 0.2)
    shift = rng.uniform(-0.03, -0.015) if style == "bob" else rng.uniform(-0.014, 0.008)
    return {
        "sex": "woman" if woman else "man",
        "gender": gender,
        "age": round(age, 6),
        **scalars,
        "ancestry": _round(ancestry),
        "face": _round(np.clip(rng.normal(0, 0.8, FACE_COEFFICIENTS), -1.8, 1.8)),
        "skin": list(palette.SKIN)[tone],
        "iris": _pick(rng, iris),
        "hair_style": style,
        "hair_colour": _hair_colour(rng, age, tone),
        "hairline_shift": round(float(shift), 6),
        "beard": bool(not woman and rng.random() < 0.3),
    }


def identity_hash(identity: Mapping[str, Any]) -> str:
    """16 hex digits of SHA-256 over the identity's sorted JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _far_from(skin: str, table: Mapping[str, palette.RGB]) -> tuple[str, ...]:
    """Colours that the eye can tell from the skin, or hand edges would vanish against the clothes."""
    s = np.asarray(palette.SKIN[skin])
    return tuple(k for k, c in table.items() if np.linalg.norm(np.asarray(c) - s) >= palette.MIN_SKIN_DISTANCE)


def draw_outfit(rng: np.random.Generator, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Garments and colours, none within .12 RGB of the skin."""
    woman = identity["sex"] == "woman"
    tops = {"t-shirt": 0.34, "shirt": 0.26, "sweater": 0.26, "tank top": 0.14}
    top = _pick(rng, tops | {"dress": 0.2} if woman else tops)
    bottoms = {"trousers": 0.4, "jeans": 0.4, "shorts": 0.2}
    bottom = "dress" if top == "dress" else _pick(rng, bottoms | {"skirt": 0.3} if woman else bottoms)
    colours = _far_from(identity["skin"], palette.TOPS)
    top_colour = _pick(rng, colours)
    bottom_colour = _pick(rng, _far_from(identity["skin"], palette.BOTTOMS))
    if bottom in ("dress", "jeans"):
        bottom_colour = top_colour if bottom == "dress" else palette.JEANS_COLOUR
    return {
        "top": top,
        "top_colour": top_colour,
        "striped": bool(rng.random() < 0.2),
        "stripe_colour": _pick(rng, tuple(c for c in colours if c != top_colour)),
        "bottom": bottom,
        "bottom_colour": bottom_colour,
        "shoe_colour": _pick(rng, tuple(palette.SHOES)),
    }


def _arm(rng: np.random.Generator, gesture: str, shape: str) -> dict[str, Any]:
    return {"gesture": gesture, "shape": shape, "numbers": _round(rng.random(6)), "swing": 0.0}


def _sign_arm(rng: np.random.Generator, shape: str) -> dict[str, Any]:
    if shape == "pointing outwards":
        return _arm(rng, "pointing outwards", "pointing")
    return _arm(rng, "thumbs up" if shape == "thumbs up" else "sign", shape)


def draw_arms(rng: np.random.Generator, gesture: str) -> dict[str, dict[str, Any]]:
    """Arm gesture, hand shape and numbers of both sides for a whole-body gesture."""
    idle = [_arm(rng, "down", _pick(rng, {"relaxed": 0.7, "flat": 0.15, "fist": 0.15})) for _ in SIDE_NAMES]
    active = int(rng.integers(2))
    if gesture in ("waving", "cheek", "thinking", "sign"):
        if gesture == "sign":
            idle[active] = _sign_arm(rng, _pick(rng, SIGN_SHAPES))
        else:
            shape = {"waving": "open", "cheek": "flat"}.get(gesture) or _pick(rng, ("fist", "pointing"))
            idle[active] = _arm(rng, gesture, shape)
    elif gesture == "two signs":
        same = _pick(rng, SIGN_SHAPES) if rng.random() < 0.5 else None
        idle = [_sign_arm(rng, same or _pick(rng, SIGN_SHAPES)) for _ in SIDE_NAMES]
    elif gesture in ("raised", "presenting", "hips", "crossed", "sitting", "clasped"):
        shape = {"raised": _pick(rng, ("open", "fist")), "presenting": "open"}.get(gesture, "relaxed")
        idle = [_arm(rng, "thighs" if gesture == "sitting" else gesture, shape) for _ in SIDE_NAMES]
        if gesture in ("crossed", "clasped"):
            for side, arm in enumerate(idle):
                arm["numbers"][0] = float(side == active)
    elif gesture == "walking":
        for arm in idle:
            arm["gesture"] = "walking"
    return dict(zip(SIDE_NAMES, idle, strict=True))


def _draw_legs(rng: np.random.Generator, legs: str, rotations: dict[str, list[float]]) -> float:
    """Adds hip, knee and foot angles; returns the hip angle of the left leg (walking), 0 otherwise."""
    forward = int(rng.integers(2))
    amplitude = float(rng.uniform(18, 34))
    for side, letter in enumerate("LR"):
        out = 0.0
        if legs == "walking":
            hip = -amplitude if side == forward else amplitude
            knee = amplitude * (0.3 if side == forward else 1.1)
        elif legs == "sitting":
            hip = float(rng.uniform(-92, -80))
            knee = -hip + float(rng.uniform(-12, 12))
            out = float(rng.uniform(4, 14)) * (1 if side == 0 else -1)
        else:
            hip, knee = float(rng.normal(0, 2)), abs(float(rng.normal(0, 3)))
        rotations[f"upperleg01.{letter}"] = _round([hip, 0, out])
        rotations[f"lowerleg01.{letter}"] = _round([knee, 0, 0])
        rotations[f"foot.{letter}"] = _round([0 if legs == "sitting" else -0.4 * knee, 0, 0])
    return rotations["upperleg01.L"][0] if legs == "walking" else 0.0


def draw_pose(rng: np.random.Generator, framing: str) -> dict[str, Any]:
    """Gesture, arms, trunk, legs and finger jitter; close-ups draw from the raised-hand gestures only."""
    table = GESTURES
    if framing.startswith("close-up"):
        table = CLOSE_UP_GESTURES
    elif framing == "portrait" and rng.random() < 0.5:
        table = PORTRAIT_GESTURES
    gesture = _pick(rng, table)
    legs = gesture if gesture in ("walking", "sitting") else "standing"
    neck = [[1 + rng.normal(0, 4), rng.normal(0, 3), rng.normal(0, 8)] for _ in range(2)]
    eyes = _round([rng.normal(0, 4), 0, rng.normal(0, 8)])
    rotations = {
        "spine03": _round([rng.normal(0, 2), rng.normal(0, 2), rng.normal(0, 5)]),
        "spine01": _round([0, rng.normal(0, 2), rng.normal(0, 4)]),
        "neck02": _round(neck[0]),
        "head": _round(neck[1]),
        "eye.L": eyes,
        "eye.R": eyes,
    }
    hip = _draw_legs(rng, legs, rotations)
    arms = draw_arms(rng, gesture)
    if legs == "walking":
        # Opposite arm and leg: a left leg in front (negative hip angle) takes the left arm back (+y).
        for name, sign in zip(SIDE_NAMES, (-1, 1), strict=True):
            arms[name]["swing"] = round(sign * hip / 100, 6)
    return {
        "gesture": gesture,
        "legs": legs,
        "arms": arms,
        "rotations": rotations,
        "splay": _round(rng.uniform(1, 4, 2)),
        "fingers": np.round(rng.normal(0, 3, (2 * 5 * 3, 3)), 6).tolist(),
    }


def draw_expression(rng: np.random.Generator) -> dict[str, Any]:
    """Named expression with amplitudes scaled by .8-1.1; 4 % of the draws blink fully."""
    name = _pick(rng, {k: v[0] for k, v in palette.EXPRESSIONS.items()})
    scale = float(rng.uniform(0.8, 1.1))
    coefficients = {k: round(scale * a, 6) for k, a in palette.EXPRESSIONS[name][1].items()}
    if rng.random() < 0.04:
        coefficients |= {"blink_L": 1.0, "blink_R": 1.0}
    return {"name": name, "coefficients": coefficients}


def raised_sides(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Sides ("left", "right") whose hand is shown: neither hanging, nor on hips or thighs, nor relaxed."""
    arms = spec["pose"]["arms"]
    return tuple(s for s in SIDE_NAMES if arms[s]["gesture"] not in LOW_GESTURES and arms[s]["shape"] != "relaxed")


def draw_camera(rng: np.random.Generator, framing: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """View angles in degrees, jitter in units of the frame's half height, and the hand a close-up shows."""
    hand = SIDE_NAMES[int(rng.integers(2))]
    shown = raised_sides(spec)
    return {
        "framing": framing,
        "azimuth": round(_clip(rng.normal(0, 16), -45, 45), 6),
        "elevation": round(float(rng.normal(0, 4)), 6),
        "shift": _round([rng.normal(0, 0.05), rng.normal(0, 0.025)]),
        "zoom": round(float(rng.uniform(0.93, 1.12)), 6),
        "close": round(float(rng.random()), 6),
        "keep_hands": bool(rng.random() < 0.9),
        "hand": hand if hand in shown or not shown else shown[0],
    }


def draw_light(rng: np.random.Generator) -> dict[str, float]:
    """Key light direction in degrees and ambient share."""
    return {
        "azimuth": round(float(rng.uniform(-60, 60)), 6),
        "elevation": round(float(rng.uniform(20, 60)), 6),
        "ambient": round(float(rng.uniform(0.38, 0.55)), 6),
    }


def draw_background(rng: np.random.Generator) -> dict[str, Any]:
    """Colour, kind and the numbers of gradient and floor."""
    return {
        "colour": _pick(rng, tuple(palette.BACKGROUNDS)),
        "kind": _pick(rng, palette.BACKGROUND_KINDS),
        "floor": round(float(rng.uniform(0.55, 0.85)), 6),
        "gain": round(float(rng.uniform(0.75, 0.92)), 6),
    }


def sample_spec(
    seed: int, index: int, framing: str | None = None, identity: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Everything about picture (seed, index); the same arguments always give the same dictionary.

    `framing` forces a name of `palette.FRAMINGS` (ValueError otherwise); `identity` = (seed, index) takes the
    person from another picture while outfit, pose, camera, light and background stay this one's.
    """
    camera_rng = stream(seed, index, "camera")
    drawn = _pick(camera_rng, palette.FRAMINGS)
    framing = drawn if framing is None else framing
    if framing not in palette.FRAMINGS:
        raise ValueError(f"sample_spec: framing {framing!r} is not one of {', '.join(palette.FRAMINGS)}")
    key = (seed, index) if identity is None else identity
    person = draw_identity(stream(*key, "identity"))
    spec: dict[str, Any] = {
        "seed": int(seed),
        "index": int(index),
        "identity_key": [int(k) for k in key],
        "identity_hash": identity_hash(person),
        "identity": person,
        "outfit": draw_outfit(stream(seed, index, "outfit"), person),
        "pose": draw_pose(stream(seed, index, "pose"), framing),
        "expression": draw_expression(stream(seed, index, "expression")),
    }
    spec["camera"] = draw_camera(camera_rng, framing, spec)
    spec["light"] = draw_light(stream(seed, index, "light"))
    spec["background"] = draw_background(stream(seed, index, "background"))
    return spec
