"""Aspect-ratio buckets: a few shapes of about one area, so that pictures are cropped little and batches still stack."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from fairhuman_jax.data.loader import Source

Shape = tuple[int, int]
READERS = 16  # threads: reading a picture's header waits for the disk, not for a core
CHUNK = 64  # pictures a thread takes at once


def bucket_shapes(resolution: int, step: int = 64, max_aspect: float = 2.0) -> tuple[Shape, ...]:
    """Shapes (height, width): multiples of `step`, of at most resolution^2 pixels and aspect up to `max_aspect`.

    For each short side k step <= resolution the long side is floor(resolution^2 / (k step^2)) step, so no bucket needs
    more memory than the square; at 1024 these are 1024 x 1024, 1088 x 960, 1152 x 896, 1216 x 832 and 1344 x 768, lying
    and standing. Ordered from the tallest to the widest. Raises: ValueError for resolution is no multiple of step, or
    max_aspect < 1.
    """
    if step < 1 or resolution < step or resolution % step:
        raise ValueError(f"buckets: resolution {resolution} must be a multiple of the step {step}")
    if max_aspect < 1.0:
        raise ValueError(f"buckets: the largest aspect is {max_aspect}; use 1 or more")
    pairs = [(short, resolution**2 // (short * step) * step) for short in range(step, resolution + 1, step)]
    pairs = [(short, long) for short, long in pairs if long <= max_aspect * short]
    shapes = {(long, short) for short, long in pairs} | set(pairs)
    return tuple(sorted(shapes, key=lambda shape: shape[1] / shape[0]))


def nearest_bucket(size: Shape, shapes: Sequence[Shape]) -> int:
    """Index of the shape whose aspect is nearest to that of `size`, by |log ratio|; the first of equals."""
    wanted = np.log(size[1] / size[0])
    return int(np.argmin([abs(np.log(width / height) - wanted) for height, width in shapes]))


def picture_size(source: Source, index: int) -> Shape:
    """(height, width) of a sample's image: from its header where the source has `size(index)`, else by loading it."""
    size = getattr(source, "size", None)
    return size(index) if size else source[index]["image"].shape[:2]


def assign_buckets(source: Source, shapes: Sequence[Shape]) -> np.ndarray:
    """Bucket of every sample, int32 [len(source)]."""
    spans = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    found: list[int] = []
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(source), desc="picture sizes", unit="image", delay=2.0, leave=False) as bar,
    ):
        for sizes in pool.map(lambda span: [picture_size(source, index) for index in span], spans):
            found += [nearest_bucket(size, shapes) for size in sizes]
            bar.update(len(sizes))
    return np.asarray(found, np.int32)
