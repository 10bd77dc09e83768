"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL, built from any diffusers `config.json` of that family.

Source: Rombach et al. 2022 (Latent Diffusion); Podell et al. 2023 (SDXL); module names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairhuman_jax.models.conditional_encoder import ConditionalEncoder, block_kind
from fairhuman_jax.models.layers import Conv, GroupNorm, activation
from fairhuman_jax.models.unet_blocks import BlockSpec, MidBlock, Skips, UpBlock, encode


class UNet2DCondition(ConditionalEncoder):
    """Denoising network (latents, timesteps, text) -> prediction, a twin of diffusers' `UNet2DConditionModel`.

    See `ConditionalEncoder` for fields, `from_config`, `to_config` and `example_inputs`.
    """

    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    sample_size: int | tuple[int, int] | None = None

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array | None = None,
        added_cond: dict[str, jax.Array] | None = None,
        down_residuals: Sequence[jax.Array] | None = None,
        mid_residual: jax.Array | None = None,
        adapter_features: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """Prediction [B, H, W, out_channels] in float32, whatever the compute dtype.

        Shapes: latents [B, H, W, in_channels] of any size, timesteps [B] or a scalar, text [B, L, cross_attention_dim]
        (None only without cross-attention), added_cond {"text_embeds": [B, D], "time_ids": [B, N]} for SDXL (N = 6 in
        the base, 5 in the refiner). `down_residuals` (ControlNet) are added to the skips, one each; `mid_residual` to
        the middle block's output; `adapter_features` (T2I-Adapter) inside the down blocks, one a block, and one more
        after the middle block where its shape fits there.
        """
        self.check_text(text)
        time = self.embed_time(timesteps, latents.shape[0], added_cond)
        x = Conv(self.block_out_channels[0], dtype=self.dtype, name="conv_in")(latents)
        features = tuple(adapter_features or ())
        down = self.down_specs()
        x, skips = encode(down, x, time, text, features)
        if down_residuals is not None:
            skips = self._add_residuals(skips, down_residuals)
        mid = self.mid_spec()
        if mid is not None:
            x = MidBlock(mid, name="mid_block")(x, time, text)
            if len(features) > len(down) and features[len(down)].shape == x.shape:
                x = x + features[len(down)].astype(x.dtype)
        if mid_residual is not None:
            x = x + mid_residual.astype(x.dtype)
        for index, spec in enumerate(self.up_specs()):
            skips, used = skips[: -spec.layers - 1], skips[-spec.layers - 1 :]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x = UpBlock(spec, name=f"up_blocks.{index}")(x, used, time, text, size)
        x = GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name="conv_norm_out")(x)
        return Conv(self.out_channels, dtype=jnp.float32, name="conv_out")(activation(self.act_fn)(x))

    def up_specs(self) -> list[BlockSpec]:
        """One specification an up block, in order: the resolutions of the down blocks from the last to the first."""
        kinds = [block_kind(kind, "Up") for kind in self.up_block_types]
        return [self.spec(-1 - i, cross, i < len(kinds) - 1) for i, cross in enumerate(kinds)]

    def needs_text(self) -> bool:
        """Whether any block attends to text."""
        return super().needs_text() or any(spec.cross_attention for spec in self.up_specs())

    def validate(self) -> None:
        """Refuses, by name, fields that contradict each other or ask for what does not exist."""
        super().validate()
        if len(self.up_block_types) != len(self.down_block_types):
            raise ValueError(
                f"{self.CLASS_NAME}: {len(self.down_block_types)} down_block_types but "
                f"{len(self.up_block_types)} up_block_types"
            )
        self.up_specs()

    def _add_residuals(self, skips: Skips, residuals: Sequence[jax.Array]) -> Skips:
        if len(residuals) != len(skips):
            raise ValueError(
                f"{self.CLASS_NAME}: down_residuals must be {len(skips)} arrays, one a skip, got {len(residuals)} "
                "(T2I-Adapter features go to adapter_features)"
            )
        return tuple(skip + residual.astype(skip.dtype) for skip, residual in zip(skips, residuals, strict=True))
