"""Residual, down, middle and up blocks of the conditional UNet; ControlNet's encoder is built from the same blocks.

Source: Ho et al. 2020 (DDPM) for the residual blocks, Rombach et al. 2022 for the conditioning; module names are those
of diffusers checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairhuman_jax.models.layers import Conv, Dtype, GroupNorm, Linear, activation
from fairhuman_jax.models.transformer import Transformer2D, rematerialise

Skips = tuple[jax.Array, ...]


@dataclass(frozen=True)
class BlockSpec:
    """Structure and computation of one resolution of the UNet."""

    channels: int
    layers: int = 2  # residual blocks of the down block; the up block has one more
    cross_attention: bool = False
    resample: bool = True  # the down block halves, the up block doubles the resolution at its end
    heads: int = 8  # used only with `cross_attention`
    depth: int = 1  # transformer blocks per attention, used only with `cross_attention`
    num_groups: int = 32
    epsilon: float = 1e-5
    act_fn: str = "silu"
    linear_projection: bool = False
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def resnet(self, name: str) -> ResnetBlock:
        """A residual block of this resolution, under its rematerialisation policy."""
        block = rematerialise(ResnetBlock, self.remat)
        return block(self.channels, self.num_groups, self.epsilon, self.act_fn, self.dtype, name=name)

    def transformer(self, name: str) -> Callable[..., jax.Array]:
        """A spatial transformer of this resolution."""
        return Transformer2D(
            heads=self.heads,
            depth=self.depth,
            num_groups=self.num_groups,
            linear_projection=self.linear_projection,
            attention=self.attention,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            name=name,
        )


class ResnetBlock(nn.Module):
    """`shortcut(x) + conv(act(norm(conv(act(norm(x))) + W act(time))))`: [B, H, W, C], time [B, E] -> [B, H, W, F]."""

    features: int
    num_groups: int = 32
    epsilon: float = 1e-5
    act_fn: str = "silu"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        act = activation(self.act_fn)
        y = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm1")(x)
        y = Conv(self.features, dtype=self.dtype, name="conv1")(act(y))
        shift = Linear(self.features, dtype=self.dtype, name="time_emb_proj")(act(time))
        y = y + shift[:, None, None, :]
        y = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm2")(y)
        y = Conv(self.features, dtype=self.dtype, name="conv2")(act(y))
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


class DownBlock(nn.Module):
    """`layers` residual blocks, each with a transformer if `spec.cross_attention`, then a strided convolution.

    Returns the output and one skip per layer, plus one after the convolution. `feature` (T2I-Adapter) is added
    where adapters are trained to act: before the convolution in a cross-attention block, after it in a plain block.
    `watched` as in `Transformer2D`.
    """

    spec: BlockSpec

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        text: jax.Array | None,
        feature: jax.Array | None = None,
        watched: jax.Array | None = None,
    ) -> tuple[jax.Array, Skips]:
        spec, skips = self.spec, []
        for layer in range(spec.layers):
            x = spec.resnet(f"resnets.{layer}")(x, time)
            if spec.cross_attention:
                x = spec.transformer(f"attentions.{layer}")(x, text, watched)
                if feature is not None and layer == spec.layers - 1:
                    x = x + feature.astype(x.dtype)
            skips.append(x)
        if spec.resample:
            x = Conv(spec.channels, strides=2, dtype=spec.dtype, name="downsamplers.0.conv")(x)
            skips.append(x)
        if feature is not None and not spec.cross_attention:
            x = x + feature.astype(x.dtype)
            skips[-1] = x
        return x, tuple(skips)


class MidBlock(nn.Module):
    """Residual block, then transformer and second residual block if `spec.cross_attention`: [B, H, W, C] kept.

    `watched` as in `Transformer2D`.
    """

    spec: BlockSpec

    @nn.compact
    def __call__(
        self, x: jax.Array, time: jax.Array, text: jax.Array | None, watched: jax.Array | None = None
    ) -> jax.Array:
        x = self.spec.resnet("resnets.0")(x, time)
        if self.spec.cross_attention:
            x = self.spec.transformer("attentions.0")(x, text, watched)
            x = self.spec.resnet("resnets.1")(x, time)
        return x


class UpBlock(nn.Module):
    """`layers + 1` residual blocks, each with one skip as input (the last skip first), then doubling and a convolution.

    `size` (height, width) is the resolution of the next skip: latents that do not halve evenly need it.
    `watched` as in `Transformer2D`.
    """

    spec: BlockSpec

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: Skips,
        time: jax.Array,
        text: jax.Array | None,
        size: tuple[int, int] | None = None,
        watched: jax.Array | None = None,
    ) -> jax.Array:
        spec = self.spec
        for layer, skip in enumerate(reversed(skips)):
            x = spec.resnet(f"resnets.{layer}")(jnp.concatenate([x, skip], axis=-1), time)
            if spec.cross_attention:
                x = spec.transformer(f"attentions.{layer}")(x, text, watched)
        if spec.resample:
            x = resize_nearest(x, size)
            x = Conv(spec.channels, dtype=spec.dtype, name="upsamplers.0.conv")(x)
        return x


def resize_nearest(x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Nearest-neighbour resize of [B, H, W, C] to `size` (twice as large when None): source = floor(i * in / out)."""
    if size is None:
        size = (2 * x.shape[1], 2 * x.shape[2])
    for axis, length in zip((1, 2), size, strict=True):
        source = x.shape[axis]
        if length == 2 * source:
            x = jnp.repeat(x, 2, axis=axis)
        else:
            x = jnp.take(x, jnp.arange(length) * source // length, axis=axis)
    return x


def encode(
    specs: Sequence[BlockSpec],
    x: jax.Array,
    time: jax.Array,
    text: jax.Array | None,
    features: Sequence[jax.Array] = (),
    watched: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Skips]:
    """Apply the down path `down_blocks.0`, `down_blocks.1`, ...: returns the output and all skips, with `x` first.

    Call it from a compact method, whose module gets the blocks. `features` are T2I-Adapter features, one per block;
    `watched` maps the names of watched blocks to positions of tokens.
    """
    skips, watched = (x,), watched or {}
    for index, spec in enumerate(specs):
        feature = features[index] if index < len(features) else None
        name = f"down_blocks.{index}"
        x, new = DownBlock(spec, name=name)(x, time, text, feature, watched.get(name))
        skips += new
    return x, skips
