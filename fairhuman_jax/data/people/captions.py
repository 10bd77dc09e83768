"""Captions that say only what the picture shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SEEN = 0.0015  # share of the image's pixels below which a hand, face or garment counts as unseen
HAIR_SEEN = 0.0005  # hair is large and plain: a few pixels tell its colour

SIGN_WORDS = {
    "open": "an open hand",
    "flat": "an open hand",
    "fist": "a fist",
    "pointing": "a pointing finger",
    "peace": "a peace sign",
    "ok": "an ok sign",
    "thumbs up": "a thumbs up",
}
HAND_ACTIONS = {
    "waving": "waving",
    "hips": "with hands on hips",
    "crossed": "with crossed arms",
    "cheek": "with a hand on the cheek",
    "thinking": "with a hand at the chin",
    "raised": "with raised arms",
    "clasped": "with clasped hands",
    "presenting": "presenting with open hands",
}
BODY_ACTIONS = {"down": "standing", "walking": "walking", "sitting": "sitting"}
LOOKING = "looking at the camera"
WITH_LEGS = ("full body", "half body")
LOOKS = re.compile(r"\ban? (?:(?:bald|slim|heavyset|young|old) )*((?:wo)?man)\b(?: with [a-z ]+? hair\b)?")
SLIM, HEAVY, YOUNG, OLD = 0.25, 0.75, 0.3, 0.7


@dataclass(frozen=True)
class Seen:
    """Shares of the image covered by what a caption may mention, 0..1."""

    left_hand: float
    right_hand: float
    face: float
    hair: float
    top: float
    bottom: float


def framing_word(framing: str) -> str:
    """Caption word of a framing: both close-ups are "close-up"."""
    return "close-up" if framing.startswith("close-up") else framing


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _person(person: dict, seen: Seen) -> str:
    words = []
    if seen.face >= SEEN and person["hair_style"] == "bald":
        words.append("bald")
    if person["weight"] < SLIM or person["weight"] > HEAVY:
        words.append("slim" if person["weight"] < SLIM else "heavyset")
    if seen.face >= SEEN and (person["age"] < YOUNG or person["age"] > OLD):
        words.append("young" if person["age"] < YOUNG else "old")
    words.append(person["sex"])
    phrase = f"{_article(words[0])} {' '.join(words)}"
    if person["hair_style"] != "bald" and seen.hair >= HAIR_SEEN:
        phrase += f" with {person['hair_style']} {person['hair_colour']} hair"
    return phrase


def _clothes(outfit: dict, framing: str, seen: Seen) -> str:
    if seen.top < SEEN:
        return ""
    striped = "striped " if outfit["striped"] else ""
    phrase = f"{striped}{outfit['top_colour']} {outfit['top']}"
    phrase = f" wearing {_article(phrase)} {phrase}"
    if framing in WITH_LEGS and outfit["bottom"] != "dress" and seen.bottom >= SEEN:
        colour = "" if outfit["bottom"] == "jeans" else f"{outfit['bottom_colour']} "
        article = "a " if outfit["bottom"] == "skirt" else ""
        phrase += f" and {article}{colour}{outfit['bottom']}"
    return phrase


def _signs(arms: dict, seen: Seen) -> str | None:
    share = {"left": seen.left_hand, "right": seen.right_hand}
    shown = [
        SIGN_WORDS[arm["shape"]]
        for side, arm in arms.items()
        if arm["gesture"] in SIGN_GESTURES and arm["shape"] in SIGN_WORDS and share[side] >= SEEN
    ]
    if not shown:
        return None
    if len(shown) == 2 and shown[0] == shown[1]:
        return f"showing {shown[0]} with both hands"
    return "showing " + " and ".join(shown)


SIGN_GESTURES = ("sign", "thumbs up", "pointing outwards")


def action(pose: dict, framing: str, seen: Seen) -> str:
    """What the person does as far as it can be seen; otherwise "looking at the camera"."""
    gesture = pose["gesture"]
    if gesture in BODY_ACTIONS:
        body = framing in WITH_LEGS or (framing == "upper body" and gesture != "sitting")
        return BODY_ACTIONS[gesture] if body else LOOKING
    if gesture in ("sign", "two signs"):
        return _signs(pose["arms"], seen) or LOOKING
    return HAND_ACTIONS[gesture] if max(seen.left_hand, seen.right_hand) >= SEEN else LOOKING


def caption(spec: dict, seen: Seen) -> str:
    """`{art} {framing} photo of {person} wearing {clothes}, {action}[, {expression}], {background}
    background`."""
    framing = framing_word(spec["camera"]["framing"])
    noun = framing if framing == "portrait" else f"{framing} photo"
    parts = [f"{_article(noun)} {noun} of {_person(spec['identity'], seen)}"]
    parts[0] += _clothes(spec["outfit"], framing, seen)
    parts.append(action(spec["pose"], framing, seen))
    word = spec["expression"]["name"]
    if word != "neutral" and framing != "full body" and seen.face >= SEEN:
        parts.append(word)
    parts.append(f"{spec['background']['colour']} background")
    return ", ".join(parts)


def pair_captions(specs: Sequence[dict], seen: Sequence[Seen]) -> tuple[str, ...]:
    """Ways to say a picture of two people, whose framing and background are the first one's; the first says most."""
    frame, backdrop = framing_word(specs[0]["camera"]["framing"]), f"{specs[0]['background']['colour']} background"
    looks = [_person(spec["identity"], s) for spec, s in zip(specs, seen, strict=True)]
    worn = [_clothes(spec["outfit"], spec["camera"]["framing"], s) for spec, s in zip(specs, seen, strict=True)]
    plain = [f"a {spec['identity']['sex']}" for spec in specs]
    dressed = [a + b.replace(" wearing ", " in ", 1) for a, b in zip(plain, worn, strict=True)]
    whole = " and ".join(a + b for a, b in zip(looks, worn, strict=True))
    return (
        f"{_article(frame)} {frame} photo of {whole}, {backdrop}",
        f"{' and '.join(looks)}, {backdrop}",
        f"a photo of {' and '.join(dressed)}, {backdrop}",
        f"{' and '.join(plain)}, {backdrop}",
    )


def without_looks(caption: str) -> str:
    """The caption with "a man" or "a woman" for what it says of a person's age, build and hair."""
    return LOOKS.sub(r"a \1", caption)


def noun_ends(caption: str) -> tuple[int, ...]:
    """Numbers of characters up to the end of each "man" or "woman", from left to right."""
    return tuple(match.end() for match in re.finditer(r"\b(?:wo)?man\b", caption))
