"""Spatial transformer of the latent-diffusion UNets: self-attention, cross-attention to text, gated feed-forward.

Source: Rombach et al. 2022 (Latent Diffusion), section 3.3; module names are those of diffusers checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fairhuman_jax.models.attention import attention, attention_columns
from fairhuman_jax.models.layers import Conv, Dtype, GroupNorm, LayerNorm, Linear

ATTENTION_OUTPUT = "attention_output"
REMAT_POLICIES = ("none", "full", "attention", "offload")
COLUMNS = "attention_columns"  # the collection with the attention that watched transformers record


def rematerialise(module: type[nn.Module], remat: str, *, in_scan: bool = False) -> Any:
    """Apply one of the rematerialisation policies `none`, `full`, `attention` and `offload` to `module`.

    `full` keeps only the module's inputs for the backward pass; `attention` keeps its attention outputs as well, and
    `offload` keeps the attention outputs in the host's memory.
    `in_scan` drops the barriers against common-subexpression elimination, which a scan body does not need.
    Raises: ValueError for another policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {remat!r}; known: {', '.join(REMAT_POLICIES)}")
    if remat == "none":
        return module
    policy = None
    if remat == "attention":
        policy = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)
    if remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[ATTENTION_OUTPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return nn.remat(module, prevent_cse=not in_scan, policy=policy)


class Attention(nn.Module):
    """Multi-head attention from `x` [B, L, C] to `context` [B, M, D] (`x` itself when None) -> ([B, L, C], columns).

    The columns are the probabilities of attention to the tokens `watched` [B, N] of the context, float32
    [B, heads, L, N]; None without `watched`.

    Raises: ValueError when the number of heads does not divide the channels.
    """

    heads: int
    attention: str = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, watched: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        channels = x.shape[-1]
        if channels % self.heads:
            raise ValueError(f"Attention: {channels} channels do not divide into {self.heads} heads")
        context = x if context is None else context

        def project(name: str, source: jax.Array) -> jax.Array:
            y = Linear(channels, use_bias=False, dtype=self.dtype, name=name)(source)
            return y.reshape(*y.shape[:2], self.heads, channels // self.heads)

        query, key, value = project("to_q", x), project("to_k", context), project("to_v", context)
        y = attention(query, key, value, implementation=self.attention).reshape(x.shape)
        y = checkpoint_name(y, ATTENTION_OUTPUT)
        columns = None if watched is None else attention_columns(query, key, watched)
        return Linear(channels, dtype=self.dtype, name="to_out.0")(y), columns


class FeedForward(nn.Module):
    """GEGLU feed-forward `W2 (a * gelu(g))`, `[a, g] = W1 x`, hidden width 4 C: [B, L, C] -> [B, L, C].

    Source: Shazeer 2020 (GLU Variants Improve Transformer); exact (erf) GELU.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        hidden = Linear(8 * channels, dtype=self.dtype, name="net.0.proj")(x)
        value, gate = jnp.split(hidden, 2, axis=-1)
        return Linear(channels, dtype=self.dtype, name="net.2")(value * jax.nn.gelu(gate, approximate=False))


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to `text` [B, M, D] and feed-forward on tokens [B, L, C].

    Returns the tokens and the cross-attention's columns at `watched` [B, N], or None without `watched`.
    """

    heads: int
    attention: str = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, text: jax.Array, watched: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        def attend(name: str) -> Attention:
            return Attention(self.heads, self.attention, self.dtype, name=name)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, name=name)

        x = x + attend("attn1")(norm("norm1")(x))[0]
        attended, columns = attend("attn2")(norm("norm2")(x), text, watched)
        x = x + attended
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x)), columns


class Transformer2D(nn.Module):
    """`depth` transformer blocks over the pixels of `x` [B, H, W, C], with a residual around them.

    With `scan` the blocks are one scanned stack `transformer_blocks` whose leaves (parameters and LoRA updates) lead
    with the depth axis; without it they are `transformer_blocks.0`, `transformer_blocks.1`, ...
    With `watched` [B, N], positions in the text, the collection `COLUMNS` receives `cross_attention`, float32
    [depth, B, heads, H, W, N]: each block's probabilities of attention to these tokens.
    """

    heads: int
    depth: int = 1
    num_groups: int = 32
    linear_projection: bool = False
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, watched: jax.Array | None = None) -> jax.Array:
        batch, height, width, channels = x.shape
        y = GroupNorm(self.num_groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        y = self._projection("proj_in", channels)(y)
        y, columns = self._blocks(y.reshape(batch, height * width, channels), text.astype(self.dtype), watched)
        if columns is not None:
            columns = columns.reshape(*columns.shape[:3], height, width, -1)
            self.put_variable(COLUMNS, "cross_attention", columns)
        return x + self._projection("proj_out", channels)(y.reshape(x.shape))

    def _projection(self, name: str, channels: int) -> Callable[[jax.Array], jax.Array]:
        if self.linear_projection:
            return Linear(channels, dtype=self.dtype, name=name)
        return Conv(channels, kernel_size=1, padding=0, dtype=self.dtype, name=name)

    def _blocks(
        self, tokens: jax.Array, text: jax.Array, watched: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        block_class = rematerialise(BasicTransformerBlock, self.remat, in_scan=self.scan)

        def block(name: str) -> BasicTransformerBlock:
            return block_class(self.heads, self.attention, self.dtype, name=name)

        if not self.scan:
            columns = []
            for index in range(self.depth):
                tokens, column = block(f"transformer_blocks.{index}")(tokens, text, watched)
                columns.append(column)
            return tokens, None if watched is None else jnp.stack(columns)
        stack = nn.scan(
            lambda layer, carry, *context: layer(carry, *context),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.depth,
        )
        return stack(block("transformer_blocks"), tokens, text, watched)
