"""One sampling loop for every step rule: a scan over a table with one row for each call of the denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion.prediction import to_x0_epsilon
from fairhuman_jax.diffusion.schedule import NoiseSchedule, timesteps

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

    `table(schedule, steps)`: constants of each step, numpy arrays with one leading axis, among them `timestep`.
    `update(schedule, row, latents, prediction, history, noise) -> (latents, history)`: one step.
    `inputs(latents, row)`: what the denoiser sees. `start(schedule, table)`: factor of unit noise at the first step.
    `init(latents)`: history of a multistep rule. `stochastic`: whether `update` reads `noise` (else it gets None).
    """

    name: str
    table: Callable[[NoiseSchedule, int], Table]
    update: Callable[[NoiseSchedule, Row, Array, Array, PyTree, Array | None], tuple[Array, PyTree]]
    stochastic: bool = False
    inputs: Callable[[Array, Row], Array] = _unscaled
    start: Callable[[NoiseSchedule, Table], float] = _unit_start
    init: Callable[[Array], PyTree] = _no_history


def sample(
    predict: Callable[[Array, Array], Array],
    latents: Array,
    key: Array | None,
    schedule: NoiseSchedule,
    steps: int,
    rule: StepRule | None = None,
    *,
    noise: Array | None = None,
) -> Array:
    """Sample: from unit noise `latents` [B, ...] to x_0 in `steps` steps of `rule` (default `ddim()`).

    `predict(latents [B, ...], timesteps int32 or fp32 [B]) -> [B, ...]` in the schedule's prediction type; state is
    fp32. Randomness of a stochastic rule comes from `key`, or from `noise` [N, B, ...] with one entry
    for each row of the rule's table. `schedule`, `steps` and `rule` are static under jit; all else may be traced.
    Returns fp32 [B, ...]. Raises ValueError when a stochastic rule gets neither key nor noise.
    """
    rule = rule or ddim()
    table = rule.table(schedule, steps)
    rows = table["timestep"].shape[0]
    if rule.stochastic and key is None and noise is None:
        raise ValueError(f"sample: rule {rule.name} is stochastic; expected a key or noise")
    if noise is not None and noise.shape != (rows, *latents.shape):
        raise ValueError(f"sample: noise is {noise.shape}; expected {(rows, *latents.shape)}")
    if schedule.prediction_type == "epsilon" and np.any(schedule.alphas_cumprod[table["timestep"].astype(int)] == 0):
        raise ValueError("sample: an epsilon prediction is undefined at zero SNR; expected v_prediction or sample")
    latents = latents.astype(jnp.float32) * rule.start(schedule, table)

    def step(carry: tuple[Array, PyTree], inputs: tuple[Row, Array | None, Array]) -> tuple[Any, None]:
        current, history = carry
        row, injected, index = inputs
        times = jnp.broadcast_to(row["timestep"], current.shape[:1])
        prediction = predict(rule.inputs(current, row), times).astype(jnp.float32)
        if rule.stochastic and injected is None and key is not None:
            injected = jax.random.normal(jax.random.fold_in(key, index), current.shape, jnp.float32)
        return rule.update(schedule, row, current, prediction, history, injected), None

    (latents, _), _ = jax.lax.scan(
        step, (latents, rule.init(latents)), (jax.tree.map(jnp.asarray, table), noise, jnp.arange(rows))
    )
    return latents


def ddim(eta: float = 0.0) -> StepRule:
    """DDIM (arXiv 2010.02502): x' = sqrt(a') x_0 + sqrt(1 - a' - s^2) noise + s z, s = eta sqrt(variance).

    The step goes from t to t - T // steps, as in diffusers, for every spacing.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        times = timesteps(schedule, steps)
        before = times - schedule.num_train_timesteps // steps
        cumprod = schedule.alphas_cumprod64
        final = 1.0 if schedule.set_alpha_to_one else cumprod[0]
        now = cumprod[times]
        then = np.where(before >= 0, cumprod[np.maximum(before, 0)], final)
        variance = np.maximum((1.0 - then) / (1.0 - now) * (1.0 - now / then), 0.0)
        added = eta * np.sqrt(variance)
        columns = {
            "signal": np.sqrt(now),
            "spread": np.sqrt(1.0 - now),
            "next_signal": np.sqrt(then),
            "next_spread": np.sqrt(np.maximum(1.0 - then - added**2, 0.0)),
            "added": added,
        }
        return {"timestep": times, **{name: column.astype(np.float32) for name, column in columns.items()}}

    def update(
        schedule: NoiseSchedule,
        row: Row,
        latents: Array,
        prediction: Array,
        history: PyTree,
        noise: Array | None,
    ) -> tuple[Array, PyTree]:
        x0, epsilon = to_x0_epsilon(schedule.prediction_type, prediction, latents, row["signal"], row["spread"])
        if schedule.clip_sample:
            x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
        moved = row["next_signal"] * x0 + row["next_spread"] * epsilon
        return (moved if noise is None else moved + row["added"] * noise), history

    return StepRule("ddim", table, update, stochastic=eta > 0)


def euler_ancestral() -> StepRule:
    """Ancestral Euler in the variance-exploding form: to sigma_down, then noise of sigma_up back to the next sigma.

    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2. The result at
    sigma = 0 is x_0. Needs a finite sigma: not for a zero-SNR schedule.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        if schedule.rescale_betas_zero_snr:
            raise ValueError("euler_ancestral: a zero-SNR schedule has infinite sigma; expected ddim")
        total = schedule.num_train_timesteps
        times = timesteps(schedule, steps)
        if schedule.timestep_spacing == "linspace":
            times = np.linspace(0, total - 1, steps)[::-1]
        cumprod = schedule.alphas_cumprod64
        sigmas = np.interp(times, np.arange(total), np.sqrt((1.0 - cumprod) / cumprod))
        following = np.append(sigmas[1:], 0.0)
        up = np.sqrt(following**2 * (sigmas**2 - following**2) / sigmas**2)
        down = np.sqrt(following**2 - up**2)
        columns = {"timestep": times, "sigma": sigmas, "down": down, "up": up}
        return {name: column.astype(np.float32) for name, column in columns.items()}

    def update(
        schedule: NoiseSchedule,
        row: Row,
        latents: Array,
        prediction: Array,
        history: PyTree,
        noise: Array | None,
    ) -> tuple[Array, PyTree]:
        assert noise is not None, "a stochastic rule is given noise"
        scale = jnp.sqrt(row["sigma"] ** 2 + 1.0)
        _, epsilon = to_x0_epsilon(
            schedule.prediction_type, prediction, latents / scale, 1.0 / scale, row["sigma"] / scale
        )
        return latents + (row["down"] - row["sigma"]) * epsilon + row["up"] * noise, history

    def inputs(latents: Array, row: Row) -> Array:
        return latents / jnp.sqrt(row["sigma"] ** 2 + 1.0)

    def start(schedule: NoiseSchedule, table: Table) -> float:
        # A run that starts below the last timestep meets signal as well as noise in its first latents.
        leading = schedule.timestep_spacing == "leading"
        return float(np.sqrt(table["sigma"][0] ** 2 + leading))

    return StepRule("euler_ancestral", table, update, stochastic=True, inputs=inputs, start=start)
