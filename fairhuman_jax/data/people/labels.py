"""Masks, part map, depth, key points and boxes of a rendered person, exact by construction.

Left and right are always the person's own.
"""

from __future__ import annotations

import numpy as np

from fairhuman_jax.data.people.surface import HAND_LEFT, HAND_RIGHT, HEAD_SKIN
from fairhuman_jax.keypoints.skeletons import relative_depth

CLASSES = 9
SIDES = ("left", "right")

COCO17 = (
    "nose", "eye.L", "eye.R", "ear.L", "ear.R", "upperarm01.L", "upperarm01.R", "lowerarm01.L",
    "lowerarm01.R", "wrist.L", "wrist.R", "upperleg01.L", "upperleg01.R", "lowerleg01.L", "lowerleg01.R",
    "foot.L", "foot.R",
)  # fmt: skip
OPENPOSE18 = (
    "nose", "shoulders", "upperarm01.R", "lowerarm01.R", "wrist.R", "upperarm01.L", "lowerarm01.L", "wrist.L",
    "upperleg01.R", "lowerleg01.R", "foot.R", "upperleg01.L", "lowerleg01.L", "foot.L",
    "eye.R", "eye.L", "ear.R", "ear.L",
)  # fmt: skip
# In image order, as face alignment expects: the person's right eye lies on the image's left.
FACE5 = ("eye.R", "eye.L", "nose", "mouth.R", "mouth.L")
HAND21 = ("wrist", *(f"finger{f}-{k}" for f in range(1, 6) for k in (1, 2, 3, "tip")))
# A joint lies inside the body: how far (m) it may lie behind the visible surface and still count as visible.
TOLERANCE = 0.05
FINGER_TOLERANCE = 0.02
DEEP_TOLERANCE = 0.12
DEEP = ("upperarm01", "upperleg01", "shoulders")


def count_classes(pixel: np.ndarray, label: np.ndarray, size: int, supersample: int) -> np.ndarray:
    """Samples of every class in every output pixel, int64 [S, S, 9]; `pixel` indexes the supersampled
    buffer."""
    wide = size * supersample
    out = (pixel // wide // supersample) * size + (pixel % wide) // supersample
    flat = np.bincount(out * CLASSES + label, minlength=size * size * CLASSES)
    return flat.reshape(size, size, CLASSES)


def decide(counts: np.ndarray, face: np.ndarray, supersample: int) -> dict[str, np.ndarray]:
    """Binarise coverage at one half: `person_mask`, `face_mask`, `hand_mask`, `hand_mask_left`,
    `hand_mask_right`, `part_map`, all uint8 [S, S, 1], from class counts [S, S, 9] and face counts [S, S].

    Pixels shared by several classes go to a hand if hands cover half of the pixel, else to the largest class;
    so hands, face and the rest of the part map never overlap, and the part map is non-zero exactly on the
    person."""
    half = supersample * supersample / 2
    hands = counts[..., HAND_LEFT] + counts[..., HAND_RIGHT]
    is_hand = hands >= half
    is_left = is_hand & (counts[..., HAND_LEFT] >= counts[..., HAND_RIGHT])
    is_face = (face >= half) & ~is_hand
    person = counts[..., 1:].sum(axis=-1) >= half
    part = 1 + counts[..., 1:HAND_LEFT].argmax(axis=-1)
    part = np.where(is_face, HEAD_SKIN, np.where(person, part, 0))
    part = np.where(is_hand, np.where(is_left, HAND_LEFT, HAND_RIGHT), part)
    masks = {
        "person_mask": person,
        "face_mask": is_face,
        "hand_mask": is_hand,
        "hand_mask_left": is_left,
        "hand_mask_right": is_hand & ~is_left,
        "part_map": part,
    }
    return {name: mask.astype(np.uint8)[..., None] for name, mask in masks.items()}


def nearest(depth: np.ndarray, size: int, supersample: int) -> np.ndarray:
    """Smallest depth of every output pixel [S, S] from a buffer [S k, S k] with inf where nothing is."""
    rows = np.minimum.reduce([depth[k::supersample] for k in range(supersample)])
    return np.minimum.reduce([rows[:, k::supersample] for k in range(supersample)])


def normalised_hand_depth(depth: np.ndarray, masks: dict[str, np.ndarray]) -> np.ndarray:
    """Hand depth float32 [S, S, 1]: each hand on its own from 1 (nearest pixel) to .2 (farthest), 0 outside
    the hands.

    `depth` [S, S, 1] in metres, `masks` as `decide` gives them.
    """
    left, right = (relative_depth(depth, masks[f"hand_mask_{side}"] > 0) for side in SIDES)
    return left + right


def tolerance(name: str) -> float:
    """Metres that a key point of this name may lie behind the surface and still be visible."""
    if name.startswith("finger"):
        return FINGER_TOLERANCE
    return DEEP_TOLERANCE if name.split(".")[0] in DEEP else TOLERANCE


def visibility(pixels: np.ndarray, depths: np.ndarray, names: tuple[str, ...], depth: np.ndarray) -> np.ndarray:
    """1.0 where a point lies in the frame and not farther than its tolerance behind `depth` [S, S] (0 =
    nothing there)."""
    size = len(depth)
    at = np.floor(pixels).astype(int)
    inside = ((at >= 0) & (at < size)).all(axis=1)
    x, y = np.clip(at, 0, size - 1).T
    surface = np.where(depth[y, x] > 0, depth[y, x], np.inf)
    allowed = np.array([tolerance(name) for name in names], dtype=np.float32)
    return (inside & (depths < surface + allowed)).astype(np.float32)


def key_points(project, points: dict[str, np.ndarray], depth: np.ndarray) -> dict[str, np.ndarray]:
    """Key points float32 [n, 3] = (x, y, visible), pixel centres at +.5: coco17, openpose18, face5 and both
    hands.

    `project` maps world points [n, 3] to (pixels [n, 2], depth [n]); `points` by name; `depth` [S, S] (0 =
    nothing)."""
    sets = {"coco17": COCO17, "openpose18": OPENPOSE18, "face5": FACE5}
    for side, tag in zip(SIDES, "LR", strict=True):
        sets[f"hand_{side}"] = tuple(f"{name}.{tag}" for name in HAND21)
    names = tuple(dict.fromkeys(name for group in sets.values() for name in group))
    pixels, distance = project(np.stack([points[name] for name in names]))
    rows = np.concatenate([pixels, visibility(pixels, distance, names, depth)[:, None]], axis=1)
    at = {name: i for i, name in enumerate(names)}
    return {key: rows[[at[name] for name in group]].astype(np.float32) for key, group in sets.items()}


def box(mask: np.ndarray, smallest: int = 4) -> list[int] | None:
    """[left, top, right, bottom) of a mask [S, S, 1], or None below `smallest` pixels."""
    rows, columns = np.nonzero(mask[..., 0])
    if len(rows) < smallest:
        return None
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
