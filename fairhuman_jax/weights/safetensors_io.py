"""Reading and writing safetensors files one tensor at a time, so that a model is never in memory twice."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from fairhuman_jax.weights.files import replacing

DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class TensorFiles:
    """The tensors of one or several safetensors files, by name; nothing is read until it is asked for.

    Errors: a missing, truncated or otherwise unreadable file raises in one line with its name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.metadata: dict[str, str] = {}
        self._handles = {}
        for path in self.files:
            handle = _open(path)
            self.metadata.update(handle.metadata() or {})
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor as a host array in the dtype it is stored in."""
        return self._handles[name].get_tensor(name)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype | Mapping[str, np.dtype],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `read(name)` for every name of `shapes`, in turn; the file at `path` is replaced as a whole.

    Errors: a tensor that a narrower float type cannot hold (finite before, infinite after), by name; OSError
    from a full disk in one line, the old file kept.
    """
    dtypes = {name: jnp.dtype(dtype[name] if isinstance(dtype, Mapping) else dtype) for name in sorted(shapes)}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, kind in dtypes.items():
        size = int(np.prod(shapes[name], dtype=np.int64)) * kind.itemsize
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
            file.write(np.ascontiguousarray(_cast(read(name), kind, name)).tobytes())


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if array.dtype != dtype and np.isfinite(array).all() and not np.isfinite(cast).all():
        largest = float(np.abs(array).max())
        raise ValueError(f"{name} does not fit into {dtype.name}: its largest magnitude is {largest:.3g}")
    return cast


def _open(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
