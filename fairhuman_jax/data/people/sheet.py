"""Contact sheets: samples beside their masks and skeletons, to be looked at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

OVERLAYS = (
    ("face_mask", (230, 40, 50)),
    ("hand_mask_left", (40, 210, 60)),
    ("hand_mask_right", (60, 80, 230)),
)
OVERLAY_SHARE = 0.6
# Pairs of rows of OpenPose-18.
LIMBS = (
    (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0),
)  # fmt: skip
FINGER_COLOURS = ((255, 60, 60), (255, 230, 60), (60, 255, 120), (60, 230, 255), (255, 80, 255))
LIMB_COLOUR = (255, 165, 0)


def overlay(sample: dict) -> np.ndarray:
    """Picture uint8 [S, S, 3] with face, left hand (green) and right hand (blue) tinted."""
    picture = sample["image"].astype(np.float32)
    for name, colour in OVERLAYS:
        mask = sample[name].astype(np.float32) * OVERLAY_SHARE
        picture = picture * (1 - mask) + mask * np.array(colour, np.float32)
    return picture.astype(np.uint8)


def _skeleton(picture: Image.Image, keypoints: dict[str, np.ndarray], scale: float) -> None:
    draw = ImageDraw.Draw(picture)
    body = keypoints["openpose18"][:, :2] * scale
    for i, j in LIMBS:
        draw.line([tuple(body[i]), tuple(body[j])], fill=LIMB_COLOUR, width=2)
    for side in ("hand_left", "hand_right"):
        hand = keypoints[side][:, :2] * scale
        for finger, colour in enumerate(FINGER_COLOURS):
            chain = [0, *range(4 * finger + 1, 4 * finger + 5)]
            draw.line([tuple(hand[k]) for k in chain], fill=colour, width=1)
    for x, y in keypoints["face5"][:, :2] * scale:
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(255, 255, 255))


def contact_sheet(samples: Iterable[dict], columns: int = 4, tile: int = 192, captions: bool = True) -> Image.Image:
    """Sheet of rendered samples (see `render`), each beside its masks and skeleton, optionally with its
    caption.

    `columns` pairs a row, every picture enlarged to `tile` pixels.
    """
    samples = list(samples)
    band = 36 if captions else 0
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * 2 * tile, rows * (tile + band)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for k, sample in enumerate(samples):
        x, y = (k % columns) * 2 * tile, (k // columns) * (tile + band)
        plain = Image.fromarray(sample["image"]).resize((tile, tile), Image.Resampling.NEAREST)
        marked = Image.fromarray(overlay(sample)).resize((tile, tile), Image.Resampling.NEAREST)
        _skeleton(marked, sample["keypoints"], tile / len(sample["image"]))
        sheet.paste(plain, (x, y))
        sheet.paste(marked, (x + tile, y))
        if captions:
            draw.multiline_text((x + 3, y + tile + 2), _wrap(sample["caption"], tile // 3), fill=(0, 0, 0), spacing=1)
    return sheet


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(lines)
