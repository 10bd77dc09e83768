"""Torch checkpoints without torch: .ckpt, .pt, .pth and .bin, zipped or not, read by an unpickler that runs nothing.

A pickle is a program that the usual reader executes. Here it yields tensors, which stay in the file until they are
asked for, and plain values; anything else that it wants to build is refused by name.
"""

from __future__ import annotations

import functools
import io
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from fairhuman_jax.files import map_array
from fairhuman_jax.weights.unpickling import PlainUnpickler, RefusedPickle

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20"
ZIP_START = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of name and extra field, which the data follow

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
DTYPE_ALIASES = {"half": "float16", "float": "float32", "double": "float64", "long": "int64", "int": "int32"}
UNREAD_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


@dataclass(eq=False)
class Storage:
    """A run of items in a file or in bytes, at `start` once that is known."""

    dtype: np.dtype
    count: int
    source: Path | bytes
    start: int = -1
    swapped: bool = False  # stored in the byte order that this machine has not

    def view(self, dtype: np.dtype, first: int, count: int) -> np.ndarray:
        """`count` items of `dtype` from number `first` on."""
        offset = self.start + first * dtype.itemsize
        if isinstance(self.source, bytes):
            array = np.frombuffer(self.source, dtype, count, offset)
        else:
            array = map_array(self.source, offset, dtype, (count,))
        if not self.swapped or dtype.itemsize == 1:
            return array
        if dtype.kind == "c":
            return array.byteswap()
        return array.view(f"u{dtype.itemsize}").byteswap().view(dtype)


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A torch tensor that is still in its file: a strided view of a storage."""

    storage: Storage
    dtype: np.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.first, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise RefusedPickle(f"holds a tensor of shape {self.shape} and strides {self.strides}")
        size = self.storage.count * self.storage.dtype.itemsize
        if (self.first + self._extent()) * self.dtype.itemsize > size:
            raise RefusedPickle(f"holds a tensor {list(self.shape)} that is larger than its storage of {size} bytes")

    def read(self) -> np.ndarray:
        """The tensor, as a read-only view of the file."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        items = self.storage.view(self.dtype, self.first, self._extent())
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(items, self.shape, strides, writeable=False)

    def _extent(self) -> int:
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


class TorchPickle:
    """The tensors of one torch checkpoint by name; nothing is read until it is asked for.

    `state_dict` is unwrapped, however deep; tensors in other dicts inside each other get dotted names. metadata: the
    numbers and texts beside the state dict (epoch, global_step, ...). Raises: FileNotFoundError, ValueError,
    RefusedPickle, EOFError, as `load_pickle`; no tensors.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        root = load_pickle(path)
        self.metadata = _texts(root)
        while isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
            root = root["state_dict"]
        self._tensors = dict(_named_tensors(root, ""))
        if not self._tensors:
            raise ValueError(f"{path} holds no tensors by name; expected a state dict, or a checkpoint with one")

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """Type of a tensor, without reading it."""
        return self._tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A tensor in the dtype it is stored in: a read-only view of the file."""
        tensor = self._tensors[name]
        return tensor.read() if isinstance(tensor, LazyTensor) else tensor


def load_pickle(path: Path, allowed: Mapping[str, Any] | None = None) -> Any:
    """What a pickle of torch (zip or legacy) or of Python holds, without running any of its code.

    Tensors come as `LazyTensor`, objects of Lightning, argparse, omegaconf and the like as `Inert`. allowed:
    "module.name" -> the stand-in to call for it. Raises: FileNotFoundError, ValueError, RefusedPickle, EOFError, one
    line each: no such file; a name that is not known to be harmless ("would run posix.system"); float8 tensors; a
    truncated file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
            file.seek(0)
            if start.startswith(ZIP_START):
                return _load_zip(path, file, allowed)
            if start == LEGACY_START:
                return _load_legacy(path, file, allowed)
            return _TorchUnpickler(file, allowed).load()
    except RefusedPickle as error:
        raise ValueError(
            f"{path} {error}; not loaded. Get the model as .safetensors in float16, bfloat16 or float32"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is truncated or no checkpoint of torch ({error!r:.120}); get it again") from error


class _TorchUnpickler(PlainUnpickler):
    """Plain values and tensors. `open_storage(dtype, key, count)` is what the container knows about storages."""

    def __init__(
        self,
        file: BinaryIO,
        allowed: Mapping[str, Any] | None = None,
        open_storage: Callable[[np.dtype, str, int], Storage] | None = None,
    ) -> None:
        nested = functools.partial(_load_bytes, allowed=allowed)
        super().__init__(file, TORCH | {"torch.storage._load_from_bytes": nested} | dict(allowed or {}))
        self._open_storage = open_storage

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a torch pickle refers to by ("storage", type, key, device, count[, view])."""
        if self._open_storage is None or not isinstance(pid, tuple) or pid[0] != "storage":
            return super().persistent_load(pid)
        kind, key, count = pid[1], str(pid[2]), pid[4]
        if not isinstance(kind, np.dtype) or type(count) is not int or count < 0:
            raise RefusedPickle(f"holds a storage of type {kind!r:.60} and size {count!r:.20}")
        if len(pid) > 5 and pid[5] is not None:
            raise RefusedPickle("was written by a torch before 0.4")
        return self._open_storage(kind, key, count)


