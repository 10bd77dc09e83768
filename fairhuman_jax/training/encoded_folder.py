"""Latents and text embeddings of a whole data set, written once (doors/encode.py is its command line)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairhuman_jax.data.shards import SHARD_BYTES, ShardedDataset, ShardWriter
from fairhuman_jax.training.datasets import geometry, open_source
from fairhuman_jax.training.latents import TextEncoding, content_keys, encode_samples
from fairhuman_jax.training.run_config import DataConfig


@dataclass(frozen=True)
class Encoded:
    """What an encoding did: records written now, found there already, samples that could not be read."""

    folder: Path
    written: int
    kept: int
    bad: int


def encode_folder(
    data: DataConfig,
    system: Any,
    params: Any,
    folder: str | os.PathLike[str],
    *,
    text: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Encoded:
    """Write what `data` describes into a folder of shards (data.shards), centre-cropped and not mirrored.

    Samples whose key (files, captions, geometry, encoders) has a record there are not encoded again. `text`: with the
    embeddings of all captions; without, captions stay text, as a trained text encoder needs it. Raises: ValueError:
    what the source and ShardWriter raise; ValueError: latents already, or a system without frozen encoders.
    """
    if "image" not in system.encodes:
        raise ValueError(f"{type(system).__name__} has no frozen autoencoder to encode with")
    if data.subjects:
        raise ValueError("data.subjects: their pictures and captions are drawn anew each time; train from the folder")
    source = open_source(data)
    if isinstance(source, ShardedDataset):
        raise ValueError(f"{data.folder}: holds latents already")
    transforms, groups = geometry(source, data, crop="center", flip=0.0)
    keys = content_keys(source, system, params, transforms, groups, text)
    empty = TextEncoding(system, params).empty() if text else None
    with ShardWriter(folder, keys, empty, shard_bytes) as writer:
        missing = set(writer.missing)
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key in missing}
        written = 0
        todo = sorted(first.values())
        skip = data.on_error == "skip"
        for index, record in encode_samples(source, todo, system, params, transforms, groups, text=text, skip=skip):
            key = keys[index]
            assert key is not None
            writer.write(key, record)
            written += 1
    readable = len({key for key in keys if key is not None})
    return Encoded(Path(folder), written, readable - len(missing), keys.count(None) + len(missing) - written)
