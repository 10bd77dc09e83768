"""Drawings on disk: PNGs with their recipes, and the names of files."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fairhuman_jax.contract import Drawing, Job
from fairhuman_jax.drawing.recipes import CHUNK
from fairhuman_jax.files import replacing

CONTACT_SHEET = "sheet.png"


def stem(text: str, fallback: str = "model") -> str:
    """A name for files: the letters and digits of a prompt in any script, or of a path; at most 60 of them."""
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text).lower())[:60].strip("-") or fallback


def write_drawing(folder: Path, drawing: Drawing) -> list[Path]:
    """Writes PNG and extras of a drawing; returns the files, the picture first.

    The picture is named by prompt, seed and label unless its job has a name; an extra adds its own name to that. A
    picture of another recipe is never overwritten: the new one gets a number.
    Raises: OSError when a file cannot be written; a file that was there before is then untouched.
    """
    job, text = drawing.job, json.dumps(drawing.recipe)
    made = "-".join(filter(None, (stem(job.prompt, "image"), str(job.seed), drawing.label)))
    path = folder / job.name if job.name else free_path(folder / f"{made}.png", text)
    metadata = PngInfo()
    metadata.add_text(CHUNK, text)
    written = [write_png(path, Image.fromarray(drawing.image), metadata)]
    for name, pixels in drawing.extras.items():
        written.append(write_png(path.with_name(f"{path.stem}-{name}.png"), Image.fromarray(pixels)))
    return written


def free_path(path: Path, recipe: str | None = None) -> Path:
    """The path, or where it is taken NAME-2, NAME-3, ...; a picture of the same recipe does not take it."""
    first = path
    for number in itertools.count(2):
        if not path.exists() or (recipe is not None and _recipe(path) == recipe):
            return path
        path = first.with_name(f"{first.stem}-{number}{first.suffix}")
    raise AssertionError("numbers never end")


def _recipe(path: Path) -> str | None:
    """The recipe's text in a picture; None where there is none to read."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(CHUNK)
    except (OSError, SyntaxError, ValueError):
        return None


def write_png(path: Path, image: Image.Image, metadata: PngInfo | None = None) -> Path:
    """Writes a PNG under a temporary name and renames it. Raises: OSError when it cannot be written."""
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=metadata)
    return path


def left_to_draw(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs without those of a plan whose picture is in the folder already."""
    return [job for job in jobs if not (job.name and (folder / job.name).is_file())]
