"""Sampling in stages by two models: the scene model, scene and subject model fused, the subject model.

Rows are those of the step rule's table, so `pndm` has one more than there are steps; row i is in stage 1 for
i <= start_merge_step, in stage 2 up to i = final_step, else in stage 3.
Source: Face-diffuser, facediffuser/pipeline.py; FastComposer (arXiv 2305.10431), fastcomposer/pipeline.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion.guidance import classifier_free, joined, parted
from fairhuman_jax.diffusion.plms import pndm
from fairhuman_jax.diffusion.samplers import Hook, RecordingPredict, prepare_rows
from fairhuman_jax.diffusion.schedule import NoiseSchedule
from fairhuman_jax.diffusion.snf import snf_fuse
from fairhuman_jax.diffusion.step_rule import StepRule

Array = jax.Array
PyTree = Any
Network = Callable[[Array, Array, PyTree], Array]
BothNetworks = Callable[[Array, Array, PyTree, PyTree], tuple[Array, Array]]
Fusion = Callable[[Array, Array, Array, Array, float | Array, float | Array], tuple[Array, Array, Array, Array]]

BASELINES = ("text", "null")


class FusionMaps(NamedTuple):
    """What fused the rows of stage 2: mask, True = subject model, and saliency of both models, [rows, B, h, w] each."""

    mask: Array
    scene: Array
    subject: Array


def staged_sample(
    scene: Network,
    subject: Network,
    latents: Array,
    key: Array | None,
    schedule: NoiseSchedule,
    steps: int,
    rule: StepRule | None = None,
    *,
    null: PyTree,
    text: PyTree,
    augmented: PyTree,
    scale_t: float | Array = 5.0,
    scale_s: float | Array | None = None,
    alpha: float = 0.3,
    beta: float = 0.6,
    start_merge_step: int | Array | None = None,
    final_step: int | Array | None = None,
    baseline: str = "text",
    both: BothNetworks | None = None,
    fuse: Fusion = snf_fuse,
    reset_history: bool = False,
    return_maps: bool = False,
    noise: Array | None = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
) -> PyTree:
    """Sample from unit noise `latents` [B, h, w, C] by E_T, then `fuse` of E_T and E_S, then E_S; default `pndm()`.

    E_T = e(null) + scale_t (e(text) - e(null)) by `scene`, E_S = e(base) + scale_s (e(augmented) - e(base)) by
    `subject`, where base is `text`, or `null` with `baseline="null"` (FastComposer). Each network is
    `(latents [2B, ...], timesteps [2B], condition) -> [2B, ...]`, epsilon or v, and is called only where its prediction
    is used; null, text and augmented are pytrees of one structure with leaves [B, ...]. `scale_s` None is `scale_t`.
    Stage 2 calls one after the other, or `both(latents, timesteps, scene_condition, subject_condition)`, which returns
    the two outputs. `fuse` has the arguments of `snf_fuse` up to the scales, and its results.

    The boundaries are `stage_steps(steps, alpha, beta)`; start_merge_step and final_step override them: -1 leaves out
    stage 1, final_step <= start_merge_step stage 2, the last row or beyond what follows. An int is static: stages are
    scans, gradients flow, empty ones are not compiled. One compilation serves every traced int32 scalar.
    A multistep rule keeps its history across boundaries, as published, unless `reset_history`. Other arguments as
    `sample`. Returns fp32 latents, or (latents, `FusionMaps`) with `return_maps`.
    Raises: ValueError for an unknown baseline, a boundary that is no row, maps with traced boundaries, as `sample`.
    """
    if baseline not in BASELINES:
        raise ValueError(f"staged_sample: baseline is {baseline!r}; known: {', '.join(BASELINES)}")
    rows = prepare_rows(latents, key, schedule, steps, rule or pndm(), noise, before_step, after_step)
    merge, last = _boundaries(stage_steps(steps, alpha, beta), start_merge_step, final_step, rows.count, return_maps)
    scales = (scale_t, scale_t if scale_s is None else scale_s)
    base = text if baseline == "text" else null
    fused = _fused(both or _one_by_one(scene, subject), joined(null, text), joined(base, augmented), scales, fuse)
    renewed = rows.restart if reset_history else (lambda carry: carry)
    carry = rows.run(classifier_free(scene, text, null, scales[0]), rows.begin(latents, rows.scale), 0, merge)
    if return_maps:
        carry, maps = rows.record(fused, renewed(carry), merge, last)
    else:
        carry, maps = rows.run(lambda x, times: fused(x, times)[0], renewed(carry), merge, last), None
    carry = rows.run(classifier_free(subject, augmented, base, scales[1]), renewed(carry), last, rows.count)
    return carry[0] if maps is None else (carry[0], maps)


def _boundaries(
    given: tuple[int, int], start: int | Array | None, final: int | Array | None, count: int, static: bool
) -> tuple[Any, Any]:
    """The steps before which stages 2 and 3 begin, of `count`; `given` are the last ones of stages 1 and 2."""
    merge = _row("start_merge_step", given[0] if start is None else start, 0, count)
    last = _row("final_step", given[1] if final is None else final, merge, count)
    if static and not (isinstance(merge, int) and isinstance(last, int)):
        raise ValueError("staged_sample: return_maps needs ints for start_merge_step and final_step, not traced arrays")
    return merge, last


def delayed_sample(
    predict: Network,
    latents: Array,
    key: Array | None,
    schedule: NoiseSchedule,
    steps: int,
    rule: StepRule | None = None,
    *,
    null: PyTree,
    text: PyTree,
    augmented: PyTree,
    scale: float | Array = 5.0,
    alpha: float = 0.3,
    start_merge_step: int | Array | None = None,
    noise: Array | None = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
) -> Array:
    """FastComposer's delayed conditioning: one network, guided from `null` by `text`, then by `augmented`.

    Rows i <= start_merge_step, by default alpha steps to the nearest, have the text; FastComposer's own alpha is 1
    minus this one. Arguments and errors as `staged_sample`. Returns fp32 latents.
    """
    start = stage_steps(steps, alpha, alpha)[0] if start_merge_step is None else start_merge_step
    rows = prepare_rows(latents, key, schedule, steps, rule or pndm(), noise, before_step, after_step)
    switch = _row("start_merge_step", start, 0, rows.count)
    carry = rows.run(classifier_free(predict, text, null, scale), rows.begin(latents, rows.scale), 0, switch)
    return rows.run(classifier_free(predict, augmented, null, scale), carry, switch, rows.count)[0]


def stage_steps(steps: int, alpha: float, beta: float) -> tuple[int, int]:
    """(start_merge_step, final_step) = (alpha steps, beta steps), to the nearest row.

    Host arithmetic; hand the results to a compiled function as arrays, and other fractions compile nothing. The
    published (15, 30) of 50 are 0.3 and 0.6. Raises: ValueError for a fraction outside [0, 1].
    """
    for name, fraction in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{name} is {fraction}; expected a fraction of the steps in 0 .. 1")
    return math.floor(alpha * steps + 0.5), math.floor(beta * steps + 0.5)


def _row(name: str, value: int | Array, low: int | Array, high: int) -> int | Array:
    """The first row after `value`, within [low, high]; an int if it and `low` are."""
    if isinstance(value, (int, np.integer)) and isinstance(low, int):
        return min(max(int(value) + 1, low), high)
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer) or jnp.shape(value):
        raise ValueError(f"{name} is {value}; expected a row, an integer scalar")
    return jnp.clip(jnp.asarray(value, jnp.int32) + 1, low, high)


def _one_by_one(scene: Network, subject: Network) -> BothNetworks:
    def both(latents: Array, timesteps: Array, scene_condition: PyTree, subject_condition: PyTree) -> PyTree:
        return scene(latents, timesteps, scene_condition), subject(latents, timesteps, subject_condition)

    return both


def _fused(
    both: BothNetworks,
    scene_condition: PyTree,
    subject_condition: PyTree,
    scales: tuple[float | Array, float | Array],
    fuse: Fusion,
) -> RecordingPredict:
    """The denoiser of stage 2, with its maps."""

    def denoise(latents: Array, timesteps: Array) -> tuple[Array, FusionMaps]:
        twice = joined(latents, latents), joined(timesteps, timesteps)
        outputs = both(*twice, scene_condition, subject_condition)
        (t_uncond, t_cond), (s_base, s_cond) = (parted(output.astype(jnp.float32)) for output in outputs)
        prediction, *maps = fuse(t_uncond, t_cond, s_base, s_cond, *scales)
        return prediction, FusionMaps(*maps)

    return denoise
