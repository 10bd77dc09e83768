"""Prompts and seeds to pictures on disk, batch by batch, whatever draws them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from fairhuman_jax.devices.sharding import replicate, shard_rows
from fairhuman_jax.drawing.pictures import Size

PyTree = Any
SHEET = 256  # pictures that a contact sheet shows, the first ones
# Of a picture's recipe.
LEFT_OUT = ("prompts", "file", "plan", "number", "batch", "mesh", "output", "debug", "seed", "size")


class Job(NamedTuple):
    """A picture to draw: prompt, seed, the file's name where it is not to be made of these, and pictures of people."""

    prompt: str
    seed: int
    name: str = ""
    references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Model:
    """What draws: `program(params, request(jobs), key, lora) -> images [N, H, W, 3] in [-1, 1]`, and its parameters.

    `name` tells the files of several apart; `size` (height, width) and `scheduler` go into the recipe. `keep`, where
    the program returns (images, more) instead, writes what `more` says of image number i beside its file.
    """

    name: str
    params: PyTree
    size: Size
    scheduler: str
    request: Callable[[Sequence[Job]], PyTree]
    program: Callable[[PyTree, PyTree, jax.Array, PyTree], PyTree]
    lora: PyTree = None
    keep: Callable[[PyTree, int, Path], Path] | None = None


def draw_jobs(
    options: argparse.Namespace, mesh: Mesh, model: Model, jobs: Sequence[Job]
) -> tuple[list[np.ndarray], list[Path]]:
    """Draws and writes every job, in batches of --batch; returns the first SHEET images and all files.

    The folder is made if need be.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    program = jax.jit(model.program)
    width = min(options.batch, len(jobs))
    width += -width % mesh.size
    params, lora = replicate(mesh, (model.params, model.lora))
    images: list[np.ndarray] = []
    written: list[Path] = []
    with tqdm(total=len(jobs), desc=f"drawing {model.name}".strip(), unit="image") as bar:
        for first in range(0, len(jobs), width):
            group = list(jobs[first : first + width])
            # The last group is filled up, so that one compiled program serves all.
            filled = group + [group[-1]] * (width - len(group))
            drawn = program(params, shard_rows(mesh, model.request(filled), width), jax.random.key(0), lora)
            drawn, more = drawn if model.keep else (drawn, None)
            found = np.asarray(drawn)[: len(group)]
            images.extend(found[: max(SHEET - len(images), 0)])
            for i, job in enumerate(group):
                written.append(_write(options, model, job, found[i]))
                if model.keep:
                    written.append(model.keep(more, i, written[-1]))
            bar.update(len(group))
    return images, written


def stem(text: str, fallback: str = "model") -> str:
    """A name for files: letters and digits of the end of a path, or of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or fallback


def _write(options: argparse.Namespace, model: Model, job: Job, image: np.ndarray) -> Path:
    """One PNG, named by prompt and seed unless the job names it, with its recipe as text chunk `parameters` (JSON)."""
    recipe = {name: _plain(value) for name, value in vars(options).items() if name not in LEFT_OUT}
    height, width = model.size
    recipe |= {"prompt": job.prompt, "seed": job.seed, "height": height, "width": width, "scheduler": model.scheduler}
    if job.name:
        recipe["reference"] = _plain(list(job.references))
    metadata = PngInfo()
    metadata.add_text("parameters", json.dumps(recipe))
    made = "-".join(filter(None, (stem(job.prompt, "image"), str(job.seed), model.name)))
    path = options.output / (job.name or f"{made}.png")
    pixels = np.rint((image + 1.0) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=metadata)
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
