"""Reads pictures and masks; whatever is wrong with a file is one `BadSample`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MASK_THRESHOLD = 128


class BadSample(ValueError):
    """A sample that cannot be used; the message names the file and the line of the metadata."""


File = str | os.PathLike[str] | bytes


def read_image(file: File, background: int = 255) -> np.ndarray:
    """Any picture file as RGB, uint8 [H, W, 3].

    EXIF orientation is applied; palettes and greys become RGB; 16-bit values are divided by 257; transparent
    pixels are laid over a grey `background`. Raises: BadSample naming the file when it is missing, damaged or
    no picture.
    """
    with _open(file) as opened:
        opened.load()
        return _to_rgb(ImageOps.exif_transpose(opened), background)


def read_size(file: File) -> tuple[int, int]:
    """(height, width) of a picture as `read_image` gives it, from the file's header alone. Raises: BadSample."""
    with _open(file) as opened:
        width, height = opened.size
        # Pillow decodes a whole PNG file to look for an orientation behind the pixels; such a one is not looked for.
        known = opened.format != "PNG" or "exif" in opened.info
        turned = known and opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


@contextmanager
def _open(file: File) -> Iterator[Image.Image]:
    """The opened picture; whatever is wrong with it becomes one BadSample."""
    name = "a picture of the record" if isinstance(file, bytes) else file
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            yield opened
    except FileNotFoundError:
        raise BadSample(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise BadSample(f"{name}: not a picture file that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"{name}: damaged picture ({error})") from None


def _to_rgb(picture: Image.Image, background: int) -> np.ndarray:
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.max(initial=0) > 255 or picture.mode != "I":
            values = (values + 128) // 257
        return np.repeat(np.clip(values, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    if picture.mode == "F":
        raise BadSample("floating-point pixels; store 8 or 16 bits a channel")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (background, background, background, 255))
        picture = Image.alpha_composite(canvas, picture)
    return np.array(picture.convert("RGB"))


def read_mask(file: File) -> np.ndarray:
    """Any picture file as a mask, uint8 [H, W, 1] in {0, 1}: 1 where the grey value is >= 128."""
    grey = Image.fromarray(read_image(file, background=0)).convert("L")
    return (np.asarray(grey) >= MASK_THRESHOLD).astype(np.uint8)[..., None]
