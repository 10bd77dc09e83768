"""A contrastive loss that trains each embedding to be more similar to its partner than to all other embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

NEVER = -1e9  # a logit whose probability after the softmax is 0
LEAST_SQUARE = 1e-12  # smallest squared length that `_unit` divides by


def contrastive_loss(first: Array, second: Array, valid: Array, temperature: float = 0.1) -> Array:
    """Symmetric InfoNCE of N pairs: the mean of both directions' cross entropies, fp32 scalar.

    s_ij = cos(first_i, second_j) / temperature; l = -(log softmax_j(s)_ii + log softmax_i(s)_ii) / 2, averaged over
    the `valid` pairs. Both softmaxes run over valid pairs only; the loss is 0 when no pair is valid.

    Args: `first`, `second` [N, D], any float dtype; `valid` bool [N].
    Raises: ValueError when the shapes do not match.
    Source: van den Oord et al. 2018 (InfoNCE); Radford et al. 2021 (CLIP), figure 3.
    """
    if first.ndim != 2 or first.shape != second.shape or valid.shape != first.shape[:1]:
        raise ValueError(
            f"contrastive_loss: embeddings are {first.shape} and {second.shape}, valid {valid.shape}; expected [N, D], "
            "[N, D], [N]"
        )
    first, second = (_unit(x.astype(jnp.float32)) for x in (first, second))
    logits = first @ second.T / temperature
    logits = jnp.where(valid[:, None] & valid[None, :], logits, NEVER)
    own = jnp.diagonal(logits)
    errors = [jax.nn.logsumexp(logits, axis=axis) - own for axis in (0, 1)]
    return jnp.sum(jnp.where(valid, (errors[0] + errors[1]) / 2, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def _unit(x: Array) -> Array:
    """Scale each vector to unit length; a zero vector stays 0 and has a finite gradient."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, LEAST_SQUARE))
