"""What a training run carries from step to step, and the optimiser that moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from fairhuman_jax.contract import Parts, Phase
from fairhuman_jax.training.combining import FairConfig, FairState, init_fair
from fairhuman_jax.training.objectives import moved

PyTree = Any
OPTIMIZERS = ("adamw", "lion", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs, as one pytree; the frozen base is not part of it.

    optimizers: optimiser state by player. fair: state of the combiner by phase. ema and ema_statistics: moving averages
    of trainables and statistics, None where none are kept. skipped: steps without a finite gradient, by phase.
    """

    step: jax.Array
    trainable: PyTree
    statistics: PyTree
    optimizers: dict[str, optax.OptState]
    ema: PyTree | None
    ema_statistics: PyTree | None
    fair: dict[str, FairState]
    key: jax.Array
    skipped: dict[str, jax.Array]

    @property
    def averaged(self) -> PyTree:
        """The trainables to evaluate and export: the moving average where one is kept."""
        return self.trainable if self.ema is None else self.ema

    def parts(self, frozen: PyTree) -> Parts:
        """The parts to evaluate and export."""
        statistics = self.statistics if self.ema_statistics is None else self.ema_statistics
        return Parts(self.averaged, statistics, frozen)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, its rate over time and the clip of the global gradient norm.

    Matrices decay by `weight_decay`, biases and norm scales do not. Sources: AdamW, Loshchilov and Hutter 2019; Lion,
    Chen et al. 2023; Adafactor, Shazeer and Stern 2018, without first moments and relative step sizes.
    """

    name: Annotated[str, "adamw, lion (about a tenth of AdamW's rate) or adafactor (factored second moments)"] = "adamw"
    learning_rate: Annotated[float, "peak of the learning rate"] = 1e-4
    schedule: Annotated[str, "constant, linear or cosine decay of the rate"] = "constant"
    warmup_steps: Annotated[int, "number of steps of linear rise before that"] = 0
    final_fraction: Annotated[float, "fraction of the peak at which linear and cosine decay end"] = 0.0
    b1: Annotated[float, "decay of the first moment; not adafactor's"] = 0.9
    b2: Annotated[float, "decay of the second moment; not adafactor's"] = 0.999
    eps: Annotated[float, "added to AdamW's denominator"] = 1e-8
    moment_dtype: Annotated[str, "dtype of the first moment; bfloat16 halves its memory"] = "float32"
    weight_decay: Annotated[float, "decay of matrices per step, times the rate"] = 0.01
    clip_norm: Annotated[float | None, "largest norm of the gradient; None does not clip"] = 1.0
    rate_scales: Annotated[
        tuple[tuple[str, float], ...], 'factors of the rate for parts of the trainables, as (("pose_kernel", 20.0),)'
    ] = ()


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate by optimiser step of a run of `steps`. Raises: ValueError for an unknown schedule."""
    after, peak = max(steps - config.warmup_steps, 1), config.learning_rate
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, peak * config.final_fraction, after)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, after, config.final_fraction)
    else:
        raise ValueError(f"optimizer.schedule={config.schedule!r}; known: {', '.join(SCHEDULES)}")
    if config.warmup_steps == 0:
        return main
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `steps`; the clip of the gradient's norm is the train step's, which knows the norm.

    Raises: ValueError for an unknown name, schedule or dtype, and, when the optimiser first sees the trainables, for a
    part that they do not have.
    """
    whole = _one_rate(config, steps)
    return optax.chain(whole, _scale_parts(dict(config.rate_scales))) if config.rate_scales else whole


def _one_rate(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    rate = learning_rate_schedule(config, steps)
    moments: dict[str, Any] = {"b1": config.b1, "b2": config.b2, "mu_dtype": _moment_dtype(config.moment_dtype)}
    decay: dict[str, Any] = {"weight_decay": config.weight_decay, "mask": _decaying}
    if config.name == "adamw":
        return optax.adamw(rate, eps=config.eps, **moments, **decay)
    if config.name == "lion":
        return optax.lion(rate, **moments, **decay)
    if config.name == "adafactor":
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    raise ValueError(f"optimizer.name={config.name!r}; known: {', '.join(OPTIMIZERS)}")


def _scale_parts(factors: dict[str, float]) -> optax.GradientTransformation:
    """Updates of the named parts of a tree, times their factors."""

    def init(params: PyTree) -> optax.OptState:
        if unknown := sorted(set(factors) - set(params)):
            raise ValueError(
                f"optimizer.rate_scales names {unknown[0]!r}, but the trainables are {', '.join(sorted(params))}"
            )
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.OptState, params: PyTree = None) -> tuple[PyTree, optax.OptState]:
        scaled = {name: optax.tree.scale(factors.get(name, 1.0), part) for name, part in updates.items()}
        return scaled, state

    return optax.GradientTransformation(init, update)


def _moment_dtype(name: str) -> jnp.dtype:
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"optimizer.moment_dtype={name!r}; known: float32, bfloat16")
    return jnp.dtype(name)


def _decaying(tree: PyTree) -> PyTree:
    """Which leaves decay: the name decides as well as the rank, because a stack of biases is a matrix."""

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return leaf.ndim > 1 and getattr(path[-1], "key", None) not in ("bias", "scale")

    return jax.tree.map_with_path(decays, tree)


def init_state(
    trainable: PyTree,
    optimizer: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    key: jax.Array,
    *,
    ema: bool,
    fair: FairState | Mapping[str, FairState] | None = None,
    phases: Sequence[Phase] = (),
    statistics: PyTree = (),
) -> TrainState:
    """Step 0.

    optimizer: one for all players, or one by player; fair: `init_fair`'s, of the only phase or by phase (not needed for
    one objective); phases: those of the system, () for a single one that moves everything; statistics: the running
    ones. Moving averages, where asked for, start as copies.
    """
    phases = tuple(phases) or (Phase(),)
    own = {}
    for phase in phases:
        one = optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer[phase.player]
        if phase.player not in own:
            own[phase.player] = one.init(moved(phase, trainable))
    if not isinstance(fair, Mapping):
        fair = {phases[0].name: fair} if fair is not None else {}
    statistics = statistics or {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        statistics=statistics,
        optimizers=own,
        ema=jax.tree.map(jnp.copy, trainable) if ema else None,
        ema_statistics=jax.tree.map(jnp.copy, statistics) if ema else None,
        fair={phase.name: fair.get(phase.name) or init_fair(FairConfig(method="single"), 1) for phase in phases},
        key=key,
        skipped={phase.name: jnp.zeros((), jnp.int32) for phase in phases},
    )
