"""A picture of a batch: images with face, hand and object masks laid over in colours, captions below."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FACE_COLOUR = (255, 0, 0)
HAND_COLOUR = (0, 255, 0)
OBJECT_COLOURS = ((255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0))
STRENGTH = 0.45
GREY = 160


def tint(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], strength: float = STRENGTH) -> np.ndarray:
    """(1 - s) image + s colour where mask [..., H, W, 1] is 1; image uint8 [..., H, W, 3]."""
    mixed = (1.0 - strength) * image + strength * np.asarray(colour, np.float32)
    return np.where(mask > 0, np.rint(mixed), image).astype(np.uint8)


def overlay(
    batch: Mapping[str, np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    tile: int | None = None,
) -> Image.Image:
    """Sheet of a batch (image uint8 [B, H, W, 3], optional face_mask, hand_mask, conditioning_image, object_masks
    [B, N, H, W], object_pixels [B, N, S, S, 3]).

    A batch of latents has no image: its masks are shown on grey. Each tile is the tinted image (its control image and
    the pictures of its objects, if any, to the right) with its caption below; `tile` is the shown height in pixels
    (None: the image's own, at least 128).
    """
    images = np.asarray(batch["image"]) if "image" in batch else _canvas(batch)
    count, high = images.shape[:2]
    for name, colour in (("face_mask", FACE_COLOUR), ("hand_mask", HAND_COLOUR)):
        if name in batch:
            images = tint(images, np.asarray(batch[name]), colour)
    if "object_masks" in batch:
        for k, mask in enumerate(np.moveaxis(np.asarray(batch["object_masks"]), 1, 0)):
            images = tint(images, mask[..., None], OBJECT_COLOURS[k % len(OBJECT_COLOURS)])
    if "conditioning_image" in batch:
        images = np.concatenate([images, np.asarray(batch["conditioning_image"])], axis=2)
    if "object_pixels" in batch:
        images = np.concatenate([images, *_objects(np.asarray(batch["object_pixels"]), high)], axis=2)
    side: int = tile or max(high, 128)
    width = side * images.shape[2] // high
    font = ImageFont.load_default(size=12)
    per_line = max(8, width // 7)
    texts = ["\n".join(textwrap.wrap(text, per_line)) for text in captions or [""] * count]
    if len(texts) != count:
        raise ValueError(f"{len(texts)} captions for {count} images")
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    below = 5 + max(int(ruler.multiline_textbbox((0, 0), text, font=font)[3]) for text in texts)
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * width, rows * (side + below)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = index % columns * width, index // columns * (side + below)
        sheet.paste(Image.fromarray(image).resize((width, side), Image.Resampling.BILINEAR), (left, top))
        draw.multiline_text((left + 3, top + side + 1), text, fill="black", font=font)
    return sheet


def _objects(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    """uint8 [B, N, S, S, 3] as N pictures [B, side, side, 3], without those that the whole batch lacks."""

    def fitted(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))

    return [np.stack([fitted(picture) for picture in kth]) for kth in np.moveaxis(pixels, 1, 0) if kth.any()]


def _canvas(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Grey uint8 [B, H, W, 3] of the size of the batch's masks."""
    shape = np.shape(batch["face_mask"])
    return np.full((*shape[:-1], 3), GREY, np.uint8)


def sheet(images: np.ndarray, titles: list[str], columns: int = 4) -> Image.Image:
    """Contact sheet of images [N, H, W, 3] in [-1, 1] with a title below each, row by row."""
    pixels = np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return overlay({"image": pixels}, titles, columns)
