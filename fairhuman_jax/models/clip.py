"""CLIP text encoder, the network of transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.

Its layers are those of the image encoder too (`clip_vision`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fairhuman_jax.models.attention import attention
from fairhuman_jax.models.layers import LayerNorm, Linear, activation
from fairhuman_jax.models.transformer import ATTENTION_OUTPUT, rematerialise

# In configs older than transformers PR 24773 this id is wrong, and pooling takes the largest id instead.
LEGACY_EOS = 2

CONFIG_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


class CLIPAttention(nn.Module):
    """Multi-head self-attention, causal or not: [B, L, D] -> [B, L, D]."""

    heads: int
    causal: bool
    dtype: Any = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        batch, length, width = hidden.shape
        query, key, value = (
            Linear(width, dtype=self.dtype, name=name)(hidden).reshape(batch, length, self.heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = attention(query, key, value, implementation=self.attention, causal=self.causal)
        mixed = checkpoint_name(mixed.reshape(batch, length, width), ATTENTION_OUTPUT)
        return Linear(width, dtype=self.dtype, name="out_proj")(mixed)


class CLIPMlp(nn.Module):
    """Two-layer perceptron: [B, L, D] -> [B, L, D]."""

    intermediate_size: int
    hidden_act: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        inner = Linear(self.intermediate_size, dtype=self.dtype, name="fc1")(hidden)
        return Linear(hidden.shape[-1], dtype=self.dtype, name="fc2")(activation(self.hidden_act)(inner))


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer with the carry (state, state before) of a scan: [B, L, D] each.

    The state before the last layer is the penultimate one, which SDXL conditions on.
    """

    heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    causal: bool = True
    dtype: Any = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        before, _ = carry
        normed = LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="layer_norm1")(before)
        attend = CLIPAttention(self.heads, self.causal, self.dtype, self.attention, name="self_attn")
        hidden = before + attend(normed)
        normed = LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="layer_norm2")(hidden)
        hidden = hidden + CLIPMlp(self.intermediate_size, self.hidden_act, self.dtype, name="mlp")(normed)
        return (hidden, before), None


class CLIPEmbeddings(nn.Module):
    """Token plus learned position embedding: ids [B, L] -> [B, L, D]."""

    vocab_size: int
    width: int
    max_length: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        length = ids.shape[-1]
        if length > self.max_length:
            raise ValueError(f"CLIPText: {length} tokens a prompt, but the model has {self.max_length} positions")
        init = nn.initializers.normal(0.02)
        tokens = nn.Embed(self.vocab_size, self.width, self.dtype, embedding_init=init, name="token_embedding")
        places = nn.Embed(self.max_length, self.width, self.dtype, embedding_init=init, name="position_embedding")
        return tokens(ids) + places(jnp.arange(length))


class CLIPEncoder(nn.Module):
    """Stack of `CLIPLayer`: hidden [B, L, D] -> (last, penultimate), neither normalised."""

    depth: int
    layer: Mapping[str, Any]
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        block = rematerialise(CLIPLayer, self.remat, in_scan=self.scan)
        carry = (hidden, hidden)
        if self.scan:
            stack = nn.scan(
                block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, length=self.depth
            )
            return stack(**self.layer, name="layers")(carry)[0]
        for i in range(self.depth):
            carry, _ = block(**self.layer, name=f"layers.{i}")(carry)
        return carry


def layer_settings(config: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """The fields of `CLIPLayer` that a config of either encoder sets, and `settings`."""
    kept = ("intermediate_size", "hidden_act", "layer_norm_eps")
    return {"heads": config["num_attention_heads"], **{key: config[key] for key in kept}, **settings}


def check_layers(name: str, config: Mapping[str, Any]) -> None:
    """Refuses layers with an unknown activation, dropout, or a width that the heads do not divide."""
    activation(config["hidden_act"])
    for key in ("attention_dropout", "dropout"):
        if config.get(key):
            raise ValueError(f"{name}: {key}={config[key]} is not supported; it must be 0")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(f"{name}: hidden_size={width} does not divide into {heads} heads")


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers, final norm: ids [B, L] -> (normalised last, penultimate), both [B, L, D]."""

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    @nn.compact
    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = self.config
        embed = CLIPEmbeddings(
            config["vocab_size"],
            config["hidden_size"],
            config["max_position_embeddings"],
            self.dtype,
            name="embeddings",
        )
        layer = layer_settings(config, causal=True, dtype=self.dtype, attention=self.attention)
        encoder = CLIPEncoder(config["num_hidden_layers"], layer, self.scan, self.remat, name="encoder")
        last, penultimate = encoder(embed(ids))
        final_norm = LayerNorm(config["layer_norm_eps"], dtype=self.dtype, name="final_layer_norm")
        return final_norm(last), penultimate


class CLIPText(nn.Module):
    """CLIP text encoder: ids [B, L] -> {last_hidden_state [B, L, D], penultimate [B, L, D], pooled [B, P]}.

    `penultimate` is the state before the last layer, not normalised (what SDXL conditions on). `pooled` is
    the normalised state at the first end token, through `text_projection` when the config's architecture has
    one (P = its width, else D). A config with `eos_token_id` 2 pools at the largest id.
    Raises: ValueError for more tokens than positions. Source: Radford et al. 2021 (CLIP), section 2.4.
    """

    config: Mapping[str, Any]
    with_projection: bool = False
    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **runtime: Any) -> CLIPText:
        """Build from the `config.json` of a CLIP text encoder; unsupported settings are refused by name."""
        if "text_config" in config:
            raise ValueError(
                "CLIPText: this config is of a whole CLIP model (text_config inside); give its text encoder"
            )
        settings = {key: config.get(key, default) for key, default in CONFIG_DEFAULTS.items()}
        check_layers("CLIPText", {**config, **settings})
        if settings["eos_token_id"] not in range(settings["vocab_size"]):
            raise ValueError(f"CLIPText: eos_token_id={settings['eos_token_id']} is no id of the vocabulary")
        architectures = config.get("architectures") or ["CLIPTextModel"]
        if architectures[0] not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise ValueError(f"CLIPText: architecture {architectures[0]} is not a CLIP text encoder")
        return cls(settings, architectures[0].endswith("WithProjection"), **runtime)

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that transformers loads this encoder from."""
        name = "CLIPTextModelWithProjection" if self.with_projection else "CLIPTextModel"
        return {
            "architectures": [name],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            **self.config,
        }

    def example_inputs(self) -> tuple[jax.Array]:
        """Arguments for `jax.eval_shape(module.init, key, *inputs)`."""
        return (jnp.zeros((1, min(2, self.config["max_position_embeddings"])), jnp.int32),)

    @nn.compact
    def __call__(self, ids: jax.Array) -> dict[str, jax.Array]:
        transformer = CLIPTextTransformer(
            self.config, self.dtype, self.scan, self.remat, self.attention, name="text_model"
        )
        last, penultimate = transformer(ids)
        eos = self.config["eos_token_id"]
        place = jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, axis=-1)
        pooled = jnp.take_along_axis(last, place[:, None, None], axis=1)[:, 0]
        if self.with_projection:
            width = self.config["projection_dim"]
            pooled = Linear(width, use_bias=False, dtype=self.dtype, name="text_projection")(pooled)
        return {"last_hidden_state": last, "penultimate": penultimate, "pooled": pooled}
