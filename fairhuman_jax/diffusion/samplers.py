"""One sampling loop for every step rule, over a table with one row for each call of the denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion.schedule import NoiseSchedule
from fairhuman_jax.diffusion.single_step import ddim
from fairhuman_jax.diffusion.step_rule import Row, StepRule, Table

Array = jax.Array
PyTree = Any
Hook = Callable[[Array, Array], Array]
Predict = Callable[[Array, Array], Array]
RecordingPredict = Callable[[Array, Array], tuple[Array, PyTree]]
Carry = tuple[Array, PyTree]


def sample(
    predict: Predict,
    latents: Array,
    key: Array | None,
    schedule: NoiseSchedule,
    steps: int,
    rule: StepRule | None = None,
    *,
    noise: Array | None = None,
    start: int | Array | None = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
) -> Array:
    """Sample: from `latents` [B, ...] to x_0 in `steps` steps of `rule` (default `ddim()`).

    `predict(latents [B, ...], timesteps int32 or fp32 [B]) -> [B, ...]` in the schedule's prediction type; state is
    fp32. Fields that the schedule's file left out take the defaults of the rule's scheduler class.

    `start` None: `latents` is unit noise. Else the row of the table to begin with (`start_row`), and `latents` lie on
    that row's level (`start_latents`). An int is static, and gradients flow through the loop. A traced int32 scalar
    lets one compilation serve every start: rows before it cost nothing, the rest is a while loop, so there are no
    reverse-mode gradients, and under vmap over starts all examples take as many calls as the longest.

    Randomness of a stochastic rule comes from `key`, one or one for each example (typed keys [B]), folded with the row;
    or from `noise` [rows, B, ...] with one entry for each row of the rule's table (`row_count`).
    `before_step(latents, row) -> latents` acts on what the denoiser is about to see, in the rule's scale;
    `after_step(latents, row) -> latents` on the result of that row's step. `row` is an int32 scalar.

    `schedule`, `steps` and `rule` are static under jit; all else may be traced. Returns fp32 [B, ...]. Raises
    ValueError when a stochastic rule gets neither key nor noise, or a shape or start does not fit.
    """
    rows = prepare_rows(latents, key, schedule, steps, rule or ddim(), noise, before_step, after_step)
    if isinstance(start, (int, np.integer)) and not 0 <= start < rows.count:
        raise ValueError(f"sample: start is {start}; expected a row in 0 .. {rows.count - 1}")
    if start is None:
        return rows.run(predict, rows.begin(latents, rows.scale), 0, rows.count)[0]
    return rows.run(predict, rows.begin(latents), start, rows.count)[0]


@dataclasses.dataclass(frozen=True)
class Rows:
    """One run of a rule, to be taken in stretches of rows that may have different denoisers.

    The carry from one stretch to the next is (latents fp32, history of the rule). `columns` is the rule's table on the
    device, `scale` what brings unit noise to row 0; the other fields are arguments of `sample`.
    """

    schedule: NoiseSchedule
    rule: StepRule
    columns: Row
    scale: float
    key: Array | None
    noise: Array | None
    before_step: Hook | None
    after_step: Hook | None

    @property
    def count(self) -> int:
        return self.columns["timestep"].shape[0]

    def begin(self, latents: Array, scale: float = 1.0) -> Carry:
        latents = latents.astype(jnp.float32) * scale
        return latents, self.rule.init(latents)

    def restart(self, carry: Carry) -> Carry:
        """The same latents, with earlier predictions forgotten."""
        latents, history = carry
        return latents, self.rule.init(latents) if self.rule.restart is None else self.rule.restart(history)

    def run(self, predict: Predict, carry: Carry, first: int | Array, last: int | Array) -> Carry:
        """Rows `first` .. `last` - 1: a scan where both are ints, else a while loop. Two ints without a row between
        them leave `predict` untraced."""
        if isinstance(first, int) and isinstance(last, int) and first >= last:
            return carry

        def step(index: Array, carry: Carry) -> Carry:
            return self._step(lambda latents, times: (predict(latents, times), None), index, carry)[0]

        return jax.lax.fori_loop(first, last, step, carry)

    def record(self, predict: RecordingPredict, carry: Carry, first: int, last: int) -> tuple[Carry, PyTree]:
        """`run` with a denoiser that returns (prediction, extra): the carry, and the extras stacked by row."""
        return jax.lax.scan(lambda carry, index: self._step(predict, index, carry), carry, jnp.arange(first, last))

    def _step(self, predict: RecordingPredict, index: Array, carry: Carry) -> tuple[Carry, PyTree]:
        current, history = carry
        row = {
            name: jax.lax.dynamic_index_in_dim(column, index, keepdims=False) for name, column in self.columns.items()
        }
        if self.before_step is not None:
            current = self.before_step(current, index).astype(jnp.float32)
        times = jnp.broadcast_to(row["timestep"], current.shape[:1])
        prediction, extra = predict(self.rule.inputs(current, row), times)
        fresh = None
        if "added" in row:
            fresh = _unit_noise(self.key, index, current.shape) if self.noise is None else self.noise[index]
        prediction = prediction.astype(jnp.float32)
        current, history = self.rule.update(self.schedule, row, current, prediction, history, fresh)
        if self.after_step is not None:
            current = self.after_step(current, index).astype(jnp.float32)
        return (current, history), extra


def prepare_rows(
    latents: Array,
    key: Array | None,
    schedule: NoiseSchedule,
    steps: int,
    rule: StepRule,
    noise: Array | None,
    before_step: Hook | None,
    after_step: Hook | None,
) -> Rows:
    """The rows of a run that starts from `latents`; arguments and errors as `sample`."""
    schedule, table = _prepared(schedule, steps, rule)
    if "added" in table and key is None and noise is None:
        raise ValueError(f"sample: rule {rule.name} is stochastic; expected a key or noise")
    expected = (table["timestep"].shape[0], *latents.shape)
    if noise is not None and noise.shape != expected:
        raise ValueError(f"sample: noise is {noise.shape}; expected {expected}")
    noise = None if noise is None else jnp.asarray(noise, jnp.float32)
    columns = {name: jnp.asarray(column) for name, column in table.items()}
    return Rows(schedule, rule, columns, rule.start(schedule, table), key, noise, before_step, after_step)


def row_count(schedule: NoiseSchedule, steps: int, rule: StepRule) -> int:
    """Rows of the rule's table, which is the number of denoiser calls: `steps`, for `pndm` one more."""
    return _prepared(schedule, steps, rule)[1]["timestep"].shape[0]


