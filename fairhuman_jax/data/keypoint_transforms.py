"""People through the geometry of their picture: joints moved, dropped outside of it, and drawn at the final size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from fairhuman_jax.data.transforms import JointTransform
from fairhuman_jax.keypoints.skeletons import HUMANSD17, draw_bodies

PEOPLE = 10  # rows of the array of key points
MISSING = (-1.0, -1.0, 0.0)
THRESHOLD = 0.02  # HumanSD's in training; it samples with 0.05
HUE_STEPS = 256 / 180  # Pillow's steps of hue in one of OpenCV's

# HumanSD's augmentation (ldm/data/humansd.py): probabilities, and largest changes.
MIRRORED, UPSIDE_DOWN, TURNED, RECOLOURED, RELIT = 0.2, 0.1, 0.1, 0.4, 0.2
DEGREES, HUE_SATURATION_VALUE, CHANNEL, LIGHT = 90.0, (20.0, 30.0, 20.0), 20.0, 0.2


@dataclass(frozen=True)
class PoseTransform(JointTransform):
    """JointTransform of a sample with people, `keypoints["coco17"]` float [P, 17, 3] or [17, 3] = (x, y, confidence).

    Mirroring exchanges left and right joints. A joint is there if its confidence exceeds `threshold` and it lies inside
    the crop; people without any such joint are left out, the others keep their order. `draw`: `conditioning_image` is
    all of them in HumanSD's style (uint8 [h, w, 3]), as sampling draws all people of a pose. `targets`: `keypoints` is
    float32 [10, 17, 3] in pixels of the crop, centres at +.5: the first ten, absent joints and people (-1, -1, 0).

    compat "reference" does what HumanSD's loader did, also where it went wrong: pictures are mirrored (.2) without
    exchanging the sides, turned upside down (.1), turned by up to 90 degrees with reflected borders (.1), recoloured
    (.4) and relit (.2) at random; joints outside the picture are moved to its first pixel; only the first ten people
    count and are drawn, in rows of their own. Needs crop="random", flip=0 and no masks. The picture is resized with
    our filter, not by area. Raises: ValueError for options; a sample without key points. Source: HumanSD, ldm/data.
    """

    keypoints: tuple[str, ...] = ("coco17",)
    draw: bool = True
    targets: bool = True
    threshold: float = THRESHOLD
    compat: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat = {self.compat!r}: use 'reference' or None")
        if self.compat and (self.crop != "random" or self.flip or self.masks):
            raise ValueError("compat = 'reference' has its own flips and no masks: use crop='random', flip=0, masks=()")

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if self.compat:
            sample = _reference_geometry(sample, rng)
        out = super().__call__(sample, rng)
        if self.compat:
            out["image"] = _reference_colours(out["image"], rng)
        people = inside(out.pop("keypoints")["coco17"].reshape(-1, 17, 3), self.size, self.threshold)
        there = people[..., 2].any(axis=1)
        drawn = people[there]
        if self.compat:
            # Rows stay where they are; a person whose numbers sum to less than nothing was not drawn.
            drawn = people[people.sum(axis=(1, 2)) > 0]
        if self.draw:
            style = replace(HUMANSD17, threshold=self.threshold)
            out["conditioning_image"] = draw_bodies(np.zeros((*self.size, 3), np.uint8), drawn, style)
        if self.targets:
            out["keypoints"] = padded(people if self.compat else drawn)
        return out


def inside(people: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    """People float [P, 17, 3] with every joint outside a picture of (height, width), or of a confidence of at most
    `threshold`, replaced by (-1, -1, 0). Coordinates that are no numbers are outside."""
    at, (height, width) = people[..., :2], size
    there = np.all((at >= 0) & (at < (width, height)), axis=-1) & (people[..., 2] > threshold)
    return np.where(there[..., None], people, np.asarray(MISSING, np.float32)).astype(np.float32)


def padded(people: np.ndarray) -> np.ndarray:
    """The first ten people of float [P, 17, 3] as float32 [10, 17, 3], missing rows (-1, -1, 0)."""
    rows = np.full((PEOPLE, 17, 3), MISSING, np.float32)
    rows[: len(people)] = people[:PEOPLE]
    return rows


def _reference_geometry(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The picture and its first ten people mirrored, turned upside down and rotated, each with its probability."""
    image = sample["image"]
    height, width = image.shape[:2]
    people = np.array(sample["keypoints"]["coco17"], np.float32).reshape(-1, 17, 3)[:PEOPLE]
    at = people[..., :2]
    at[~np.all((at >= 0) & (at < (width, height)), axis=-1)] = 0.5
    mirrored, upside_down, turned = rng.random(3) < (MIRRORED, UPSIDE_DOWN, TURNED)
    angle = float(rng.uniform(-DEGREES, DEGREES))
    if mirrored:
        image, at[..., 0] = image[:, ::-1], width - at[..., 0]
    if upside_down:
        image, at[..., 1] = image[::-1], height - at[..., 1]
    if turned:
        image, at[:] = rotate(image, at, angle)
    return {"image": np.ascontiguousarray(image), "keypoints": {"coco17": people}}


def rotate(image: np.ndarray, points: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [H, W, 3] and points [..., 2] in it turned anticlockwise about its centre, in a frame of the same
    size; borders are reflected about the outermost pixels, values interpolated linearly."""
    height, width = image.shape[:2]
    reach = math.hypot(height, width) / 2
    above, left = (math.ceil(reach - side / 2) + 1 for side in (height, width))
    wide = np.pad(image, ((above, above), (left, left), (0, 0)), mode="reflect")
    turned = np.asarray(Image.fromarray(wide).rotate(degrees, Image.Resampling.BILINEAR))
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre = np.array([width / 2, height / 2])
    moved = (points - centre) @ np.array([[cosine, -sine], [sine, cosine]]) + centre
    return turned[above : above + height, left : left + width], moved


def _reference_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] with hue, saturation and value or the three channels shifted, then contrast and brightness."""
    recoloured, relit = rng.random(2) < (RECOLOURED, RELIT)
    by_hue, shift, (contrast, brightness) = rng.random() < 0.5, rng.uniform(-1, 1, 3), rng.uniform(-LIGHT, LIGHT, 2)
    if recoloured and by_hue:
        hsv = np.asarray(Image.fromarray(image).convert("HSV"), np.float32)
        hsv = hsv + np.float32(shift * HUE_SATURATION_VALUE * np.array([HUE_STEPS, 1, 1]))
        hsv[..., 0] %= 256
        image = np.asarray(Image.frombytes("HSV", image.shape[1::-1], _bytes(hsv).tobytes()).convert("RGB"))
    elif recoloured:
        image = _bytes(image + np.float32(shift * CHANNEL))
    if relit:
        image = _bytes(image * np.float32(1 + contrast) + np.float32(255 * brightness))
    return image


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
