"""A contrastive loss: of pairs of embeddings, each is to be nearer to its partner than to all others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

NEVER = -1e9  # a logit that no probability is left of
LEAST_SQUARE = 1e-12  # of the length of what is scaled to unit length


def contrastive_loss(first: Array, second: Array, valid: Array, temperature: float = 0.1) -> Array:
    """Symmetric InfoNCE of N pairs: the mean of both directions' cross entropies, fp32 scalar.

    s_ij = cos(first_i, second_j) / temperature; l = -(log softmax_j(s)_ii + log softmax_i(s)_ii) / 2, averaged over
    the pairs that are `valid`, among which alone partners are looked for; 0 without any.

    Args: `first`, `second` [N, D], any float dtype; `valid` bool [N]. Raises: ValueError when shapes do not fit.
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
    """Of unit length, or 0, whose gradient is then finite."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, LEAST_SQUARE))
