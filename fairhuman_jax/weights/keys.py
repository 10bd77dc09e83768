"""The rule between our parameter trees and torch state dicts: names, transposes, stacks.

The dotted path of a module is its torch name. A leaf `kernel` is the torch `weight` transposed (linear [in,
out] from [out, in], convolution HWIO from OIHW); `scale` and `embedding` are `weight` as it is; `bias` is
`bias`. Under a scanned module (`transformer_blocks`, `layers`) every leaf leads with a depth axis: one torch
tensor a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

PyTree = Any
Path = tuple[str, ...]

STACKS = ("transformer_blocks", "layers")
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Attention of autoencoders saved before diffusers 0.12, still what the published SD 1.x and 2.x folders hold.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Leaf:
    """One leaf of a parameter tree and the torch tensors it stands for, one a layer when it is stacked."""

    path: Path
    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool

    def to_torch(self, array: np.ndarray, name: str) -> np.ndarray:
        """The torch tensor `name` out of this leaf's array."""
        return to_torch(array[self.names.index(name)] if self.stacked else array, self.path[-1])

    def from_torch(self, read: Callable[[str], np.ndarray], dtype: np.dtype | None) -> np.ndarray:
        """This leaf's array out of its torch tensors, read one at a time; `dtype` None keeps theirs."""
        first = from_torch(read(self.names[0]), self.path[-1])
        if not self.stacked:
            return np.ascontiguousarray(first, dtype=dtype or first.dtype)
        array = np.empty((len(self.names), *first.shape), dtype or first.dtype)
        array[0] = first
        for i, name in enumerate(self.names[1:], start=1):
            array[i] = from_torch(read(name), self.path[-1])
        return array


def leaves(params: PyTree) -> list[Leaf]:
    """Every leaf of a tree (arrays or shapes), with its torch names and the torch shape of one tensor."""
    found = []
    for path, leaf in sorted(flatten_dict(params).items()):
        depth = leaf.shape[0] if is_stacked(path) else None
        shape = leaf.shape if depth is None else leaf.shape[1:]
        names = tuple(f"{module}.{LEAF_NAMES[path[-1]]}" for module in module_names(path[:-1], depth))
        found.append(Leaf(path, names, torch_shape(shape, path[-1]), depth is not None))
    return found


def is_stacked(path: Path) -> bool:
    """Whether a module or leaf lies under a scanned stack."""
    return any(part in STACKS for part in path)


def module_names(module: Path, depth: int | None) -> tuple[str, ...]:
    """Torch names of a module: one, or one a layer where it lies under a stack of `depth` layers."""
    if depth is None:
        return (".".join(module),)
    return tuple(".".join(f"{part}.{i}" if part in STACKS else part for part in module) for i in range(depth))


def to_torch(array: np.ndarray, leaf: str) -> np.ndarray:
    """One unstacked array in torch's axis order."""
    if leaf != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def from_torch(array: np.ndarray, leaf: str) -> np.ndarray:
    """One torch tensor in our axis order."""
    if leaf != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def torch_shape(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
    """The torch shape of an unstacked array."""
    if leaf != "kernel":
        return tuple(shape)
    return tuple(shape[::-1]) if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def canonical_names(network: str, names: Iterable[str]) -> dict[str, str]:
    """Our name of every tensor in a file -> its name there, for the dialects of one network class.

    CLIPText: transformers 5 writes no `text_model.` prefix, version 4 does, and old files carry a
    `position_ids` buffer. AutoencoderKL: old attention names.
    """
    names = tuple(names)
    if network == "CLIPText":
        prefixed = any(name.startswith("text_model.") for name in names)
        kept = [name for name in names if not name.endswith("embeddings.position_ids")]
        bare = prefixed or not kept
        return {name if bare or name.startswith("text_projection.") else f"text_model.{name}": name for name in kept}
    if network == "AutoencoderKL":
        return {_current_attention_name(name): name for name in names}
    return {name: name for name in names}


def _current_attention_name(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2:
        parts[-2] = OLD_ATTENTION.get(parts[-2], parts[-2])
    return ".".join(parts)
