"""Look through a whole `metadata.jsonl` folder before training on it: faults, sizes, areas of faces and hands."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from fairhuman_jax.data.buckets import bucket_shapes, nearest_bucket
from fairhuman_jax.data.folder import FolderDataset, read_layer
from fairhuman_jax.data.pictures import BadSample, read_image
from fairhuman_jax.data.preview import overlay
from fairhuman_jax.data.transforms import OPTIONAL_MASKS, JointTransform

FULL = 0.98  # a mask that covers more of the picture than this marks nothing
COVERED = 0.25  # share of a latent cell that area masks ask for
LONG_CAPTION = 60  # words; CLIP reads 75 tokens, which few captions of more words fit into
CHUNK = 16  # samples a worker process takes at once
SHEET, TILE = 24, 192


@dataclass(frozen=True)
class Task:
    """What a worker needs to look at one sample."""

    line: int | str
    files: dict[str, Path]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Region:
    """One mask: its share of the picture, and whether the crop, and latent masks of either method, keep any of it."""

    area: float
    cropped: bool
    stride: bool
    covered: bool


@dataclass
class Finding:
    """What one sample is; `problems` make it unfit, `notes` are worth a look."""

    line: int | str
    size: tuple[int, int] | None = None
    digest: str = ""
    regions: dict[str, Region] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Found = TypeVar("Found", bound=Finding)


@dataclass
class Report:
    """All findings of a folder, faults of its metadata among the `problems`; `figures`: further text. `str()`
    is what the command prints."""

    folder: Path
    resolution: int
    findings: list[Finding]
    problems: list[str]
    notes: list[str]
    layers: tuple[str, ...]
    figures: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing has to be mended."""
        return not self.problems

    def __str__(self) -> str:
        sections = [
            _listing(f"{len(self.problems)} problems", self.problems),
            _listing(f"{len(self.notes)} notes", self.notes),
            _sizes(self.findings, self.resolution),
            *(_areas(self.findings, name, self.resolution) for name in OPTIONAL_MASKS if name in self.layers),
            *self.figures,
        ]
        return "\n\n".join([f"{self.folder}: {len(self.findings)} samples", *filter(None, sections)])


def check_folder(folder: str | os.PathLike[str], resolution: int = 1024, workers: int | None = None) -> Report:
    """Read every file of the folder with `workers` processes (None: one a core; 0: in this one).

    `resolution` is that of the training to come, for buckets and for the question which regions survive at latent
    size. Problems: files missing or unreadable, masks of another shape or that cover everything, empty captions, bad
    lines of metadata. Notes: masks without a region, captions over 60 words, the same image twice, pictures smaller
    than `resolution`. Raises: FileNotFoundError, ValueError as FolderDataset does.
    """
    data = FolderDataset(folder)
    broken = data.bad_lines()
    tasks = [Task(data.line(i), data.files(i), data.captions(i)) for i in range(len(data))]
    findings = inspected(inspect, tasks, resolution, workers)
    problems = [line.removeprefix(f"{data.metadata}:") for line in broken]
    problems += [f"{f.line}: {text}" for f in findings for text in f.problems]
    notes = [f"{f.line}: {text}" for f in findings for text in f.notes] + duplicates(findings)
    notes += [f"{count} lines have no {column!r}" for column, count in data.missing.items()]
    return Report(Path(folder), resolution, findings, problems, notes, data.layers)


def inspected(
    look: Callable[[Task, int], Found], tasks: Sequence[Task], resolution: int, workers: int | None
) -> list[Found]:
    """What `look(task, resolution)` finds in each task, with `workers` processes (None: one a core; 0: in this one)."""
    workers = os.cpu_count() or 1 if workers is None else workers
    with contextlib.ExitStack() as stack:
        found: Iterable[Found] = (look(task, resolution) for task in tasks)
        if workers and len(tasks) > CHUNK:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            found = pool.map(look, tasks, [resolution] * len(tasks), chunksize=CHUNK)
        return list(tqdm(found, total=len(tasks), desc="checking", unit="sample", delay=0.5))


def inspect(task: Task, resolution: int) -> Finding:
    """Every file of one sample, each judged for itself."""
    finding = Finding(task.line)
    judge_captions(finding, task.captions)
    try:
        image = read_image(task.files["image"])
    except BadSample as error:
        finding.problems.append(str(error))
        return finding
    judge_image(finding, image, resolution)
    for name, path in task.files.items():
        if name == "image":
            continue
        try:
            layer = read_layer(name, path, image.shape[:2], task.files["image"].name)
        except BadSample as error:
            finding.problems.append(str(error))
            continue
        if name in OPTIONAL_MASKS:
            _judge_mask(finding, name, layer, path, resolution)
    return finding


