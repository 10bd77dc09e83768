"""Step rules without memory: DDIM, DDPM, Euler and ancestral Euler."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion.prediction import to_x0_epsilon
from fairhuman_jax.diffusion.schedule import NoiseSchedule, timesteps
from fairhuman_jax.diffusion.sigmas import final_sigma, single_step_levels
from fairhuman_jax.diffusion.step_rule import PyTree, Row, StepRule, Table, fp32_columns

Array = jax.Array


@functools.cache
def ddim(eta: float = 0.0) -> StepRule:
    """DDIM (arXiv 2010.02502): x' = sqrt(a') x_0 + sqrt(1 - a' - s^2) noise + s z, s = eta sqrt(variance).

    The step goes from t to t - T // steps, as in diffusers, for every spacing. The rule follows `clip_sample`.
    Raises: ValueError, when its table is built, for epsilon at zero SNR.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        times = timesteps(schedule, steps)
        return _transitions_between(schedule, times, times - schedule.num_train_timesteps // steps, eta)

    return StepRule("ddim", "DDIMScheduler", table, _posterior_step)


@functools.cache
def ddim_humansd() -> StepRule:
    """DDIM as HumanSD's scripts run it: it leaves out the noisiest entry of the table and takes steps - 1 steps.

    The table is 1, 1 + T // steps, 1 + 2 (T // steps), ...; when T // steps is rounded down, it is longer than `steps`,
    and all entries from number steps - 1 on are left out. 50 of 1000 gives 49 steps, from timestep 961 to 1. The rule
    ignores `timestep_spacing` and `steps_offset`.
    Raises: ValueError, when its table is built, for a number of steps whose table reaches T (3, 9, 27, 36, 37 and some
    above 100, of 1000), which HumanSD's sampler cannot index, and for 1, which takes no step.
    Source: HumanSD, scripts/pose2img.py and ldm/models/diffusion/ddim.py.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        total = schedule.num_train_timesteps
        if not 2 <= steps <= total:
            raise ValueError(f"ddim_humansd: steps is {steps}; expected 2 .. {total}")
        ladder = np.arange(0, total, total // steps) + 1
        if ladder[-1] >= total:
            raise ValueError(
                f"ddim_humansd: {steps} steps reach timestep {ladder[-1]}; the schedule ends at {total - 1}, "
                f"use a divisor of {total} below it"
            )
        times = ladder[: steps - 1]
        return _transitions_between(schedule, times[::-1], np.append(-1, times[:-1])[::-1], 0.0)

    return StepRule("ddim_humansd", "DDIMScheduler", table, _posterior_step)


@functools.cache
def ddpm() -> StepRule:
    """Ancestral sampling from the posterior q(x' | x, x_0) (arXiv 2006.11239), variance beta (1 - a') / (1 - a).

    With leading timesteps it equals `ddim(1.0)` with `set_alpha_to_one`.
    Raises: ValueError, when its table is built, for a `variance_type` other than fixed_small and epsilon at zero SNR.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        kind = schedule.option("variance_type", "fixed_small")
        if kind not in (None, "fixed_small"):
            raise ValueError(f"ddpm: variance_type {kind!r} is not supported; expected 'fixed_small'")
        times = timesteps(schedule, steps)
        then = np.append(schedule.alphas_cumprod64[times[1:]], 1.0)
        return _transitions(schedule, times, then, 1.0)

    return StepRule("ddpm", "DDPMScheduler", table, _posterior_step)


def _transitions_between(schedule: NoiseSchedule, times: np.ndarray, before: np.ndarray, eta: float) -> Table:
    """Columns of the steps from `times` to `before`; `set_alpha_to_one` sets the level below timestep 0."""
    cumprod = schedule.alphas_cumprod64
    final = 1.0 if schedule.set_alpha_to_one else cumprod[0]
    return _transitions(schedule, times, np.where(before >= 0, cumprod[np.maximum(before, 0)], final), eta)


def _transitions(schedule: NoiseSchedule, times: np.ndarray, then: np.ndarray, eta: float) -> Table:
    """Columns of the steps from a_t at `times` to `then`, both in fp64."""
    now = schedule.alphas_cumprod64[times]
    if schedule.prediction_type == "epsilon" and np.any(now == 0):
        raise ValueError("sample: an epsilon prediction is undefined at zero SNR; expected v_prediction or sample")
    added = eta * np.sqrt(np.maximum((1.0 - then) / (1.0 - now) * (1.0 - now / then), 0.0))
    columns = {
        "signal": np.sqrt(now),
        "spread": np.sqrt(1.0 - now),
        "next_signal": np.sqrt(then),
        "next_spread": np.sqrt(np.maximum(1.0 - then - added**2, 0.0)),
    }
    return fp32_columns(times, **columns, **({"added": added} if eta > 0 else {}))


def _posterior_step(
    schedule: NoiseSchedule, row: Row, latents: Array, prediction: Array, history: PyTree, noise: Array | None
) -> tuple[Array, PyTree]:
    x0, epsilon = to_x0_epsilon(schedule.prediction_type, prediction, latents, row["signal"], row["spread"])
    if schedule.clip_sample:
        x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
        # DDPM takes the posterior's mean for the clipped x_0; DDIM keeps the predicted direction.
        if schedule.class_name == "DDPMScheduler":
            epsilon = (latents - row["signal"] * x0) / row["spread"]
    moved = row["next_signal"] * x0 + row["next_spread"] * epsilon
    return (moved if noise is None else moved + row["added"] * noise), history


@functools.cache
def euler(karras: bool | None = None) -> StepRule:
    """Euler's method on dx / d sigma = noise(x) in the variance-exploding form: x' = x + (sigma' - sigma) noise.

    `karras` defaults to the config's `use_karras_sigmas`; the rule follows `final_sigmas_type`. A zero-SNR schedule
    starts at sigma = 4096.
    Raises: ValueError, when its table is built, for an `interpolation_type` other than linear and for continuous
    timesteps.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        for option, expected in (("interpolation_type", "linear"), ("timestep_type", "discrete")):
            if schedule.option(option, expected) != expected:
                raise ValueError(f"euler: {option} {schedule.option(option)!r} is not supported; expected {expected!r}")
        spaced = schedule.option("use_karras_sigmas", False) if karras is None else karras
        times, sigmas = single_step_levels(schedule, steps, bool(spaced))
        end = np.append(sigmas[1:], final_sigma(schedule))
        return fp32_columns(times, signal=np.ones_like(sigmas), spread=sigmas, end=end)

    return StepRule("euler", "EulerDiscreteScheduler", table, _euler_step, inputs=_unit_variance, start=_noise_start)


@functools.cache
def euler_ancestral() -> StepRule:
    """Ancestral Euler in the variance-exploding form: step to sigma_down, then add noise of sigma_up.

    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2. The result at
    sigma = 0 is x_0. A zero-SNR schedule starts at sigma = 4096.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        times, sigmas = single_step_levels(schedule, steps, karras=False)
        following = np.append(sigmas[1:], 0.0)
        down = following**2 / sigmas
        added = np.sqrt(following**2 - down**2)
        return fp32_columns(times, signal=np.ones_like(sigmas), spread=sigmas, end=down, added=added)

    return StepRule(
        "euler_ancestral",
        "EulerAncestralDiscreteScheduler",
        table,
        _euler_step,
        inputs=_unit_variance,
        start=_noise_start,
    )


def _euler_step(
    schedule: NoiseSchedule, row: Row, latents: Array, prediction: Array, history: PyTree, noise: Array | None
) -> tuple[Array, PyTree]:
    scale = jnp.sqrt(row["spread"] ** 2 + 1.0)
    x0, epsilon = to_x0_epsilon(
        schedule.prediction_type, prediction, latents / scale, 1.0 / scale, row["spread"] / scale
    )
    # Both forms are equal in exact arithmetic; each avoids subtracting large numbers at sigma = 4096.
    if schedule.prediction_type == "epsilon":
        moved = latents + (row["end"] - row["spread"]) * epsilon
    else:
        moved = x0 + row["end"] * epsilon
    return (moved if noise is None else moved + row["added"] * noise), history


def _unit_variance(latents: Array, row: Row) -> Array:
    return latents / jnp.sqrt(row["spread"] ** 2 + 1.0)


def _noise_start(schedule: NoiseSchedule, table: Table) -> float:
    # Leading spacing starts below the last timestep, where latents contain signal as well as noise.
    leading = schedule.timestep_spacing == "leading"
    return float(np.sqrt(table["spread"][0] ** 2 + leading))
