"""Saliency-adaptive noise fusion: each latent pixel takes the guided prediction of the model with the higher saliency.

It needs no training. Source: Face-diffuser (CVPR 2024, arXiv 2311.10329), facediffuser/pipeline.py, after MagicFusion
(ICCV 2023), which introduced the gains. The published code computes in fp16 and takes 64 x 64 latents only.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion.guidance import per_example

Array = jax.Array

_WINDOW = 4
_EXACT = jax.lax.Precision.HIGHEST  # differences of 1e-5 decide which model a pixel takes


def snf_saliency(resp: Array) -> Array:
    """m = mean over channels of Sm(|resp|): how strongly a model responds to its condition at each pixel.

    Sm: means over 4 x 4 pixels, from one before to two after, including zeros outside the picture; then bilinear
    from (h - 1, w - 1) back to (h, w) with half-pixel centres. It commutes with mirroring; a constant field loses a
    quarter at edges and 7/16 in corners. `resp` [B, h, w, C], any float dtype. Returns fp32 [B, h, w].
    Raises: ValueError for a side below 2.
    """
    return _smoothed(jnp.abs(resp.astype(jnp.float32)).mean(-1))


def snf_fuse(
    e_t_uncond: Array,
    e_t_cond: Array,
    e_s_base: Array,
    e_s_cond: Array,
    scale_t: float | Array,
    scale_s: float | Array | None = None,
    gain_t: float | Array = 1.0,
    gain_s: float | Array = 1.0,
    per_channel: bool = False,
    temperature: float | Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Fused guided prediction E = E_S where M, E_T elsewhere, of a scene model T and a subject model S.

    R = scale (cond - base) and E = base + R for each model, m = `snf_saliency(R)`, log Omega = gain m - LSE(gain m)
    over the pixels of a picture, M = [log Omega_S > log Omega_T]: a tie goes to T. Identical responses give E_T
    everywhere, and M is never S everywhere. A scale above one also sharpens Omega.
    Args: predictions [B, h, w, C] on the same latents, epsilon or v; scales and gains: scalars or [B], may be traced,
    `scale_s` None means `scale_t`. `per_channel`: one map and one mask per channel. `temperature` tau > 0 blends
    instead: E = E_T + M (E_S - E_T), M = sigmoid((log Omega_S - log Omega_T) / tau), which is Omega_S / (Omega_S +
    Omega_T) at tau = 1; None or 0 is the published hard mask, through which no gradient passes. A traced
    temperature must be above 0.
    Returns (E fp32 [B, h, w, C], M bool [B, h, w], or fp32 with a temperature, m_T, m_S fp32 [B, h, w]); M and m are
    [B, h, w, C] with `per_channel`.
    Raises: ValueError for predictions that differ in shape, a side below 2, or a negative temperature.
    """
    shapes = [tuple(prediction.shape) for prediction in (e_t_uncond, e_t_cond, e_s_base, e_s_cond)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4:
        raise ValueError(f"snf_fuse: predictions are {shapes}; expected four of one shape [B, h, w, C]")
    if isinstance(temperature, (int, float)):
        if temperature < 0:
            raise ValueError(f"snf_fuse: temperature is {temperature}; expected 0 (hard mask) or more")
        temperature = temperature or None
    guided_t, m_t = _guided(e_t_uncond, e_t_cond, scale_t, per_channel)
    guided_s, m_s = _guided(e_s_base, e_s_cond, scale_t if scale_s is None else scale_s, per_channel)
    log_odds = _log_softmax(m_s, gain_s) - _log_softmax(m_t, gain_t)
    soft = temperature is not None
    mask = jax.nn.sigmoid(log_odds / per_example(temperature, log_odds.ndim)) if soft else log_odds > 0
    share = mask if per_channel else mask[..., None]
    fused = guided_t + share * (guided_s - guided_t) if soft else jnp.where(share, guided_s, guided_t)
    return fused, mask, m_t, m_s


def _guided(base: Array, cond: Array, scale: float | Array, per_channel: bool) -> tuple[Array, Array]:
    """(E, m) of one model."""
    base = base.astype(jnp.float32)
    response = per_example(scale, base.ndim) * (cond.astype(jnp.float32) - base)
    return base + response, _smoothed(jnp.abs(response)) if per_channel else snf_saliency(response)


def _log_softmax(saliency: Array, gain: float | Array) -> Array:
    return jax.nn.log_softmax(per_example(gain, saliency.ndim) * saliency, axis=(1, 2))


def _smoothed(field: Array) -> Array:
    """Apply Sm, which is separable and linear, to the axes 1 and 2 of [B, h, w, ...]."""
    height, width = field.shape[1:3]
    if min(height, width) < 2:
        raise ValueError(f"snf_saliency: responses are {height}x{width}; expected 2x2 or more")
    columns = jnp.einsum("xw,bhw...->bhx...", _smoothing(width), field, precision=_EXACT)
    return jnp.einsum("yh,bhx...->byx...", _smoothing(height), columns, precision=_EXACT)


@functools.cache
def _smoothing(side: int) -> np.ndarray:
    """Sm along one axis as a matrix fp32 [side, side]: bilinear [side, side - 1] times means [side - 1, side]."""
    rows, pixels = np.arange(side - 1)[:, None], np.arange(side)[None, :]
    means = ((pixels >= rows - 1) & (pixels < rows - 1 + _WINDOW)) / _WINDOW
    source = np.maximum((np.arange(side) + 0.5) * (side - 1) / side - 0.5, 0.0)
    low = np.floor(source).astype(int)
    high, share = np.minimum(low + 1, side - 2), (source - low)[:, None]
    matrix = ((1.0 - share) * means[low] + share * means[high]).astype(np.float32)
    matrix.flags.writeable = False
    return matrix
