"""Write any sample source as a `metadata.jsonl` folder, the layout that FolderDataset and FairHuman read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fairhuman_jax.data.folder import METADATA
from fairhuman_jax.data.loader import Source

# sample key, key in metadata.jsonl, folder
_LAYERS = (
    ("image", "image", "images"),
    ("face_mask", "mask_face", "masks_face"),
    ("hand_mask", "mask_hand", "masks_hand"),
    ("conditioning_image", "conditioning_image", "conditioning"),
)


def export_folder(
    source: Source,
    folder: str | os.PathLike[str],
    count: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the first `count` samples (None: all) as PNG files; returns the path of `metadata.jsonl`.

    Masks become 0 / 255 grey pictures; keys that a sample lacks are left out of its line. The metadata is
    written last and in one move, so a folder that has it is whole. `report(done, count)` is called after each
    sample. Raises: FileExistsError when the folder holds metadata already, ValueError when the source is
    shorter than `count`.
    """
    root = Path(folder)
    count = len(source) if count is None else count
    if not 0 < count <= len(source):
        raise ValueError(f"count = {count}: the source holds {len(source)} samples")
    if (root / METADATA).exists():
        raise FileExistsError(f"{root / METADATA}: exists; export into an empty folder")
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        lines.append(write_sample(root, f"{index:06d}", source[index]))
        if report is not None:
            report(index + 1, count)
    return write_metadata(root, lines)


def write_sample(root: Path, stem: str, sample: dict[str, Any]) -> dict[str, str]:
    """Write one sample's pictures as `<folder>/<stem>.png` under `root`; returns its metadata line."""
    line = {"text_english": sample["caption"]}
    for key, column, folder in _LAYERS:
        if key not in sample:
            continue
        path = root / folder / f"{stem}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.asarray(sample[key])
        if key.endswith("mask"):
            pixels = pixels[..., 0] * np.uint8(255)
        Image.fromarray(pixels).save(path)
        line[column] = path.relative_to(root).as_posix()
    return line


def write_metadata(root: Path, lines: list[dict[str, str]]) -> Path:
    """Write `metadata.jsonl` under a temporary name and move it into place."""
    temporary = root / f".{METADATA}.part"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, root / METADATA)
    return root / METADATA
