"""HumanSD's heatmap-guided denoising loss: what a pose network sees in the decoded error weighs the squared error.

Two forms. As published: `heatmap_weight`, which counts the joints that are *not* seen and takes the count through the
autoencoder's encoder. As the paper's figure shows it: `heatmap_mask`, one where joints are seen. Either goes into
`humansd_loss`.
Source: HumanSD (ICCV 2023, arXiv 2304.04269), ldm/models/diffusion/ddpm.py, LatentPoseText2ImageDiffusion_HumanSD.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fairhuman_jax.resizing import average_area, resize_bicubic

Array = jax.Array

SD_LATENT_SCALE = 0.18215


def heatmap_weight(
    eps_hat: Array,
    eps: Array,
    *,
    vae_decode: Callable[[Array], Array],
    vae_encode_moments: Callable[[Array], tuple[Array, Array]],
    pose_heatmap_fn: Callable[[Array], Array],
    key: Array | None,
    latent_scale: float = SD_LATENT_SCALE,
    heat_threshold: float = 0.05,
    sample_posterior: bool = True,
) -> Array:
    """The published weight W = s E(P), P = bicubic(number of joint types not seen in D((eps_hat - eps) / s)).

    Far from people P is the constant J, so W is mostly one constant a latent channel, s E(J), of either sign.
    Args: `eps_hat`, `eps` [B, h, w, c], noise; `vae_decode`: latents -> pictures [B, H, W, 3] about [-1, 1];
    `vae_encode_moments`: pictures -> mean, log-variance [B, h, w, c], both on unscaled latents; `pose_heatmap_fn`:
    pictures in [0, 1] -> heat maps [B, h', w', J] of any size; `key`: one, or typed keys [B], of the posterior sample,
    None where `sample_posterior` is false and the mean is taken.
    Returns fp32 [B, h, w, c] without gradient. Raises: ValueError for a posterior sample without a key.
    """
    picture, heat = _seen(eps_hat, eps, vae_decode, pose_heatmap_fn, latent_scale)
    missing = resize_bicubic(missing_joints(heat, heat_threshold), picture.shape[1:3])
    mean, logvar = vae_encode_moments(jnp.broadcast_to(missing, picture.shape))
    latents = mean.astype(jnp.float32)
    if sample_posterior:
        latents += jnp.exp(0.5 * logvar.astype(jnp.float32)) * _unit_noise(key, latents.shape)
    return jax.lax.stop_gradient(latent_scale * latents)


def heatmap_mask(
    eps_hat: Array,
    eps: Array,
    *,
    vae_decode: Callable[[Array], Array],
    pose_heatmap_fn: Callable[[Array], Array],
    latent_scale: float = SD_LATENT_SCALE,
    heat_threshold: float = 0.05,
) -> Array:
    """The intended weight: the share of each latent cell in which some joint is seen, M = 1[max_j A_j > threshold].

    Arguments as `heatmap_weight`. Returns fp32 [B, h, w, 1] in [0, 1] without gradient.
    """
    _, heat = _seen(eps_hat, eps, vae_decode, pose_heatmap_fn, latent_scale)
    seen = (jnp.max(heat, axis=-1, keepdims=True) > heat_threshold).astype(jnp.float32)
    return jax.lax.stop_gradient(average_area(seen, eps.shape[1:3]))


def humansd_loss(
    eps_hat: Array, eps: Array, W: Array, *, pose_loss_weight: float | Array = 0.1
) -> tuple[Array, Array, Array]:
    """Mean of (eps_hat - eps)^2 (1 + weight W), with that of each sample and the plain mean of (eps_hat - eps)^2.

    `eps_hat`, `eps` [B, h, w, c]; `W` broadcastable to them, `heatmap_weight` or `heatmap_mask`; no gradient flows
    through it. Returns fp32 scalars and [B]: (loss, per_sample, mse_plain). Raises: ValueError when shapes differ.
    """
    if eps_hat.shape != eps.shape:
        raise ValueError(f"humansd_loss: eps_hat {eps_hat.shape} and eps {eps.shape} differ in shape")
    squared = jnp.square(eps_hat.astype(jnp.float32) - eps.astype(jnp.float32))
    factor = 1.0 + pose_loss_weight * jax.lax.stop_gradient(W.astype(jnp.float32))
    per_sample = jnp.mean(squared * factor, axis=tuple(range(1, squared.ndim)))
    return jnp.mean(per_sample), per_sample, jnp.mean(squared)


def missing_joints(heatmaps: Array, threshold: float = 0.05) -> Array:
    """Number of heat maps that are at most `threshold`, at each pixel: fp32 [B, h, w, J] -> [B, h, w, 1] in 0 .. J."""
    return jnp.sum(heatmaps.astype(jnp.float32) <= threshold, axis=-1, keepdims=True).astype(jnp.float32)


def _seen(
    eps_hat: Array,
    eps: Array,
    vae_decode: Callable[[Array], Array],
    pose_heatmap_fn: Callable[[Array], Array],
    latent_scale: float,
) -> tuple[Array, Array]:
    """The decoded error as a picture in [0, 1] and the pose network's heat maps of it, without gradient."""
    error = jax.lax.stop_gradient(eps_hat.astype(jnp.float32) - eps.astype(jnp.float32))
    picture = jnp.clip((vae_decode(error / latent_scale).astype(jnp.float32) + 1.0) / 2.0, 0.0, 1.0)
    return picture, pose_heatmap_fn(picture).astype(jnp.float32)


def _unit_noise(key: Array | None, shape: tuple[int, ...]) -> Array:
    if key is None:
        raise ValueError("heatmap_weight: a posterior sample needs a key; expected one, or sample_posterior=False")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1:
        return jax.vmap(lambda one: jax.random.normal(one, shape[1:]))(key)
    return jax.random.normal(key, shape)
