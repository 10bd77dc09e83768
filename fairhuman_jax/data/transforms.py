"""Joint geometry: image, control image, masks and key points go through one resize, flip and crop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fairhuman_jax.keypoints.poses import MIRROR

OPTIONAL_MASKS = ("face_mask", "hand_mask")

# Names that change places when a picture is mirrored.
SWAP = {
    "hand_left": "hand_right",
    "hand_right": "hand_left",
    "hand_mask_left": "hand_mask_right",
    "hand_mask_right": "hand_mask_left",
}


@dataclass(frozen=True)
class Geometry:
    """What happened to one picture: resized to (height, width), mirrored or not, then cropped at (top, left).

    Offsets are pixels of the resized (and, where `flip`, mirrored) picture; `original` is (height, width)
    before, `size` that of the crop [h, w].
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    flip: bool
    size: tuple[int, int]

    @property
    def resized_xy(self) -> tuple[int, int]:
        """(width, height), as Pillow counts."""
        return self.resized[1], self.resized[0]

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Mirror and crop an array [height, width, C] that has the resized size already."""
        if self.flip:
            array = array[:, ::-1]
        height, width = self.size
        return np.ascontiguousarray(array[self.top : self.top + height, self.left : self.left + width])

    def image(self, array: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [h, w, 3]: bilinear with antialiasing."""
        if array.shape[:2] != self.resized:
            array = np.asarray(Image.fromarray(array).resize(self.resized_xy, Image.Resampling.BILINEAR))
        return self.cut(array)

    def mask(self, array: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 1] in {0, 1} -> [h, w, 1]: bilinear on 0 / 255 grey, then 1 where >= 128."""
        if array.shape[:2] != self.resized:
            grey = Image.fromarray(array[..., 0] * np.uint8(255))
            grey = np.asarray(grey.resize(self.resized_xy, Image.Resampling.BILINEAR))
            array = (grey >= 128).astype(np.uint8)[..., None]
        return self.cut(array)

    def map(self, array: np.ndarray) -> np.ndarray:
        """float32 [H, W, 1] -> [h, w, 1]: bilinear with antialiasing."""
        if array.shape[:2] != self.resized:
            layer = Image.fromarray(array[..., 0].astype(np.float32))
            array = np.asarray(layer.resize(self.resized_xy, Image.Resampling.BILINEAR))[..., None]
        return self.cut(array)

    def labels(self, array: np.ndarray) -> np.ndarray:
        """Integers [H, W] -> [h, w]: those of the nearest pixels, never mixed."""
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(np.intp)
            for old, new in zip(array.shape[:2], self.resized, strict=True)
        )
        return self.cut(array[rows[:, None], columns])

    def keypoints(self, sets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sets of key points by the names of MIRROR: float [..., K, D], (x, y, ...), pixel centres at +.5.

        Mirroring exchanges left and right by name, within a set and between hands. Points outside the crop
        keep their coordinates, and columns after x, y their values.
        """
        moved = {name: self._move(array) for name, array in sets.items()}
        if not self.flip:
            return moved
        return {name: np.take(moved[SWAP.get(name, name)], MIRROR[name], axis=-2) for name in moved}

    def _move(self, array: np.ndarray) -> np.ndarray:
        moved = np.array(array, dtype=np.float32)
        height, width = self.resized
        moved[..., 0] *= width / self.original[1]
        moved[..., 1] *= height / self.original[0]
        if self.flip:
            moved[..., 0] = width - moved[..., 0]
        moved[..., 0] -= self.left
        moved[..., 1] -= self.top
        return moved

    def time_ids(self) -> np.ndarray:
        """SDXL's float32 [6]: original height, width, crop top, left, target height, width."""
        return np.asarray([*self.original, self.top, self.left, *self.size], np.float32)


