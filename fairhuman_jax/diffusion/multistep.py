"""Linear multistep rules in log SNR: DPM-Solver++ and UniPC.

Both move by x' = keep x + sum_k w_k m_k (+ added z), m_k being the predictions of x_0, newest first. The weights for
each order are constants of the step, computed in fp64. The order of a step is the smaller of the number of predictions
so far and the order in the table. lambda = -log sigma is half the log SNR, h its change over the step.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion.prediction import to_x0_epsilon
from fairhuman_jax.diffusion.schedule import NoiseSchedule
from fairhuman_jax.diffusion.sigmas import final_sigma, multistep_levels
from fairhuman_jax.diffusion.step_rule import PyTree, Row, StepRule, Table, fp32_columns

Array = jax.Array

_MAX_ORDER = 3
_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "deis")
# In runs of fewer steps than this, the last steps use lower orders.
_FEW_STEPS = 15


@functools.cache
def dpmpp_2m(karras: bool | None = None, sde: bool | None = None) -> StepRule:
    """DPM-Solver++ (arXiv 2211.01095), multistep, of order 2 unless the config's `solver_order` is 1 or 3.

    First order: x' = (sigma' / sigma) x + a' (1 - e^-h) m_0 in variance-preserving a, sigma; higher orders add
    divided differences of the m_k. `karras` and `sde` default to the config's `use_karras_sigmas` and `algorithm_type`.
    The rule also follows `solver_type`, `lower_order_final`, `euler_at_final` and `final_sigmas_type`.
    Raises: ValueError, when its table is built, for other algorithms, learned variance, a finite `lambda_min_clipped`,
    third order with noise, and epsilon at zero SNR.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        noisy = _follows_noise(schedule) if sde is None else sde
        order = _solver_order("dpmpp_2m", schedule, 2 if noisy else _MAX_ORDER)
        spaced = schedule.option("use_karras_sigmas", False) if karras is None else karras
        truncated = schedule.beta_schedule == "squaredcos_cap_v2"
        times, sigmas = multistep_levels(schedule, steps, bool(spaced), truncated)
        _check_signal("dpmpp_2m", schedule, sigmas)
        sigmas = np.append(sigmas, final_sigma(schedule))
        lambdas, signal, spread = _levels(sigmas)
        orders = _dpm_orders(schedule, steps, order)
        midpoint = schedule.option("solver_type", "midpoint") != "heun"
        weights = np.zeros((steps, order, order))
        for i in range(steps):
            for p in range(1, min(orders[i], i + 1) + 1):
                weights[i, p - 1, :p] = signal[i + 1] * _dpm_weights(lambdas[i + 1 - p : i + 2], midpoint, noisy)
        decay = sigmas[1:] / sigmas[:-1]
        keep = spread[1:] / spread[:-1] * (decay if noisy else 1.0)
        added = {"added": spread[1:] * np.sqrt(1.0 - decay**2)} if noisy else {}
        columns = fp32_columns(times, signal=signal[:-1], spread=spread[:-1], keep=keep, weights=weights, **added)
        return columns | {"order": orders}

    def init(latents: Array) -> PyTree:
        return jnp.int32(0), (jnp.zeros_like(latents),) * (_MAX_ORDER - 1)

    return StepRule("dpmpp_2m", "DPMSolverMultistepScheduler", table, _predict_step, init=init)


