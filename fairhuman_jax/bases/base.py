"""What a base is: text encoders, a denoiser, a codec between pictures and latents, a noise process, and parameters.

Systems and drawing know these five alone; which networks stand behind them is set where a base is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.diffusion.process import Process

PyTree = Any
Params = dict[str, PyTree]


class Text(Protocol):
    """Captions to token ids to what a denoiser reads of them."""

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The tokenizers, one a text encoder."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the text encoders, in `params` and in LoRA trees."""
        ...

    @property
    def empty_is_zero(self) -> bool:
        """Whether no negative prompt means zeros instead of the encoded empty text."""
        ...

    def tokenize(self, captions: Sequence[str], chunks: int | None = None) -> dict[str, np.ndarray]:
        """Captions -> int32 arrays [B, L], or [B, chunks, L]."""
        ...

    def chunks(self, captions: Sequence[str]) -> int:
        """The number of chunks that hold the longest caption."""
        ...

    def encode(
        self, params: Params, ids: dict[str, jax.Array], lora: Params | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Token ids -> (hidden states [B, L, D], pooled vector [B, P])."""
        ...


class Denoiser(Protocol):
    """The network that answers to noisy latents."""

    @property
    def reads(self) -> str:
        """What its input holds beside latents: "", "mask" (and a holed picture) or "pose" (a skeleton's latents)."""
        ...

    @property
    def channels(self) -> int:
        """Channels of its whole input."""
        ...

    def __call__(
        self,
        params: Params,
        *,
        x: jax.Array,
        t: jax.Array,
        given: Conditioning,
        lora: Params | None = None,
        **more: Any,
    ) -> jax.Array:
        """The answer float32 [B, h, w, c] to input x [B, h, w, channels] at times t [B]."""
        ...

    def added(self, given: Conditioning) -> dict[str, Any] | None:
        """What it and its ControlNets read beside text; None where they read nothing else."""
        ...

    def size_ids(self, height: int, width: int, count: int, *, negative: bool = False) -> jax.Array | None:
        """What the network reads of a drawn picture's size, [count, n]; None where it reads none."""
        ...


class Codec(Protocol):
    """Pictures in [-1, 1] to latents and back."""

    @property
    def downscale(self) -> int:
        """Pixels a latent, by side."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def scaling_factor(self) -> float:
        """Latents of the process are the network's own times this."""
        ...

    def moments(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the latent posterior [B, h, w, c], unscaled."""
        ...

    def encode(self, params: Params, image: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Scaled latents, drawn from the posterior with `noise` [B, h, w, c], or its mean for None."""
        ...

    def draw(self, mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
        """Scaled latents of a posterior with these moments: (mean + exp(logvar / 2) noise) scaling_factor."""
        ...

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents -> pictures [B, H, W, 3], clipped to [-1, 1]; large ones in tiles."""
        ...

    def decode_unscaled(self, params: Params, latents: jax.Array) -> jax.Array:
        """The network's own latents -> pictures about [-1, 1], in one piece."""
        ...


@dataclass(frozen=True, eq=False)
class Base:
    """An opened base. Networks are static; `params` by network travel as an argument of every call."""

    text: Text
    denoiser: Denoiser
    codec: Codec
    process: Process
    params: Params


def variables(params: Params, lora: Params | None, name: str) -> dict[str, PyTree]:
    """The collections of one network's call."""
    collections = {"params": params[name]}
    if lora is not None and name in lora:
        collections["lora"] = lora[name]
    return collections


def numbered(name: str, index: int) -> str:
    """Names of several of a kind as diffusers has them: name, name_2, name_3, ..."""
    return name if index == 0 else f"{name}_{index + 1}"
