"""Meshes and placements: batches are split over both axes, small trees are replicated."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
BATCH_SPEC = PartitionSpec(AXES)


def make_mesh(fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; `fsdp` must divide their number.

    Axis types are Auto: `jax.make_mesh` of jax 0.10 defaults to Explicit, which refuses sharded convolution kernels.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"mesh: fsdp={fsdp} does not divide {len(devices)} devices")
    grid = np.asarray(devices).reshape(-1, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays [B, ...] split over the mesh along B; each process hands in its own share of the global batch."""
    size = next(iter(batch.values())).shape[0]
    local_devices = len(mesh.local_devices)
    if size % local_devices:
        raise ValueError(f"a batch of {size} does not divide over {local_devices} devices; use a multiple of it")
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def shard_rows(mesh: Mesh, tree: Any, rows: int) -> Any:
    """The tree's arrays: those with a leading axis of `rows` split along it, all others whole on every device."""

    def place(leaf: Any) -> jax.Array:
        split = np.ndim(leaf) > 0 and np.shape(leaf)[0] == rows
        return jax.device_put(leaf, NamedSharding(mesh, BATCH_SPEC if split else PartitionSpec()))

    return jax.tree.map(place, tree)
