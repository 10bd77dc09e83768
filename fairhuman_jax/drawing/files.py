"""Drawings on disk: PNGs with their recipes, and the names of files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fairhuman_jax.contract import Drawing, Job
from fairhuman_jax.drawing.recipes import CHUNK
from fairhuman_jax.files import replacing

CONTACT_SHEET = "sheet.png"


def stem(text: str, fallback: str = "model") -> str:
    """A name for files: letters and digits of a prompt, or of the end of a path."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or fallback


def write_drawing(folder: Path, drawing: Drawing) -> list[Path]:
    """Writes PNG and extras of a drawing; returns the files, the picture first.

    The picture is named by prompt, seed and label unless its job has a name; an extra adds its own name to that.
    Raises: OSError when a file cannot be written; a file that was there before is then untouched.
    """
    job = drawing.job
    made = "-".join(filter(None, (stem(job.prompt, "image"), str(job.seed), drawing.label)))
    path = folder / (job.name or f"{made}.png")
    metadata = PngInfo()
    metadata.add_text(CHUNK, json.dumps(drawing.recipe))
    written = [write_png(path, Image.fromarray(drawing.image), metadata)]
    for name, pixels in drawing.extras.items():
        written.append(write_png(path.with_name(f"{path.stem}-{name}.png"), Image.fromarray(pixels)))
    return written


def write_png(path: Path, image: Image.Image, metadata: PngInfo | None = None) -> Path:
    """Writes a PNG under a temporary name and renames it. Raises: OSError when it cannot be written."""
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=metadata)
    return path


def left_to_draw(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs without those of a plan whose picture is in the folder already."""
    return [job for job in jobs if not (job.name and (folder / job.name).is_file())]
