"""Noise levels in the variance-exploding form, sigma = sqrt((1 - a) / a), and their placement in samplers."""

from __future__ import annotations

import numpy as np

from fairhuman_jax.diffusion.schedule import NoiseSchedule, timesteps

# Replaces a = 0 where sigma must stay finite: the smallest half-precision number, as in diffusers.
_SMALLEST_CUMPROD = 2.0**-24
_KARRAS_RHO = 7.0


def sigma_table(schedule: NoiseSchedule) -> np.ndarray:
    """sigma of each training timestep, fp64 [num_train_timesteps]; 4096 at the end of a zero-SNR schedule."""
    cumprod = schedule.alphas_cumprod64
    if schedule.rescale_betas_zero_snr:
        cumprod = np.append(cumprod[:-1], _SMALLEST_CUMPROD)
    return np.sqrt((1.0 - cumprod) / cumprod)


def final_sigma(schedule: NoiseSchedule) -> float:
    """The level on which the last step ends, by `final_sigmas_type`: 0 ("zero") or that of timestep 0 ("sigma_min").

    Raises: ValueError for another type.
    """
    kind = schedule.option("final_sigmas_type", "zero")
    if kind not in ("zero", "sigma_min"):
        raise ValueError(f"schedule: final_sigmas_type is {kind!r}; known: zero, sigma_min")
    return 0.0 if kind == "zero" else float(sigma_table(schedule)[0])


def karras_sigmas(largest: float, smallest: float, steps: int) -> np.ndarray:
    """`steps` levels from `largest` to `smallest`, evenly spaced in sigma^(1 / 7) (arXiv 2206.00364, equation 5)."""
    ends = largest ** (1.0 / _KARRAS_RHO), smallest ** (1.0 / _KARRAS_RHO)
    return np.linspace(*ends, steps) ** _KARRAS_RHO


def single_step_levels(schedule: NoiseSchedule, steps: int, karras: bool) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, sigmas), each [steps], of the Euler rules: linspace and Karras timesteps are fractional.

    Karras levels run from the first to the last level of the schedule's spacing.
    """
    total, levels = schedule.num_train_timesteps, sigma_table(schedule)
    times = timesteps(schedule, steps)
    if schedule.timestep_spacing == "linspace":
        times = np.linspace(0, total - 1, steps)[::-1]
    sigmas = np.interp(times, np.arange(total), levels)
    if karras:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
        times = _times_of(sigmas, levels)
    return times, sigmas


def multistep_levels(
    schedule: NoiseSchedule, steps: int, karras: bool, truncated: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps int, sigmas), each [steps], of DPM-Solver and UniPC: the last of steps + 1 points is left out.

    Karras levels run over the whole table; the denoiser gets the nearest timestep, or with `truncated` the one below.
    """
    levels = sigma_table(schedule)
    times = timesteps(schedule, steps, intervals=True)
    if not karras:
        return times, levels[times]
    sigmas = karras_sigmas(levels[-1], levels[0], steps)
    exact = _times_of(sigmas, levels)
    # The first and last level are table entries: rounding must not push them below their timestep.
    return np.floor(exact + 1e-6 if truncated else np.round(exact)).astype(np.int32), sigmas


def _times_of(sigmas: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Fractional timesteps at which the table has these levels, linear in log sigma."""
    return np.interp(np.log(sigmas), np.log(levels), np.arange(len(levels)))
