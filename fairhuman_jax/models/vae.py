"""Image autoencoder of latent diffusion, the network of diffusers' `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fairhuman_jax.models.attention import attention
from fairhuman_jax.models.layers import Conv, GroupNorm, Linear, activation
from fairhuman_jax.models.transformer import ATTENTION_OUTPUT, rematerialise

EPSILON = 1e-6  # epsilon of every group norm of this network; no config key sets it
LOGVAR_RANGE = (-30.0, 20.0)
QUERY_CHUNK = 4096  # queries at a time in the mid attention, whose scores are quadratic in pixels

CONFIG_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
UNSUPPORTED = ("shift_factor", "latents_mean", "latents_std")


class VAEResnet(nn.Module):
    """Residual block without time embedding: [B, H, W, C] -> [B, H, W, features]."""

    features: int
    groups: int
    act_fn: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = activation(self.act_fn)
        hidden = act(GroupNorm(self.groups, EPSILON, self.dtype, name="norm1")(x))
        hidden = Conv(self.features, dtype=self.dtype, name="conv1")(hidden)
        hidden = act(GroupNorm(self.groups, EPSILON, self.dtype, name="norm2")(hidden))
        hidden = Conv(self.features, dtype=self.dtype, name="conv2")(hidden)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return x + hidden


class VAEAttention(nn.Module):
    """Self-attention over all pixels with one head of C channels: [B, H, W, C] -> same.

    Such a head is too wide for fused kernels, so the module always uses the plain implementation.
    """

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        normed = GroupNorm(self.groups, EPSILON, self.dtype, name="group_norm")(x)
        normed = normed.reshape(batch, height * width, channels)
        query, key, value = (
            Linear(channels, dtype=self.dtype, name=name)(normed)[:, :, None] for name in ("to_q", "to_k", "to_v")
        )
        if height * width <= QUERY_CHUNK:
            mixed = attention(query, key, value, implementation="xla")
        else:

            def of_one_query(row: jax.Array) -> jax.Array:
                return attention(row[:, None], key, value, implementation="xla")[:, 0]

            mixed = jax.lax.map(of_one_query, query.swapaxes(0, 1), batch_size=QUERY_CHUNK).swapaxes(0, 1)
        mixed = Linear(channels, dtype=self.dtype, name="to_out.0")(checkpoint_name(mixed[:, :, 0], ATTENTION_OUTPUT))
        return x + mixed.reshape(x.shape)


class MidBlock(nn.Module):
    """Resnet, attention (when the config has it), resnet, at the lowest resolution."""

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups, act_fn = self.config["norm_num_groups"], self.config["act_fn"]
        resnet = rematerialise(VAEResnet, self.remat)
        x = resnet(x.shape[-1], groups, act_fn, self.dtype, name="resnets.0")(x)
        if self.config["mid_block_add_attention"]:
            x = rematerialise(VAEAttention, self.remat)(groups, self.dtype, name="attentions.0")(x)
        return resnet(x.shape[-1], groups, act_fn, self.dtype, name="resnets.1")(x)


class Resample(nn.Module):
    """`down`: stride-2 convolution, padded at bottom and right only; `up`: nearest doubling, convolution."""

    direction: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.direction == "down":
            return Conv(x.shape[-1], strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv")(x)
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class Stage(nn.Module):
    """One resolution of encoder or decoder: `depth` resnets, then an `up` or `down` resampler, if any."""

    features: int
    depth: int
    config: Mapping[str, Any]
    resample: str | None = None
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups, act_fn = self.config["norm_num_groups"], self.config["act_fn"]
        resnet = rematerialise(VAEResnet, self.remat)
        for i in range(self.depth):
            x = resnet(self.features, groups, act_fn, self.dtype, name=f"resnets.{i}")(x)
        if self.resample:
            x = Resample(self.resample, self.dtype, name=f"{self.resample}samplers.0")(x)
        return x


class Encoder(nn.Module):
    """Image [B, H, W, 3] -> moments [B, H/f, W/f, 2 * latent_channels]."""

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config["block_out_channels"]
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            down = "down" if i < len(widths) - 1 else None
            depth = config["layers_per_block"]
            x = Stage(width, depth, config, down, self.dtype, self.remat, name=f"down_blocks.{i}")(x)
        x = MidBlock(config, self.dtype, self.remat, name="mid_block")(x)
        x = nn.silu(GroupNorm(config["norm_num_groups"], EPSILON, self.dtype, name="conv_norm_out")(x))
        return Conv(2 * config["latent_channels"], dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents [B, h, w, latent_channels] -> image [B, f h, f w, 3]."""

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config["block_out_channels"][::-1]
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        x = MidBlock(config, self.dtype, self.remat, name="mid_block")(x)
        for i, width in enumerate(widths):
            up = "up" if i < len(widths) - 1 else None
            depth = config["layers_per_block"] + 1
            x = Stage(width, depth, config, up, self.dtype, self.remat, name=f"up_blocks.{i}")(x)
        x = nn.silu(GroupNorm(config["norm_num_groups"], EPSILON, self.dtype, name="conv_norm_out")(x))
        return Conv(config["out_channels"], dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Autoencoder with a Gaussian latent: `encode(image) -> (mean, logvar)`, `decode(latents) -> image`.

    Images [B, H, W, 3] in [-1, 1], H and W multiples of `downscale`; latents [B, H/f, W/f, C] are unscaled:
    callers multiply by `scaling_factor` after encoding and divide before decoding. logvar is clipped to
    [-30, 20]. Apply with `method="encode"` or `method="decode"`; a plain call decodes the mean of the encoding.
    The runtime fields `scan` and `attention` have no effect: the network has no equal blocks to scan, and its one
    head is too wide for fused attention.
    Source: Rombach et al. 2022 (latent diffusion), appendix G.
    """

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **runtime: Any) -> AutoencoderKL:
        """Build from a diffusers AutoencoderKL's `config.json`.

        Raises: ValueError, which names the setting, for an unsupported setting.
        """
        for key in UNSUPPORTED:
            if config.get(key) is not None:
                raise ValueError(f"AutoencoderKL: {key}={config[key]} is not supported; it must be null")
        known = {*CONFIG_DEFAULTS, *UNSUPPORTED}
        unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
        if unknown:
            raise ValueError(f"AutoencoderKL: unknown config keys {', '.join(unknown)}")
        settings: dict[str, Any] = {key: config.get(key, default) for key, default in CONFIG_DEFAULTS.items()}
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        for key, block in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if settings[key] != (block,) * len(settings["block_out_channels"]):
                raise ValueError(f"AutoencoderKL: {key} must be one {block} for each of block_out_channels")
        activation(settings["act_fn"])
        return cls(settings, **runtime)

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that diffusers loads this autoencoder from."""
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in self.config.items()}
        return {"_class_name": "AutoencoderKL", **lists}

    @property
    def scaling_factor(self) -> float:
        """Factor that brings encoded latents to about unit variance."""
        return self.config["scaling_factor"]

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def example_inputs(self) -> tuple[jax.Array]:
        """Arguments for `jax.eval_shape(module.init, key, *inputs)`."""
        side = 2 * self.downscale
        return (jnp.zeros((1, side, side, self.config["in_channels"])),)

    def setup(self) -> None:
        channels = self.config["latent_channels"]
        self.encoder = Encoder(self.config, self.dtype, self.remat)
        self.decoder = Decoder(self.config, self.dtype, self.remat)
        if self.config["use_quant_conv"]:
            self.quant_conv = Conv(2 * channels, kernel_size=1, padding=0, dtype=self.dtype)
        if self.config["use_post_quant_conv"]:
            self.post_quant_conv = Conv(channels, kernel_size=1, padding=0, dtype=self.dtype)

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image [B, H, W, 3] in [-1, 1] -> mean, log-variance of the latent [B, H/f, W/f, C], float32.

        Raises: ValueError when H or W is no multiple of `downscale`.
        """
        if image.shape[1] % self.downscale or image.shape[2] % self.downscale:
            raise ValueError(
                f"AutoencoderKL: image {image.shape[1]}x{image.shape[2]} is no multiple of {self.downscale}"
            )
        moments = self.encoder(image)
        if self.config["use_quant_conv"]:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] (unscaled) -> image [B, f h, f w, 3], float32, not clipped."""
        if self.config["use_post_quant_conv"]:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, image: jax.Array) -> jax.Array:
        mean, _ = self.encode(image)
        return self.decode(mean)
