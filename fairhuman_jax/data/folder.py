"""Reader of a folder that holds `metadata.jsonl`: one photo with caption, masks and control image a line.

The layout is FairHuman's (github.com/PRIS-CV/FairHuman, dataset/wholebody_dataset.py): UTF-8, one JSON object
a line, paths relative to the folder, keys `image`, `text_english`, `mask_face`, `mask_hand`,
`conditioning_image`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from fairhuman_jax.data.pictures import MASK_THRESHOLD, BadSample, File, read_image, read_mask, read_size

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_OPTIONAL_DEFAULTS = {
    "face_mask_column": "mask_face",
    "hand_mask_column": "mask_hand",
    "condition_column": "conditioning_image",
}
_ASPECT_TOLERANCE = 0.02
METADATA = "metadata.jsonl"


"""A path, or the content of a file."""


class FileDataset(ABC):
    """Random access to samples whose files one file of metadata names; what happens at a bad one.

    `on_error`: "skip" replaces a bad sample by the next good one (so the order stays a function of the index alone) and
    counts it in `bad`, also when worker processes met it; "stop" raises BadSample. `root`: what paths are relative to.
    Raises: FileNotFoundError for no `metadata`. ValueError: another `on_error`.
    """

    def __init__(self, root: Path, metadata: Path, on_error: str, layout: str) -> None:
        if on_error not in ("skip", "stop"):
            raise ValueError(f"on_error = {on_error!r}: use 'skip' or 'stop'")
        self.root, self.metadata, self.on_error = root, metadata, on_error
        if not metadata.is_file():
            raise FileNotFoundError(f"{metadata}: not found; {layout}")
        # Bad samples are appended to one temporary file, which worker processes share by its name.
        handle, self._report_path = tempfile.mkstemp(prefix="bad_samples_", suffix=".txt")
        os.close(handle)
        self._reported: set[str] = set()
        self._cleanup = weakref.finalize(self, Path(self._report_path).unlink, missing_ok=True)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def line(self, index: int) -> int | str:
        """Where sample `index` stands in the metadata: its line, from 1, or its key."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of sample `index`."""

    @abstractmethod
    def files(self, index: int) -> dict[str, Path]:
        """The files of sample `index` by name of what they hold."""

    @abstractmethod
    def load(self, index: int) -> dict[str, Any]:
        """Sample `index` itself, whatever `on_error` says. Raises: BadSample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.root}")
        return self._first_good(index, self.load)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image of sample `index`, read from its header."""
        return self._first_good(index, lambda i: read_size(self.files(i)["image"]))

    def digest(self, index: int) -> str:
        """Hexadecimal digest of the content of sample `index`: its files and its captions. Raises: BadSample."""
        digest = hashlib.blake2b(json.dumps(self.captions(index)).encode(), digest_size=16)
        for name, path in sorted(self.files(index).items()):
            try:
                with path.open("rb") as file:
                    digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise BadSample(f"{path}: {error.strerror}") from None
        return digest.hexdigest()

    def bad_lines(self) -> list[str]:
        """One line of text for each bad sample met so far, by this process or its workers."""
        if not os.path.exists(self._report_path):
            return []
        return sorted(set(Path(self._report_path).read_text(encoding="utf-8").splitlines()))

    @property
    def bad(self) -> int:
        """Number of different bad samples met so far."""
        return len(self.bad_lines())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cleanup"}

    def _first_good(self, index: int, read: Callable[[int], T]) -> T:
        """What `read` gives for sample `index`, or for the next one that can be read."""
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                return read(candidate)
            except BadSample as error:
                self._report(self.line(candidate), error)
        raise BadSample(f"{self.metadata}: none of its {len(self)} samples can be read")

    def _report(self, line: int | str, error: BadSample) -> None:
        text = f"{self.metadata}:{line}: {error}"
        if self.on_error == "stop":
            raise BadSample(text) from None
        if text in self._reported:
            return
        self._reported.add(text)
        _LOG.warning("skipped %s", text)
        with open(self._report_path, "a", encoding="utf-8") as file:
            file.write(text.replace("\n", " ") + "\n")


