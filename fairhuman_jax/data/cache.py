"""Samples drawn once and kept: a folder of arrays, made by all cores on first use and mapped into memory after."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fairhuman_jax.data.loader import Source
from fairhuman_jax.data.people import PeopleDataset
from fairhuman_jax.data.people.conditions import detected_points
from fairhuman_jax.data.people.paraphrase import paraphrases
from fairhuman_jax.data.people.subjects import PeopleScenes, PeopleSubjects, PeopleViews
from fairhuman_jax.packages import cache_folder

CHUNK = 64
PICTURES, MASKS = ("image", "conditioning_image"), ("face_mask", "hand_mask")
KEYPOINTS = "keypoints"
Rows = Callable[[dict[str, Any]], dict[str, np.ndarray]]
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class CachedSource:
    """The samples of a finished cache folder: image, face_mask, hand_mask, caption and `captions`, its paraphrases, of
    which the loader draws one; where they were asked for conditioning_image and `keypoints`. Picklable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.captions: list[str] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
        self._pictures = {name: arrays[name] for name in PICTURES if name in arrays}
        self._masks = {name: arrays[name] for name in MASKS}
        self._keypoints = arrays.get(KEYPOINTS)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pictures = {name: np.asarray(array[index]) for name, array in self._pictures.items()}
        side = pictures["image"].shape[0]
        masks = {
            name: np.unpackbits(packed[index], count=side * side).reshape(side, side, 1)
            for name, packed in self._masks.items()
        }
        caption = self.captions[index]
        sample = {**pictures, "caption": caption, "captions": paraphrases(caption), **masks}
        if self._keypoints is not None:
            sample["keypoints"] = {"coco17": np.asarray(self._keypoints[index])}
        return sample

    def __reduce__(self):
        return CachedSource, (self.folder,)


class CachedArrays:
    """The samples of a finished cache folder as they were: arrays and caption. Picklable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.captions: list[str] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self._arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        arrays = {name: np.asarray(array[index]) for name, array in self._arrays.items()}
        return arrays | {"caption": self.captions[index]}

    def __reduce__(self):
        return CachedArrays, (self.folder,)


def cached_people(
    size: int,
    length: int,
    seed: int,
    start: int = 0,
    conditioning: str | None = None,
    keypoints: bool = False,
    framings: tuple[tuple[str, float], ...] = (),
) -> CachedSource:
    """People-world samples `start` to `start + length`, from the user's cache folder or rendered into it; with control
    images of the style `conditioning`, and with `keypoints` = {"coco17": float32 [1, 17, 3]}, the person's joints as
    `conditions.detected_points` gives them. `framings` = ((name, share), ...) takes the place of the palette's mix.

    The folder's name covers the arguments and the renderer's own source, so a changed renderer draws anew. The folder
    appears whole or not at all. FAIRHUMAN_CACHE names another place for it. Raises: OSError for no room or no right to
    write.
    """
    source = PeopleDataset(size, length, seed, start=start, conditioning=conditioning, framings=framings)
    layers = (f"-{conditioning}" if conditioning else "") + ("-keypoints" if keypoints else "")
    if source.framings:
        layers += f"-mix{hashlib.sha256(json.dumps(source.framings).encode()).hexdigest()[:8]}"
    name = f"people-{size}px-seed{seed}-{start}+{length}{layers}"
    return CachedSource(_kept(source, name, functools.partial(_rows, keypoints=keypoints)))


def cached_subjects(
    size: int,
    length: int,
    seed: int,
    view_size: int,
    identities: int | None = None,
    pairs: float = 0,
    count: int = 4,
    looks: bool = True,
) -> PeopleSubjects:
    """Scenes of the people world with `count` views of each person, in pictures of `view_size` pixels, kept as
    `cached_people` keeps its samples; `looks` is of PeopleSubjects, the other arguments are those of PeopleScenes."""
    scenes = PeopleScenes(size, length, seed, identities, pairs)
    views = PeopleViews(view_size, scenes.identities, seed, count)
    people = f"{scenes.identities}people"
    stored = (
        _kept(scenes, f"scenes-{size}px-seed{seed}-{length}-{people}-pairs{pairs}", _arrays),
        _kept(views, f"views-{view_size}px-seed{seed}-{people}x{count}", _arrays),
    )
    return PeopleSubjects(CachedArrays(stored[0]), CachedArrays(stored[1]), count, looks)


def _kept(source: Source, name: str, rows: Rows) -> Path:
    """The finished cache folder of what `rows` takes of each sample; written if it is not there."""
    folder = cache_folder() / f"{name}-{_renderer_digest()}"
    if not folder.is_dir():
        try:
            _write(source, folder, rows)
        except OSError as error:
            if not folder.is_dir():  # or another process finished the same folder first
                raise OSError(
                    f"people world: cannot keep {len(source)} images in {folder.parent} ({error.strerror or error}); "
                    "set FAIRHUMAN_CACHE to a folder with room"
                ) from error
    return folder


def _write(source: Source, folder: Path, rows: Rows) -> None:
    """Renders every sample with one process a core, then renames the finished folder into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="people-", dir=folder.parent))
    try:
        captions: list[str] = []
        first = rows(source[0])
        arrays = {
            name: np.lib.format.open_memmap(work / f"{name}.npy", "w+", row.dtype, (len(source), *row.shape))
            for name, row in first.items()
        }
        spans = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
        with tqdm(total=len(source), desc="rendering people", unit="image", smoothing=0.1) as bar:
            for span, (chunk, texts) in zip(spans, _rendered(source, spans, rows), strict=True):
                for name, array in arrays.items():
                    array[span.start : span.stop] = chunk[name]
                captions += texts
                bar.update(len(span))
        for array in arrays.values():
            array.flush()
        (work / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rows(sample: dict[str, Any], keypoints: bool) -> dict[str, np.ndarray]:
    """What is kept of a sample: pictures as they are, masks with eight pixels a byte, the joints of COCO."""
    rows = {name: sample[name] for name in PICTURES if name in sample}
    rows |= {name: np.packbits(sample[name]) for name in MASKS}
    return rows | ({KEYPOINTS: detected_points(sample, "coco17")[None]} if keypoints else {})


def _arrays(sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """All that is an array."""
    return {name: value for name, value in sample.items() if isinstance(value, np.ndarray)}


def _rendered(source: Source, spans: Sequence[range], rows: Rows) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """The chunks in order, from all cores; a single one is drawn here, which is done before a process has started."""
    if len(spans) == 1:
        yield _render(source, spans[0], rows)
        return
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(_render, [source] * len(spans), spans, [rows] * len(spans))


def _render(source: Source, span: range, rows: Rows) -> tuple[dict[str, np.ndarray], list[str]]:
    samples = [source[i] for i in span]
    kept = [rows(sample) for sample in samples]
    return {name: np.stack([row[name] for row in kept]) for name in kept[0]}, [sample["caption"] for sample in samples]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Child processes inherit one BLAS thread: two processes with default pools on two cores are half as fast."""
    before = {name: os.environ.get(name) for name in THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _renderer_digest() -> str:
    """Twelve hex digits over the people world's source files, its body pack and the drawing of control images."""
    digest = hashlib.sha256()
    entries = sorted(resources.files("fairhuman_jax.data.people").iterdir(), key=lambda e: e.name)
    for entry in (*entries, resources.files("fairhuman_jax.keypoints") / "skeletons.py"):
        if entry.name.endswith((".py", ".npz")):
            digest.update(entry.name.encode() + entry.read_bytes())
    return digest.hexdigest()[:12]
