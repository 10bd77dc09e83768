"""What a training run carries from step to step, and the optimiser that moves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs, as one pytree; the frozen base is not part of it."""

    step: jax.Array
    trainable: PyTree
    opt_state: optax.OptState
    ema: PyTree | None
    key: jax.Array
    skipped: jax.Array

    @property
    def averaged(self) -> PyTree:
        """The trainables to evaluate and export: the moving average where one is kept."""
        return self.trainable if self.ema is None else self.ema


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant or cosine-decayed rate, and a clip of the global gradient norm."""

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate by optimiser step; `schedule` is constant or cosine (down to `final_fraction` of the peak)."""
    after = max(steps - config.warmup_steps, 1)
    if config.schedule == "constant":
        main = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.learning_rate, after, config.final_fraction)
    else:
        raise ValueError(f"optimizer.schedule={config.schedule!r}; known: constant, cosine")
    if config.warmup_steps == 0:
        return main
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW; matrices and embeddings decay, biases and norm scales do not, in scanned stacks either.

    The clip of the gradient's norm is the train step's, which knows the norm already.
    """
    return optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda tree: jax.tree.map_with_path(_decays, tree),
    )


def _decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    """The name decides as well as the rank: a stack of biases is a matrix."""
    return leaf.ndim > 1 and getattr(path[-1], "key", None) not in ("bias", "scale")


def init_state(trainable: PyTree, optimizer: optax.GradientTransformation, key: jax.Array, *, ema: bool) -> TrainState:
    """Step 0. The moving average, where asked for, starts as a copy of the trainables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if ema else None,
        key=key,
        skipped=jnp.zeros((), jnp.int32),
    )
