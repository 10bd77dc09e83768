"""FastComposer's fusion of subjects into text: embeddings of their pictures change the states of their words.

Source: FastComposer (arXiv 2305.10431), section 4.1, and fastcomposer/model.py; module names are those of its
checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairhuman_jax.models.layers import Dtype, LayerNorm, Linear, activation


class FusionMLP(nn.Module):
    """`W2 gelu(W1 norm(x))` with exact GELU, both layers `features` wide: [..., C] -> [..., features]."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(self.features, dtype=self.dtype, name="fc1")(LayerNorm(dtype=self.dtype, name="layernorm")(x))
        return Linear(self.features, dtype=self.dtype, name="fc2")(activation("gelu")(hidden))


class Postfuse(nn.Module):
    """Fuse the text states of subjects' words with embeddings of the subjects' pictures.

    For the state t at a subject's position and its embedding o: a = mlp1([t, o]) + t, b = mlp2(a) + a, and norm(b)
    takes the place of t. All other states stay the same, bit for bit. `width` is the width of t and o: 768 with
    CLIP ViT-L/14, which makes 2,958,336 parameters. Of the runtime fields only `dtype` has an effect.
    """

    width: int = 768
    dtype: Dtype = jnp.float32
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"

    CLASS_NAME: ClassVar[str] = "Postfuse"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **runtime: Any) -> Postfuse:
        """Build from the `config.json` of `to_config`. Raises: ValueError for another class or unknown keys."""
        if config.get("_class_name", cls.CLASS_NAME) != cls.CLASS_NAME:
            raise ValueError(f"{cls.CLASS_NAME}: this config.json is of class {config['_class_name']!r}")
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(set(settings) - {"width"}):
            raise ValueError(f"{cls.CLASS_NAME}: unknown config keys {', '.join(unknown)}")
        return cls(**settings, **runtime)

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that `from_config` builds this network from."""
        return {"_class_name": self.CLASS_NAME, "width": self.width}

    def example_inputs(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Arguments for `jax.eval_shape(module.init, key, *inputs)`."""
        vectors = jnp.zeros((1, 1, self.width))
        return vectors, vectors, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    @nn.compact
    def __call__(self, text: jax.Array, subjects: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        """Text states [B, L, width] in their dtype, with the fused states in place.

        Shapes: text [B, L, width], subjects [B, N, width], positions int [B, N] in 0 .. L - 1, valid bool [B, N].
        Slots that are not valid change nothing, whatever their position. No two valid slots may share a position.
        Raises: ValueError when shapes do not match.
        """
        batch, slots = positions.shape
        expected = {"text": (batch, text.shape[1], self.width), "subjects": (batch, slots, self.width)}
        for name, array in (("text", text), ("subjects", subjects)):
            if array.shape != expected[name]:
                raise ValueError(f"{self.CLASS_NAME}: {name} is {list(array.shape)}, not {list(expected[name])}")
        if valid.shape != positions.shape:
            raise ValueError(f"{self.CLASS_NAME}: valid is {list(valid.shape)}, not {list(positions.shape)}")
        words = jnp.take_along_axis(text, positions[:, :, None], axis=1)
        both = jnp.concatenate([words.astype(self.dtype), subjects.astype(self.dtype)], axis=-1)
        fused = FusionMLP(self.width, self.dtype, name="mlp1")(both) + words.astype(self.dtype)
        fused = FusionMLP(self.width, self.dtype, name="mlp2")(fused) + fused
        fused = LayerNorm(dtype=self.dtype, name="layer_norm")(fused).astype(text.dtype)
        # Slots of padding have the start token's position: move them beyond the end, where their states are dropped.
        places = jnp.where(valid, positions, text.shape[1])
        return jax.vmap(lambda states, place, new: states.at[place].set(new, mode="drop"))(text, places, fused)
