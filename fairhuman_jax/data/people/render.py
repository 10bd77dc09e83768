"""One picture of the people world with all its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from fairhuman_jax.data.people import labels, mesh, palette
from fairhuman_jax.data.people.camera import Camera, Landmarks, frame
from fairhuman_jax.data.people.captions import Seen, caption
from fairhuman_jax.data.people.garments import dress
from fairhuman_jax.data.people.pack import HAIR, SKIRT, PeoplePack
from fairhuman_jax.data.people.paint import background, paint
from fairhuman_jax.data.people.posing import pose_body
from fairhuman_jax.data.people.raster import Fragments, rasterise
from fairhuman_jax.data.people.shading import contact, shade
from fairhuman_jax.data.people.shape import Shaped, shape_body
from fairhuman_jax.data.people.spec import raised_sides
from fairhuman_jax.data.people.surface import (
    BOTTOM,
    HAND_LEFT,
    HAND_RIGHT,
    TOP,
    classify,
    interpolate,
    is_face,
    surface,
)
from fairhuman_jax.data.people.surface import HAIR as HAIR_CLASS


def identity_vector(person: dict) -> np.ndarray:
    """Ground truth of a person's looks, float32 [43]: six phenotype scalars, ancestry (3), face (16),
    colours of skin, iris and hair (9), hair style one-hot (6), hairline shift in cm, beard, and woman."""
    scalars = [person[k] for k in ("gender", "age", "muscle", "weight", "height", "proportions")]
    colours = palette.SKIN[person["skin"]] + palette.IRIS[person["iris"]] + palette.HAIR[person["hair_colour"]]
    styles = [float(person["hair_style"] == s) for s in (*palette.HAIR_STYLES, "bald")]
    last = [100 * person["hairline_shift"], float(person["beard"]), float(person["sex"] == "woman")]
    return np.array([*scalars, *person["ancestry"], *person["face"], *colours, *styles, *last], dtype=np.float32)


def assemble(pack: PeoplePack, spec: dict) -> tuple[mesh.Drawable, dict[str, np.ndarray], Landmarks]:
    """Shape, dress and pose: what to draw, every named point, and what the camera aims at."""
    shaped = shape_body(pack, spec["identity"], spec["expression"]["coefficients"])
    wardrobe = dress(pack.canon, mesh.static(pack).fields, spec)
    # Posing the dressed body keeps hands outside the cloth.
    posed = pose_body(pack, Shaped(mesh.dressed_rest(pack, shaped.vertices, wardrobe), shaped.joints), spec)
    vertices = posed.vertices
    points = {name: posed.points[i] for name, i in pack.point.items()}
    points |= {name: vertices[i] for name, i in pack.mark.items()}
    points["shoulders"] = 0.5 * (points["upperarm01.L"] + points["upperarm01.R"])
    drawn = mesh.drawable(pack, vertices, wardrobe, posed.seat)
    hands = {
        side: np.stack([points[f"{name}.{tag}"] for name in labels.HAND21])
        for side, tag in zip(labels.SIDES, "LR", strict=True)
    }
    body = vertices[_body_vertices(pack)]
    return drawn, points, Landmarks(points, hands, raised_sides(spec), body.min(axis=0), body.max(axis=0))


def _body_vertices(pack: PeoplePack) -> np.ndarray:
    return ~pack.part_vertices(HAIR, SKIRT)


@dataclass(frozen=True)
class Drawing:
    """One person's samples of a picture, a row for each of `fragments`: class `label` [n], whether it is `face` [n],
    `colour` float32 [n, 3], lit and darkened at contacts; and the `camera` and every named point of the body."""

    fragments: Fragments
    label: np.ndarray
    face: np.ndarray
    colour: np.ndarray
    camera: Camera
    points: dict[str, np.ndarray]


def draw(pack: PeoplePack, spec: dict, size: int, supersample: int) -> Drawing:
    """Rasterise, classify, paint and light the person of `spec`, `supersample` squared samples a pixel."""
    drawn, points, landmarks = assemble(pack, spec)
    person, camera, wide = spec["identity"], frame(spec["camera"], landmarks), size * supersample
    pixels, depth = camera.project(drawn.vertices, wide)
    fragments = rasterise(pixels, depth, drawn.faces, wide, wide)
    values = interpolate(drawn.attributes, drawn.faces[fragments.triangle], fragments.weights)
    seen = surface(values, drawn.part[fragments.triangle], person["hairline_shift"], person["hair_style"])
    label = classify(seen, person["hair_style"])
    colour, shine = paint(seen, label, spec)
    colour = shade(colour, seen.normal, shine, camera.rotation, spec["light"])
    buffer = np.zeros((wide, wide), dtype=np.float32)
    buffer.ravel()[fragments.pixel] = fragments.depth
    shadow = contact(buffer, buffer > 0, camera.distance, camera.half_height)
    return Drawing(
        fragments, label, is_face(seen, label), colour * shadow.ravel()[fragments.pixel, None], camera, points
    )


def compose(backdrop: dict, drawings: Sequence[Drawing], size: int, supersample: int) -> np.ndarray:
    """Lay drawings over a spec's `background` entry, the last one in front, and average samples: uint8 [S, S, 3]."""
    picture = background(backdrop, size * supersample).reshape(-1, 3)
    for drawing in drawings:
        picture[drawing.fragments.pixel] = drawing.colour
    samples = picture.reshape(size, supersample, size, supersample * 3)
    rows = reduce(np.add, (samples[:, k] for k in range(supersample)))
    mean = sum(rows[..., 3 * k : 3 * k + 3] for k in range(supersample)) / np.float32(supersample**2)
    return (np.clip(mean, 0, 1) * 255 + 0.5).astype(np.uint8)


