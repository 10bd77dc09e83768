"""The global, face and hand losses of one prediction, and masks at latent size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

REFERENCE_LOCAL_SCALE = 25.0


def region_losses(
    prediction: Array,
    target: Array,
    face_mask: Array | None,
    hand_mask: Array | None,
    *,
    weight: Array | None = None,
    local_scale: float | Array = 1.0,
    normalize: str = "pixels",
    compat: str | None = None,
) -> dict[str, Array]:
    """Three mean squared errors of one prediction: over the whole image, on faces, on hands.

    global = mean_b w_b mean(e_b^2), e = prediction - target; local = local_scale * mean_b w_b mean(m_b e_b^2).
    `normalize` "pixels" averages local terms over all elements, so a region of area fraction a
    contributes a * e^2; "area" averages each sample over its own region (0 without a region), so small regions count
    fully. Both are means over the batch: micro-batches of equal size average to the whole batch.

    Args: `prediction`, `target` [B, H, W, C], any float dtype; masks [B, H, W, 1] in {0, 1} (or coverage in [0, 1])
    at the same H, W, None = no such region: loss exactly 0, a task without gradient; `weight` [B] multiplies all three
    losses of a sample (min-SNR, 1/alphas_cumprod); `local_scale` c multiplies the face and hand losses: c > 1 lowers
    their contribution under the MPD rule (by c^(-1/3) for orthogonal tasks) and raises it under a plain sum.
    `compat="reference"` follows the published LoRA trainer: local_scale 25, and `weight` on the global loss only.
    Returns {"global", "face", "hand"}, fp32 scalars.
    Raises: ValueError when shapes do not match, for an unknown `normalize` or `compat`, or for other settings of
    `local_scale` and `normalize` together with `compat="reference"`.
    Source: FairHuman (arXiv 2507.02714).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"region_losses: prediction {prediction.shape} and target {target.shape} differ in shape")
    if normalize not in ("pixels", "area"):
        raise ValueError(f"region_losses: unknown normalize {normalize!r}; known: pixels, area")
    local_weight = weight
    if compat == "reference":
        if normalize != "pixels" or not isinstance(local_scale, (int, float)) or local_scale != 1.0:
            raise ValueError("region_losses: compat='reference' fixes local_scale = 25 and normalize = 'pixels'")
        local_scale, local_weight = REFERENCE_LOCAL_SCALE, None
    elif compat is not None:
        raise ValueError(f"region_losses: unknown compat {compat!r}; known: reference")
    squared = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))

    def local(name: str, mask: Array | None) -> Array:
        if mask is None:
            return jnp.zeros((), jnp.float32)
        if mask.shape != (*squared.shape[:-1], 1):
            raise ValueError(f"region_losses: {name} is {mask.shape}; expected {(*squared.shape[:-1], 1)}")
        return local_scale * _weighted_mean(masked_mean(squared, mask, normalize), local_weight)

    return {
        "global": _weighted_mean(jnp.mean(squared, axis=(1, 2, 3)), weight),
        "face": local("face_mask", face_mask),
        "hand": local("hand_mask", hand_mask),
    }


def latent_mask(mask: Array, factor: int, method: str = "stride", threshold: float = 0.25) -> Array:
    """Mask at latent size: one cell per `factor` x `factor` pixels.

    "stride" reads pixel (factor i, factor j) and thresholds it at half of full scale: mask[::8, ::8] >= 128 for 8-bit
    masks, as in the reference; regions narrower than `factor` can vanish. "area" keeps cells whose covered fraction is
    at least `threshold`.

    Args: `mask` [H, W], [H, W, 1] or [B, H, W, 1]; bool, {0, 1} of any dtype, or 0..255. A mask with a value above 1
    is read as 0..255.
    Returns fp32 in {0, 1}, H and W divided by `factor`.
    Raises: ValueError when H or W is not a multiple of `factor`, or for an unknown method.
    """
    mask = jnp.asarray(mask).astype(jnp.float32)
    rows, columns = (0, 1) if mask.ndim == 2 else (mask.ndim - 3, mask.ndim - 2)
    height, width = mask.shape[rows], mask.shape[columns]
    if height % factor or width % factor:
        raise ValueError(f"latent_mask: mask is {height} x {width}; expected multiples of {factor}")
    peak = jnp.max(mask, axis=(rows, columns), keepdims=True)
    inside = mask >= jnp.where(peak > 1.0, 128.0, 0.5)
    if method == "stride":
        every = (slice(None),) * rows + (slice(None, None, factor), slice(None, None, factor))
        return inside[every].astype(jnp.float32)
    if method != "area":
        raise ValueError(f"latent_mask: unknown method {method!r}; known: stride, area")
    blocks = (height // factor, factor, width // factor, factor)
    cells = (*mask.shape[:rows], *blocks, *mask.shape[columns + 1 :])
    covered = jnp.mean(inside.astype(jnp.float32).reshape(cells), axis=(rows + 1, rows + 3))
    return (covered >= threshold).astype(jnp.float32)


def masked_mean(squared: Array, mask: Array, normalize: str) -> Array:
    """Mean of `mask * squared` of each sample, [B, H, W, C] -> fp32 [B]: over all elements ("pixels"), or over
    the area of the mask [B, H, W, 1] ("area"), where an empty mask gives 0.
    """
    mask = mask.astype(jnp.float32)
    per_sample = jnp.mean(squared * mask, axis=(1, 2, 3))
    if normalize == "pixels":
        return per_sample
    area = jnp.mean(mask, axis=(1, 2, 3))
    return jnp.where(area > 0, per_sample / jnp.where(area > 0, area, 1.0), 0.0)


def _weighted_mean(per_sample: Array, weight: Array | None) -> Array:
    return jnp.mean(per_sample if weight is None else per_sample * weight.astype(jnp.float32))
