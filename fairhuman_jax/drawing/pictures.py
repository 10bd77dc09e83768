"""Pictures that options name: read, and fitted to one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.data.pictures import read_image, read_mask
from fairhuman_jax.drawing.options import Picture, Size
from fairhuman_jax.fields import OptionError


@dataclass(frozen=True)
class Guides:
    """Pictures to draw from, uint8 [H, W, 3] (mask [H, W, 1] in {0, 1}), all of one size (height, width)."""

    size: Size
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    conditions: tuple[np.ndarray, ...] = ()


def pixels_of(picture: Picture) -> np.ndarray:
    """A file or a picture in memory as uint8 [H, W, 3]. Raises: BadSample for a file that is no readable picture."""
    if isinstance(picture, np.ndarray):
        return picture
    return np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else read_image(picture)


def read_guides(
    system: LatentDiffusion,
    asked: Size | None,
    image: Picture | None = None,
    mask: Picture | None = None,
    conditions: tuple[Picture, ...] = (),
    further: np.ndarray | None = None,
) -> Guides:
    """Reads and fits the pictures to the asked size, or to that of the first picture (`further` is the last of them).

    Raises: BadSample for a file that is no readable picture; OptionError for a size that the networks cannot halve, or
    a mask of another size than its image.
    """
    read = None if image is None else pixels_of(image)
    shown = [pixels_of(condition) for condition in conditions]
    given = [picture.shape[:2] for picture in (read, *shown, further) if picture is not None]
    size = checked_size(asked, given[0] if given else None, system)
    return Guides(
        size,
        None if read is None else fitted(read, size),
        None if mask is None or read is None else _mask(mask, read.shape[:2], size),
        tuple(fitted(picture, size) for picture in shown),
    )


def _mask(mask: Picture, wanted: tuple[int, ...], size: Size) -> np.ndarray:
    """uint8 [H, W, 1] in {0, 1} of the given size, from a mask of the image's own size."""
    if isinstance(mask, (np.ndarray, Image.Image)):
        pixels = (np.asarray(Image.fromarray(np.asarray(mask)).convert("L")) >= 128).astype(np.uint8)
    else:
        pixels = read_mask(mask)[..., 0]
    if pixels.shape != tuple(wanted):
        raise OptionError(
            "mask",
            f"{{mask}} {mask} is {pixels.shape[0]}x{pixels.shape[1]}, but {{init_image}} is {wanted[0]}x{wanted[1]}",
        )
    return fitted(pixels, size, Image.Resampling.NEAREST)[..., None]


def fitted(pixels: np.ndarray, size: Size, method: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """Resizes a picture, and crops it at the middle where the proportions differ."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), method))


def checked_size(asked: Size | None, given: Size | None, system: LatentDiffusion) -> Size:
    """The asked size, that of the picture to draw from (rounded down to what the networks halve), or the base's own.

    Raises: OptionError for an asked size that is no multiple of the autoencoder's factor.
    """
    unet, factor = system.pipeline.unet, system.base.codec.downscale
    if asked is not None:
        if asked[0] % factor or asked[1] % factor or min(asked) < factor:
            raise OptionError("size", f"{{size}} {asked[0]}x{asked[1]}: both sides must be multiples of {factor}")
        return asked
    if given is not None:
        multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
        return max(given[0] // multiple, 1) * multiple, max(given[1] // multiple, 1) * multiple
    side = unet.sample_size or 64
    height, width = (side, side) if isinstance(side, int) else side
    return height * factor, width * factor
