"""Layers that all networks share: linear maps (with low-rank updates), convolutions, norms, timestep embedding.

Parameters are float32 unless a checkpoint was loaded in another dtype; `dtype` is the compute dtype. Norms take their
statistics in float32 whatever `dtype` is.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairhuman_jax.models.products import convolution, product

Dtype = jnp.dtype | type


class Linear(nn.Module):
    """`y = x W + b`, plus `(x down) up` when the `lora` collection holds `down` [in, r] and `up` [r, out] for it.

    The strength alpha / r of a low-rank update is folded into `up` by `models.lora.scale_lora`.
    Source of the update rule: Hu et al. 2021 (LoRA), equation 3.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = product(x, kernel.astype(self.dtype))
        if self.has_variable("lora", "down"):
            down, up = (_lora(self, name).astype(self.dtype) for name in ("down", "up"))
            y = y + product(product(x, down), up)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class Conv(nn.Module):
    """2-D convolution on NHWC with an HWIO kernel, plus a low-rank update when the `lora` collection holds one.

    `padding` counts pixels on every side, or is ((top, bottom), (left, right)). The update is a convolution of the
    same size, stride and padding with `down` [h, w, in, r], then `up` [r, out] on every pixel.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1
    dtype: Dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        x = x.astype(self.dtype)
        y = self._convolve(x, kernel)
        if self.has_variable("lora", "down"):
            y = y + product(self._convolve(x, _lora(self, "down")), _lora(self, "up").astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(self.dtype)
        return y

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        padding = self.padding
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        return convolution(x, kernel.astype(self.dtype), self.strides, padding)


def _lora(module: nn.Module, name: str) -> jax.Array:
    """A factor of the module's low-rank update, unboxed as `param` unboxes parameters."""
    return nn.meta.unbox(module.get_variable("lora", name))


class GroupNorm(nn.Module):
    """Group normalisation over space and channel groups; statistics in float32.

    Raises: ValueError when `num_groups` does not divide the number of channels.
    """

    num_groups: int = 32
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {self.num_groups} groups")
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        # Moments by channel, then by group: on a CPU, sums over whole rows are twice as fast as sums inside groups.
        wide = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        centred = wide - self._by_group(wide.mean(axis=1))[:, None]
        variance = self._by_group(jnp.square(centred).mean(axis=1))
        gain = jax.lax.rsqrt(variance + self.epsilon) * scale.astype(jnp.float32)
        return (centred * gain[:, None] + bias.astype(jnp.float32)).reshape(x.shape).astype(self.dtype)

    def _by_group(self, moments: jax.Array) -> jax.Array:
        """[B, C] -> the mean over each channel's group, [B, C]."""
        batch, channels = moments.shape
        means = moments.reshape(batch, self.num_groups, -1).mean(axis=-1)
        return jnp.repeat(means, channels // self.num_groups, axis=1)


class LayerNorm(nn.Module):
    """Normalisation over the last axis; statistics in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def timestep_embedding(
    timesteps: jax.Array,
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
) -> jax.Array:
    """Sinusoidal embedding [B, dim] of timesteps [B], float32.

    Frequencies are `max_period ** (-i / (dim / 2 - freq_shift))`; `flip_sin_to_cos` puts the cosines first.
    Source: Ho et al. 2020 (DDPM), appendix B, in the parametrisation of diffusers' UNet configs.
    """
    half = dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(-jnp.log(max_period) * exponent)[None, :]
    first, second = (jnp.cos, jnp.sin) if flip_sin_to_cos else (jnp.sin, jnp.cos)
    embedding = jnp.concatenate([first(angles), second(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of a diffusers or transformers config. Raises: ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
