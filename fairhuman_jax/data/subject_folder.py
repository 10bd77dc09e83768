"""Reader of FFHQ in FastComposer's layout: photos whose captions are linked to the segments of people in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairhuman_jax.contract import MARKER
from fairhuman_jax.data.folder import FileDataset
from fairhuman_jax.data.pictures import BadSample, read_image

SPLITS = {"train": "image_ids_train.txt", "test": "image_ids_test.txt", "all": "image_ids.txt"}
SHARD = 5  # first digits of an id: the folder that its files lie in
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Segment:
    """One entity of a caption and where it is in the picture.

    id: its value in the segment map; box: (x0, y0, x1, y1), pixels x0 <= x < x1 and y0 <= y < y1; end: number of
    characters of the caption up to the end of the words that name it; label: its class in COCO, as "person".
    """

    id: int
    box: Box
    end: int
    label: str


class SubjectDataset(FileDataset):
    """Random access to the samples of a folder with `image_ids_train.txt`, in that file's order.

    `<id[:5]>/<id>.jpg` is the photo, `.json` its caption and segments, `.npy` its segment map; an id is a string of at
    least five digits. A sample is `image` uint8 [H, W, 3] (upright RGB, see `read_image`), `caption` str, `segment_map`
    integer [H, W] of that picture's pixels, `segments`: a tuple of Segment, which may be empty. `split`: "train",
    "test" or "all" (`image_ids.txt`). `on_error`: see FileDataset; lines that are no ids are found at construction.
    Raises: FileNotFoundError for no such list. ValueError: another split, no usable line. Source: FastComposer,
    data.py.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train", on_error: str = "skip") -> None:
        if split not in SPLITS:
            raise ValueError(f"split = {split!r}: use {', '.join(SPLITS)}")
        folder = Path(root)
        super().__init__(folder, folder / SPLITS[split], on_error, "a folder of subjects lists an id a line there")
        self._ids = []
        for number, line in enumerate(self.metadata.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            name = line.strip()
            if name and not (name.isascii() and name.isdigit() and len(name) >= SHARD):
                self._report(
                    number, BadSample(f"an id has at least {SHARD} digits and nothing else, found {name!r:.60}")
                )
            elif name:
                self._ids.append(name)
        if not self._ids:
            raise ValueError(f"{self.metadata}: no usable id ({self.bad} bad)")

    def __len__(self) -> int:
        return len(self._ids)

    def line(self, index: int) -> str:
        """The id of sample `index`."""
        return self._ids[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """The caption of sample `index`, alone. Raises: BadSample."""
        return (read_record(self.files(index)["record"])[0],)

    def files(self, index: int) -> dict[str, Path]:
        """The files of sample `index`: `image`, `record` and `segment_map`."""
        name = self._ids[index]
        stem = self.root / name[:SHARD] / name
        return {
            "image": stem.with_suffix(".jpg"),
            "record": stem.with_suffix(".json"),
            "segment_map": stem.with_suffix(".npy"),
        }

    def load(self, index: int) -> dict[str, Any]:
        """Sample `index` itself, whatever `on_error` says. Raises: BadSample."""
        return read_subjects(self.files(index))

    def __repr__(self) -> str:
        return f"SubjectDataset({str(self.root)!r}, list={self.metadata.name!r}, samples={len(self)}, bad={self.bad})"


def read_subjects(files: Mapping[str, Path]) -> dict[str, Any]:
    """The sample of three files as `SubjectDataset.files` names them.

    Raises: BadSample for any of them cannot be used.
    """
    caption, segments = read_record(files["record"])
    image = read_image(files["image"])
    ids = read_segment_map(files["segment_map"])
    height, width = image.shape[:2]
    if ids.shape != (height, width):
        has = f"{ids.shape[1]}x{ids.shape[0]}"
        raise BadSample(f"{files['segment_map']}: {has} values, the picture has {width}x{height} pixels")
    for number, segment in enumerate(segments, 1):
        where, (x0, y0, x1, y1) = f"{files['record']}: segment {number}", segment.box
        if not (ids == segment.id).any():
            raise BadSample(f"{where}: id {segment.id} is not in the segment map; there: {_some(np.unique(ids))}")
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise BadSample(f"{where}: bbox {list(segment.box)} is no x0, y0, x1, y1 inside {width}x{height} pixels")
    return {"image": image, "caption": caption, "segment_map": ids, "segments": segments}


def read_record(path: Path) -> tuple[str, tuple[Segment, ...]]:
    """Caption and segments of a json file, checked as far as that is possible without the picture.

    Raises: BadSample.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file") from None
    except OSError as error:
        raise BadSample(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{path}: bad JSON ({error})") from None
    caption, entries = (record.get(name) for name in ("caption", "segments")) if isinstance(record, dict) else (0, 0)
    if not isinstance(caption, str) or not isinstance(entries, list):
        raise BadSample(f"{path}: needs an object with a string 'caption' and a list 'segments'")
    if MARKER in caption:
        raise BadSample(f"{path}: the caption holds {MARKER}, which is put behind the words that `end` gives")
    return caption, tuple(_segment(entry, caption, f"{path}: segment {i}") for i, entry in enumerate(entries, 1))


def _segment(entry: Any, caption: str, where: str) -> Segment:
    if not isinstance(entry, dict):
        raise BadSample(f"{where}: needs an object with id, bbox, end, coco_label, found {entry!r:.60}")
    bbox, label = entry.get("bbox"), entry.get("coco_label")
    numbers = [entry.get("id"), entry.get("end"), *(bbox if isinstance(bbox, list) else [])]
    if len(numbers) != 6 or not all(_is_whole(number) for number in numbers) or not isinstance(label, str):
        raise BadSample(f"{where}: needs whole numbers id, end, four of bbox, and a string coco_label: {entry!r:.120}")
    number, end, *box = (int(value) for value in numbers)
    if not 0 < end <= len(caption) or not caption[:end].strip():
        raise BadSample(f"{where}: end {end} closes no word of a caption of {len(caption)} characters")
    return Segment(number, (box[0], box[1], box[2], box[3]), end, label)


def _is_whole(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and number == number // 1


def read_segment_map(path: Path) -> np.ndarray:
    """The integers [H, W] of an npy file; never unpickles. Raises: BadSample."""
    try:
        # Mapped, so that a header that promises too much is an error and not an allocation.
        mapped = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file") from None
    except SystemError:  # Python 3.11 may lose count of its parser's depth among threads (python/cpython#106905)
        return read_segment_map(path)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise BadSample(f"{path}: no whole npy file of numbers ({' '.join(str(error).split())})") from None
    if mapped.ndim != 2 or mapped.dtype.kind not in "iu":
        raise BadSample(f"{path}: a segment map is integers [H, W], found {mapped.dtype} {list(mapped.shape)}")
    return np.array(mapped)


def _some(ids: np.ndarray, most: int = 8) -> str:
    return ", ".join(map(str, ids[:most])) + (", ..." if len(ids) > most else "")
