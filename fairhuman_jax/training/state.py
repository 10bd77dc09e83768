"""What a training run carries from step to step, and the optimiser that moves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from fairhuman_jax.training.combining import FairConfig, FairState, init_fair

PyTree = Any
OPTIMIZERS = ("adamw", "lion", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs, as one pytree; the frozen base is not part of it."""

    step: jax.Array
    trainable: PyTree
    opt_state: optax.OptState
    ema: PyTree | None
    fair: FairState
    key: jax.Array
    skipped: jax.Array

    @property
    def averaged(self) -> PyTree:
        """The trainables to evaluate and export: the moving average where one is kept."""
        return self.trainable if self.ema is None else self.ema


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, its rate over time and the clip of the global gradient norm.

    name: adamw, lion (Chen et al. 2023; one moment; about a tenth of AdamW's rate) or adafactor (Shazeer and Stern
    2018; factored second moments; without first moments and relative step sizes here). eps is AdamW's alone; b1 and b2
    are not Adafactor's. moment_dtype: of the first moment; bfloat16 halves it. schedule: constant, linear or cosine,
    the latter two down to `final_fraction` of the peak, after `warmup_steps` of linear rise. Matrices decay by
    `weight_decay`, biases and norm scales do not. rate_scales: factors of the rate for parts of the trainables, by
    their names, as (("pose_kernel", 20.0),).
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moment_dtype: str = "float32"
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    rate_scales: tuple[tuple[str, float], ...] = ()


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate by optimiser step of a run of `steps`. Errors: an unknown schedule."""
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

    Errors: an unknown name, schedule or dtype; when it first sees the trainables, a part that they do not have.
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
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema: bool,
    fair: FairState | None = None,
) -> TrainState:
    """Step 0. The moving average, where asked for, starts as a copy of the trainables; `fair` is `init_fair`'s, which a
    system of one objective does not need."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if ema else None,
        fair=init_fair(FairConfig(method="single"), 1) if fair is None else fair,
        key=key,
        skipped=jnp.zeros((), jnp.int32),
    )