def start_row(steps: int, strength: float) -> int:
    """First row of an image-to-image run: the last int(steps * strength) steps are taken, as in diffusers.

    Host arithmetic; hand the result to a compiled function as an array, and another strength compiles nothing.
    Raises: ValueError for a strength outside (0, 1] or one that leaves no step.
    """
    taken = int(steps * strength)
    if not 0.0 < strength <= 1.0 or taken < 1:
        raise ValueError(f"strength is {strength}, which takes {taken} of {steps} steps; expected {1 / steps:g} .. 1")
    return steps - taken


def start_noise(noise: Array, schedule: NoiseSchedule, steps: int, rule: StepRule) -> Array:
    """Unit noise brought to the scale of row 0, where a run without an image begins; fp32."""
    schedule, table = _prepared(schedule, steps, rule)
    return noise.astype(jnp.float32) * rule.start(schedule, table)


def start_latents(
    x0: Array, noise: Array, schedule: NoiseSchedule, steps: int, rule: StepRule, start: int | Array
) -> Array:
    """Clean latents `x0` [B, ...] brought to the level of row `start` (may be traced) with unit `noise`; fp32.

    signal x_0 + spread noise: sqrt(a) and sqrt(1 - a), for the Euler rules 1 and sigma.
    """
    return _noised(x0, noise, _levels(schedule, steps, rule), start)


def keep_known(known: Array, noise: Array, mask: Array, schedule: NoiseSchedule, steps: int, rule: StepRule) -> Hook:
    """`after_step` hook for inpainting with a 4-channel model: outside the mask the latents are those of the image.

    `known` clean latents and `noise` [B, ...]; `mask` broadcastable to them, 1 = repaint. After each step the known
    part is `known` on the level of the next row, with the same noise each time; after the last it is clean.
    Source: diffusers' StableDiffusionInpaintPipeline.
    """
    levels = _levels(schedule, steps, rule)

    def blend(latents: Array, row: Array) -> Array:
        return mask * latents + (1.0 - mask) * _noised(known, noise, levels, row + 1)

    return blend


def renoise_known(
    known: Array,
    mask: Array,
    schedule: NoiseSchedule,
    steps: int,
    rule: StepRule,
    *,
    key: Array | None = None,
    noise: Array | None = None,
) -> Hook:
    """`before_step` hook for inpainting: ahead of each call the known part is `known` on that row's level, fresh noise.

    Arguments as `keep_known`; noise comes from `key` (one, or typed keys [B]), folded with the row, or from `noise`
    [rows, B, ...]. Nothing is blended after the last step. Source: HandRefiner, cldm/ddim_hacked.py.
    Raises: ValueError when neither or both of key and noise are given.
    """
    if (key is None) == (noise is None):
        raise ValueError("renoise_known: expected a key or noise, one of them")
    levels = _levels(schedule, steps, rule)

    def blend(latents: Array, row: Array) -> Array:
        fresh = _unit_noise(key, row, latents.shape) if noise is None else jnp.asarray(noise)[row]
        return mask * latents + (1.0 - mask) * _noised(known, fresh, levels, row)

    return blend


def _prepared(schedule: NoiseSchedule, steps: int, rule: StepRule) -> tuple[NoiseSchedule, Table]:
    schedule = schedule.for_class(rule.class_name)
    return schedule, rule.table(schedule, steps)


def _levels(schedule: NoiseSchedule, steps: int, rule: StepRule) -> tuple[np.ndarray, np.ndarray]:
    """(signal, spread) of each row, with the clean level after the last."""
    table = _prepared(schedule, steps, rule)[1]
    return np.append(table["signal"], np.float32(1.0)), np.append(table["spread"], np.float32(0.0))


def _noised(x0: Array, noise: Array, levels: tuple[np.ndarray, np.ndarray], row: int | Array) -> Array:
    signal, spread = (jnp.asarray(column)[row] for column in levels)
    return signal * x0.astype(jnp.float32) + spread * noise.astype(jnp.float32)


def _unit_noise(key: Array | None, row: Array, shape: tuple[int, ...]) -> Array:
    """Noise of one row from one key, or from a key for each example."""
    assert key is not None, "checked where the loop or the hook is made"
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1:
        return jax.vmap(lambda one: jax.random.normal(jax.random.fold_in(one, row), shape[1:], jnp.float32))(key)
    return jax.random.normal(jax.random.fold_in(key, row), shape, jnp.float32)
