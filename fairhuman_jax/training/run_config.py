"""The configuration of a training run: what `configs/*.py` build and `--set` changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fairhuman_jax.config import ConfigError, differences, to_dict
from fairhuman_jax.contract import PreviewConfig, SystemConfig
from fairhuman_jax.data.subject_transforms import SubjectConfig
from fairhuman_jax.files import read_json
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.state import OptimizerConfig

CONFIG = "config.json"  # in a run's folder
# What may change when a run is resumed: its length, what it logs and draws, how it is spread over devices, its rate.
FREE = (
    *("output", "preview", "data.workers", "data.on_error", "optimizer.learning_rate", "optimizer.schedule"),
    *("optimizer.warmup_steps", "optimizer.final_fraction", "optimizer.weight_decay", "optimizer.clip_norm"),
    *("train.steps", "train.fsdp", "train.shard_frozen", "train.log_every", "train.validate_every"),
    *("train.preview_every", "train.checkpoint_every", "train.keep_checkpoints", "train.profile", "train.wandb"),
    *("system.remat", "system.attention"),
)


@dataclass(frozen=True)
class DataConfig:
    """The data of a run, and how pictures become batches."""

    folder: Annotated[
        str | None,
        "folder of FairHuman, FastComposer, TFDS or shards of latents, or a mapping file (.json) of Laion-Human or "
        "Human-Art; None is the people world",
    ] = None
    length: Annotated[int, "number of training samples of the people world, rendered on first use and kept"] = 2048
    seed: Annotated[int, "seed of the people world"] = 0
    framings: Annotated[
        tuple[tuple[str, float], ...],
        'framings of the people world and their shares, as (("portrait", 0.3),); () is its mix',
    ] = ()
    conditioning: Annotated[
        Literal["fairhuman", "humansd"] | None,
        "control images to draw: fairhuman (skeleton, face points, hand depth; people world) or humansd (skeletons; "
        "people world and mapping files); folders have their own",
    ] = None
    keypoints: Annotated[bool, "add the joints of ten people to a batch (people world and mapping files)"] = False
    subjects: Annotated[
        SubjectConfig | None,
        "add pictures of the people in a sample, their masks and marked captions (people world, FastComposer folders)",
    ] = None
    compat: Annotated[Literal["reference"] | None, "prepare skeletons as HumanSD, subjects as FastComposer"] = None
    held_out: Annotated[int, "number of samples kept from training, at most a quarter of a folder"] = 128
    resolution: Annotated[int, "pixels a side after the joint resize and crop"] = 64
    buckets: Annotated[bool, "instead of squares take the nearest of several shapes, one shape a batch"] = False
    bucket_step: Annotated[int, "multiple that both sides of a bucket's shape have"] = 64
    bucket_aspect: Annotated[float, "largest ratio of a bucket's sides"] = 2.0
    crop: Annotated[str, "crop at the center, or at a random place"] = "center"
    flip: Annotated[float, "probability of mirroring a sample"] = 0.0
    caption_dropout: Annotated[float, "probability of an empty caption"] = 0.0
    cache_latents: Annotated[bool, "encode every image once before training (then no random crop and no flip)"] = False
    workers: Annotated[int, "number of loader processes"] = 0
    on_error: Annotated[str, "skip a sample that cannot be read, or stop at it"] = "skip"


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run and its intervals in steps; 0 turns an interval off."""

    steps: Annotated[int, "number of steps"] = 200
    batch_size: Annotated[int, "samples a step, of all devices together"] = 8
    accumulate: Annotated[int, "number of micro-batches that a batch is cut into"] = 1
    seed: Annotated[int, "seed of initial values, noise and order"] = 0
    ema_decay: Annotated[float | None, "decay of the moving average of the trainables; None keeps none"] = None
    fsdp: Annotated[int, "number of devices that share each large leaf of the trainables"] = 1
    shard_frozen: Annotated[bool, "share the frozen base in the same way"] = False
    log_every: Annotated[int, "interval of logged metrics"] = 1
    validate_every: Annotated[int, "interval of held-out losses"] = 0
    preview_every: Annotated[int, "interval of previews"] = 0
    checkpoint_every: Annotated[int, "interval of checkpoints; the last step writes one in any case"] = 100
    keep_checkpoints: Annotated[int, "number of checkpoints that are kept"] = 2
    profile: Annotated[tuple[int, int] | None, "(first step, number of steps) traced into output/profile"] = None
    wandb: Annotated[str | None, "project of Weights & Biases that metrics go to"] = None


@dataclass(frozen=True)
class RunConfig:
    """One experiment."""

    system: Annotated[SystemConfig, "what trains"]
    output: Annotated[str, "folder of the run"]
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    optimizers: Annotated[
        tuple[tuple[str, OptimizerConfig], ...], "optimisers of single players, by name, instead of `optimizer`"
    ] = ()
    fair: FairConfig = field(default_factory=FairConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def optimizer_of(self, player: str) -> OptimizerConfig:
        """The optimiser of a player of the step."""
        return dict(self.optimizers).get(player, self.optimizer)


def check_resumed(config: RunConfig) -> None:
    """Holds a configuration against the one that its run began with, but for the `FREE` fields.

    Raises: ConfigError that names each field that differs; ValueError for a stored configuration that cannot be read.
    """
    path = Path(config.output) / CONFIG
    if not path.is_file():
        return
    stored: dict[str, Any] = read_json(path)
    found = [
        f"{key} is {given!r}, but the run has {old!r}"
        for key, old, given in differences(stored, to_dict(config))
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]
    if found:
        raise ConfigError(
            f"{path}: the run began with another configuration: {'; '.join(found)}; give those, or another output"
        )
