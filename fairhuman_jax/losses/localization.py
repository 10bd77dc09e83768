"""FastComposer's losses for subjects: where attention to their words lies, and the denoising error where they are.

Source: FastComposer (arXiv 2305.10431), fastcomposer/model.py; Face-diffuser (arXiv 2311.10329) trains its subject
model by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fairhuman_jax.losses.regions import masked_mean

Array = jax.Array

EPSILON = 1e-5


def localization_loss(columns: Sequence[Array], segmaps: Array, valid: Array, normalize: bool = False) -> Array:
    """How much more attention a subject's word gets outside the subject than on it: mean of the balanced L1 loss.

    l = sum(A (1 - m)) / (sum(1 - m) + e) - sum(A m) / (sum(m) + e), e = 1e-5, over pixels, for the attention A to one
    subject's token and its mask m at A's size (bilinear, antialiased). A sample's loss is the sum over its valid
    subjects divided by (their number + e), so 0 without any; then the mean over samples and heads, then over layers.
    Uniform attention gives 0, A = m almost -1.

    Args: `columns`, for each layer probabilities [B, heads, h, w, N] (`models.watched_columns`), sizes may differ;
    `segmaps` [B, N, H, W] in {0, 1}; `valid` [B, N], false on padding. `normalize` divides each A by (its maximum + e)
    first. Returns an fp32 scalar. Raises: ValueError without columns, or when shapes do not fit.
    """
    if not columns:
        raise ValueError("localization_loss: no columns; expected one array [B, heads, h, w, N] a layer")
    batch, subjects = segmaps.shape[:2]
    if valid.shape != (batch, subjects):
        raise ValueError(f"localization_loss: valid is {valid.shape}; expected {(batch, subjects)}")
    valid = valid.astype(jnp.float32)[:, None, :]
    count = jnp.sum(valid, axis=-1)
    losses = []
    for column in columns:
        if column.ndim != 5 or (column.shape[0], column.shape[-1]) != (batch, subjects):
            raise ValueError(f"localization_loss: columns are {column.shape}; expected ({batch}, ., ., ., {subjects})")
        attention = column.astype(jnp.float32)
        if normalize:
            attention /= jnp.max(attention, axis=(2, 3), keepdims=True) + EPSILON
        mask = _resize(segmaps, column.shape[2:4], antialias=True)
        mask = jnp.moveaxis(mask, 1, -1)[:, None]
        per_head = jnp.sum(valid * (_mean_on(attention, 1.0 - mask) - _mean_on(attention, mask)), axis=-1)
        losses.append(jnp.mean(per_head / (count + EPSILON)))
    return jnp.mean(jnp.stack(losses))


def object_mask(segmaps: Array, size: Sequence[int]) -> Array:
    """Where any subject is, at latent size: [B, N, H, W] -> fp32 [B, *size, 1] in [0, 1].

    Bilinear between pixel centres, without antialiasing: from 512 to 64, the mean of pixels 8 d + 3 and 8 d + 4 an
    axis. Maps of padding are zero.
    """
    inside = jnp.any(segmaps > 0, axis=1)
    return _resize(inside, size, antialias=False)[..., None]


def object_masked_loss(
    prediction: Array, target: Array, mask: Array, masked: Array, *, compat: str | None = None
) -> Array:
    """Mean squared error of each example, on its subjects alone where `masked` says so.

    sum(m^2 e^2) / sum(m^2), e = prediction - target: m multiplies both, and the mean is over what it lets through, so
    that a small subject counts as much as a large one. An example without subjects is left unmasked.
    `compat="reference"`: the published mean over all elements, mean(m^2 e^2), which is 0 without subjects.

    Args: `prediction`, `target` [B, h, w, c], any float dtype; `mask` [B, h, w, 1] (`object_mask`); `masked` bool [B],
    one coin a sample (the published trainer throws one a batch). Returns fp32 [B].
    Raises: ValueError when shapes do not fit, or for another `compat`.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"object_masked_loss: prediction {prediction.shape} and target {target.shape} differ in shape")
    if mask.shape != (*prediction.shape[:-1], 1):
        raise ValueError(f"object_masked_loss: mask is {mask.shape}; expected {(*prediction.shape[:-1], 1)}")
    if masked.shape != prediction.shape[:1]:
        raise ValueError(f"object_masked_loss: masked is {masked.shape}; expected {prediction.shape[:1]}")
    if compat not in (None, "reference"):
        raise ValueError(f"object_masked_loss: unknown compat {compat!r}; known: reference")
    squared = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    everywhere = jnp.mean(squared, axis=(1, 2, 3))
    weight = jnp.square(mask.astype(jnp.float32))
    if compat == "reference":
        return jnp.where(masked, masked_mean(squared, weight, "pixels"), everywhere)
    masked = masked & jnp.any(mask > 0, axis=(1, 2, 3))
    return jnp.where(masked, masked_mean(squared, weight, "area"), everywhere)


def _mean_on(attention: Array, mask: Array) -> Array:
    """The mean of attention [B, heads, h, w, N] where mask [B, 1, h, w, N] is 1 -> [B, heads, N]."""
    return jnp.sum(attention * mask, axis=(2, 3)) / (jnp.sum(mask, axis=(2, 3)) + EPSILON)


def _resize(maps: Array, size: Sequence[int], *, antialias: bool) -> Array:
    """Bilinear resize of the last two axes, half-pixel centres, fp32."""
    shape = (*maps.shape[:-2], *size)
    return jax.image.resize(maps.astype(jnp.float32), shape, "bilinear", antialias=antialias)
