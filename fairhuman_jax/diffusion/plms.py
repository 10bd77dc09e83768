"""The pseudo linear multistep rule (PNDM without its Runge-Kutta start)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion.schedule import NoiseSchedule, timesteps
from fairhuman_jax.diffusion.step_rule import PyTree, Row, StepRule, Table, fp32_columns

Array = jax.Array

# Weights of the newest prediction and the three before it. Rows 0 to 3 are Adams-Bashforth of order one to four, for
# that many earlier predictions. The last row averages both ends of the first step, for its repetition.
_WEIGHTS = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [3 / 2, -1 / 2, 0.0, 0.0],
        [23 / 12, -16 / 12, 5 / 12, 0.0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
        [1 / 2, 1 / 2, 0.0, 0.0],
    ],
    np.float32,
)
_AVERAGE = len(_WEIGHTS) - 1
_MOST_HELD = 3


@functools.cache
def pndm() -> StepRule:
    """PLMS (arXiv 2202.09778, `skip_prk_steps` of diffusers): a transfer step with a mixture of the last predictions.

    x' = sqrt(a' / a) x + (sqrt(1 - a') - sqrt((1 - a) a' / a)) noise, from t to t - T // steps. The table has
    steps + 1 rows: the second timestep comes twice, because the second call repeats the first step with the average of
    both predictions. As in diffusers, a run that starts at row k > 0 repeats its first step too and so loses one level.
    Predictions: epsilon or v.
    Raises: ValueError, when its table is built, for another prediction type, a zero-SNR schedule, and a PNDM config
    with the Runge-Kutta start (`skip_prk_steps` false, the class's default).
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        _check(schedule)
        times = timesteps(schedule, steps)
        times = np.concatenate([times[:1], times[1:2], times[1:]])
        stride = schedule.num_train_timesteps // steps
        before, after = times - stride, np.minimum(times + stride, schedule.num_train_timesteps - 1)
        cumprod = schedule.alphas_cumprod64
        final = 1.0 if schedule.set_alpha_to_one else cumprod[0]
        now, earlier = cumprod[times], cumprod[after]
        then = np.where(before >= 0, cumprod[np.maximum(before, 0)], final)
        keep, gain = _transfer(now, then)
        repeated_keep, repeated_gain = _transfer(earlier, now)
        return fp32_columns(
            times,
            signal=np.sqrt(now),
            spread=np.sqrt(1.0 - now),
            keep=keep,
            gain=gain,
            repeated_signal=np.sqrt(earlier),
            repeated_spread=np.sqrt(1.0 - earlier),
            repeated_keep=repeated_keep,
            repeated_gain=repeated_gain,
        )

    def init(latents: Array) -> PyTree:
        return jnp.int32(0), latents, jnp.int32(0), (jnp.zeros_like(latents),) * _MOST_HELD

    def restart(history: PyTree) -> PyTree:
        # The table determines which call repeats the first step, so the count of calls continues.
        calls, first, _, held = history
        return calls, first, jnp.int32(0), held

    return StepRule("pndm", "PNDMScheduler", table, _step, init=init, restart=restart)


def _check(schedule: NoiseSchedule) -> None:
    # Configs of other classes lack this key; only PNDM's default is the Runge-Kutta start.
    if schedule.option("skip_prk_steps") is False:
        raise ValueError("pndm: skip_prk_steps = False (Runge-Kutta start) is not supported; expected True")
    if schedule.prediction_type == "sample":
        raise ValueError("pndm: prediction_type 'sample' is not supported; expected epsilon or v_prediction")
    if schedule.rescale_betas_zero_snr:
        raise ValueError("pndm: a zero-SNR schedule is not supported; expected ddim, euler, dpmpp_2m or unipc")


def _transfer(now: np.ndarray, then: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the latents and of the noise in the step from a = `now` to `then`."""
    keep = np.sqrt(then / now)
    return keep, np.sqrt(1.0 - then) - keep * np.sqrt(1.0 - now)


def _step(
    schedule: NoiseSchedule, row: Row, latents: Array, prediction: Array, history: PyTree, noise: Array | None
) -> tuple[Array, PyTree]:
    calls, first, count, held = history
    repeats = calls == 1
    weights = jnp.asarray(_WEIGHTS)[jnp.where(repeats & (count > 0), _AVERAGE, count)]
    mixed = sum(weights[i] * output for i, output in enumerate((prediction, *held)))
    base = jnp.where(repeats, first, latents)

    def column(name: str) -> Array:
        return jnp.where(repeats, row[f"repeated_{name}"], row[name])

    if schedule.prediction_type == "v_prediction":
        mixed = column("signal") * mixed + column("spread") * base
    moved = column("keep") * base + column("gain") * mixed
    # The history does not keep the prediction of the repeated step.
    count = jnp.where(repeats, count, jnp.minimum(count + 1, _MOST_HELD))
    held = tuple(jnp.where(repeats, old, new) for old, new in zip(held, (prediction, *held[:-1]), strict=True))
    return moved, (calls + 1, jnp.where(calls == 0, latents, first), count, held)
