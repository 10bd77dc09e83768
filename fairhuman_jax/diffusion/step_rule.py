"""Step rules: records of the pure functions that define a sampler, called by the loop in `samplers`."""

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
    """Pure functions that move a sampler from one noise level to the next."""

    name: str
    # The diffusers scheduler with the same steps; its defaults apply to options that a config leaves out.
    class_name: str
    # (schedule, steps) -> constants of each step, numpy arrays with one leading axis. Required columns: `timestep`, and
    # `signal` and `spread`, the noise level at the start of the step: latents = signal x_0 + spread noise. A column
    # `added` (the scale of fresh noise) makes the rule stochastic.
    table: Callable[[NoiseSchedule, int], Table]
    # One step: (schedule, row, latents, prediction, history, noise) -> (latents, history). `noise` is None for a
    # deterministic table.
    update: Callable[[NoiseSchedule, Row, Array, Array, PyTree, Array | None], tuple[Array, PyTree]]
    # (latents, row) -> input of the denoiser.
    inputs: Callable[[Array, Row], Array] = _unscaled
    # (schedule, table) -> factor of unit noise at the first step.
    start: Callable[[NoiseSchedule, Table], float] = _unit_start
    # latents -> history of a multistep rule before its first step.
    init: Callable[[Array], PyTree] = _no_history
    # history -> history without the earlier predictions, for a change of denoiser during a run. None where `init` of
    # the latents gives that history.
    restart: Callable[[PyTree], PyTree] | None = None


def fp32_columns(timestep: np.ndarray, **columns: np.ndarray) -> Table:
    """Build a table: float columns in fp32, timesteps in int32 if they are integers, else in fp32."""
    times = timestep.astype(np.int32 if np.issubdtype(timestep.dtype, np.integer) else np.float32)
    return {"timestep": times, **{name: column.astype(np.float32) for name, column in columns.items()}}
