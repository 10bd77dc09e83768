"""The package's attention function, one name for several implementations.

Scaled dot-product attention `softmax(q k^T / sqrt(d)) v` over [batch, length, heads, head_dim].
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "blocked", "cudnn", "splash")
CUDNN_HEAD_DIM = {8.0: 128, 9.0: 256}  # widest head by compute capability
NOT_AT_HAND = "8.0"  # compute capability that jax assumes for an absent NVIDIA GPU
SPLASH_LENGTH = 1024  # shorter sequences are faster without the kernel
SPLASH_BLOCK = 512
BLOCKED_LENGTH, BLOCK = 1024, 512  # length from which `blocked` is faster on a CPU; queries per block
SPLASH_BLOCK_SIZES = (
    *("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str = "auto", causal: bool = False
) -> jax.Array:
    """`softmax(q k^T / sqrt(head_dim)) v`: query [B, Lq, H, D], key and value [B, Lk, H, D] -> [B, Lq, H, D].

    `xla` runs everywhere, with scores and softmax in float32. `blocked` does the same one head and `BLOCK` queries at
    a time, for CPUs, which run batched products at a fifth of the rate of plain products. `cudnn` is NVIDIA's fused
    kernel: bfloat16 or float16, head_dim a multiple of 8 and at most 128 (256 from Hopper on), for even lengths; `xla`
    replaces it for odd lengths (77 tokens of text), where jax 0.10 has no backward pass. `splash` is the fused TPU
    kernel for self-attention of at least 1024 tokens without a mask; `xla` replaces it elsewhere. Off a TPU it is
    interpreted, slowly. `auto` chooses by platform (`target`) and shapes when the call is traced.
    Raises: ValueError for an unknown implementation.
    """
    if implementation == "auto":
        implementation = fitting(query, key, causal, *target(), unsplit())
    unfit = {"splash": not _splash_fits(query, key, causal), "cudnn": not _cudnn_fits(query, key)}
    if implementation == "xla" or unfit.get(implementation, False):
        return _xla(query, key, value, causal=causal)
    if implementation == "blocked":
        return _blocked(query, key, value, causal=causal)
    if implementation == "cudnn":
        kernel = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
        return batchable_backward(kernel)(query, key, value)
    if implementation == "splash":
        return _splash(query, key, value)
    raise ValueError(f"unknown attention implementation {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")


def attention_columns(query: jax.Array, key: jax.Array, positions: jax.Array) -> jax.Array:
    """The columns `positions` of `softmax(q k^T / sqrt(head_dim))`: the attention of every query to these keys.

    query [B, Lq, H, D], key [B, Lk, H, D], positions int [B, N] in 0 .. Lk - 1 -> float32 [B, H, Lq, N]. The softmax is
    over all keys. A position beyond the keys gives NaN.
    """
    return jnp.take_along_axis(_softmax(query, key), positions[:, None, None, :], axis=-1)


def fitting(query: jax.Array, key: jax.Array, causal: bool, platform: str, capability: str, whole: bool) -> str:
    """Choose the implementation for `auto`, by `platform` and by the shapes and dtype of `query` and `key`.

    `capability` is the compute capability of an NVIDIA device, such as 9.0; `whole` is True when the compiler does not
    split the program over devices.
    """
    if platform == "gpu" and capability.replace(".", "").isdigit():  # other makers' devices report no number
        widest = max((width for least, width in CUDNN_HEAD_DIM.items() if float(capability) >= least), default=0)
        half, width = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
        return "cudnn" if half and width <= widest and width % 8 == 0 and _cudnn_fits(query, key) else "xla"
    if platform == "cpu":
        return "blocked" if whole and min(query.shape[1], key.shape[1]) >= BLOCKED_LENGTH else "xla"
    return "splash" if platform == "tpu" and whole and _splash_fits(query, key, causal) else "xla"


def target() -> tuple[str, str]:
    """Target of the program being traced: (platform, NVIDIA compute capability or "").

    Inside a `shard_map` it is the target of the mesh, whose devices may be absent in ahead-of-time compilation;
    otherwise it is the default device.
    """
    device = jax.local_devices()[0]
    meant = jax.sharding.get_abstract_mesh().abstract_device
    if meant is not None and meant.platform != device.platform:
        return meant.platform, NOT_AT_HAND if meant.device_kind.startswith("NVIDIA") else ""
    return device.platform, str(getattr(device, "compute_capability", ""))


def unsplit() -> bool:
    """Whether the traced program runs on one device. With several devices that holds only inside a `shard_map`.

    The compiler splits other programs over devices, which it cannot do with the TPU kernel.
    """
    return jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual


def _cudnn_fits(query: jax.Array, key: jax.Array) -> bool:
    return query.shape[1] % 2 == key.shape[1] % 2 == 0


def _splash_fits(query: jax.Array, key: jax.Array, causal: bool) -> bool:
    return query.shape[1] == key.shape[1] >= SPLASH_LENGTH and not causal


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool) -> jax.Array:
    if target()[0] != "cpu":
        weights = _softmax(query, key, causal).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    # On a CPU, products over one merged axis of batch and heads are faster; float32 sums as in models/products.py.
    queries, keys, values = (_by_head(x) for x in (query, key, value))
    scores = jnp.einsum("bqd,bkd->bqk", queries, keys, preferred_element_type=jnp.float32)
    weights = _probabilities(scores, query.shape[-1], causal).astype(value.dtype)
    summed = jnp.einsum("bqk,bkd->bqd", weights, values, preferred_element_type=jnp.float32)
    return _from_heads(summed.astype(value.dtype), query.shape[2])


def _by_head(x: jax.Array) -> jax.Array:
    """[B, L, H, D] -> [B H, L, D]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[-1])