def part_masks(
    drawing: Drawing, size: int, supersample: int, hidden: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Masks as `labels.decide` gives them and class counts int64 [S, S, 9], without the rows `hidden` (bool [n])."""
    there = np.ones(len(drawing.label), bool) if hidden is None else ~hidden
    pixel, face = drawing.fragments.pixel[there], drawing.face[there]
    counts = labels.count_classes(pixel, drawing.label[there], size, supersample)
    faces = labels.count_classes(pixel[face], np.ones(face.sum(), np.intp), size, supersample)[..., 1]
    return labels.decide(counts, faces, supersample), counts


def _depths(
    fragments: Fragments, label: np.ndarray, masks: dict, covered: np.ndarray, size: int, supersample: int
) -> tuple[np.ndarray, np.ndarray]:
    """Depth (m, 0 where less than half of the pixel is covered) and per-hand normalised hand depth, [S, S,
    1]."""
    wide = size * supersample

    def spread(rows: np.ndarray) -> np.ndarray:
        buffer = np.full(wide * wide, np.inf, dtype=np.float32)
        buffer[fragments.pixel[rows]] = fragments.depth[rows]
        return labels.nearest(buffer.reshape(wide, wide), size, supersample)

    depth = np.where(covered * 2 >= supersample**2, spread(np.arange(len(label))), 0)
    # A pixel given to a hand takes the hand's depth, even where something nearer covers a sample of it.
    for side, c in (("left", HAND_LEFT), ("right", HAND_RIGHT)):
        at_hand = spread(np.flatnonzero(label == c))
        inside = masks[f"hand_mask_{side}"][..., 0] > 0
        depth[inside] = at_hand[inside]
    depth = depth.astype(np.float32)[..., None]
    return depth, labels.normalised_hand_depth(depth, masks)


def shares(masks: dict[str, np.ndarray], size: int) -> Seen:
    """Shares of the picture that `decide`'s masks of one person cover."""
    share = np.bincount(masks["part_map"].ravel(), minlength=labels.CLASSES) / (size * size)
    return Seen(
        left_hand=float(share[HAND_LEFT]),
        right_hand=float(share[HAND_RIGHT]),
        face=float(masks["face_mask"].mean()),
        hair=float(share[HAIR_CLASS]),
        top=float(share[TOP]),
        bottom=float(share[BOTTOM]),
    )


def render(pack: PeoplePack, spec: dict, size: int, supersample: int = 2) -> dict:
    """Draw `spec` (see `sample_spec`) as a square picture of `size` pixels with every label.

    Returns `image` uint8 [S, S, 3]; `caption` str; `face_mask`, `hand_mask`, `hand_mask_left`,
    `hand_mask_right`, `person_mask`, `part_map` (classes of `surface.CLASS_NAMES`) uint8 [S, S, 1],
    coverage binarised at one half; `depth` float32 [S, S, 1] (m along the view axis of the nearest surface,
    a stool included; 0 = background); `hand_depth` float32 [S, S, 1] (each hand: nearest 1, farthest .2; 0
    outside); `keypoints` {coco17, openpose18, hand_left, hand_right (21 each), face5}: float32 [n, 3] = (x,
    y, visible), pixels with centres at +.5; `boxes` {person, face, hand_left, hand_right}: [left, top,
    right, bottom) or None; `identity_hash` str and `identity` float32 [43]. Left and right are the
    person's. `supersample` squared samples a pixel."""
    if size < 8 or supersample < 1:
        raise ValueError(f"render: size {size} and supersample {supersample} must be at least 8 and 1")
    drawing = draw(pack, spec, size, supersample)
    masks, counts = part_masks(drawing, size, supersample)
    camera, covered = drawing.camera, counts.sum(axis=-1)
    depths, hand_depth = _depths(drawing.fragments, drawing.label, masks, covered, size, supersample)
    keypoints = labels.key_points(lambda p: camera.project(p, size), drawing.points, depths[..., 0])
    names = {
        "person": "person_mask",
        "face": "face_mask",
        "hand_left": "hand_mask_left",
        "hand_right": "hand_mask_right",
    }
    return {
        "image": compose(spec["background"], [drawing], size, supersample),
        "caption": caption(spec, shares(masks, size)),
        **masks,
        "depth": depths,
        "hand_depth": hand_depth,
        "keypoints": keypoints,
        "boxes": {name: labels.box(masks[mask]) for name, mask in names.items()},
        "identity_hash": spec["identity_hash"],
        "identity": identity_vector(spec["identity"]),
    }