def judge_captions(finding: Finding, captions: Sequence[str]) -> None:
    """Notes what a text encoder makes nothing of, or too little."""
    if any(not caption.strip() for caption in captions):
        finding.problems.append("empty caption")
    words = max(len(caption.split()) for caption in captions)
    if words > LONG_CAPTION:
        finding.notes.append(f"caption of {words} words; text encoders cut after about {LONG_CAPTION}")


def judge_image(finding: Finding, image: np.ndarray, resolution: int) -> None:
    """Notes size and content of a picture."""
    finding.size = image.shape[0], image.shape[1]
    finding.digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() + str(finding.size)
    if min(finding.size) < resolution:
        finding.notes.append(f"{image.shape[1]}x{image.shape[0]} pixels, enlarged to {resolution}")


def _judge_mask(finding: Finding, name: str, mask: np.ndarray, path: Path, resolution: int) -> None:
    area = float(mask.mean())
    if area == 0.0:
        finding.notes.append(f"{path}: no region (nothing is 128 or brighter)")
        return
    if area > FULL:
        finding.problems.append(f"{path}: covers {100 * area:.0f} % of the picture")
    transform = JointTransform(resolution)
    cropped = transform.geometry(mask.shape[0], mask.shape[1], np.random.default_rng(0)).mask(mask)
    kept = [latent_cells(cropped, method).any() for method in ("stride", "area")]
    finding.regions[name] = Region(area, not cropped.any(), bool(kept[0]), bool(kept[1]))


def latent_cells(mask: np.ndarray, method: str, factor: int = 8) -> np.ndarray:
    """Mask uint8 [H, W, 1] in {0, 1} -> bool [H // factor, W // factor]: the cells that losses.latent_mask keeps.

    "stride" reads pixel (factor i, factor j), "area" asks for a quarter of the cell.
    """
    height, width = (side // factor for side in mask.shape[:2])
    whole = mask[: height * factor, : width * factor, 0]
    if method == "stride":
        return whole[::factor, ::factor] > 0
    return whole.reshape(height, factor, width, factor).mean((1, 3)) >= COVERED


def sheet(folder: str | os.PathLike[str], count: int = SHEET, tile: int = TILE) -> Image.Image:
    """Picture of `count` samples spread over the folder, masks laid over, captions below. Raises: BadSample."""
    data = FolderDataset(folder)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int))
    samples = [data[int(index)] for index in chosen]
    transform, rng = JointTransform(tile), np.random.default_rng(0)
    parts = [transform(sample, rng) for sample in samples]
    batch = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return overlay(batch, [sample["caption"][:160] for sample in samples])


def duplicates(findings: Sequence[Finding]) -> list[str]:
    lines = defaultdict(list)
    for finding in findings:
        if finding.digest:
            lines[finding.digest].append(finding.line)
    return [f"lines {', '.join(map(str, same))}: the same image" for same in lines.values() if len(same) > 1]


def _listing(title: str, lines: Sequence[str], limit: int = 40) -> str:
    more = [f"  ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([title + (":" if lines else ""), *(f"  {line}" for line in lines[:limit]), *more])


def bars(title: str, rows: Sequence[tuple[str, int]]) -> str:
    """A row of `#` for each (label, count), the longest of 30."""
    most = max((count for _, count in rows), default=1)
    return "\n".join([title, *(f"  {label:<24} {count:>8}  {'#' * -(-30 * count // most)}" for label, count in rows)])


def _sizes(findings: Sequence[Finding], resolution: int) -> str:
    sizes = [finding.size for finding in findings if finding.size]
    if not sizes:
        return ""
    shorts = Counter(max(2 ** int(np.log2(min(size))), 1) for size in sizes)
    rows = [(f"short side {low} - {2 * low - 1}", count) for low, count in sorted(shorts.items())]
    shapes = bucket_shapes(resolution, max(resolution // 16, 1)) if resolution >= 16 else ((1, 1),)
    nearest = Counter(nearest_bucket(size, shapes) for size in sizes)
    rows += [(f"bucket {shapes[i][1]}x{shapes[i][0]}", nearest[i]) for i in sorted(nearest)]
    return bars("sizes and aspect ratios (width x height):", rows)


def _areas(findings: Sequence[Finding], name: str, resolution: int) -> str:
    regions = [finding.regions[name] for finding in findings if name in finding.regions]
    share = f"{name}: {len(regions)} of {len(findings)} samples ({100 * len(regions) / max(len(findings), 1):.0f} %)"
    if not regions:
        return share
    low, median, high = np.percentile([100 * region.area for region in regions], [10, 50, 90])
    inside = [region for region in regions if not region.cropped]
    strided, covered = sum(not region.stride for region in inside), sum(not region.covered for region in inside)
    return (
        f"{share}\n  percent of the picture: median {median:.2f}, 10th to 90th percentile {low:.2f} to {high:.2f}"
        f"\n  outside a central square crop: {len(regions) - len(inside)}"
        f"\n  vanish from latents at {resolution}: {strided} with stride masks, {covered} with area masks"
    )