@functools.cache
def unipc(karras: bool | None = None) -> StepRule:
    """UniPC (arXiv 2302.04867), B(h) variant on x_0: each step corrects its latents by the new prediction and moves.

    `karras` defaults to the config's `use_karras_sigmas`. The rule follows `solver_order` 1 to 3 (default 2),
    `solver_type` bh1 or bh2 (default bh2), `lower_order_final`, `disable_corrector` and `final_sigmas_type`.
    Raises: ValueError, when its table is built, for `predict_x0` false, a `solver_p`, a last step to sigma = 0 in more
    than first order, and epsilon at zero SNR.
    """

    def table(schedule: NoiseSchedule, steps: int) -> Table:
        if not schedule.option("predict_x0", True) or schedule.option("solver_p"):
            raise ValueError("unipc: predict_x0 = False and solver_p are not supported; expected True and null")
        order = _solver_order("unipc", schedule, _MAX_ORDER)
        last = final_sigma(schedule)
        lower = schedule.option("lower_order_final", True)
        if last == 0 and not lower and order > 1:
            raise ValueError(
                "unipc: lower_order_final = False cannot end at sigma 0; expected final_sigmas_type sigma_min"
            )
        spaced = schedule.option("use_karras_sigmas", False) if karras is None else karras
        times, sigmas = multistep_levels(schedule, steps, bool(spaced))
        _check_signal("unipc", schedule, sigmas)
        lambdas, signal, spread = _levels(np.append(sigmas, last))
        exponential = schedule.option("solver_type", "bh2") != "bh1"
        orders = np.minimum(order, np.arange(steps, 0, -1) if lower else np.full(steps, order)).astype(np.int32)
        weights, corrector = np.zeros((steps, order, order)), np.zeros((steps, order, order + 1))
        for i in range(steps):
            for p in range(1, min(orders[i], i + 1) + 1):
                weights[i, p - 1, :p] = signal[i + 1] * _unip_weights(lambdas[i + 1 - p : i + 2], exponential)
            for p in range(1, min(order, i) + 1):
                corrector[i, p - 1, : p + 1] = signal[i] * _unic_weights(lambdas[i - p : i + 1], exponential)
        skipped = np.isin(np.arange(steps) - 1, np.asarray(schedule.option("disable_corrector", ()), int))
        keep = spread[1:] / spread[:-1]
        columns = fp32_columns(
            times,
            signal=signal[:-1],
            spread=spread[:-1],
            keep=keep,
            weights=weights,
            corrector=corrector,
            corrector_keep=np.append(1.0, keep[:-1]),
        )
        return columns | {"order": orders, "corrects": ~skipped}

    def init(latents: Array) -> PyTree:
        return jnp.int32(0), jnp.int32(1), latents, (jnp.zeros_like(latents),) * _MAX_ORDER

    return StepRule("unipc", "UniPCMultistepScheduler", table, _correct_predict_step, init=init)