def _load_zip(path: Path, file: BinaryIO, allowed: Mapping[str, Any] | None) -> Any:
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        main = next((name for name in records if name == "data.pkl" or name.endswith("/data.pkl")), None)
        if main is None:
            raise RefusedPickle("is a zip archive without data.pkl, so no checkpoint of torch")
        root = main.removesuffix("data.pkl")
        if any(name.startswith(f"{root}code/") for name in records):
            raise RefusedPickle("is a TorchScript program")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in records else b"little"

        @functools.cache
        def open_storage(dtype: np.dtype, key: str, count: int) -> Storage:
            info = records[f"{root}data/{key}"]
            file.seek(info.header_offset)
            start = info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size)))
            needed = count * dtype.itemsize
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < needed or start + needed > size:
                raise ValueError(f"storage {key} has not its {needed} bytes")
            return Storage(dtype, count, path, start, swapped=order.strip() != sys.byteorder.encode())

        if records[main].file_size > size:
            raise ValueError(f"{main} is larger than the file")
        return _TorchUnpickler(io.BytesIO(archive.read(main)), allowed, open_storage).load()


def _load_legacy(source: Path | bytes, file: BinaryIO, allowed: Mapping[str, Any] | None) -> Any:
    """Magic number, version, facts about the system, the value, keys of storages; then size and bytes of each."""
    head = [PlainUnpickler(file).load() for _ in range(3)]
    if head[:2] != [LEGACY_MAGIC, LEGACY_VERSION]:
        raise ValueError("not the head of a torch file")
    swapped = head[2].get("little_endian", True) != (sys.byteorder == "little")
    storages: dict[str, Storage] = {}

    def open_storage(dtype: np.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, count, source, swapped=swapped))

    value = _TorchUnpickler(file, allowed, open_storage).load()
    keys = PlainUnpickler(file).load()
    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    for key in keys:
        storage = storages[str(key)]
        storage.start = position + 8  # the count comes first
        position = storage.start + storage.count * storage.dtype.itemsize
    if position > end or any(storage.start < 0 for storage in storages.values()):
        raise EOFError(f"its tensors end at byte {position}, the file at {end}")
    return value


def _load_bytes(data: bytes, allowed: Mapping[str, Any] | None) -> Any:
    """A torch file inside a pickle of Python, which is how that pickles a storage."""
    return _load_legacy(data, io.BytesIO(data), allowed)


def _tensor(storage: Any, first: int, shape: Any, strides: Any, dtype: np.dtype | None = None) -> LazyTensor:
    if not isinstance(storage, Storage):
        raise RefusedPickle(f"holds a tensor in {storage!r:.60}")
    return LazyTensor(storage, dtype or storage.dtype, first, tuple(shape), tuple(strides))


def _tensor_v2(storage: Any, first: int, shape: Any, strides: Any, *_: Any) -> LazyTensor:
    return _tensor(storage, first, shape, strides)


def _tensor_v3(
    storage: Any, first: int, shape: Any, strides: Any, grad: bool, hooks: Any, dtype: Any, *_: Any
) -> LazyTensor:
    del grad, hooks
    if not isinstance(dtype, np.dtype):
        raise RefusedPickle(f"holds tensors of type {dtype}, which are not read")
    return _tensor(storage, first, shape, strides, dtype)


def _of_type(build: Any, kind: Any, arguments: tuple, state: Any) -> Any:
    del kind, state  # the attributes of a subclass of Tensor
    if build not in (_tensor_v2, _tensor_v3, _tensor):
        raise RefusedPickle(f"would build a tensor with {build!r:.60}")
    return build(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


def _named_tensors(tree: Any, prefix: str) -> Iterator[tuple[str, LazyTensor | np.ndarray]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _named_tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (LazyTensor, np.ndarray)):
        yield prefix, tree


def _texts(root: Any) -> dict[str, str]:
    if not isinstance(root, dict):
        return {}
    return {str(key): str(value) for key, value in root.items() if isinstance(value, (str, int, float))}


_DTYPE_NAMES = {*STORAGE_DTYPES.values(), "uint16", "uint32", "uint64"}
TORCH: dict[str, Any] = {
    **{f"torch.{name}": jnp.dtype(dtype) for name, dtype in STORAGE_DTYPES.items()},
    **{f"torch.cuda.{name}": jnp.dtype(dtype) for name, dtype in STORAGE_DTYPES.items()},
    **{f"torch.{name}": jnp.dtype(name) for name in _DTYPE_NAMES},
    **{f"torch.{alias}": jnp.dtype(name) for alias, name in DTYPE_ALIASES.items()},
    **{f"torch.{name}": name for name in UNREAD_DTYPES},
    "torch.storage.UntypedStorage": jnp.dtype(jnp.uint8),
    "torch.Size": tuple,
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "torch.Tensor": "torch.Tensor",
    "torch.nn.parameter.Parameter": "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}
