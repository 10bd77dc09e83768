"""The one attention function of the package, with its implementations behind one name.

Scaled dot-product attention `softmax(q k^T / sqrt(d)) v` over [batch, length, heads, head_dim].
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla", "cudnn")


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str = "xla", causal: bool = False
) -> jax.Array:
    """`softmax(q k^T / sqrt(head_dim)) v`: query [B, Lq, H, D], key and value [B, Lk, H, D] -> [B, Lq, H, D].

    `xla` runs everywhere, with scores and softmax in float32. `cudnn` is NVIDIA's fused kernel: bfloat16 or float16,
    head_dim a multiple of 8 and at most 128 (256 from Hopper on).
    Errors: an unknown implementation is refused by name.
    """
    if implementation == "xla":
        return _xla(query, key, value, causal=causal)
    if implementation == "cudnn":
        kernel = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
        return batchable_backward(kernel)(query, key, value)
    raise ValueError(f"unknown attention implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def batchable_backward(kernel):
    """`kernel(q, k, v)` whose pull-back may be vmapped over cotangents alone.

    The fair step pulls K cotangents back through one forward pass with `vmap`. A fused kernel whose backward batching
    rule expects batched primals as well (cuDNN in jax 0.10) fails there. Here the forward keeps the kernel's own vjp
    closure, a pytree of residuals, and the backward applies it once a cotangent; everything around the attention stays
    batched, and nothing is recomputed.
    """

    @jax.custom_vjp
    def wrapped(query, key, value):
        return kernel(query, key, value)

    def forward(query, key, value):
        return jax.vjp(kernel, query, key, value)

    @jax.custom_batching.sequential_vmap
    def pull_back(residual_vjp, cotangent):
        return residual_vjp(cotangent)

    wrapped.defvjp(forward, pull_back)
    return wrapped
