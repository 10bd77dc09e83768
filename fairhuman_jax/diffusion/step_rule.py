"""What a sampler is: a record of pure functions that the one loop in `samplers` calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fairhuman_jax.diffusion.schedule import NoiseSchedule

Array = jax.Array
PyTree = Any
Table = dict[str, np.ndarray]
Row = dict[str, Array]


def _no_history(latents: Array) -> PyTree:
    return ()


def _unit_start(schedule: NoiseSchedule, table: Table) -> float:
    return 1.0


def _unscaled(latents: Array, row: Row) -> Array:
    return latents


@dataclasses.dataclass(frozen=True)
class StepRule:
    """How a sampler moves from one noise level to the next; a record of pure functions.

    `class_name`: the diffusers scheduler with the same steps, whose defaults fill what a config leaves out.
    `table(schedule, steps)`: constants of each step, numpy arrays with one leading axis. Always among them: `timestep`,
    and `signal` and `spread`, the level on which the step starts: latents = signal x_0 + spread noise. A column `added`
    (the scale of fresh noise) makes the rule stochastic.
    `update(schedule, row, latents, prediction, history, noise) -> (latents, history)`: one step; `noise` is None for a
    deterministic table.
    `inputs(latents, row)`: what the denoiser sees. `start(schedule, table)`: factor of unit noise at the first step.
    `init(latents)`: history of a multistep rule before its first step. `restart(history)`: the same with the earlier
    predictions forgotten, for a change of denoiser in mid-run; None where `init` of the latents does that.
    """

    name: str
    class_name: str
    table: Callable[[NoiseSchedule, int], Table]
    update: Callable[[NoiseSchedule, Row, Array, Array, PyTree, Array | None], tuple[Array, PyTree]]
    inputs: Callable[[Array, Row], Array] = _unscaled
    start: Callable[[NoiseSchedule, Table], float] = _unit_start
    init: Callable[[Array], PyTree] = _no_history
    restart: Callable[[PyTree], PyTree] | None = None


def fp32_columns(timestep: np.ndarray, **columns: np.ndarray) -> Table:
    """A table of float columns in fp32 beside its timesteps, which keep int32 where they are whole."""
    times = timestep.astype(np.int32 if np.issubdtype(timestep.dtype, np.integer) else np.float32)
    return {"timestep": times, **{name: column.astype(np.float32) for name, column in columns.items()}}
