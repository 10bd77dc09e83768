"""Meshes and placements: batches are split over both axes, large leaves over `fsdp`, the rest is whole everywhere.

A leaf that is split is gathered where a network uses it: inside `shard_map` it travels as a `Shard`, a box that flax
opens when a layer asks for the parameter. So a scanned stack gathers one layer at a time, rematerialised blocks gather
again for the backward pass instead of keeping what they gathered, and the transpose of the gather leaves each device
with its own part of the gradient, summed over `fsdp` (a reduce-scatter). No layer knows of it.
Source: Rajbhandari et al. 2020 (ZeRO), stage 3.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fairhuman_jax.devices.processes import put

PyTree = Any
AXES = DATA, FSDP = ("data", "fsdp")
BATCH_SPEC = PartitionSpec(AXES)
WHOLE = PartitionSpec()
SPLIT_ABOVE = 2**16  # elements; smaller leaves cost more to gather than to keep
SPLIT_NAMES = ("kernel", "embedding", "down", "up")


class Shard(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A device's part of a leaf that is split over `fsdp` along `axis`, counted from the end."""

    value: jax.Array
    axis: int = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """The whole leaf; to be called inside `shard_map`."""
        axis = self.value.ndim + self.axis
        return jax.lax.all_gather(self.value, FSDP, axis=axis, tiled=True)

    def replace_boxed(self, val: Any) -> Shard:
        """The same box around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Shard:
        """A scanned stack's leading axis does not move an axis counted from the end."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Shard:
        """See `add_axis`."""
        return self


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; `fsdp` must divide their number.

    Axis types are Auto: `jax.make_mesh` of jax 0.10 defaults to Explicit, which refuses sharded convolution kernels.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"mesh: fsdp={fsdp} does not divide {len(devices)} devices")
    grid = np.asarray(devices).reshape(-1, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_specs(mesh: Mesh, tree: PyTree, split_above: int = SPLIT_ABOVE) -> PyTree:
    """A PartitionSpec for every leaf, by its name, shape and the mesh; `tree` may hold arrays or their shapes.

    A kernel, embedding or LoRA factor of more than `split_above` elements is split over `fsdp` along the larger of its
    last two axes that the axis size divides; every other leaf is whole. Moments of an optimiser carry their
    parameter's name and shape, so they are split alike.
    """
    size = mesh.shape[FSDP]

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = next((entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), None)
        if size == 1 or name not in SPLIT_NAMES or math.prod(leaf.shape) <= split_above:
            return WHOLE
        last = [axis for axis in range(max(leaf.ndim - 2, 0), leaf.ndim) if leaf.shape[axis] % size == 0]
        if not last:
            return WHOLE
        axis = max(last, key=lambda a: leaf.shape[a])
        return PartitionSpec(*[None] * axis, FSDP)

    return jax.tree.map_with_path(spec, tree)


def is_split(spec: PartitionSpec) -> bool:
    """Whether a leaf's spec splits it over `fsdp`."""
    return FSDP in spec


def box(tree: PyTree, specs: PyTree) -> PyTree:
    """Inside `shard_map`: every split leaf as a `Shard`, the others as they are."""

    def wrap(leaf: jax.Array, spec: PartitionSpec) -> Any:
        return Shard(leaf, spec.index(FSDP) - leaf.ndim) if is_split(spec) else leaf

    return jax.tree.map(wrap, tree, specs)


def unbox(tree: PyTree) -> PyTree:
    """The parts that `Shard`s hold, not gathered: back from `box`."""
    return jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, Shard) else leaf, tree, is_leaf=_is_shard)


def named(mesh: Mesh, specs: PyTree) -> PyTree:
    """Specs as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """The tree's arrays, whole on every device."""
    return put(tree, jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), tree))


def place(mesh: Mesh, tree: PyTree, split_above: int = SPLIT_ABOVE) -> PyTree:
    """The tree's arrays, large leaves split over `fsdp` (`leaf_specs`); on a mesh with fsdp = 1 this is `replicate`."""
    return put(tree, named(mesh, leaf_specs(mesh, tree, split_above)))


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays [B, ...] split over the mesh along B; each process hands in its own share of the global batch."""
    size = next(iter(batch.values())).shape[0]
    local_devices = len(mesh.local_devices)
    if size % local_devices:
        raise ValueError(f"a batch of {size} does not divide over {local_devices} devices; use a multiple of it")
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def shard_rows(mesh: Mesh, tree: PyTree, rows: int) -> PyTree:
    """The tree's arrays: those with a leading axis of `rows` split along it, all others whole on every device."""

    def place_leaf(leaf: Any) -> jax.Array:
        split = np.ndim(leaf) > 0 and np.shape(leaf)[0] == rows
        return jax.device_put(leaf, NamedSharding(mesh, BATCH_SPEC if split else WHOLE))

    return jax.tree.map(place_leaf, tree)


def _is_shard(node: Any) -> bool:
    return isinstance(node, Shard)
