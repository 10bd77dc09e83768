"""Readers of Laion-Human and Human-Art as HumanSD's authors publish them: mapping files, npz poses, parquet lists.

A mapping file is one JSON object, {id: {"img_path", "prompt", "pose_path"}}; its order is that of the data set.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fairhuman_jax.data.folder import FileDataset
from fairhuman_jax.data.pictures import BadSample, read_image
from fairhuman_jax.keypoints.readers import read_poses

COLUMNS = {"image": "img_path", "poses": "pose_path"}
CAPTION = "prompt"
PROBES = 64  # entries looked for on disk to find the folder that paths start from
ABOVE = 3  # folders tried for that: the mapping file's own and those above it


class MappingDataset(FileDataset):
    """Random access to the samples of a mapping file, in its order.

    A sample is `image` uint8 [H, W, 3] (upright RGB, see `read_image`), `caption` str and `keypoints` = {"coco17":
    float32 [P, 17, 3]}: (x, y, confidence) of every person in pixels of that image, centres at +.5; P may be 0, and
    joints may lie outside. `data.keypoint_transforms.PoseTransform` makes skeletons and arrays of fixed shape of them.

    base: the folder that paths are relative to; None: the mapping file's own or, where none of the images is there, the
    nearest above it that has one. `on_error`: see FileDataset; entries that lack a path or the prompt are found at
    construction. Raises: FileNotFoundError for no such file, or no image of it on this disk; ValueError: no JSON
    object, or no usable entry. Source: HumanSD, README and ldm/data.
    """

    def __init__(
        self, file: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, on_error: str = "skip"
    ) -> None:
        path = Path(file)
        super().__init__(path.parent, path, on_error, "a mapping file is one JSON object of images with their poses")
        entries = _read_object(path).items()
        self._entries = [(key, entry) for key, entry in entries if self._complete(key, entry)]
        if not self._entries:
            raise ValueError(f"{path}: no usable entry ({self.bad} bad)")
        self.root = Path(base) if base is not None else self._base()

    def __len__(self) -> int:
        return len(self._entries)

    def line(self, index: int) -> str:
        """The id of sample `index`."""
        return self._entries[index][0]

    def captions(self, index: int) -> tuple[str, ...]:
        """The prompt of sample `index`, alone."""
        return (self._entries[index][1][CAPTION],)

    def files(self, index: int) -> dict[str, Path]:
        """The files of sample `index`: `image` and `poses`."""
        return {name: self.root / self._entries[index][1][column] for name, column in COLUMNS.items()}

    def style(self, index: int) -> str:
        """Name of the folder that the image lies in: for Human-Art the style, for Laion-Human the shard."""
        return Path(self._entries[index][1][COLUMNS["image"]]).parent.name

    def load(self, index: int) -> dict[str, Any]:
        """Sample `index` itself, whatever `on_error` says. Raises: BadSample."""
        files = self.files(index)
        image = read_image(files["image"])
        try:
            poses = read_poses(files["poses"]).poses
        except FileNotFoundError:
            raise BadSample(f"{files['poses']}: no such file") from None
        except (OSError, ValueError) as error:
            raise BadSample(str(error)) from None
        people = np.array([pose.keypoints for pose in poses], np.float32).reshape(-1, 17, 3)
        people[..., :2] += 0.5  # the files count pixels from their centres
        return {"image": image, "caption": self.captions(index)[0], "keypoints": {"coco17": people}}

    def __repr__(self) -> str:
        return f"MappingDataset({str(self.metadata)!r}, base={str(self.root)!r}, samples={len(self)}, bad={self.bad})"

    def _complete(self, key: str, entry: Any) -> bool:
        """Whether an entry has what a sample needs; reports it otherwise."""
        wanted = (*COLUMNS.values(), CAPTION)
        if isinstance(entry, dict):
            wrong = [name for name in wanted if not isinstance(entry.get(name), str) or not entry[name]]
            # An empty prompt is a caption.
            wrong = [name for name in wrong if name != CAPTION or entry.get(name) != ""]
            problem = f"needs a string for {', '.join(map(repr, wrong))}; it has {', '.join(entry) or 'nothing'}"
        else:
            wrong, problem = list(wanted), f"needs an object with {', '.join(wanted)}, found {entry!r:.60}"
        if wrong:
            self._report(key, BadSample(problem))
        return not wrong

    def _base(self) -> Path:
        """The nearest of the mapping file's folder and those above it that holds one of its images."""
        some = np.unique(np.linspace(0, len(self) - 1, min(PROBES, len(self))).astype(int))
        paths = [self._entries[index][1][COLUMNS["image"]] for index in some]
        own = self.metadata.absolute().parent
        for folder in (own, *own.parents)[:ABOVE]:
            if any((folder / path).is_file() for path in paths):
                return folder
        raise FileNotFoundError(
            f"{self.metadata}: none of {len(paths)} of its images, as {paths[0]}, lies under {own} or above; "
            "put the mapping file into the folder that its paths start from"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: a mapping file is one JSON object, found a {type(mapping).__name__}")
    return mapping


def read_url_list(file: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(key, url) of every row of a parquet list (columns `key`, `url`), in its order.

    The lists hold all pictures that were looked at, the mapping file those with people: download what the latter names.
    Needs pyarrow. Raises: ImportError for not installed. FileNotFoundError. ValueError: no parquet file with both
    columns.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError("reading parquet lists needs pyarrow: pip install 'fairhuman_jax[parquet]'") from None
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: not found; a parquet list has the columns key and url")
    try:
        table = parquet.read_table(file, columns=["key", "url"])
        keys, urls = (table.column(name).to_pylist() for name in ("key", "url"))
    except (arrow.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{file}: no parquet list with the columns key and url ({error})".replace("\n", " ")) from None
    return [(str(key), str(url)) for key, url in zip(keys, urls, strict=True)]
