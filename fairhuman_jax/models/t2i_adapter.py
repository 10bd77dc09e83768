"""T2I-Adapter: a small convolutional network that turns a condition image into features for a UNet's down blocks.

Source: Mou et al. 2023 (T2I-Adapter), section 3.2; config keys and module names are those of diffusers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairhuman_jax.models.layers import Conv, Dtype

FULL, FULL_XL, LIGHT = ADAPTER_TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One feature's part of an adapter: its channels inside and out, and whether it halves the resolution first."""

    channels: int
    features: int
    down: bool


class AdapterResnet(nn.Module):
    """`x + conv(relu(conv3x3(x)))`; the second convolution is 1x1, or 3x3 in light adapters."""

    second_kernel: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.relu(Conv(x.shape[-1], dtype=self.dtype, name="block1")(x))
        kernel = self.second_kernel
        return x + Conv(x.shape[-1], kernel, padding=kernel // 2, dtype=self.dtype, name="block2")(hidden)


class AdapterBlock(nn.Module):
    """One stage: [B, H, W, C] -> [B, H or ceil(H / 2), W or ceil(W / 2), features]."""

    stage: Stage
    depth: int
    light: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv1x1(features: int, name: str) -> Conv:
            return Conv(features, kernel_size=1, padding=0, dtype=self.dtype, name=name)

        if self.stage.down:
            x = nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)
        if self.light or x.shape[-1] != self.stage.channels:
            x = conv1x1(self.stage.channels, "in_conv")(x)
        for index in range(self.depth):
            x = AdapterResnet(3 if self.light else 1, self.dtype, name=f"resnets.{index}")(x)
        return conv1x1(self.stage.features, "out_conv")(x) if self.light else x


class Adapter(nn.Module):
    """The stages one after the other on the unshuffled image; each output is a feature."""

    stages: tuple[Stage, ...]
    depth: int
    light: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        features = []
        if not self.light:
            x = Conv(self.stages[0].channels, dtype=self.dtype, name="conv_in")(x)
        for index, stage in enumerate(self.stages):
            x = AdapterBlock(stage, self.depth, self.light, self.dtype, name=f"body.{index}")(x)
            features.append(x)
        return tuple(features)


class T2IAdapter(nn.Module):
    """Condition image -> features for `UNet2DCondition(adapter_features=...)`, a twin of diffusers' `T2IAdapter`.

    Fields are the keys of the `config.json`. Of the runtime fields of every network only `dtype` changes this one:
    it has no equal blocks to scan, no attention, and too few activations to rematerialise.
    Source: Mou et al. 2023 (T2I-Adapter), section 3.2.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = FULL
    dtype: Dtype = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    CLASS_NAME: ClassVar[str] = "T2IAdapter"
    CONFIG_FIELDS: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "channels",
        "num_res_blocks",
        "downscale_factor",
        "adapter_type",
    )

    @classmethod
    def from_config(cls, config: dict[str, Any], **runtime: Any) -> T2IAdapter:
        """The adapter a diffusers `config.json` describes; unknown keys and types are refused by name."""
        if config.get("_class_name", cls.CLASS_NAME) != cls.CLASS_NAME:
            raise ValueError(f"{cls.CLASS_NAME}: this config.json is of class {config['_class_name']!r}")
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(set(settings) - set(cls.CONFIG_FIELDS)):
            raise ValueError(f"{cls.CLASS_NAME}: unknown config keys {', '.join(unknown)}")
        if "channels" in settings:
            settings["channels"] = tuple(settings["channels"])
        module = cls(**settings, **runtime)
        module.stages()
        return module

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that diffusers loads this adapter from."""
        fields = {key: getattr(self, key) for key in self.CONFIG_FIELDS}
        return {"_class_name": self.CLASS_NAME, **fields, "channels": list(self.channels)}

    def stages(self) -> tuple[Stage, ...]:
        """One stage a feature. The full adapter halves before each but the first, the XL one before the third only.

        Raises: ValueError for an unknown adapter type; channels that an XL adapter cannot have.
        """
        widths = self.channels
        if self.adapter_type == FULL:
            return tuple(Stage(width, width, index > 0) for index, width in enumerate(widths))
        if self.adapter_type == FULL_XL:
            if any(widths[i] != widths[i - 1] for i in range(3, len(widths))):
                raise ValueError(f"{self.CLASS_NAME}: channels {list(widths)} must be equal from the third on")
            return tuple(Stage(width, width, index == 2) for index, width in enumerate(widths))
        if self.adapter_type == LIGHT:
            return tuple(Stage(w // 4, w, index > 0) for index, w in enumerate((*widths, widths[-1])))
        raise ValueError(
            f"{self.CLASS_NAME}: adapter_type {self.adapter_type!r} is not known; known: {', '.join(ADAPTER_TYPES)}"
        )

    def example_inputs(self) -> tuple[jax.Array]:
        """Arguments for `jax.eval_shape(module.init, key, *inputs)`."""
        return (jnp.zeros((1, self.downscale_factor, self.downscale_factor, self.in_channels)),)

    @nn.compact
    def __call__(self, condition: jax.Array) -> tuple[jax.Array, ...]:
        """Condition [B, H, W, in_channels] in [0, 1] -> features, one a stage, [B, H/f, W/f, channels] the first.

        f = downscale_factor. For SD 1.x they halve in turn; for SDXL the second keeps the size of the first and the
        fourth that of the third, as its UNet's down blocks do. In the compute dtype.
        Raises: ValueError for another number of channels; H or W that f does not divide.
        """
        factor = self.downscale_factor
        batch, height, width, channels = condition.shape
        if channels != self.in_channels or height % factor or width % factor:
            raise ValueError(
                f"{self.CLASS_NAME}: condition is {list(condition.shape[1:])}, but must have sides that {factor} "
                f"divides and {self.in_channels} channels"
            )
        # Channels of the checkpoint run over image channel, row, column inside each cell.
        cells = condition.reshape(batch, height // factor, factor, width // factor, factor, channels)
        cells = cells.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // factor, width // factor, -1)
        light = self.adapter_type == LIGHT
        return Adapter(self.stages(), self.num_res_blocks, light, self.dtype, name="adapter")(cells)
