"""Named tensors in files, whatever the format: the interface that loading is built on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fairhuman_jax.files import read_json
from fairhuman_jax.weights.keys import Leaf, leaves
from fairhuman_jax.weights.pickles import LEGACY_START, ZIP_START, TorchPickle
from fairhuman_jax.weights.safetensors_io import TensorFiles

PICKLE_PROTOCOLS = tuple(bytes([number]) for number in range(2, 6))
PAGE = "is a web page, not a model: the download asked for a login or another address"
# First bytes, in small letters, of files that are mistaken for weights -> what to say.
FOREIGN = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file it stands for; fetch that with `git lfs pull`",
    b"gguf": "is a GGUF file, whose quantised tensors are not read; get the model as .safetensors in float16",
    b"<!doctype": PAGE,
    b"<html": PAGE,
    b"\x89hdf": "is an HDF5 file (Keras or TensorFlow); get the model as .safetensors",
}

PyTree = Any


class Tensors(Protocol):
    """Tensors by name, read from their files one at a time.

    label: what errors call the source, a file or a folder. metadata: texts that came with the tensors.
    """

    @property
    def label(self) -> str: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Type of a tensor, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor; the array may be a read-only view of the file."""
        ...


@dataclass(frozen=True, eq=False)
class ParamTensors:
    """`Tensors` of a parameter tree in the names of diffusers or transformers; a leaf is fetched when it is read."""

    label: str
    flat: dict[tuple[str, ...], Any]
    owners: dict[str, Leaf]
    metadata: dict[str, str]

    @classmethod
    def of(cls, params: PyTree, label: str) -> ParamTensors:
        """The tensors of `params`; `label` is what errors call them."""
        owners = {name: leaf for leaf in leaves(params) for name in leaf.names}
        return cls(label, flatten_dict(params), owners, {})

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self.owners)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in torch's axis order."""
        return self.owners[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Type of the parameter."""
        return jnp.dtype(self.flat[self.owners[name].path].dtype)

    def read(self, name: str) -> np.ndarray:
        """The parameter in torch's axis order, on the host."""
        leaf = self.owners[name]
        return leaf.to_torch(self.flat[leaf.path], name)


def open_tensors(paths: Path | Iterable[Path]) -> Tensors:
    """The tensors of a file, of several (shards) as one, or of those that an `*.index.json` names.

    Formats are told by content: safetensors, or a checkpoint of torch (.ckpt, .pt, .pth, .bin). Raises:
    FileNotFoundError, ValueError, one line each: those of the format; GGUF, git-lfs pointers, web pages and empty files
    by name.
    """
    files = [path for given in ([paths] if isinstance(paths, Path) else paths) for path in _shards(given)]
    kinds = [_format(path) for path in files]
    if all(kind is TensorFiles for kind in kinds):
        return TensorFiles(files)
    parts = [
        TensorFiles([path]) if kind is TensorFiles else TorchPickle(path)
        for path, kind in zip(files, kinds, strict=True)
    ]
    return parts[0] if len(parts) == 1 else _Joined(parts)


class _Joined:
    """Several files as one."""

    def __init__(self, parts: Sequence[Tensors]) -> None:
        self.label = str(Path(parts[0].label).parent)
        self.metadata: dict[str, str] = {}
        self._owners: dict[str, Tensors] = {}
        for part in parts:
            if twice := sorted(self._owners.keys() & set(part.names())):
                raise ValueError(f"{part.label} holds {twice[0]}, which {self._owners[twice[0]].label} holds too")
            self.metadata.update(part.metadata)
            self._owners.update(dict.fromkeys(part.names(), part))

    def names(self) -> tuple[str, ...]:
        return tuple(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owners[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._owners[name].dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._owners[name].read(name)


def shards(index: Path) -> list[Path]:
    """The files that a `*.index.json` names.

    Raises: ValueError for no `weight_map`; a name that leaves the index's folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names the file {name!r}; shards lie beside their index")
    return [index.with_name(name) for name in names]


def _shards(path: Path) -> list[Path]:
    return shards(path) if path.suffix == ".json" else [path]


def _format(path: Path) -> type[TensorFiles] | type[TorchPickle]:
    """The reader for a file, by its first bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with open(path, "rb") as file:
        start = file.read(64)
    for mark, message in FOREIGN.items():
        if start.lstrip().lower().startswith(mark):
            raise ValueError(f"{path} {message}")
    if not start:
        raise ValueError(f"{path} is empty (0 bytes); get it again")
    if start.startswith((ZIP_START, LEGACY_START)) or (start[0] == 0x80 and start[1:2] in PICKLE_PROTOCOLS):
        return TorchPickle
    return TensorFiles
