"""From a data configuration to training batches and a fixed held-out set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fairhuman_jax.contract import System
from fairhuman_jax.data.buckets import assign_buckets, bucket_shapes, picture_size
from fairhuman_jax.data.cache import cached_people, cached_subjects
from fairhuman_jax.data.folder import METADATA, FolderDataset
from fairhuman_jax.data.keypoint_transforms import PoseTransform
from fairhuman_jax.data.loader import BatchIterator, Source, Transform, make_loader
from fairhuman_jax.data.pose_files import MappingDataset
from fairhuman_jax.data.shards import MANIFEST, ShardedDataset
from fairhuman_jax.data.subject_folder import SPLITS, SubjectDataset
from fairhuman_jax.data.subject_transforms import SubjectTransform
from fairhuman_jax.data.tfds_folder import INFO, TFDSDataset
from fairhuman_jax.data.transforms import JointTransform
from fairhuman_jax.training.latents import encode_samples
from fairhuman_jax.training.run_config import DataConfig, TrainConfig

Arrays = dict[str, np.ndarray]


class Part:
    """Some samples of a source in a given order, picklable for worker processes."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.indices = source, np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample's image."""
        return picture_size(self.source, int(self.indices[index]))


class LatentSource:
    """Encoded samples in memory; `shapes`: of their latents."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples
        self.shapes = [sample["latent_mean"].shape for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def open_source(config: DataConfig) -> Source:
    """The people world or what `config.folder` is: a mapping file, or a folder with metadata.jsonl, a list of ids, a
    TFDS version or shards of latents.

    Raises: FileNotFoundError, ValueError for no such folder, or none of the four in it; settings that the data cannot
    follow; what the readers raise.
    """
    _check(config)
    if config.folder is None:
        total = config.length + config.held_out
        if config.subjects:
            people = config.subjects
            return cached_subjects(
                config.resolution,
                total,
                config.seed,
                people.object_resolution,
                people.identities,
                people.pairs,
                people.references,
                people.looks,
            )
        drawn = None if config.conditioning == "humansd" else config.conditioning  # those come with the crop
        return cached_people(
            config.resolution,
            total,
            config.seed,
            conditioning=drawn,
            keypoints=_asks_for_poses(config),
            framings=config.framings,
        )
    root = Path(config.folder)
    if config.subjects and not (root / SPLITS["train"]).is_file():
        raise ValueError(f"data.subjects: {root} holds no {SPLITS['train']}, and is not the people world")
    if _has_poses(config):
        if config.conditioning == "fairhuman":
            raise ValueError(f"{root}: has joints alone; set data.conditioning to humansd or none")
        return MappingDataset(root, on_error=config.on_error)
    if (root / SPLITS["train"]).is_file():
        if config.keypoints or config.conditioning:
            raise ValueError(f"{root}: has people's segments alone; set neither data.keypoints nor data.conditioning")
        return SubjectDataset(root, on_error=config.on_error)
    if config.compat:
        raise ValueError(f"data.compat: {root} is no mapping file (.json), and not the people world")
    if (root / MANIFEST).is_file():
        return ShardedDataset(root)
    if config.keypoints:
        raise ValueError(f"data.keypoints: {root} has none; mapping files (.json) and the people world have")
    if (root / METADATA).is_file():
        return FolderDataset(root, on_error=config.on_error)
    if (root / INFO).is_file():
        return TFDSDataset(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    raise ValueError(
        f"{root}: no data folder; it needs {METADATA}, {INFO} (TFDS version folder), {SPLITS['train']} "
        f"(FastComposer) or {MANIFEST} (shards)"
    )


def _check(config: DataConfig) -> None:
    """Refuses settings that exclude each other, whatever the data."""
    if config.subjects and (config.cache_latents or config.keypoints or config.conditioning):
        raise ValueError("data.subjects: set neither data.cache_latents, data.keypoints nor data.conditioning with it")
    if config.subjects and config.caption_dropout:
        raise ValueError(
            f"data.caption_dropout={config.caption_dropout}: a caption and its objects are dropped together, by "
            "data.subjects.uncondition_prob"
        )
    if config.subjects and config.compat and (config.buckets or config.crop != "center"):
        raise ValueError(
            f"data.compat={config.compat} crops squares from the middle: no data.buckets, data.crop=center"
        )
    if config.subjects or not config.compat:
        return
    if config.buckets or config.cache_latents or not _asks_for_poses(config):
        raise ValueError(
            f"data.compat={config.compat} crops pictures with poses anew, to squares: set data.conditioning=humansd or "
            "data.keypoints=true, and neither data.buckets nor data.cache_latents"
        )


def open_data(config: DataConfig) -> tuple[Source, Source]:
    """(training source, held-out source); held out are the last samples."""
    source = open_source(config)
    if config.folder is None:
        held_out = config.held_out
    else:
        held_out = min(config.held_out, max(len(source) // 4, 1))
        if len(source) < 2:
            raise ValueError(f"{config.folder}: {len(source)} samples; training and held-out need at least 2")
    training = len(source) - held_out
    return Part(source, range(training)), Part(source, range(training, len(source)))


def training_batches(
    source: Source, system: System, data: DataConfig, train: TrainConfig, frozen: Any
) -> BatchIterator:
    """The endless, resumable stream of this process's share of each global batch; with buckets one shape a batch."""
    encodes = "image" in system.encodes
    if (data.cache_latents or latent_shapes(source)) and not encodes:
        what = "data.cache_latents" if data.cache_latents else f"{data.folder} holds latents"
        raise ValueError(f"{what}: {type(system).__name__} has no frozen autoencoder to encode with")
    if data.cache_latents and not latent_shapes(source):
        fixed, groups = geometry(source, data, crop="center", flip=0.0)
        source = encode_source(source, system, frozen, fixed, groups)
    transforms, groups = _batching(source, data, crop=data.crop, flip=data.flip)
    return make_loader(
        source,
        transforms,
        system.tokenize,
        train.batch_size,
        train.seed,
        workers=data.workers,
        shard=(jax.process_index(), jax.process_count()),
        caption_dropout=data.caption_dropout,
        groups=groups,
    )


