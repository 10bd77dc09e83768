"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL, built from any diffusers `config.json` of that family.

Source: Rombach et al. 2022 (Latent Diffusion); Podell et al. 2023 (SDXL); module names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from fairhuman_jax.models.conditional_encoder import ConditionalEncoder, block_kind
from fairhuman_jax.models.layers import Conv, GroupNorm, activation
from fairhuman_jax.models.transformer import COLUMNS
from fairhuman_jax.models.unet_blocks import BlockSpec, MidBlock, Skips, UpBlock, encode

CENTRAL_BLOCKS = 5  # whose cross-attention FastComposer's localisation loss reads


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
        watched: jax.Array | None = None,
        watched_blocks: int = CENTRAL_BLOCKS,
    ) -> jax.Array:
        """Prediction [B, H, W, out_channels] in float32, whatever the compute dtype.

        Shapes: latents [B, H, W, in_channels] of any size, timesteps [B] or a scalar, text [B, L, cross_attention_dim]
        (None only without cross-attention), added_cond {"text_embeds": [B, D], "time_ids": [B, N]} for SDXL (N = 6 in
        the base, 5 in the refiner). `down_residuals` (ControlNet) are added to the skips, one each; `mid_residual` to
        the middle block's output; `adapter_features` (T2I-Adapter) inside the down blocks, one a block, and one more
        after the middle block where its shape fits there.

        `watched`, int [B, N], are positions of tokens in the text: the `central_blocks(watched_blocks)` give away their
        attention to them in the collection `COLUMNS`, which must be mutable then: see `watched_columns`.
        """
        self.check_text(text)
        time = self.embed_time(timesteps, latents.shape[0], added_cond)
        x = Conv(self.block_out_channels[0], dtype=self.dtype, name="conv_in")(latents)
        features = tuple(adapter_features or ())
        positions = self._watched_positions(watched, watched_blocks, latents.shape[0])
        down = self.down_specs()
        x, skips = encode(down, x, time, text, features, positions)
        if down_residuals is not None:
            skips = self._add_residuals(skips, down_residuals)
        mid = self.mid_spec()
        if mid is not None:
            x = MidBlock(mid, name="mid_block")(x, time, text, positions.get("mid_block"))
            if len(features) > len(down) and features[len(down)].shape == x.shape:
                x = x + features[len(down)].astype(x.dtype)
        if mid_residual is not None:
            x = x + mid_residual.astype(x.dtype)
        for index, spec in enumerate(self.up_specs()):
            skips, used = skips[: -spec.layers - 1], skips[-spec.layers - 1 :]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            name = f"up_blocks.{index}"
            x = UpBlock(spec, name=name)(x, used, time, text, size, positions.get(name))
        x = GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name="conv_norm_out")(x)
        return Conv(self.out_channels, dtype=jnp.float32, name="conv_out")(activation(self.act_fn)(x))

    def up_specs(self) -> list[BlockSpec]:
        """One specification an up block, in order: the resolutions of the down blocks from the last to the first."""
        kinds = [block_kind(kind, "Up") for kind in self.up_block_types]
        return [self.spec(-1 - i, cross, i < len(kinds) - 1) for i, cross in enumerate(kinds)]

    def central_blocks(self, count: int = CENTRAL_BLOCKS) -> tuple[str, ...]:
        """The `count` in the middle of all blocks with cross-attention, these in the order down, middle, up.

        Of n blocks the first one taken is number (n - count) // 2: from Stable Diffusion 1's seven, down_blocks.0, .1,
        .2, mid_block, up_blocks.1, .2, .3, five are down_blocks.1 to up_blocks.2, with 11 cross-attentions.
        Raises: ValueError for a count below 1 or above n.
        """
        specs: dict[str, BlockSpec | None] = {f"down_blocks.{i}": spec for i, spec in enumerate(self.down_specs())}
        specs |= {"mid_block": self.mid_spec()} | {f"up_blocks.{i}": spec for i, spec in enumerate(self.up_specs())}
        names = [name for name, spec in specs.items() if spec is not None and spec.cross_attention]
        if not 1 <= count <= len(names):
            raise ValueError(
                f"{self.CLASS_NAME}: {count} blocks with cross-attention were asked for, and there are {len(names)} "
                f"({', '.join(names)})"
            )
        first = (len(names) - count) // 2
        return tuple(names[first : first + count])

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

    def _watched_positions(self, watched: jax.Array | None, count: int, batch: int) -> dict[str, jax.Array]:
        if watched is None:
            return {}
        if watched.ndim != 2 or watched.shape[0] != batch:
            raise ValueError(f"{self.CLASS_NAME}: watched must be positions [{batch}, N], got {list(watched.shape)}")
        if not self.is_mutable_collection(COLUMNS):
            raise ValueError(f"{self.CLASS_NAME}: watched tokens need apply(..., mutable=[{COLUMNS!r}])")
        return dict.fromkeys(self.central_blocks(count), watched)

    def _add_residuals(self, skips: Skips, residuals: Sequence[jax.Array]) -> Skips:
        if len(residuals) != len(skips):
            raise ValueError(
                f"{self.CLASS_NAME}: down_residuals must be {len(skips)} arrays, one a skip, got {len(residuals)} "
                "(T2I-Adapter features go to adapter_features)"
            )
        return tuple(skip + residual.astype(skip.dtype) for skip, residual in zip(skips, residuals, strict=True))


def watched_columns(collections: Mapping[str, Any]) -> tuple[jax.Array, ...]:
    """What a UNet's cross-attentions give to the tokens `watched` [B, N]: one float32 [B, heads, h, w, N] for each.

    collections: the second result of `unet.apply(variables, ..., watched=positions, mutable=[COLUMNS])`. Values are
    softmax probabilities over all tokens of the text, h and w the size of the block's features. Order: down blocks,
    middle block, up blocks, and inside a block by attention and depth.
    """
    stacks: dict[tuple[str, ...], Any] = flatten_dict(collections[COLUMNS])
    return tuple(column for path in sorted(stacks, key=_in_order) for column in stacks[path])


def _in_order(path: tuple[str, ...]) -> list[list[str | int]]:
    """A key that sorts names by their numbers; down, mid and up stand in the order of the alphabet."""
    return [[int(part) if part.isdigit() else part for part in name.split(".")] for name in path]
