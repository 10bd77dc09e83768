"""From a data configuration to training batches and a fixed held-out set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fairhuman_jax.data.cache import cached_people
from fairhuman_jax.data.folder import FolderDataset
from fairhuman_jax.data.loader import BatchIterator, Source, make_loader
from fairhuman_jax.data.transforms import JointTransform
from fairhuman_jax.systems.contract import System
from fairhuman_jax.training.config import DataConfig, TrainConfig

Arrays = dict[str, np.ndarray]
ENCODE_BATCH = 64


class Part:
    """A contiguous part of a source, picklable for worker processes."""

    def __init__(self, source: Source, first: int, length: int) -> None:
        self.source, self.first, self.length = source, first, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.first + index]


class LatentSource:
    """Samples whose image is replaced by the moments of its latent, encoded once (float16)."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def open_data(config: DataConfig) -> tuple[Source, Source]:
    """(training source, held-out source); held out are the last samples."""
    if config.folder is None:
        source: Source = cached_people(config.resolution, config.length + config.held_out, config.seed)
        held_out = config.held_out
    else:
        source = FolderDataset(config.folder, on_error=config.on_error)
        held_out = min(config.held_out, max(len(source) // 4, 1))
        if len(source) < 2:
            raise ValueError(f"{config.folder}: {len(source)} samples; training and held-out need at least 2")
    training = len(source) - held_out
    return Part(source, 0, training), Part(source, training, held_out)


def training_batches(
    source: Source, system: System, data: DataConfig, train: TrainConfig, frozen: Any
) -> BatchIterator:
    """The endless, resumable stream of this process's share of each global batch."""
    transform: Callable = JointTransform(data.resolution, crop=data.crop, flip=data.flip)
    if data.cache_latents:
        if not hasattr(system, "encode_image"):
            raise ValueError(f"data.cache_latents: {type(system).__name__} has no frozen autoencoder to encode with")
        fixed = JointTransform(data.resolution, crop="center", flip=0.0)
        source, transform = encode_source(source, system, frozen, fixed), _arrays_only
    return make_loader(
        source,
        transform,
        system.tokenize,
        train.batch_size,
        train.seed,
        workers=data.workers,
        shard=(jax.process_index(), jax.process_count()),
        caption_dropout=data.caption_dropout,
    )


def held_out_batches(source: Source, system: System, data: DataConfig, batch_size: int) -> list[Arrays]:
    """Full batches of the held-out samples, centre-cropped; a remainder is filled up from the start."""
    transform = JointTransform(data.resolution, crop="center", flip=0.0)
    count = -(-len(source) // batch_size)
    with make_loader(source, transform, system.tokenize, batch_size, seed=0, shuffle=False) as loader:
        batches = [next(loader) for _ in range(count)]
    times = (np.arange(count * batch_size, dtype=np.float32) + 0.5) / (count * batch_size)
    # Neighbouring samples get distant times, so that each batch covers the schedule.
    spread = times.reshape(batch_size, count).T
    position = np.arange(batch_size, dtype=np.int32)
    return [batch | {"times": spread[i], "position": position} for i, batch in enumerate(batches)]


def encode_source(source: Source, system: Any, frozen: Any, transform: Callable) -> LatentSource:
    """Every image through the frozen encoder, once; captions, masks and sizes are kept as `transform` gives them."""
    encode = jax.jit(system.encode_image)
    rng = np.random.default_rng(0)
    samples: list[dict[str, Any]] = []
    for first, group in tqdm(list(_groups(len(source))), desc="encoding latents", unit="batch"):
        raw = [source[i] for i in range(first, first + group)]
        arrays = [transform(sample, rng) for sample in raw]
        images = np.stack([each.pop("image") for each in arrays])
        padded = np.concatenate([images, np.repeat(images[-1:], ENCODE_BATCH - group, axis=0)])
        mean, logvar = (np.asarray(x, np.float16) for x in encode(frozen, padded))
        for i, sample in enumerate(raw):
            texts = {name: sample[name] for name in ("caption", "captions") if name in sample}
            samples.append(texts | arrays[i] | {"latent_mean": mean[i], "latent_logvar": logvar[i]})
    return LatentSource(samples)


def _groups(length: int) -> Iterator[tuple[int, int]]:
    return ((first, min(ENCODE_BATCH, length - first)) for first in range(0, length, ENCODE_BATCH))


def _arrays_only(sample: dict[str, Any], rng: np.random.Generator) -> Arrays:
    return {name: value for name, value in sample.items() if isinstance(value, np.ndarray)}
