"""From files to devices, one leaf at a time, each device its own part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from fairhuman_jax.weights.keys import Leaf

Placement = Sharding | Callable[[tuple[str, ...], tuple[int, ...]], Sharding] | None


def place(
    leaf: Leaf, read: Callable[[str], np.ndarray], dtype: np.dtype, *, host: bool = False, sharding: Placement = None
) -> np.ndarray | jax.Array:
    """The array of `leaf`: on the host, on the default device (`sharding` None), or by a sharding.

    Returns when the devices hold it, so that the host's copy is gone before the next leaf is read. A CPU device
    keeps the host's array as it is.
    """
    if host:
        return leaf.from_torch(read, dtype)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(leaf.from_torch(read, dtype)))
    if not isinstance(sharding, Sharding):
        sharding = sharding(leaf.path, leaf.array_shape)
    return _place_parts(leaf, read, dtype, sharding)


def _place_parts(leaf: Leaf, read: Callable[[str], np.ndarray], dtype: np.dtype, sharding: Sharding) -> jax.Array:
    shape = leaf.array_shape
    holders: dict[tuple, tuple[tuple[slice, ...], list[Any]]] = {}  # devices that hold the same part
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        index = tuple(slice(*part.indices(extent)) for part, extent in zip(index, shape, strict=True))
        key = tuple((part.start, part.stop) for part in index)
        holders.setdefault(key, (index, []))[1].append(device)
    arrays = []
    for index, devices in holders.values():
        array = leaf.from_torch(read, dtype, index)
        targets = [SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in devices]
        arrays += [jax.block_until_ready(jax.device_put(array, target)) for target in targets]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
