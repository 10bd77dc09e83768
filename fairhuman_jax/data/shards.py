"""Encoded samples in ArrayRecord shards: latents and text embeddings, written once and found again by content.

A folder holds `manifest.json` (the content key of every sample, in order), `shard-N.array_record` with its index
`shard-N.json` (keys and latent shapes of its records), and `empty_caption.npz`. A shard and its index appear under
their names when they are whole, so a folder can be read at any time of its writing.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

FORMAT = "fairhuman_jax shards 1"
MANIFEST = "manifest.json"
EMPTY_CAPTION = "empty_caption.npz"
SHARD_BYTES = 512 * 2**20
# One record a group, or a random read would unpack its neighbours too; fast to unpack: latents hardly shrink.
_OPTIONS = "group_size:1,zstd:1"
_TEXT = ("text_hidden", "text_pooled")

Arrays = Mapping[str, np.ndarray]


class ShardWriter:
    """Appends records to a folder of shards; a context manager that closes the last shard.

    `keys`: the content keys of all samples in their order (None: a sample that cannot be read); from now on readers see
    these samples alone, as far as their records are there. `missing` is what is left to write: what a run that was
    killed had finished, and what has not changed, is not in it. `empty_text`: embedding of the empty caption, for
    records with embeddings. Raises: FileExistsError for the folder holds something else. OSError: no room or no right
    to write; the shards finished before stay readable.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keys: Sequence[str | None],
        empty_text: Arrays | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / MANIFEST).exists():
            raise FileExistsError(f"{self.folder}: holds files but no {MANIFEST}; write shards into an empty folder")
        self._writer: ArrayRecordWriter | None = None
        self._keys: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._bytes = 0
        with _one_line(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("*.part"):
                stale.unlink()
            done = {key for index in _indices(self.folder).values() for key in index["keys"]}
            wanted = [key for key in keys if key is not None]
            if empty_text is not None:
                _replace(self.folder / EMPTY_CAPTION, _pack(empty_text))
            manifest = {"format": FORMAT, "keys": wanted}
            _replace(self.folder / MANIFEST, json.dumps(manifest, indent=0).encode())
        self.missing = [key for key in dict.fromkeys(wanted) if key not in done]

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Append one record: arrays, and `captions`; latent_mean [h, w, c] must be among the arrays."""
        content = _pack({name: value for name, value in record.items() if name != "captions"} | _texts(record))
        with _one_line(self.folder):
            writer = self._writer
            if writer is None:
                self._number = 1 + max(map(_number, _indices(self.folder)), default=-1)
                writer = self._writer = ArrayRecordWriter(str(self._part), _OPTIONS)
            writer.write(content)
        self._keys.append(key)
        self._shapes.append(np.shape(record["latent_mean"]))
        self._bytes += len(content)
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Finish the shard begun, if any: what has been written so far can be read afterwards."""
        if self._writer is None:
            return
        with _one_line(self.folder):
            self._writer.close()
            os.replace(self._part, self._part.with_suffix(""))
            index = {"keys": self._keys, "shapes": self._shapes}
            _replace(self.folder / f"shard-{self._number:05d}.json", json.dumps(index).encode())
        self._writer, self._keys, self._shapes, self._bytes = None, [], [], 0

    @property
    def _part(self) -> Path:
        return self.folder / f"shard-{self._number:05d}.array_record.part"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or not issubclass(kind, OSError):  # an interrupted run keeps what it has
            self.flush()


class ShardedDataset:
    """Random access to the samples of a folder of shards, in the manifest's order. Picklable.

    A sample: `latent_mean`, `latent_logvar` float16 [h, w, c], masks, `conditioning_image`, `time_ids` as they were
    written, `caption` and `captions`; with embeddings also `texts`, one {"text_hidden" float16 [L, D], "text_pooled"
    float16 [P]} a caption, and `empty_text`, the same of the empty caption. `shapes`: the latents' of every sample.
    `absent`: samples of the manifest without a record yet. Raises: FileNotFoundError for no manifest. ValueError:
    unknown format, no record, a damaged shard.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; a folder of shards holds its keys there")
        manifest = _read_json(path)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT!r}")
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        indices = _indices(self.folder)
        place = 0
        for index in indices.values():
            for key, shape in zip(index["keys"], index["shapes"], strict=True):
                found[key] = (place, tuple(shape))
                place += 1
        served = [key for key in manifest["keys"] if key in found]
        self.absent = len(manifest["keys"]) - len(served)
        if not served:
            raise ValueError(f"{self.folder}: none of its {self.absent} samples is encoded yet; run the encoding again")
        self._places = [found[key][0] for key in served]
        self.shapes = [found[key][1] for key in served]
        self._records = _open_shards(self.folder, indices)
        empty = self.folder / EMPTY_CAPTION
        self._empty_text = _unpack(empty.read_bytes()) if empty.is_file() else None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        try:
            sample = _unpack(self._records[self._places[index]])
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{self.folder}: sample {index}: damaged record ({error})") from None
        captions = json.loads(sample.pop("captions").tobytes())
        sample |= {"caption": captions[0], "captions": tuple(captions)}
        if "text_hidden" in sample:
            hidden, pooled = (sample.pop(name) for name in _TEXT)
            sample["texts"] = [dict(zip(_TEXT, pair, strict=True)) for pair in zip(hidden, pooled, strict=True)]
            sample["empty_text"] = self._empty_text
        return sample

    def __reduce__(self):
        return ShardedDataset, (self.folder,)


def _open_shards(folder: Path, indices: Mapping[str, dict[str, Any]]) -> ArrayRecordDataSource:
    """The shards one after the other, each of the length that its index says."""
    paths = [str(folder / f"{stem}.array_record") for stem in indices]
    for path, index in zip(paths, indices.values(), strict=True):
        try:
            reader = ArrayRecordReader(path)
            count = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise ValueError(
                f"{path}: damaged or cut short ({error}); delete it with its .json, encode again"
            ) from None
        if count != len(index["keys"]):
            raise ValueError(
                f"{path}: holds {count} records, its index {len(index['keys'])}; delete both, encode again"
            )
    return ArrayRecordDataSource([f"{p}[0:{len(i['keys'])}]" for p, i in zip(paths, indices.values(), strict=True)])


def _indices(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of each finished shard -> its index."""
    return {path.stem: _read_json(path) for path in sorted(folder.glob("shard-*.json"))}


def _number(stem: str) -> int:
    return int(stem.rpartition("-")[2])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None


def _texts(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {"captions": np.frombuffer(json.dumps(list(record["captions"])).encode(), np.uint8)}


def _pack(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    return buffer.getvalue()


def _unpack(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content)) as file:
        return dict(file)


def _replace(path: Path, content: bytes) -> None:
    """Write under a temporary name and move into place."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


class _one_line:
    """Turns what a failed write raises, here or in ArrayRecord's library, into one OSError that names the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, RuntimeError)):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(";")[0]
            raise OSError(f"{self.folder}: cannot write shards ({reason}); those finished before are whole") from None
