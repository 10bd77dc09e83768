"""The configuration of a training run: what `configs/*.py` build and `--set` changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fairhuman_jax.data.subject_transforms import SubjectConfig
from fairhuman_jax.systems.autoencoder import AutoencoderConfig
from fairhuman_jax.systems.contract import PreviewConfig
from fairhuman_jax.systems.facediffuser import SceneModelConfig, SubjectModelConfig
from fairhuman_jax.systems.fairhuman import FairHumanConfig
from fairhuman_jax.systems.humansd import HumanSDConfig
from fairhuman_jax.systems.identity_encoder import IdentityEncoderConfig
from fairhuman_jax.systems.pose_network import PoseNetworkConfig
from fairhuman_jax.systems.text_to_image import TextToImageConfig
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.state import OptimizerConfig


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    folder: a FairHuman folder (metadata.jsonl), a FastComposer folder (image_ids_train.txt), a TFDS version folder or
    shards of latents (training/encode.py), told apart by what they hold, a mapping file (.json) of Laion-Human or
    Human-Art, or None for the people world; length, seed: of the people world, which is rendered on first use and kept;
    framings: the people world's framings and their shares, as (("portrait", 0.3), ...), empty for its own mix;
    conditioning: control images, for the people world "fairhuman" (skeleton, face points, hand depth), for it and
    mapping files "humansd" (skeletons, drawn anew for each crop), while folders have their own; keypoints: with the
    joints of ten people, of the same two; subjects: with pictures of the people in it, their masks and marked captions,
    for the people world and FastComposer folders (SubjectConfig in data/subject_transforms.py); compat: "reference"
    prepares skeletons as HumanSD did, subjects as FastComposer did (data/keypoint_transforms.py,
    data/subject_transforms.py); held_out: samples kept from training (at
    most a quarter of a folder); resolution: pixels a side after the joint resize and crop (center or random); buckets:
    instead of squares the nearest of several shapes of at most that area, sides multiples of bucket_step, aspect up to
    bucket_aspect, one shape a batch; flip: probability of mirroring; caption_dropout: probability of an empty caption;
    cache_latents: encode every image once before training (no random crop or flip then, as with shards); workers:
    loader processes; on_error: skip or stop at a sample that cannot be read.
    """

    folder: str | None = None
    length: int = 2048
    seed: int = 0
    framings: tuple[tuple[str, float], ...] = ()
    conditioning: Literal["fairhuman", "humansd"] | None = None
    keypoints: bool = False
    subjects: SubjectConfig | None = None
    compat: Literal["reference"] | None = None
    held_out: int = 128
    resolution: int = 64
    buckets: bool = False
    bucket_step: int = 64
    bucket_aspect: float = 2.0
    crop: str = "center"
    flip: float = 0.0
    caption_dropout: float = 0.0
    cache_latents: bool = False
    workers: int = 0
    on_error: str = "skip"


@dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run; a rhythm of 0 never comes round.

    batch_size: of all devices together; accumulate: micro-batches that it is cut into; fsdp: devices that share large
    leaves of the trainables, and of the frozen base with shard_frozen; log_every, validate_every (held-out losses),
    preview_every, checkpoint_every: in steps; profile: (first step, number of steps) traced into output/profile; wandb:
    a project of Weights & Biases.
    """

    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    ema_decay: float | None = None
    fsdp: int = 1
    shard_frozen: bool = False
    log_every: int = 1
    validate_every: int = 0
    preview_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    profile: tuple[int, int] | None = None
    wandb: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One experiment."""

    system: (
        FairHumanConfig
        | HumanSDConfig
        | SubjectModelConfig
        | SceneModelConfig
        | TextToImageConfig
        | AutoencoderConfig
        | PoseNetworkConfig
        | IdentityEncoderConfig
    )
    output: str
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    fair: FairConfig = field(default_factory=FairConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
