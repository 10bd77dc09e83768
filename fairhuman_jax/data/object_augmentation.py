"""The picture of one object as an image encoder gets it: squared, resized and, for training, changed at random.

Source: FastComposer, transforms.py. Its random numbers are torch's, so single draws cannot be compared.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Probabilities: zoom, turn, colours, blur, grey, mirror, elastic.
PROBABILITIES = (0.5, 0.75, 0.5, 0.5, 0.1, 0.5, 0.5)
LARGEST_ZOOM = 2.0
DEGREES = 30.0
JITTER = 0.5  # of brightness, contrast and saturation as a factor 1 +- JITTER, of hue in turns
BLUR_TAPS, BLUR_SIGMA = 5, (0.1, 2.0)
ELASTIC_ALPHA, ELASTIC_SIGMA, ELASTIC_TAPS = 50.0, 5.0, 41


def squared(crop: np.ndarray, size: int, compat: str | None = None) -> np.ndarray:
    """uint8 [h, w, 3] in the middle of a black square, resized to uint8 [size, size, 3]: bilinear with antialiasing.

    compat "reference": an odd difference of the sides leaves the square one pixel short before it is resized.
    """
    height, width = crop.shape[:2]
    row, column = max(width - height, 0), max(height - width, 0)
    top, left = row // 2, column // 2
    bottom, right = (top, left) if compat else (row - top, column - left)
    square = np.pad(crop, ((top, bottom), (left, right), (0, 0)))
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR))


def augmented(crop: np.ndarray, size: int, rng: np.random.Generator, compat: str | None = None) -> np.ndarray:
    """`squared`, with each change of PROBABILITIES made or not, in their order; the zoom comes before the square.

    Turned by up to 30 degrees with black corners, brightness, contrast, saturation and hue changed in a random order,
    blurred, made grey, mirrored, and bent by a smooth field of displacements.
    """
    zoomed, turned, recoloured, blurred, grey, mirrored, bent = rng.random(len(PROBABILITIES)) < PROBABILITIES
    if zoomed:
        crop = zoom(crop, rng.uniform(1.0, LARGEST_ZOOM), compat)
    picture = Image.fromarray(squared(crop, size, compat))
    if turned:
        picture = picture.rotate(rng.uniform(-DEGREES, DEGREES), Image.Resampling.BILINEAR)
    if recoloured:
        picture = jittered(picture, rng)
    if blurred:
        smooth = _blur_matrix(size, rng.uniform(*BLUR_SIGMA), BLUR_TAPS)
        picture = Image.fromarray(
            _bytes(np.einsum("ik,jl,klc->ijc", smooth, smooth, np.asarray(picture), optimize=True))
        )
    if grey:
        picture = picture.convert("L").convert("RGB")
    if mirrored:
        picture = ImageOps.mirror(picture)
    return bend(np.asarray(picture), rng) if bent else np.array(picture)


def zoom(crop: np.ndarray, factor: float, compat: str | None = None) -> np.ndarray:
    """The upper middle of a crop [h, w, 3], where heads are: min(h, w) / factor pixels high, w / factor wide.

    compat "reference": the whole crop is enlarged, then only what is higher than wide is cut off below, so that the
    factor changes nothing but the resampling.
    """
    height, width = crop.shape[:2]
    if compat:
        size = int(factor * width), int(factor * height)
        return np.asarray(Image.fromarray(crop).resize(size, Image.Resampling.BILINEAR))[: min(size)]
    rows, columns = max(round(min(height, width) / factor), 1), max(round(width / factor), 1)
    left = (width - columns) // 2
    return crop[:rows, left : left + columns]


def jittered(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue of an RGB picture changed, in a random order."""
    factors, turn = rng.uniform(1 - JITTER, 1 + JITTER, 3), rng.uniform(-JITTER, JITTER)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for change in rng.permutation(4):
        if change < 3:
            picture = enhancers[change](picture).enhance(factors[change])
        else:
            hsv = np.array(picture.convert("HSV"))
            hsv[..., 0] += np.uint8(round(turn * 255) % 256)
            picture = Image.frombytes("HSV", picture.size, hsv.tobytes()).convert("RGB")
    return picture


def bend(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [S, S, 3] read at displaced places: alpha / 2 pixels times blurred uniform noise -1 ... 1; black beyond."""
    size = len(image)
    smooth = _blur_matrix(size, ELASTIC_SIGMA, ELASTIC_TAPS)
    noise = rng.uniform(-1, 1, (2, size, size)).astype(np.float32)
    at = np.indices((size, size), np.float32) + ELASTIC_ALPHA / 2 * (smooth @ noise @ smooth.T)
    low = np.floor(at).astype(np.intp)
    padded, total = np.pad(image, ((1, 1), (1, 1), (0, 0))).astype(np.float32), np.zeros(image.shape, np.float32)
    for corner in np.ndindex(2, 2):
        cell = low + np.reshape(corner, (2, 1, 1))
        row, column = np.clip(cell, -1, size) + 1
        total += np.prod(1 - np.abs(at - cell), axis=0)[..., None] * padded[row, column]
    return _bytes(total)


def _blur_matrix(size: int, sigma: float, taps: int) -> np.ndarray:
    """float32 [size, size]: a Gaussian of `taps` values along an axis, borders reflected about the outermost pixels."""
    weights = np.exp(-0.5 * ((np.arange(taps) - taps // 2) / sigma) ** 2)
    source = np.pad(np.arange(size), taps // 2, mode="reflect")
    matrix = np.zeros((size, size), np.float32)
    rows = np.arange(size)[:, None]
    np.add.at(matrix, (rows, source[rows + np.arange(taps)]), weights / weights.sum())
    return matrix


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
