"""The rule between our parameter trees and torch state dicts: names, transposes, stacks.

The dotted path of a module is its torch name. A leaf `kernel` is the torch `weight` transposed (linear [in,
out] from [out, in], convolution HWIO from OIHW); `scale` and `embedding` are `weight` as it is; `bias` is
`bias`. `transposed_kernel` is the `weight` of a transposed convolution, turned round in both spatial axes;
`mean` and `var` of a batch norm are its running moments. Under a scanned module (`transformer_blocks`,
`layers`) every leaf leads with a depth axis: one torch tensor a layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fairhuman_jax.files import aligned_empty

PyTree = Any
Path = tuple[str, ...]

BLOCK = 256  # of the last axis, copied at once when a tensor is transposed
LARGE = 1 << 20  # bytes from which on several threads copy
STACKS = ("transformer_blocks", "layers")
COLLECTIONS = ("params", "batch_stats")  # what a tree of variables begins with; no part of a name
LEAF_NAMES = {  # others keep their name
    "kernel": "weight",
    "transposed_kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}

# CLIP network -> the prefix of all its names but those of its projection.
TOWERS = {"CLIPText": ("text_model.", "text_projection."), "CLIPVision": ("vision_model.", "visual_projection.")}
# Attention of autoencoders saved before diffusers 0.12, still what the published SD 1.x and 2.x folders hold.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Leaf:
    """One leaf of a parameter tree and the torch tensors it stands for, one a layer when it is stacked."""

    path: Path
    names: tuple[str, ...]
    shape: tuple[int, ...]  # of one torch tensor
    array_shape: tuple[int, ...]  # of the leaf
    stacked: bool

    def to_torch(self, array: np.ndarray | jax.Array, name: str) -> np.ndarray:
        """The torch tensor `name` out of this leaf's array; from a device that tensor alone is fetched."""
        layer = self.names.index(name) if self.stacked else None
        return to_torch(_fetch(array, layer), self.path[-1])

    def from_torch(
        self, read: Callable[[str], np.ndarray], dtype: np.dtype, index: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """This leaf's array in `dtype`, or the part `index` of it, out of its torch tensors.

        They are read one at a time and written straight to their place, so nothing is in memory twice.
        """
        names, within = self.names, index or ()
        if self.stacked and index:
            names, within = names[index[0]], index[1:]
        array = None
        for i, name in enumerate(names):
            part = from_torch(read(name).reshape(self.shape), self.path[-1])[within]
            if array is None:
                array = aligned_empty((len(names), *part.shape) if self.stacked else part.shape, dtype)
            _copy(array[i] if self.stacked else array, part)
        assert array is not None
        return array


def leaves(params: PyTree) -> list[Leaf]:
    """Every leaf of a tree (arrays or shapes), with its torch names and the torch shape of one tensor.

    The tree is one of parameters, or of the collections of a network that has running statistics too.
    """
    found = []
    for path, leaf in sorted(flatten_dict(params).items()):
        depth = leaf.shape[0] if is_stacked(path) else None
        shape = leaf.shape if depth is None else leaf.shape[1:]
        last = LEAF_NAMES.get(path[-1], path[-1])
        module = path[1:-1] if path[0] in COLLECTIONS else path[:-1]
        names = tuple(f"{name}.{last}" for name in module_names(module, depth))
        found.append(Leaf(path, names, torch_shape(shape, path[-1]), tuple(leaf.shape), depth is not None))
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
    if leaf == "transposed_kernel":
        return array[::-1, ::-1].transpose(2, 3, 0, 1)
    if leaf != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def from_torch(array: np.ndarray, leaf: str) -> np.ndarray:
    """One torch tensor in our axis order."""
    if leaf == "transposed_kernel":
        return array.transpose(2, 3, 0, 1)[::-1, ::-1]
    if leaf != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def _fetch(array: np.ndarray | jax.Array, layer: int | None) -> np.ndarray:
    """On the host, `array` or a layer of it. What is fetched from a device must not stay in memory with `array`,
    where jax keeps it, so a copy is made there to fetch from.
    """
    if isinstance(array, jax.Array) and [device.platform for device in array.devices()] != ["cpu"]:
        return np.asarray(jnp.copy(array) if layer is None else array[layer])
    array = np.asarray(array)
    return array if layer is None else array[layer]


def _copy(into: np.ndarray, array: np.ndarray) -> None:
    """`into[...] = array`, in blocks of the last axis where that is not the fastest, by all cores where it is large.

    A block's cache lines are read once, and numpy lets other threads run while it copies.
    """
    if array.ndim < 2 or array.flags.c_contiguous:
        into[...] = array
        return

    def one(start: int) -> None:
        into[..., start : start + BLOCK] = array[..., start : start + BLOCK]

    starts = range(0, array.shape[-1], BLOCK)
    if array.nbytes < LARGE:
        for start in starts:
            one(start)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, starts))


def torch_shape(shape: tuple[int, ...], leaf: str) -> tuple[int, ...]:
    """The torch shape of an unstacked array."""
    if leaf == "transposed_kernel":
        return shape[2:] + shape[:2]
    if leaf != "kernel":
        return tuple(shape)
    return tuple(shape[::-1]) if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def canonical_names(network: str, names: Iterable[str]) -> dict[str, str]:
    """Our name of every tensor in a file -> its name there, for the dialects of one network class.

    CLIP: transformers 5 writes no `text_model.` or `vision_model.` prefix, version 4 does, and old files carry a
    `position_ids` buffer. AutoencoderKL: old attention names. HigherHRNet: torch's batch norms count their batches.
    """
    names = tuple(names)
    if network in TOWERS:
        prefix, head = TOWERS[network]
        prefixed = any(name.startswith(prefix) for name in names)
        kept = [name for name in names if not name.endswith("embeddings.position_ids")]
        return {name if prefixed or name.startswith(head) else f"{prefix}{name}": name for name in kept}
    if network == "AutoencoderKL":
        return {_current_attention_name(name): name for name in names}
    if network == "HigherHRNet":
        return {name: name for name in names if not name.endswith(".num_batches_tracked")}
    return {name: name for name in names}


def _current_attention_name(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and len(parts) >= 2:
        parts[-2] = OLD_ATTENTION.get(parts[-2], parts[-2])
    return ".".join(parts)
