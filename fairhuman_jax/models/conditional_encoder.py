"""What UNet and ControlNet share: the diffusers config, the time embedding and the down path.

Source: Rombach et al. 2022 (Latent Diffusion), Podell et al. 2023 (SDXL) for the added conditioning; config keys and
module names are those of diffusers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairhuman_jax.models.layers import Dtype, Linear, activation, timestep_embedding
from fairhuman_jax.models.transformer import REMAT_POLICIES
from fairhuman_jax.models.unet_blocks import BlockSpec

RUNTIME_FIELDS = ("dtype", "scan", "remat", "attention")
EXAMPLE_TIME_IDS = 6  # of the SDXL base; the refiner has 5
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}

# Keys of diffusers configs whose every other value would change the network: key -> values that change nothing.
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


class TimestepEmbedding(nn.Module):
    """Two-layer network `W2 act(W1 x)` on conditioning vectors [B, D] -> [B, features], in float32."""

    features: int
    act_fn: str = "silu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = activation(self.act_fn)(Linear(self.features, name="linear_1")(x.astype(jnp.float32)))
        return Linear(self.features, name="linear_2")(hidden)


class ConditionalEncoder(nn.Module):
    """Base of networks that read latents, timesteps and text: fields are the keys of the diffusers `config.json`.

    `attention_head_dim` is the *number* of heads, one for all blocks or one a block: diffusers named it wrongly and
    keeps the name. `upcast_attention` is carried along and changes nothing, since scores and softmax are float32.
    Runtime fields: compute `dtype`; `scan` transformer stacks; `remat` none, `full`, `attention` or `offload`;
    `attention` implementation.
    """

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    dtype: Dtype = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    CLASS_NAME: ClassVar[str] = ""
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = FIXED_KEYS

    @classmethod
    def from_config(cls, config: dict[str, Any], **runtime: Any) -> Self:
        """The network a diffusers `config.json` describes; `runtime` sets dtype, scan, remat and attention.

        Raises: ValueError for a config key that would change the network in an unsupported way is refused by name and
        value.
        """
        name = cls.CLASS_NAME
        if config.get("_class_name", name) != name:
            raise ValueError(f"{name}: this config.json is of class {config['_class_name']!r}")
        if unknown := set(runtime) - set(RUNTIME_FIELDS):
            raise ValueError(f"{name}: unknown runtime options {sorted(unknown)}; known: {RUNTIME_FIELDS}")
        fields = set(cls.config_fields())
        for key, value in config.items():
            if key.startswith("_") or key in fields:
                continue
            if key not in cls.FIXED:
                raise ValueError(f"{name}: unknown config key {key!r} (value {value!r})")
            if value not in cls.FIXED[key]:
                raise ValueError(f"{name}: {key}={value!r} is not supported, only {cls.FIXED[key][0]!r}")
        module = cls(**{key: _frozen(value) for key, value in config.items() if key in fields}, **runtime)
        module.validate()
        return module

    def to_config(self) -> dict[str, Any]:
        """The `config.json` of this network, loadable by diffusers."""
        fields = {key: getattr(self, key) for key in self.config_fields()}
        return {"_class_name": self.CLASS_NAME} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()
        }

    @classmethod
    def config_fields(cls) -> tuple[str, ...]:
        """Names of the fields that come from `config.json`, as against runtime fields."""
        names = (field.name for field in dataclasses.fields(cls))
        return tuple(name for name in names if name not in (*RUNTIME_FIELDS, "parent", "name"))

    def validate(self) -> None:
        """Refuses, by name, fields that contradict each other or ask for what does not exist."""
        name, blocks = self.CLASS_NAME, len(self.down_block_types)
        if len(self.block_out_channels) != blocks:
            raise ValueError(f"{name}: {blocks} down_block_types but {len(self.block_out_channels)} block_out_channels")
        if self.mid_block_type not in (None, *MID_BLOCKS):
            raise ValueError(f"{name}: mid_block_type {self.mid_block_type!r} is not supported")
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"{name}: addition_embed_type {self.addition_embed_type!r} is not supported")
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise ValueError(
                f"{name}: addition_embed_type text_time needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )
        if len(set(self.per_block("cross_attention_dim"))) != 1:
            raise ValueError(
                f"{name}: cross_attention_dim={self.cross_attention_dim!r} must be the same for all blocks"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"{name}: unknown remat policy {self.remat!r}; known: {', '.join(REMAT_POLICIES)}")
        activation(self.act_fn)
        self.down_specs()

    def per_block(self, key: str) -> tuple[int, ...]:
        """The field `key`, an integer or one integer a down block, as one integer a down block."""
        value, blocks = getattr(self, key), len(self.down_block_types)
        values = (value,) * blocks if isinstance(value, int) else tuple(value)
        if len(values) != blocks or not all(isinstance(number, int) for number in values):
            raise ValueError(f"{self.CLASS_NAME}: {key}={value!r} must be an integer or {blocks} integers")
        return values

    def spec(self, block: int, cross_attention: bool, resample: bool) -> BlockSpec:
        """The specification of the resolution that down block number `block` (may be negative) works at."""
        return BlockSpec(
            channels=self.block_out_channels[block],
            layers=self.per_block("layers_per_block")[block],
            cross_attention=cross_attention,
            resample=resample,
            heads=self.per_block("attention_head_dim")[block],
            depth=self.per_block("transformer_layers_per_block")[block],
            num_groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            act_fn=self.act_fn,
            linear_projection=self.use_linear_projection,
            attention=self.attention,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
        )

    def down_specs(self) -> list[BlockSpec]:
        """One specification a down block, in order."""
        kinds = [block_kind(kind, "Down") for kind in self.down_block_types]
        return [self.spec(i, cross, i < len(kinds) - 1) for i, cross in enumerate(kinds)]

    def mid_spec(self) -> BlockSpec | None:
        """The specification of the middle block, None where the network has none."""
        if self.mid_block_type is None:
            return None
        return self.spec(-1, MID_BLOCKS[self.mid_block_type], False)

    def needs_text(self) -> bool:
        """Whether any block of the network attends to text."""
        specs = [*self.down_specs(), self.mid_spec()]
        return any(spec is not None and spec.cross_attention for spec in specs)

    def check_text(self, text: jax.Array | None) -> None:
        """Refuses text embeddings that are missing or of the wrong width."""
        width = self.per_block("cross_attention_dim")[0]
        if self.needs_text() and (text is None or text.shape[-1] != width):
            found = "none" if text is None else f"shape {text.shape}"
            raise ValueError(f"{self.CLASS_NAME}: needs text [B, L, {width}], got {found}")

    def embed_time(self, timesteps: jax.Array, batch: int, added_cond: dict[str, jax.Array] | None = None) -> jax.Array:
        """Time embedding [B, 4 C] in float32, plus that of `added_cond` in text_time networks.

        Call it from a compact method: it creates `time_embedding` and `add_embedding` there. `timesteps` is [B] or a
        scalar; `added_cond` holds `text_embeds` [B, D] and `time_ids` [B, N], and is ignored elsewhere. D plus N times
        addition_time_embed_dim must be projection_class_embeddings_input_dim: see `time_ids`.
        """
        features = 4 * self.block_out_channels[0]
        flips = {"flip_sin_to_cos": self.flip_sin_to_cos, "freq_shift": self.freq_shift}
        timesteps = jnp.broadcast_to(timesteps, (batch,))
        waves = timestep_embedding(timesteps, self.block_out_channels[0], **flips)
        time = TimestepEmbedding(features, self.act_fn, name="time_embedding")(waves)
        if self.addition_embed_type is None:
            return time
        if not added_cond or not {"text_embeds", "time_ids"} <= set(added_cond):
            raise ValueError(f"{self.CLASS_NAME}: needs added_cond with text_embeds and time_ids")
        ids = timestep_embedding(added_cond["time_ids"].reshape(-1), cast(int, self.addition_time_embed_dim), **flips)
        pooled = added_cond["text_embeds"].astype(jnp.float32)
        added = jnp.concatenate([pooled, ids.reshape(batch, -1)], axis=-1)
        if added.shape[-1] != self.projection_class_embeddings_input_dim:
            raise ValueError(
                f"{self.CLASS_NAME}: text_embeds and embedded time_ids are {added.shape[-1]} wide, not "
                f"projection_class_embeddings_input_dim={self.projection_class_embeddings_input_dim}"
            )
        return time + TimestepEmbedding(features, self.act_fn, name="add_embedding")(added)

    def time_ids(self, pooled_width: int) -> int:
        """Number of time ids beside a pooled text embedding of this width: 6 in the SDXL base, 5 in the refiner.

        Raises: ValueError for no such embedding in this network; a width that leaves no whole number.
        """
        if self.addition_embed_type is None:
            raise ValueError(f"{self.CLASS_NAME}: takes no time_ids, since addition_embed_type is null")
        total, each = cast(int, self.projection_class_embeddings_input_dim), cast(int, self.addition_time_embed_dim)
        count, rest = divmod(total - pooled_width, each)
        if rest or count < 0:
            raise ValueError(
                f"{self.CLASS_NAME}: pooled text of width {pooled_width} does not fit: "
                f"projection_class_embeddings_input_dim={total} less it is no multiple of {each}"
            )
        return count

    def example_inputs(self) -> tuple:
        """Smallest arrays the network accepts, for `jax.eval_shape(module.init, key, *inputs)`."""
        size = 2 ** (len(self.down_block_types) - 1)
        latents = jnp.zeros((1, size, size, self.in_channels))
        text = jnp.zeros((1, 1, self.per_block("cross_attention_dim")[0]))
        added_cond = None
        if self.addition_embed_type is not None:
            total, each = cast(int, self.projection_class_embeddings_input_dim), cast(int, self.addition_time_embed_dim)
            count = min(EXAMPLE_TIME_IDS, total // each)
            added_cond = {"text_embeds": jnp.zeros((1, total - count * each)), "time_ids": jnp.zeros((1, count))}
        return latents, jnp.zeros((1,), jnp.int32), text, added_cond


def block_kind(kind: str, direction: str) -> bool:
    """Whether a block type such as `CrossAttnDownBlock2D` has cross-attention; unsupported types are refused."""
    kinds = {f"{direction}Block2D": False, f"CrossAttn{direction}Block2D": True}
    if kind not in kinds:
        raise ValueError(f"block type {kind!r} is not supported; known: {', '.join(sorted(kinds))}")
    return kinds[kind]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
