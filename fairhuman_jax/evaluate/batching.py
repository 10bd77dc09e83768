"""Networks over long lists of pictures: equal batches, one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


def in_batches(run: Callable[..., Any], rows: Iterable[tuple[np.ndarray, ...]], batch_size: int) -> np.ndarray:
    """What `run(*arrays)` gives for the stacked rows, `batch_size` at a time, as one array [N, ...].

    The last batch is filled up with its last row, so that every call has the same shapes. Raises: ValueError for no row
    at all, a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}; needs 1 or more")
    found: list[np.ndarray] = []
    batch: list[tuple[np.ndarray, ...]] = []

    def flush() -> None:
        filled = [*batch, *batch[-1:] * (batch_size - len(batch))]
        arrays = [np.stack(column) for column in zip(*filled, strict=True)]
        found.append(np.asarray(run(*arrays))[: len(batch)])
        batch.clear()

    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    if not found:
        raise ValueError("no pictures to measure")
    return np.concatenate(found)
