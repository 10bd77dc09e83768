"""CLIP image encoder, the network of transformers' `CLIPVisionModel` and `CLIPVisionModelWithProjection`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.models.clip import CLIPEncoder, check_layers, layer_settings
from fairhuman_jax.models.layers import LayerNorm, Linear

CONFIG_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
ARCHITECTURES = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
PIXEL_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)  # of red, green, blue in [0, 1]
PIXEL_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


class PatchEmbedding(nn.Module):
    """Convolution without bias whose stride is its size: [B, H, W, C] -> [B, H W / size^2, features]."""

    features: int
    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        size, (batch, height, width, channels) = self.size, pixels.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, channels, self.features))
        cells = pixels.astype(self.dtype).reshape(batch, height // size, size, width // size, size, channels)
        cells = cells.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
        return cells @ kernel.reshape(-1, self.features).astype(self.dtype)


class VisionEmbeddings(nn.Module):
    """The class embedding, then the patches, plus learned positions: [B, H, W, C] -> [B, 1 + patches, D]."""

    config: Mapping[str, Any]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        width, size = self.config["hidden_size"], self.config["patch_size"]
        init = nn.initializers.normal(0.02)
        patches = PatchEmbedding(width, size, self.dtype, name="patch_embedding")(pixels)
        first = self.param("class_embedding", init, (width,)).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(first, (patches.shape[0], 1, width)), patches], axis=1)
        length = tokens.shape[1]
        places = nn.Embed(length, width, self.dtype, embedding_init=init, name="position_embedding")
        return tokens + places(jnp.arange(length))


class CLIPVisionTransformer(nn.Module):
    """Embeddings, norm, layers, norm of the class token: pixels -> (last, penultimate [B, L, D], pooled [B, D])."""

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    @nn.compact
    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config

        def norm(name: str) -> LayerNorm:
            return LayerNorm(config["layer_norm_eps"], dtype=self.dtype, name=name)

        hidden = norm("pre_layrnorm")(VisionEmbeddings(config, self.dtype, name="embeddings")(pixels))
        layer = layer_settings(config, causal=False, dtype=self.dtype, attention=self.attention)
        encoder = CLIPEncoder(config["num_hidden_layers"], layer, self.scan, self.remat, name="encoder")
        last, penultimate = encoder(hidden)
        return last, penultimate, norm("post_layernorm")(last[:, 0])


class CLIPVision(nn.Module):
    """CLIP image encoder: pixels [B, S, S, 3] -> {last_hidden_state, penultimate [B, L, D], pooled [B, D]}.

    S = image_size and L = 1 + (S / patch_size)^2, the class token first. Pixels are normalised by CLIP's mean and
    standard deviation. `last_hidden_state` and `penultimate` (the state before the last layer) are not normalised,
    `pooled` is the class token after the last norm. Where the config's architecture has a projection, `image_embeds`
    [B, P] is `pooled` through it, not of unit length.
    Raises: ValueError for pixels of another size. Source: Radford et al. 2021 (CLIP), section 2.4.
    """

    config: Mapping[str, Any]
    with_projection: bool = False
    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **runtime: Any) -> CLIPVision:
        """Build from the `config.json` of a CLIP image encoder; unsupported settings are refused by name."""
        if "vision_config" in config:
            raise ValueError(
                "CLIPVision: this config is of a whole CLIP model (vision_config inside); give its image encoder"
            )
        settings = {key: config.get(key, default) for key, default in CONFIG_DEFAULTS.items()}
        check_layers("CLIPVision", {**config, **settings})
        if settings["image_size"] % settings["patch_size"]:
            raise ValueError(
                f"CLIPVision: image_size={settings['image_size']} is no multiple of patch_size={settings['patch_size']}"
            )
        architecture = (config.get("architectures") or ARCHITECTURES)[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(f"CLIPVision: architecture {architecture} is not a CLIP image encoder")
        return cls(settings, architecture.endswith("WithProjection"), **runtime)

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that transformers loads this encoder from."""
        return {
            "architectures": [ARCHITECTURES[self.with_projection]],
            "model_type": "clip_vision_model",
            "attention_dropout": 0.0,
            **self.config,
        }

    def example_inputs(self) -> tuple[jax.Array]:
        """Arguments for `jax.eval_shape(module.init, key, *inputs)`."""
        side = self.config["image_size"]
        return (jnp.zeros((1, side, side, self.config["num_channels"])),)

    @nn.compact
    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        side, channels = self.config["image_size"], self.config["num_channels"]
        if pixels.shape[1:] != (side, side, channels):
            raise ValueError(f"CLIPVision: pixels are {list(pixels.shape[1:])}, not [{side}, {side}, {channels}]")
        transformer = CLIPVisionTransformer(
            self.config, self.dtype, self.scan, self.remat, self.attention, name="vision_model"
        )
        last, penultimate, pooled = transformer(pixels)
        outputs = {"last_hidden_state": last, "penultimate": penultimate, "pooled": pooled}
        if self.with_projection:
            width = self.config["projection_dim"]
            projection = Linear(width, use_bias=False, dtype=self.dtype, name="visual_projection")
            outputs["image_embeds"] = projection(pooled)
        return outputs


def subject_pixels(images: jax.Array, side: int) -> jax.Array:
    """Pictures of subjects [B, N, H, W, 3] in [0, 1] as `CLIPVision` reads them: float32 [B N, side, side, 3].

    Brought to `side` by side pixels by a bilinear filter, antialiased where it shrinks, whatever their shape; then
    less CLIP's mean, over its deviation. FastComposer's embedding of a subject is the network's `image_embeds` of it,
    not of unit length. Raises: ValueError for another number of axes or channels.
    Source: fastcomposer/model.py.
    """
    if images.ndim != 5 or images.shape[-1] != 3:
        raise ValueError(f"subject_pixels: images are {list(images.shape)}, not [B, N, H, W, 3]")
    pixels = images.reshape(-1, *images.shape[2:]).astype(jnp.float32)
    pixels = jax.image.resize(pixels, (pixels.shape[0], side, side, 3), "bilinear")
    return (pixels - PIXEL_MEAN) / PIXEL_STD


def embed_subjects(encoder: CLIPVision, params: Any, pictures: jax.Array) -> jax.Array:
    """Pictures of subjects [B, N, H, W, 3] in [0, 1] -> the encoder's `image_embeds` [B N, D], not of unit length."""
    pixels = subject_pixels(pictures, encoder.config["image_size"])
    return cast(Any, encoder.apply({"params": params}, pixels))["image_embeds"]
