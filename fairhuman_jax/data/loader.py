"""Batches from any sample source: a deterministic, shardable, exactly resumable stream built on grain."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

Tokenize = Callable[[list[str]], dict[str, np.ndarray]]


class Source(Protocol):
    """Random access to samples (dicts of numpy arrays and `caption`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Transform(Protocol):
    """Sample and generator -> arrays of fixed shapes, in a dict that may be nested."""

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]: ...


@dataclass(frozen=True)
class _Order:
    """Position in the endless stream -> (epoch, index of the sample)."""

    length: int
    seed: int
    shuffle: bool

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        if not self.shuffle:
            return epoch, place
        return epoch, int(_permutation(self.length, self.seed, epoch)[place])


@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Order of one epoch, uint32 [length].

    Grain's own shuffle needs no memory, but takes 7 ms an index for ten samples: it walks a domain of 2^16.
    """
    order = np.arange(length, dtype=np.uint32)
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


@dataclass(frozen=True)
class _Load:
    """Position -> arrays and caption of one sample. All randomness comes from (seed, epoch, index)."""

    source: Source
    transform: Transform
    order: _Order
    first: int
    batch_size: int
    global_batch_size: int
    caption_dropout: float

    def __call__(self, local: int) -> tuple[dict[str, Any], str]:
        step, row = divmod(local, self.batch_size)
        epoch, index = self.order(step * self.global_batch_size + self.first + row)
        rng = np.random.default_rng((self.order.seed, epoch, index))
        sample = self.source[index]
        drop, choice = rng.random(2)
        captions: Sequence[str] = sample.get("captions") or (sample["caption"],)
        caption = "" if drop < self.caption_dropout else captions[int(choice * len(captions))]
        return self.transform(sample, rng), caption


@dataclass(frozen=True)
class _Collate:
    """Samples -> batch: arrays stacked, captions tokenized."""

    tokenize: Tokenize

    def __call__(self, samples: Sequence[tuple[dict[str, Any], str]]) -> dict[str, Any]:
        batch = _stack([arrays for arrays, _ in samples])
        ids = self.tokenize([caption for _, caption in samples])
        return batch | {name: np.asarray(value, np.int32) for name, value in ids.items()}


def _stack(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Dicts of arrays, nested or not -> one dict of arrays with a leading batch axis."""
    first = parts[0]
    for other in parts[1:]:
        if other.keys() != first.keys():
            different = ", ".join(sorted(other.keys() ^ first.keys()))
            raise ValueError(f"samples of one batch differ in keys: {different}; give all of them or none")
    return {
        name: _stack([part[name] for part in parts]) if isinstance(value, dict) else np.stack([p[name] for p in parts])
        for name, value in first.items()
    }


class BatchIterator:
    """Endless iterator of batches; `get_state()` / `set_state()` move it to any step exactly.

    The state is JSON: the number of batches given and the settings that fix their order. Worker and host
    counts are not among them, so a run may resume with others. Closes its worker processes in `close()` or as
    a context manager.
    """

    def __init__(self, samples: grain.MapDataset, collate: _Collate, workers: int, prefetch: int, order: dict) -> None:
        self._samples, self._collate = samples, collate
        self._workers, self._prefetch, self._order = workers, prefetch, order
        self._step = 0
        self._batches: grain.DatasetIterator | None = None

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._step += 1
        return batch

    def _start(self) -> grain.DatasetIterator:
        rows = self._order["batch_size"] // self._order["shards"]
        samples = self._samples[self._step * rows :] if self._step else self._samples
        batches = samples.batch(rows, drop_remainder=True, batch_fn=self._collate)
        stream = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=self._prefetch, prefetch_buffer_size=self._prefetch)
        )
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl.app would have parsed
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=self._prefetch)
            )
        return iter(stream)

    def get_state(self) -> dict[str, Any]:
        """JSON-able position: the next batch is batch number `step` (from 0)."""
        return {"step": self._step} | self._order

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError when the data order is not the same one."""
        for name, value in self._order.items():
            if name != "shards" and state.get(name) != value:
                raise ValueError(f"data order differs: {name} is {value} here and {state.get(name)} in the saved state")
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stop worker processes and threads; the position is kept."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_loader(
    source: Source,
    transform: Transform,
    tokenize: Tokenize,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    caption_dropout: float = 0.0,
    prefetch: int = 2,
) -> BatchIterator:
    """Endless batches of `source`, reshuffled every epoch.

    `batch_size` counts the rows of the global batch; shard (index, count) gets its contiguous share of each,
    so that the shards' batches put together are the batch of one host. Batches run across the ends of epochs,
    so all are full and no sample is left out. `tokenize(list of captions) -> {"input_ids": int32 [B, L],
    ...}`. Captions are replaced by "" with probability `caption_dropout`, drawn anew for each sample in each
    epoch. `workers` processes (0: threads of this process) and `prefetch` batches ahead for each change speed
    only, never the batches.

    Batch: the transform's arrays stacked (image uint8 [B, H, W, 3], masks uint8 [B, H, W, 1], time_ids
    float32 [B, 6]) and the tokenizer's. Raises ValueError on settings that do not fit.
    """
    index, count = shard
    if len(source) < 1:
        raise ValueError("the source holds no samples")
    if not 0 <= index < count:
        raise ValueError(f"shard = {shard}: the index must be 0 ... count - 1")
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"batch_size = {batch_size} must be a positive multiple of the shard count {count}")
    if not 0.0 <= caption_dropout <= 1.0:
        raise ValueError(f"caption_dropout = {caption_dropout}: use 0 ... 1")
    if workers < 0 or prefetch < 1:
        raise ValueError(f"workers = {workers} must be >= 0 and prefetch = {prefetch} >= 1")
    rows = batch_size // count
    order = _Order(len(source), seed, shuffle)
    load = _Load(source, transform, order, index * rows, rows, batch_size, caption_dropout)
    samples = grain.MapDataset.range(sys.maxsize // batch_size).map(load)
    settings = {
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
        "samples": len(source),
        "shards": count,
    }
    return BatchIterator(samples, _Collate(tokenize), workers, prefetch, settings)
