"""ControlNet: a copy of a UNet's encoder that reads a condition image and steers the UNet by residuals.

Source: Zhang et al. 2023 (Adding Conditional Control to Text-to-Image Diffusion Models), section 3; config keys and
module names are those of diffusers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.models.conditional_encoder import RUNTIME_FIELDS, ConditionalEncoder
from fairhuman_jax.models.layers import Conv, Dtype
from fairhuman_jax.models.unet import UNet2DCondition
from fairhuman_jax.models.unet_blocks import MidBlock, Skips, encode

PyTree = Any

CHANNEL_ORDERS = ("rgb", "bgr")
CONDITION = "controlnet_cond_embedding"


class ConditionEmbedding(nn.Module):
    """Condition image [B, f H, f W, C] -> [B, H, W, features]; f doubles with each of `widths` after the first.

    Convolutions 3x3 with SiLU between: one to `widths[0]`, then a plain and a strided one for each further width, and
    the last, which ControlNets start with at zero.
    """

    features: int
    widths: tuple[int, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, condition: jax.Array) -> jax.Array:
        x = nn.silu(Conv(self.widths[0], dtype=self.dtype, name="conv_in")(condition))
        for index, (narrow, wide) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            x = nn.silu(Conv(narrow, dtype=self.dtype, name=f"blocks.{2 * index}")(x))
            x = nn.silu(Conv(wide, strides=2, dtype=self.dtype, name=f"blocks.{2 * index + 1}")(x))
        return Conv(self.features, dtype=self.dtype, name="conv_out")(x)


class ControlNet(ConditionalEncoder):
    """Control network (latents, timesteps, text, condition) -> residuals, a twin of diffusers' `ControlNetModel`.

    See `ConditionalEncoder` for the other fields, `from_config` and `to_config`. Training starts from
    `controlnet_from_unet`, not from `init`, whose output convolutions are not zero.
    """

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    CLASS_NAME: ClassVar[str] = "ControlNetModel"

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array | None,
        condition: jax.Array,
        scale: jax.Array | float = 1.0,
        added_cond: dict[str, jax.Array] | None = None,
    ) -> tuple[Skips, jax.Array]:
        """(residuals of the UNet's skips, residual of its middle block), in the compute dtype.

        Shapes: latents [B, H, W, in_channels], timesteps [B] or a scalar, text [B, L, cross_attention_dim], condition
        [B, f H, f W, conditioning_channels] in [0, 1] (f = `condition_factor`, 8 in published networks), `added_cond`
        as for the UNet. `scale` multiplies all residuals: a number or [B], and may be traced. With
        `global_pool_conditions` every residual is its mean over the pixels, [B, 1, 1, C].
        Raises: ValueError for text or `added_cond` that do not fit; a condition of another size.
        """
        self.check_text(text)
        factor, (height, width) = self.condition_factor, latents.shape[1:3]
        if condition.shape[1:] != (factor * height, factor * width, self.conditioning_channels):
            raise ValueError(
                f"{self.CLASS_NAME}: condition is {list(condition.shape[1:])}, but latents {height}x{width} need "
                f"[{factor * height}, {factor * width}, {self.conditioning_channels}]"
            )
        if self.controlnet_conditioning_channel_order == "bgr":
            condition = condition[..., ::-1]
        time = self.embed_time(timesteps, latents.shape[0], added_cond)
        first = self.block_out_channels[0]
        x = Conv(first, dtype=self.dtype, name="conv_in")(latents)
        x = x + ConditionEmbedding(first, self.conditioning_embedding_out_channels, self.dtype, name=CONDITION)(
            condition
        )
        x, skips = encode(self.down_specs(), x, time, text)
        mid = self.mid_spec()
        if mid is not None:
            x = MidBlock(mid, name="mid_block")(x, time, text)
        down = tuple(self._residual(f"controlnet_down_blocks.{i}", skip, scale) for i, skip in enumerate(skips))
        return down, self._residual("controlnet_mid_block", x, scale)

    @property
    def condition_factor(self) -> int:
        """Pixels of the condition image a latent pixel, along one side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def example_inputs(self) -> tuple:
        """Smallest arrays the network accepts, for `jax.eval_shape(module.init, key, *inputs)`."""
        latents, timesteps, text, added_cond = super().example_inputs()
        side = self.condition_factor * latents.shape[1]
        condition = jnp.zeros((1, side, side, self.conditioning_channels))
        return latents, timesteps, text, condition, 1.0, added_cond

    def validate(self) -> None:
        """Refuses, by name, fields that contradict each other or ask for what does not exist."""
        super().validate()
        order = self.controlnet_conditioning_channel_order
        if order not in CHANNEL_ORDERS:
            raise ValueError(f"{self.CLASS_NAME}: controlnet_conditioning_channel_order {order!r} is not rgb or bgr")

    def _residual(self, name: str, x: jax.Array, scale: jax.Array | float) -> jax.Array:
        x = Conv(x.shape[-1], kernel_size=1, padding=0, dtype=self.dtype, name=name)(x)
        x = x * jnp.asarray(scale, x.dtype).reshape(-1, 1, 1, 1)
        return x.mean(axis=(1, 2), keepdims=True) if self.global_pool_conditions else x


def controlnet_from_unet(
    unet: UNet2DCondition, unet_params: Mapping[str, Any], key: jax.Array, **fields: Any
) -> tuple[ControlNet, PyTree]:
    """The ControlNet that training starts from, and its parameters: the UNet's own encoder, with residuals of zero.

    Encoder and time embeddings are the UNet's arrays (not copies); the condition embedding is drawn from `key`, but
    its last convolution is zero, and so are the output convolutions. `fields` sets config keys that a UNet does not
    have, such as `conditioning_channels`.
    Raises: ValueError for parameters that are not those of `unet`.
    """
    shared = {name: getattr(unet, name) for name in (*ConditionalEncoder.config_fields(), *RUNTIME_FIELDS)}
    module = ControlNet(**shared, **fields)
    module.validate()
    shapes = jax.eval_shape(module.init, key, *module.example_inputs())["params"]
    params = {name: _taken(unet_params, name, tree) for name, tree in shapes.items() if not _own(name)}
    params |= {name: _zeros(tree) for name, tree in shapes.items() if _own(name)}
    kernels = {name: tree["kernel"].shape for name, tree in shapes[CONDITION].items() if name != "conv_out"}
    for name, kernel in _drawn(key, kernels).items():
        params[CONDITION][name]["kernel"] = kernel
    return module, params


def _own(name: str) -> bool:
    """Whether a part of a ControlNet is none of its UNet's."""
    return name.startswith("controlnet_")


def _drawn(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Convolution kernels, each uniform between plus and minus 1 / sqrt(values that a pixel sums); one draw for all."""
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    numbers = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1.0, maxval=1.0), ends[:-1])
    pairs = zip(shapes.items(), numbers, strict=True)
    return {name: part.reshape(shape) * math.prod(shape[:-1]) ** -0.5 for (name, shape), part in pairs}


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), tree)


def _taken(unet_params: Mapping[str, Any], name: str, shapes: PyTree) -> PyTree:
    """`unet_params[name]`, refused unless its leaves have the given shapes."""
    tree = unet_params.get(name)
    if jax.tree.map(jnp.shape, tree) != jax.tree.map(jnp.shape, shapes):
        raise ValueError(f"controlnet_from_unet: {name} of unet_params is not that of the given UNet")
    return tree
