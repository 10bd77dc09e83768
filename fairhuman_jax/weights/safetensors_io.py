"""Reading and writing safetensors files one tensor at a time, so that a model is never in memory twice.

The format's own library copies every tensor it reads and wants all of them at once to write; these are views of the
mapped file, and one tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fairhuman_jax.files import map_array, replacing

DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPES = {code: jnp.dtype(name) for name, code in DTYPE_NAMES.items()}
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


class _Stored(NamedTuple):
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFiles:
    """The tensors of one or several safetensors files, by name; nothing is read until it is asked for.

    Raises: FileNotFoundError, ValueError, one line each: a missing, truncated or otherwise unreadable file; tensors in
    float8 or another type that is not read, by name; a tensor that is in two of the files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.label = str(self.files[0] if len(self.files) == 1 else self.files[0].parent)
        self.metadata: dict[str, str] = {}
        self._stored: dict[str, _Stored] = {}
        for path in self.files:
            metadata, stored = _read_header(path)
            if twice := sorted(self._stored.keys() & stored.keys()):
                raise ValueError(f"{path} holds {twice[0]}, which {self._stored[twice[0]].path.name} holds too")
            self.metadata.update(metadata)
            self._stored.update(stored)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Type of a tensor, without reading it."""
        return self._stored[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A tensor in the dtype it is stored in: a read-only view of the file, which takes no memory of its own."""
        path, dtype, shape, offset = self._stored[name]
        return map_array(path, offset, dtype, shape)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype | Mapping[str, np.dtype],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `read(name)` for every name of `shapes`, in turn; the file at `path` is replaced as a whole.

    Wider types come first, as the format's own writers do, so that every tensor starts at a multiple of its item.
    Raises: ValueError for a tensor that a narrower float type cannot hold (finite before, infinite after), by name;
    OSError from a full disk in one line, the old file kept.
    """
    dtypes = {name: jnp.dtype(dtype[name] if isinstance(dtype, Mapping) else dtype) for name in shapes}
    dtypes = dict(sorted(dtypes.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, kind in dtypes.items():
        size = math.prod(shapes[name]) * kind.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kind.name],
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, kind in dtypes.items():
            file.write(_cast(read(name), kind, name).reshape(-1).view(np.uint8).data)


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in C order and `dtype`; itself when it is that already, else the one copy that is made."""
    with np.errstate(over="ignore"):
        cast = np.asarray(array, dtype, order="C")
    if array.dtype != dtype and np.isfinite(array).all() and not np.isfinite(cast).all():
        largest = float(np.abs(array).max())
        raise ValueError(f"{name} does not fit into {dtype.name}: its largest magnitude is {largest:.3g}")
    return cast


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, _Stored]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    size = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).rjust(8, b"\xff"))
        if length > min(size - 8, LONGEST_HEADER):
            raise _broken(path, f"{size} bytes cannot hold its header")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        _refuse_types(path, header)
        stored = {name: _entry(path, entry, 8 + length, size) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"its header is no description of tensors: {error!r}") from error
    return metadata, stored


def _refuse_types(path: Path, header: Mapping[str, Any]) -> None:
    names = [name for name, entry in header.items() if entry["dtype"] not in DTYPES]
    if names:
        code = str(header[names[0]]["dtype"])
        kind = "float8" if code.startswith("F8") else code
        raise ValueError(
            f"{path} holds {len(names)} {kind} tensors ({code}, as {names[0]}), which are not read; "
            "get the model in float16, bfloat16 or float32"
        )


def _entry(path: Path, entry: Mapping[str, Any], start: int, size: int) -> _Stored:
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(extent) for extent in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(path, f"its header gives a tensor {list(shape)} the bytes {begin} to {end}")
    if start + end > size:
        raise _broken(path, f"it should have {start + end} bytes or more and has {size}")
    return _Stored(path, dtype, shape, start + begin)


def _broken(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is truncated or not a safetensors file ({why}); get it again")