def held_out_batches(source: Source, system: System, data: DataConfig, batch_size: int) -> list[Arrays]:
    """Full batches of the held-out samples, centre-cropped to the square; latents keep their shapes, one a batch.

    A remainder is filled up from the start of its shape's samples. All subjects appear, as they are.
    """
    shown = data.subjects.plain() if data.subjects else None
    transforms, groups = _batching(source, replace(data, buckets=False, subjects=shown), crop="center", flip=0.0)
    members = np.zeros(len(source), np.int32) if groups is None else groups
    batches: list[Arrays] = []
    for group in np.unique(members):
        part = Part(source, np.flatnonzero(members == group))
        with make_loader(part, transforms[group], system.tokenize, batch_size, seed=0, shuffle=False) as loader:
            batches += [next(loader) for _ in range(-(-len(part) // batch_size))]
    count = len(batches)
    times = (np.arange(count * batch_size, dtype=np.float32) + 0.5) / (count * batch_size)
    # Neighbouring samples get distant times, so that each batch covers the schedule.
    spread = times.reshape(batch_size, count).T
    position = np.arange(batch_size, dtype=np.int32)
    return [batch | {"times": spread[i], "position": position} for i, batch in enumerate(batches)]


def encode_source(
    source: Source, system: Any, frozen: Any, transforms: Sequence[JointTransform], groups: np.ndarray | None = None
) -> LatentSource:
    """Every image through the frozen encoder, once; captions, masks and sizes are kept as its transform gives them."""
    samples: list[dict[str, Any]] = [{}] * len(source)
    for index, record in encode_samples(source, range(len(source)), system, frozen, transforms, groups):
        samples[index] = record | {"caption": record["captions"][0]}
    return LatentSource(samples)


def geometry(
    source: Source, data: DataConfig, *, crop: str, flip: float
) -> tuple[list[JointTransform], np.ndarray | None]:
    """(transforms, which of them each sample takes): one for each bucket, or the square's alone and None."""

    def transform(shape: int | tuple[int, int]) -> JointTransform:
        if data.subjects:
            return SubjectTransform(shape, crop=crop, flip=flip, subjects=data.subjects, compat=data.compat)
        if _has_poses(data) and _asks_for_poses(data):
            draw = data.conditioning == "humansd"
            return PoseTransform(shape, crop=crop, flip=flip, draw=draw, targets=data.keypoints)
        return JointTransform(shape, crop=crop, flip=flip)

    if not data.buckets:
        return [transform(data.resolution)], None
    shapes = bucket_shapes(data.resolution, data.bucket_step, data.bucket_aspect)
    return [transform(shape) for shape in shapes], assign_buckets(source, shapes)


def _has_poses(data: DataConfig) -> bool:
    """Whether samples have key points: those of the people world and of mapping files."""
    return data.folder is None or Path(data.folder).suffix == ".json"


def _asks_for_poses(data: DataConfig) -> bool:
    """Whether batches carry key points, or skeletons drawn from them."""
    return data.keypoints or data.conditioning == "humansd"


def latent_shapes(source: Source) -> list[tuple[int, ...]] | None:
    """Shape of each sample's latent, for a source that holds latents."""
    if isinstance(source, Part):
        shapes = latent_shapes(source.source)
        return shapes and [shapes[i] for i in source.indices]
    return getattr(source, "shapes", None)


def _batching(
    source: Source, data: DataConfig, *, crop: str, flip: float
) -> tuple[Sequence[Transform], np.ndarray | None]:
    """What make_loader needs so that batches stack: `geometry` of images, or the shapes of latents."""
    shapes = latent_shapes(source)
    if data.compat and not data.subjects:
        options = {"draw": data.conditioning == "humansd", "targets": data.keypoints, "compat": data.compat}
        return [PoseTransform(data.resolution, crop="random", masks=(), **options)], None
    if shapes is None:
        return geometry(source, data, crop=crop, flip=flip)
    kinds = {shape: i for i, shape in enumerate(sorted(set(shapes)))}
    return [_arrays_only] * len(kinds), np.asarray([kinds[shape] for shape in shapes]) if len(kinds) > 1 else None


def _arrays_only(sample: dict[str, Any], rng: np.random.Generator) -> Arrays:
    return {name: value for name, value in sample.items() if isinstance(value, np.ndarray)}
