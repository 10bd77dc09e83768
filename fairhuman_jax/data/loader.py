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
    """Sample and generator -> arrays of fixed shapes, in a dict that may be nested.

    A `caption` (str) among them takes the place of the sample's: the transform has decided what is said, and whether.
    """

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]: ...


class _Order:
    """Place in the endless stream -> (group, epoch, index of the sample); every batch is of one group.

    A group's samples form an endless stream of their own, reshuffled after each pass, of which every batch takes the
    next `batch_size`. Up to the end of epoch E a group of n samples has given floor(E n / batch_size) batches: what
    does not fill a batch waits for the next epoch, so no sample is lost and none comes more often than another of its
    group by more than one. The batches of an epoch are in random order. One group: batches run across the ends of
    epochs.
    """

    def __init__(self, groups: np.ndarray, batch_size: int, seed: int, shuffle: bool) -> None:
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.names = [int(group) for group in np.unique(groups)]
        self.members = [np.flatnonzero(groups == group).astype(np.uint32) for group in self.names]
        self._passes: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, step: int, row: int) -> tuple[int, int, int]:
        member, batch = (0, step) if len(self.members) == 1 else self._batch(step)
        indices = self.members[member]
        epoch, place = divmod(batch * self.batch_size + row, len(indices))
        if self.shuffle:
            place = self._permutation(member, epoch)[place]
        return self.names[member], epoch, int(indices[place])

    def _permutation(self, member: int, epoch: int) -> np.ndarray:
        """Order of one pass through a group, uint32 [samples of it]; that pass and its neighbours are kept.

        Grain's own shuffle needs no memory, but takes 7 ms an index for ten samples: it walks a domain of 2^16.
        """
        order = self._passes.get((member, epoch))
        if order is None:
            order = np.arange(len(self.members[member]), dtype=np.uint32)
            np.random.default_rng((self.seed, epoch, member)).shuffle(order)
            kept = {key: value for key, value in self._passes.items() if key[0] != member or abs(key[1] - epoch) <= 1}
            self._passes = kept | {(member, epoch): order}  # replaced, not changed: threads read it
        return order

    def _batch(self, step: int) -> tuple[int, int]:
        """Step -> (which group, number of the batch in that group's stream)."""
        sizes = tuple(map(len, self.members))
        # The epoch in which the step lies: at most one batch a group is owed, so the guess is below by few.
        epoch = step * self.batch_size // sum(sizes)
        while sum(_batches(sizes, epoch + 1, self.batch_size)) <= step:
            epoch += 1
        done = _batches(sizes, epoch, self.batch_size)
        members, counts = _schedule(sizes, epoch, self.batch_size, self.seed, self.shuffle)
        place = step - sum(done)
        return int(members[place]), done[members[place]] + int(counts[place])


def _batches(sizes: Sequence[int], epochs: int, batch_size: int) -> list[int]:
    """Batches that groups of these sizes have given after that many epochs."""
    return [epochs * size // batch_size for size in sizes]


@functools.lru_cache(maxsize=2)
def _schedule(
    sizes: tuple[int, ...], epoch: int, batch_size: int, seed: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    """For each batch of an epoch its group and how many of that group come before it in the epoch, int64 [batches]."""
    before, after = (_batches(sizes, e, batch_size) for e in (epoch, epoch + 1))
    members = np.repeat(np.arange(len(sizes)), np.subtract(after, before))
    if shuffle:
        np.random.default_rng((seed, epoch, len(sizes))).shuffle(members)
    counts = np.zeros_like(members)
    for member in range(len(sizes)):
        counts[members == member] = np.arange(np.count_nonzero(members == member))
    return members, counts


@dataclass(frozen=True)
class _Load:
    """Position -> arrays and caption of one sample. All randomness comes from (seed, epoch, index)."""

    source: Source
    transforms: Sequence[Transform]
    order: _Order
    first: int
    rows: int
    caption_dropout: float

    def __call__(self, local: int) -> tuple[dict[str, Any], str | None]:
        step, row = divmod(local, self.rows)
        group, epoch, index = self.order(step, self.first + row)
        rng = np.random.default_rng((self.order.seed, epoch, index))
        sample = self.source[index]
        drop, choice = rng.random(2)
        captions: Sequence[str] = sample.get("captions") or (sample["caption"],)
        dropped, chosen = drop < self.caption_dropout, int(choice * len(captions))
        arrays = self.transforms[group](sample, rng)
        if "caption" in arrays:
            return {name: value for name, value in arrays.items() if name != "caption"}, arrays["caption"]
        if "texts" in sample:
            return arrays | (sample["empty_text"] if dropped else sample["texts"][chosen]), None
        return arrays, "" if dropped else captions[chosen]


@dataclass(frozen=True)
class _Collate:
    """Samples -> batch: arrays stacked, captions tokenized where the samples carry no embeddings of them."""

    tokenize: Tokenize

    def __call__(self, samples: Sequence[tuple[dict[str, Any], str | None]]) -> dict[str, Any]:
        batch = _stack([arrays for arrays, _ in samples])
        captions = [caption for _, caption in samples if caption is not None]
        if not captions:
            return batch
        ids = self.tokenize(captions)
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
        """Continue where `state` was taken. Raises: ValueError when the data order is not the same one."""
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
    transform: Transform | Sequence[Transform],
    tokenize: Tokenize,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    caption_dropout: float = 0.0,
    prefetch: int = 2,
    groups: np.ndarray | None = None,
) -> BatchIterator:
    """Endless batches of `source`, reshuffled every epoch.

    `batch_size` counts the rows of the global batch; shard (index, count) gets its contiguous share of each,
    so that the shards' batches put together are the batch of one host. Batches run across the ends of epochs,
    so all are full and no sample is left out. `groups` (int [samples], for instance of aspect-ratio buckets): all rows
    of a batch, on every shard, are then of one group g and go through `transform[g]`; what does not fill a batch of
    its group waits for the next epoch. `tokenize(list of captions) -> {"input_ids": int32 [B, L],
    ...}`. Captions are replaced by "" with probability `caption_dropout`, drawn anew for each sample in each
    epoch; a sample with `texts` (a dict of arrays for each caption) and `empty_text` gives those in place of ids, and a
    transform that gives a caption drops it itself.
    `workers` processes (0: threads of this process) and `prefetch` batches ahead for each change speed
    only, never the batches.

    Batch: the transform's arrays stacked (image uint8 [B, H, W, 3], masks uint8 [B, H, W, 1], time_ids
    float32 [B, 6]) and the tokenizer's. Raises: ValueError on settings that do not fit.
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
    transforms = [transform] if callable(transform) else list(transform)
    members = np.zeros(len(source), np.int32) if groups is None else np.asarray(groups)
    if members.shape != (len(source),) or not 0 <= members.min() <= members.max() < len(transforms):
        raise ValueError(f"groups: needs one number below {len(transforms)} for each of the {len(source)} samples")
    rows = batch_size // count
    order = _Order(members, batch_size, seed, shuffle)
    load = _Load(source, transforms, order, index * rows, rows, caption_dropout)
    samples = grain.MapDataset.range(sys.maxsize // batch_size).map(load)
    settings = {
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
        "samples": len(source),
        "groups": None if groups is None else np.bincount(members, minlength=len(transforms)).tolist(),
        "shards": count,
    }
    return BatchIterator(samples, _Collate(tokenize), workers, prefetch, settings)