def _from_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B H, L, D] -> [B, L, H, D]."""
    return x.reshape(-1, heads, *x.shape[1:]).swapaxes(1, 2)


def _softmax(query: jax.Array, key: jax.Array, causal: bool = False) -> jax.Array:
    """`softmax(q k^T / sqrt(head_dim))`, float32 [B, H, Lq, Lk]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return _probabilities(scores, query.shape[-1], causal)


def _probabilities(scores: jax.Array, width: int, causal: bool) -> jax.Array:
    """Softmax over the last axis of float32 `scores / sqrt(width)` [..., Lq, Lk]."""
    scores = scores * width**-0.5
    if causal:
        allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _blocked(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool) -> jax.Array:
    length, heads, width = query.shape[1:]
    padded = jnp.pad(query, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
    places = jnp.arange(padded.shape[1]).reshape(-1, BLOCK)
    allowed_from = jnp.arange(key.shape[1])

    def one_head(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, keys, values = arrays

        def one_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, place = block
            scores = jnp.dot(rows, keys, preferred_element_type=jnp.float32)
            if causal:
                scores = jnp.where(allowed_from <= place[:, None], scores, jnp.finfo(jnp.float32).min)
            weights = _weights(scores, width).astype(values.dtype)
            sums = jnp.dot(weights, values, preferred_element_type=jnp.float32)
            return (sums[:, :-1] / sums[:, -1:]).astype(values.dtype)

        return jax.lax.map(one_block, (queries.reshape(*places.shape, width), places)).reshape(-1, width)

    # With a last column of ones the product sums the weights as well, which saves a pass over them.
    summed = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    result = jax.lax.map(one_head, (_by_head(padded), _by_head(key).swapaxes(1, 2), _by_head(summed)))
    return _from_heads(result, heads)[:, :length]


def _weights(scores: jax.Array, width: int) -> jax.Array:
    """Softmax of `scores / sqrt(width)` without its division by the sum, which costs less after the next product."""
    return jnp.exp((scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))) * width**-0.5)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The TPU kernel, on lengths padded to full blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # here, because it takes long to import

    _, length, heads, width = query.shape
    rows = -length % SPLASH_BLOCK
    query = query * jnp.asarray(width**-0.5, query.dtype)
    padded = (jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value))
    # Padded keys form a separate segment, so that no real query attends to them.
    segment = jnp.int32(jnp.arange(length + rows) >= length)
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((length + rows, length + rows))] * heads)
    sizes: dict[str, Any] = dict.fromkeys(SPLASH_BLOCK_SIZES, SPLASH_BLOCK)
    kernel = splash_attention.make_splash_mha(
        mask,
        block_sizes=splash_attention.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=target()[0] != "tpu",
    )
    batched = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = cast(jax.Array, batched(*padded, splash_attention.SegmentIds(segment, segment) if rows else None))
    return out.swapaxes(1, 2)[:, :length]


def batchable_backward(kernel):
    """Wrap `kernel(q, k, v)` so that its pull-back can be vmapped over cotangents only.

    The fair step pulls K cotangents back through one forward pass with `vmap`. A fused kernel whose backward batching
    rule expects batched primals as well (cuDNN in jax 0.10) fails there. Here the forward keeps the kernel's own vjp
    closure, a pytree of residuals, and the backward applies it once per cotangent; everything around the attention
    stays batched, and nothing is recomputed.
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
