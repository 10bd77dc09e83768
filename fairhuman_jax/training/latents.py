"""Samples through a frozen autoencoder and text encoders, once: for training from memory or from shards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fairhuman_jax.data.loader import Source
from fairhuman_jax.data.pictures import BadSample
from fairhuman_jax.data.transforms import JointTransform

_LOG = logging.getLogger(__name__)
PIXELS = 64 * 256 * 256  # of the images encoded at once
MOST = 64
TEXTS = 32
READERS = 4
PROBE = "two hands beside a face"

Record = dict[str, Any]


def encode_samples(
    source: Source,
    indices: Sequence[int],
    system: Any,
    params: Any,
    transforms: Sequence[JointTransform],
    groups: np.ndarray | None = None,
    *,
    text: bool = False,
    skip: bool = False,
) -> Iterator[tuple[int, Record]]:
    """(index, record) of every sample, one group after the other, so not in the order of `indices`.

    A record holds what `transforms[groups[index]]` gives, with `latent_mean` and `latent_logvar` (float16 [h, w, c]) in
    place of the image, and `captions`; with `text` also text_hidden (float16 [captions, L, D]) and text_pooled (float16
    [captions, P]). `skip` leaves out samples that cannot be read, which otherwise raise BadSample. Raises: ValueError:
    a value that float16 cannot hold.
    """
    encode = jax.jit(system.encode_image)
    texts = TextEncoding(system, params) if text else None
    chosen = np.asarray(indices, np.int64)
    member = np.zeros(len(chosen), np.int64) if groups is None else np.asarray(groups)[chosen]
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(chosen), desc="encoding", unit="image", delay=0.5) as bar,
    ):
        for group in np.unique(member):
            transform, part = transforms[group], chosen[member == group]
            size = max(1, min(MOST, len(part), PIXELS // int(np.prod(transform.size))))
            for first in range(0, len(part), size):
                span = [int(index) for index in part[first : first + size]]
                loaded = pool.map(_reader(source, transform, skip), span)
                found = {index: record for index, record in zip(span, loaded, strict=True) if record is not None}
                if found:
                    _encode_images(encode, params, list(found.values()), size)
                    if texts is not None:
                        texts.add(list(found.values()))
                for index, record in found.items():
                    _check(index, record)
                    yield index, record
                bar.update(len(span))


class TextEncoding:
    """Captions -> embeddings in float16, in padded batches of one size."""

    def __init__(self, system: Any, params: Any) -> None:
        self.system, self.params = system, params
        self._encode = jax.jit(system.encode_text)

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """text_hidden [captions, L, D] and text_pooled [captions, P]."""
        parts = []
        for first in range(0, len(captions), TEXTS):
            some = list(captions[first : first + TEXTS])
            ids = self.system.tokenize(some + [""] * (TEXTS - len(some)))
            parts.append([_half(array)[: len(some)] for array in self._encode(self.params, ids)])
        hidden, pooled = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return {"text_hidden": hidden, "text_pooled": pooled}

    def add(self, records: Sequence[Record]) -> None:
        """Puts the embeddings of each record's captions into it."""
        embedded = self([caption for record in records for caption in record["captions"]])
        ends = np.cumsum([len(record["captions"]) for record in records])[:-1]
        for name, array in embedded.items():
            for record, part in zip(records, np.split(array, ends), strict=True):
                record[name] = part

    def empty(self) -> dict[str, np.ndarray]:
        """text_hidden [L, D] and text_pooled [P] of the empty caption."""
        return {name: array[0] for name, array in self([""]).items()}


def content_keys(
    source: Source,
    system: Any,
    params: Any,
    transforms: Sequence[JointTransform],
    groups: np.ndarray | None,
    text: bool,
) -> list[str | None]:
    """One hexadecimal key a sample, which changes with its files, captions, geometry or encoders; None: unreadable."""
    encoder = _encoder_digest(system, params, text)
    contents = [hashlib.blake2b(encoder + repr(transform).encode(), digest_size=16) for transform in transforms]
    digest = getattr(source, "digest", None) or (lambda index: _digest_arrays(source[index]))

    def key(index: int) -> str | None:
        whole = contents[0 if groups is None else groups[index]].copy()
        try:
            whole.update(digest(index).encode())
        except BadSample as error:
            _LOG.warning("skipped %s", error)
            return None
        return whole.hexdigest()

    with ThreadPoolExecutor(READERS) as pool:
        bar = tqdm(pool.map(key, range(len(source))), "reading keys", len(source), unit="image", delay=2.0)
        return list(bar)


def _reader(source: Source, transform: JointTransform, skip: bool) -> Callable[[int], Record | None]:
    read = getattr(source, "load", source.__getitem__)

    def load(index: int) -> Record | None:
        try:
            sample = read(index)
        except BadSample as error:
            if not skip:
                raise
            _LOG.warning("skipped %s", error)
            return None
        captions = tuple(sample.get("captions") or (sample["caption"],))
        return transform(sample, np.random.default_rng(0)) | {"captions": captions}

    return load


def _encode_images(encode: Callable, params: Any, records: list[Record], size: int) -> None:
    """Replaces `image` by its latent's moments in each record; the batch is filled up to `size`."""
    images = np.stack([record.pop("image") for record in records])
    images = np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])
    moments = [_half(moment) for moment in encode(params, images)]
    for i, record in enumerate(records):
        record["latent_mean"], record["latent_logvar"] = (moment[i] for moment in moments)


def _half(array: Any) -> np.ndarray:
    """float16; what does not fit becomes infinite, which `_check` reports."""
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float16)


def _check(index: int, record: Record) -> None:
    for name, value in record.items():
        if isinstance(value, np.ndarray) and value.dtype == np.float16 and not np.isfinite(value).all():
            raise ValueError(f"sample {index}: {name} is not finite in float16; use dtype=float32 for the encoders")


def _encoder_digest(system: Any, params: Any, text: bool) -> bytes:
    """Digest of the parameters that encode, and of what the tokenizers make of a sentence."""
    digest = hashlib.blake2b(b"text" if text else b"", digest_size=16)
    used = {name: tree for name, tree in params.items() if name == "vae" or (text and name.startswith("text_encoder"))}
    for path, leaf in jax.tree_util.tree_leaves_with_path(used):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    for name, ids in sorted(system.tokenize([PROBE]).items()) if text else ():
        digest.update(name.encode() + np.asarray(ids, np.int32).tobytes())
    return digest.digest()


def _digest_arrays(sample: dict[str, Any]) -> str:
    digest = hashlib.blake2b(repr(sample.get("captions", sample["caption"])).encode(), digest_size=16)
    for name, value in sorted(sample.items()):
        if isinstance(value, np.ndarray):
            digest.update(f"{name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
