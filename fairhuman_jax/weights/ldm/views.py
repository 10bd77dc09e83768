"""Views of a file's tensors under other names: renamed, split, transposed, put together; nothing is read early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fairhuman_jax.weights.tensors import Tensors


@dataclass(frozen=True)
class Slot:
    """Where a tensor comes from: `stored` is its name in the file, or several, whose rows follow on each other.

    part: (which, of how many) equal parts of its rows. transpose: a matrix the other way round. ndim: the number of
    axes wanted, 2 for a linear map stored as a 1x1 convolution and 4 for the reverse.
    """

    stored: tuple[str, ...]
    part: tuple[int, int] = (0, 1)
    transpose: bool = False
    ndim: int | None = None


@dataclass(frozen=True, eq=False)
class View:
    """`Tensors` of `source` under the names of `slots`."""

    source: Tensors
    slots: Mapping[str, Slot]

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def metadata(self) -> dict[str, str]:
        return self.source.metadata

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self.slots)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        slot = self.slots[name]
        shapes = [self.source.shape(stored) for stored in slot.stored]
        shape = (sum(shape[0] for shape in shapes) // slot.part[1], *shapes[0][1:]) if shapes[0] else ()
        shape = shape[::-1] if slot.transpose else shape
        return _with_ndim(shape, slot.ndim)

    def dtype(self, name: str) -> np.dtype:
        """Type of a tensor, without reading it."""
        return self.source.dtype(self.slots[name].stored[0])

    def read(self, name: str) -> np.ndarray:
        """A tensor, a view of what is stored where it can be."""
        slot = self.slots[name]
        arrays = [self.source.read(stored) for stored in slot.stored]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        which, parts = slot.part
        if parts > 1:
            rows = len(array) // parts
            array = array[which * rows : (which + 1) * rows]
        array = array.T if slot.transpose else array
        return array.reshape(_with_ndim(array.shape, slot.ndim))


def _with_ndim(shape: tuple[int, ...], ndim: int | None) -> tuple[int, ...]:
    """`shape` with ones appended, or ones at its end taken away, to have `ndim` axes."""
    if ndim is None:
        return shape
    while len(shape) > ndim and shape[-1] == 1:
        shape = shape[:-1]
    return (*shape, *(1,) * (ndim - len(shape)))