def _levels(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lambda, signal, spread) of levels sigma; lambda is infinite at sigma = 0."""
    with np.errstate(divide="ignore"):
        lambdas = -np.log(sigmas)
    signal = 1.0 / np.sqrt(1.0 + sigmas**2)
    return lambdas, signal, sigmas * signal


def _solver_order(name: str, schedule: NoiseSchedule, most: int) -> int:
    order = schedule.option("solver_order", 2)
    if order not in range(1, most + 1):
        raise ValueError(f"{name}: solver_order is {order!r}; expected 1 .. {most}")
    return order


def _check_signal(name: str, schedule: NoiseSchedule, sigmas: np.ndarray) -> None:
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon" and sigmas[0] > 4000:
        raise ValueError(f"{name}: an epsilon prediction is undefined at zero SNR; expected v_prediction or sample")


def _follows_noise(schedule: NoiseSchedule) -> bool:
    """Whether the config selects the stochastic algorithm."""
    algorithm = schedule.option("algorithm_type", "dpmsolver++")
    if algorithm not in _ALGORITHMS:
        raise ValueError(
            f"dpmpp_2m: algorithm_type {algorithm!r} is not supported; expected one of {', '.join(_ALGORITHMS)}"
        )
    return algorithm == "sde-dpmsolver++"


def _dpm_orders(schedule: NoiseSchedule, steps: int, order: int) -> np.ndarray:
    """Highest order that each step may take, int32 [steps]."""
    if schedule.option("variance_type") is not None:
        raise ValueError("dpmpp_2m: variance_type is not supported; expected null")
    if schedule.option("lambda_min_clipped", -np.inf) != -np.inf:
        raise ValueError("dpmpp_2m: a finite lambda_min_clipped is not supported; expected -Infinity")
    orders = np.full(steps, order, np.int32)
    careful = schedule.option("lower_order_final", True) and steps < _FEW_STEPS
    if careful:
        orders[-2:] = np.minimum(orders[-2:], 2)
    if careful or schedule.option("euler_at_final", False) or final_sigma(schedule) == 0:
        orders[-1] = 1
    return orders


def _dpm_weights(lambdas: np.ndarray, midpoint: bool, noisy: bool) -> np.ndarray:
    """Weights of m_0, m_1, ... divided by the new signal level, [order]; `lambdas` ascend to the end of the step."""
    end, newest, *older = lambdas[::-1]
    h = end - newest
    span = 2.0 * h if noisy else h
    first = -np.expm1(-span)
    if not older:
        return np.array([first])
    # A step of length 0 (Karras levels that end at sigma_min) has no higher-order terms.
    second = first / 2.0 if midpoint and len(older) == 1 else (1.0 - first / span if span else 0.0)
    slope = h / (newest - older[0])
    if len(older) == 1:
        return np.array([first + second * slope, -second * slope])
    third = (first - span) / span**2 + 0.5 if span else 0.0
    share, both = (newest - older[0]) / (newest - older[1]), h / (newest - older[1])
    near, far = second * (1.0 + share) + third * both, -(second * share + third * both)
    near, far = near * slope, far * h / (older[0] - older[1])
    return np.array([first + near, far - near, -far])


def _unipc_terms(lambdas: np.ndarray, exponential: bool) -> tuple[float, float, np.ndarray, np.ndarray, np.ndarray]:
    """(e^-h - 1, B(h), ratios r_k with 1 at the end, the Vandermonde rows r^i, right-hand sides b)."""
    end, newest, *older = lambdas[::-1]
    h = end - newest
    first = np.expm1(-h)
    scale = first if exponential else -h
    ratios = np.array([(level - newest) / h for level in older] + [1.0])
    rows = ratios[None, :] ** np.arange(len(ratios))[:, None]
    sides, phi, factorial = [], first / -h - 1.0, 1.0
    for i in range(1, len(ratios) + 1):
        sides.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / -h - 1.0 / factorial
    return first, scale, ratios, rows, np.array(sides)


def _unip_weights(lambdas: np.ndarray, exponential: bool) -> np.ndarray:
    """Predictor weights of m_0, m_1, ... divided by the new signal level: [order]."""
    if len(lambdas) == 2:
        return -np.expm1(lambdas[:1] - lambdas[1:])
    first, scale, ratios, rows, sides = _unipc_terms(lambdas, exponential)
    # Second order uses 1/2, the limit of the equation's solution for short steps.
    rho = np.array([0.5]) if len(lambdas) == 3 else np.linalg.solve(rows[:-1, :-1], sides[:-1])
    older = -scale * rho / ratios[:-1]
    return np.concatenate([[-first - older.sum()], older])


def _unic_weights(lambdas: np.ndarray, exponential: bool) -> np.ndarray:
    """Corrector weights of the new prediction and of m_0, m_1, ... divided by its signal level: [order + 1]."""
    first, scale, ratios, rows, sides = _unipc_terms(lambdas, exponential)
    rho = np.array([0.5]) if len(lambdas) == 2 else np.linalg.solve(rows, sides)
    new, older = -scale * rho[-1], -scale * rho[:-1] / ratios[:-1]
    return np.concatenate([[new, -first - new - older.sum()], older])


def _combined(weights: Array, outputs: tuple[Array, ...]) -> Array:
    """sum_k weights[k] outputs[k], elementwise: a matrix product might run in lower precision."""
    return sum((weights[k] * outputs[k] for k in range(1, weights.shape[0])), weights[0] * outputs[0])


def _predict_step(
    schedule: NoiseSchedule, row: Row, latents: Array, prediction: Array, history: PyTree, noise: Array | None
) -> tuple[Array, PyTree]:
    calls, held = history
    x0, _ = to_x0_epsilon(schedule.prediction_type, prediction, latents, row["signal"], row["spread"])
    outputs = (x0, *held)
    order = jnp.minimum(calls + 1, row["order"])
    moved = row["keep"] * latents + _combined(row["weights"][order - 1], outputs)
    if noise is not None:
        moved = moved + row["added"] * noise
    return moved, (calls + 1, outputs[:-1])


def _correct_predict_step(
    schedule: NoiseSchedule, row: Row, latents: Array, prediction: Array, history: PyTree, noise: Array | None
) -> tuple[Array, PyTree]:
    calls, order, before, held = history
    x0, _ = to_x0_epsilon(schedule.prediction_type, prediction, latents, row["signal"], row["spread"])
    outputs = (x0, *held)
    corrected = row["corrector_keep"] * before + _combined(row["corrector"][order - 1], outputs)
    latents = jnp.where((calls > 0) & row["corrects"], corrected, latents)
    order = jnp.minimum(calls + 1, row["order"])
    moved = row["keep"] * latents + _combined(row["weights"][order - 1], outputs)
    return moved, (calls + 1, order, latents, outputs[:-1])