@dataclass(frozen=True)
class JointTransform:
    """Resize (up or down) to cover `resolution`, mirror with probability `flip`, crop to it.

    `resolution`: (height, width), or one number for a square. The picture keeps its shape: one side fits, the other
    is floored from the same factor and at least as long as the crop's. `crop`: "center" or "random" (uniform over
    all offsets), centre offsets rounded half to even, as torchvision does it. Called with (sample, numpy Generator),
    gives `image`, `conditioning_image` if the sample has one (uint8 [h, w, 3]), `masks` (uint8 [h, w, 1] in {0, 1};
    face_mask and hand_mask are empty where missing), `maps` (float32 [h, w, 1]), `keypoints` (a dict of the
    named sets, see Geometry.keypoints) and `time_ids` (float32 [6]). The generator is drawn from three times
    whatever the options, so that switching one does not change the others' draws. Raises: ValueError for options,
    or a sample that lacks a layer.
    """

    resolution: int | tuple[int, int]
    crop: str = "center"
    flip: float = 0.0
    masks: tuple[str, ...] = ("face_mask", "hand_mask")
    maps: tuple[str, ...] = ()
    keypoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop = {self.crop!r}: use 'center' or 'random'")
        if min(self.size) < 1 or not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"resolution = {self.resolution} must be >= 1 and flip = {self.flip} within 0 ... 1")
        for name in self.keypoints:
            if name not in MIRROR:
                raise ValueError(f"keypoints: unknown set {name!r}; use {', '.join(MIRROR)}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)

    def geometry(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
        """Draw the geometry of a picture of `height` x `width` pixels."""
        high, wide = self.size
        fits_height = high * width >= wide * height
        resized = (high, high * width // height) if fits_height else (wide * height // width, wide)
        flip, row, column = rng.random(3)
        room = resized[0] - high, resized[1] - wide
        if self.crop == "random":
            top, left = (int(u * (r + 1)) for u, r in zip((row, column), room, strict=True))
        else:
            top, left = (round(r / 2) for r in room)
        return Geometry((height, width), resized, top, left, bool(flip < self.flip), self.size)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        height, width = sample["image"].shape[:2]
        geometry = self.geometry(height, width, rng)
        out: dict[str, Any] = {"image": geometry.image(sample["image"])}
        if "conditioning_image" in sample:
            out["conditioning_image"] = geometry.image(_layer(sample, "conditioning_image"))
        empty = np.zeros((*self.size, 1), np.uint8)
        for name in self.masks:
            source = SWAP.get(name, name) if geometry.flip else name
            optional = name in OPTIONAL_MASKS and name not in sample
            out[name] = empty if optional else geometry.mask(_layer(sample, source))
        for name in self.maps:
            out[name] = geometry.map(_layer(sample, name))
        if self.keypoints:
            sets = geometry.keypoints(sample.get("keypoints", {}))
            if lacking := [name for name in self.keypoints if name not in sets]:
                raise ValueError(
                    f"the sample has no key points {', '.join(lacking)}; it has {', '.join(sets) or 'none'}"
                )
            out["keypoints"] = {name: sets[name] for name in self.keypoints}
        return out | {"time_ids": geometry.time_ids()}


def _layer(sample: Mapping[str, Any], name: str) -> np.ndarray:
    """A layer of the sample, of the image's size."""
    if name not in sample:
        raise ValueError(f"the sample has no {name!r}; it has {', '.join(sample)}")
    array, size = sample[name], sample["image"].shape[:2]
    if array.shape[:2] != size:
        raise ValueError(f"{name} is {array.shape[:2]} pixels, the image {size}")
    return array


def dilate_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Grow the region of a mask [..., H, W, 1] in {0, 1} by a `size` x `size` rectangle, once.

    Grows (size - 1) // 2 pixels to the left and top and size // 2 to the right and bottom: 7 and 8 for 16, 3
    and 4 for 8 (FairHuman's mask preparation, preprocessor/mask_annoation.py).
    """
    if size < 1:
        raise ValueError(f"size = {size}: use >= 1")
    grown = np.asarray(mask)
    for axis in (-3, -2):
        length = grown.shape[axis]
        total = np.cumsum(np.moveaxis(grown > 0, axis, 0), axis=0, dtype=np.int64)
        total = np.concatenate([np.zeros_like(total[:1]), total])
        first = np.clip(np.arange(length) - size // 2, 0, length)
        last = np.clip(np.arange(length) + (size - 1) // 2 + 1, 0, length)
        grown = np.moveaxis(total[last] > total[first], 0, axis)
    return grown.astype(np.uint8)