class FolderDataset(FileDataset):
    """Random access to the samples of a `metadata.jsonl` folder.

    A sample is `image` uint8 [H, W, 3], `caption` str (and `captions` when the line holds a list), and, where
    the folder has them, `face_mask`, `hand_mask` uint8 [H, W, 1] in {0, 1} and `conditioning_image` uint8 [H,
    W, 3]. A key is present in every sample or in none: a line without the path gets an empty mask, or a black
    control image; `missing` counts those lines. Masks and control images of another size but the same shape
    are resized to the image.

    `on_error`: see FileDataset. Lines that are not JSON, or lack image or caption, are found at construction. Raises
    FileNotFoundError, ValueError.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_column: str = "image",
        caption_column: str = "text_english",
        face_mask_column: str = "mask_face",
        hand_mask_column: str = "mask_hand",
        condition_column: str = "conditioning_image",
        on_error: str = "skip",
    ) -> None:
        super().__init__(
            Path(root), Path(root) / METADATA, on_error, "a data folder holds one JSON object a line there"
        )
        self._image_column, self._caption_column = image_column, caption_column
        optional = {
            "face_mask_column": face_mask_column,
            "hand_mask_column": hand_mask_column,
            "condition_column": condition_column,
        }
        records = list(self._read_lines())
        keys = sorted({key for _, record in records for key in record})
        self._check_columns(keys, optional)
        self._columns = {
            name: column
            for name, column in zip(("face_mask", "hand_mask", "conditioning_image"), optional.values(), strict=True)
            if column in keys
        }
        self._lines = [(line, record) for line, record in records if self._complete(line, record)]
        if not self._lines:
            raise ValueError(f"{self.metadata}: no usable line ({self.bad} bad)")
        self.missing = {
            column: absent
            for column in self._columns.values()
            if (absent := sum(not record.get(column) for _, record in self._lines))
        }

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that every sample has."""
        return ("image", *self._columns)

    # -- one line --------------------------------------------------------------------------------------------

    def line(self, index: int) -> int:
        """Line of the metadata that sample `index` stands on, from 1."""
        return self._lines[index][0]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of sample `index`."""
        caption = self._lines[index][1][self._caption_column]
        return (caption,) if isinstance(caption, str) else tuple(caption)

    def has_list(self, index: int) -> bool:
        """Whether the line gives a list of captions."""
        return isinstance(self._lines[index][1][self._caption_column], list)

    def files(self, index: int) -> dict[str, Path]:
        """The files of sample `index` by name of the layer; a mask or control image that its line lacks is absent."""
        record = self._lines[index][1]
        columns = {"image": self._image_column} | self._columns
        return {name: self.root / record[column] for name, column in columns.items() if record.get(column)}

    def __repr__(self) -> str:
        return f"FolderDataset({str(self.root)!r}, samples={len(self)}, bad={self.bad}, missing={self.missing})"

    # -- metadata --------------------------------------------------------------------------------------------

    def _read_lines(self) -> Iterable[tuple[int, dict[str, Any]]]:
        with self.metadata.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    record = json.loads(raw.decode("utf-8-sig"))
                    if not isinstance(record, dict):
                        raise ValueError(f"a JSON object is needed, found {type(record).__name__}")
                except ValueError as error:
                    self._report(number, BadSample(f"bad JSON: {error}"))
                    continue
                yield number, record

    def _check_columns(self, keys: list[str], optional: dict[str, str]) -> None:
        required = {"image_column": self._image_column, "caption_column": self._caption_column}
        wrong = {name: column for name, column in required.items() if column not in keys}
        wrong |= {
            name: column
            for name, column in optional.items()
            if column not in keys and column != _OPTIONAL_DEFAULTS[name]
        }
        for name, column in wrong.items():
            raise ValueError(f"{self.metadata}: no key {column!r} ({name}); keys found: {', '.join(keys) or 'none'}")

    def _complete(self, line: int, record: dict[str, Any]) -> bool:
        """Whether a line has what a sample needs; reports it otherwise."""
        caption, image = record.get(self._caption_column), record.get(self._image_column)
        texts = caption if isinstance(caption, list) and caption else [caption]
        paths = [record.get(column) for column in self._columns.values()]
        if not isinstance(image, str) or not image:
            problem = f"{self._image_column!r} must be a path, found {image!r}"
        elif not all(isinstance(text, str) for text in texts):
            problem = f"{self._caption_column!r} must be a string or a list of strings, found {caption!r}"
        elif not all(path is None or isinstance(path, str) for path in paths):
            problem = f"{list(self._columns.values())} must be paths or null, found {paths!r}"
        else:
            return True
        self._report(line, BadSample(problem))
        return False

    # -- pixels ----------------------------------------------------------------------------------------------

    def load(self, index: int) -> dict[str, Any]:
        """Sample `index` itself, whatever `on_error` says. Raises: BadSample."""
        files, captions = self.files(index), self.captions(index)
        image = read_image(files["image"])
        sample: dict[str, Any] = {"image": image, "caption": captions[0]}
        if self.has_list(index):
            sample["captions"] = captions
        for name in self._columns:
            sample[name] = read_layer(name, files.get(name), image.shape[:2], files["image"].name)
        return sample


def read_layer(name: str, file: File | None, size: tuple[int, int], image_name: str) -> np.ndarray:
    """A mask (uint8 [H, W, 1] in {0, 1}) or, for any other name, a control image (uint8 [H, W, 3]) of the image's size.

    No file: an empty mask, a black control image. Another size of the same shape is resized. Raises: BadSample for a
    file that cannot be read, or of another aspect ratio.
    """
    is_mask = name.endswith("mask")
    if not file:
        return np.zeros((*size, 1 if is_mask else 3), np.uint8)
    layer = read_mask(file) if is_mask else read_image(file, background=0)
    return _fit(layer, size, name if isinstance(file, bytes) else file, image_name)


def _fit(layer: np.ndarray, size: tuple[int, int], path: str | os.PathLike[str], image_name: str) -> np.ndarray:
    """`layer` [h, w, C] at the image's size [H, W]; refuses another aspect ratio."""
    (height, width), (high, wide) = size, layer.shape[:2]
    if (high, wide) == (height, width):
        return layer
    if abs((wide * height) / (width * high) - 1.0) > _ASPECT_TOLERANCE:
        raise BadSample(f"{path}: {wide}x{high} pixels do not fit {image_name} ({width}x{height})")
    if layer.shape[-1] == 3:
        return np.array(Image.fromarray(layer).resize((width, height), Image.Resampling.BILINEAR))
    grey = Image.fromarray(layer[..., 0] * np.uint8(255)).resize((width, height), Image.Resampling.BILINEAR)
    return (np.asarray(grey) >= MASK_THRESHOLD).astype(np.uint8)[..., None]


# layer of a sample: column of metadata.jsonl and feature of the data set
COLUMNS = {
    "image": "image",
    "face_mask": "mask_face",
    "hand_mask": "mask_hand",
    "conditioning_image": "conditioning_image",
}
