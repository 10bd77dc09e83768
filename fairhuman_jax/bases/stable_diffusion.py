"""Stable Diffusion 1, 2 and XL as a `Base`: the only place above weights that tells them apart.

Source: Rombach et al. 2022 (latent diffusion); Podell et al. 2023 (SDXL: two text encoders, size conditioning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.base import Base, Params, numbered, variables
from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.diffusion.process import VariancePreserving
from fairhuman_jax.models import AutoencoderKL
from fairhuman_jax.models.vae_tiling import tiled_decode
from fairhuman_jax.weights import Pipeline, count_chunks, tokenize, tokenize_chunks

TILE_ABOVE = 128  # latents a side; larger ones are decoded in tiles
# What SDXL's refiner reads of how pretty the picture is, with and without the prompt (its published defaults).
AESTHETIC_SCORES = (6.0, 2.5)


@dataclass(frozen=True, eq=False)
class ClipText:
    """One or two CLIP text encoders. SDXL takes their penultimate states side by side, Stable Diffusion the last."""

    encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    names: tuple[str, ...]
    penultimate: bool
    empty_is_zero: bool

    def tokenize(self, captions: Sequence[str], chunks: int | None = None) -> dict[str, np.ndarray]:
        """Captions -> {"input_ids": int32 [B, L]}, with input_ids_2 for a second text encoder.

        With `chunks` = n the arrays are [B, n, L]: long captions go on in further chunks instead of being truncated.
        """
        read = tokenize if chunks is None else partial(tokenize_chunks, chunks=chunks)
        found = [read(tokenizer, list(captions)) for tokenizer in self.tokenizers]
        return {numbered("input_ids", i): ids for i, ids in enumerate(found)}

    def chunks(self, captions: Sequence[str]) -> int:
        """The number of chunks that hold the longest caption."""
        return max(count_chunks(tokenizer, captions) for tokenizer in self.tokenizers)

    def encode(
        self, params: Params, ids: dict[str, jax.Array], lora: Params | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Token ids -> (hidden states [B, L, D], pooled vector [B, P]).

        Ids are [B, L], or [B, n, L] for prompts in n chunks: hidden states then follow each other, and the pooled
        vector is the first chunk's. Of two encoders the pooled vector is the second's.
        """
        states, pooled = [], []
        for i, (name, encoder) in enumerate(zip(self.names, self.encoders, strict=True)):
            tokens = ids[numbered("input_ids", i)]
            output = cast(Any, encoder.apply(variables(params, lora, name), tokens.reshape(-1, tokens.shape[-1])))
            state = output["penultimate" if self.penultimate else "last_hidden_state"]
            states.append(state.reshape(tokens.shape[0], -1, state.shape[-1]))
            pooled.append(output["pooled"].reshape(tokens.shape[0], -1, output["pooled"].shape[-1])[:, 0])
        return jnp.concatenate(states, -1), pooled[-1]


@dataclass(frozen=True, eq=False)
class UNetDenoiser:
    """A `UNet2DCondition`; sized: it reads pooled text and sizes (SDXL), with an aesthetic score in the refiner."""

    unet: Any
    reads: str
    sized: bool
    scored: bool

    @property
    def channels(self) -> int:
        """Channels of its whole input."""
        return self.unet.in_channels

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
        """The UNet's output float32 [B, h, w, c]; `more` are residuals and features of ControlNets and adapters."""
        unet = cast(Any, self.unet)
        added = self.added(given)
        output = unet.apply(
            variables(params, lora, "unet"), latents=x, timesteps=t, text=given.hidden, added_cond=added, **more
        )
        return output.astype(jnp.float32)

    def added(self, given: Conditioning) -> dict[str, jax.Array | None] | None:
        """What SDXL's networks, ControlNets too, read beside text: pooled text and sizes."""
        return {"text_embeds": given.pooled, "time_ids": given.time_ids} if self.sized else None

    def size_ids(self, height: int, width: int, count: int, *, negative: bool = False) -> jax.Array | None:
        """SDXL's sizes of an uncropped picture, float32 [count, 6]; the refiner's end with a score, [count, 5]."""
        if not self.sized:
            return None
        end = (AESTHETIC_SCORES[int(negative)],) if self.scored else (height, width)
        ids = jnp.array([height, width, 0, 0, *end], jnp.float32)
        return jnp.broadcast_to(ids, (count, len(ids)))


@dataclass(frozen=True, eq=False)
class AutoencoderCodec:
    """An `AutoencoderKL` with its scale."""

    vae: AutoencoderKL

    @property
    def downscale(self) -> int:
        """Pixels a latent."""
        return self.vae.downscale

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.vae.config["latent_channels"]

    @property
    def scaling_factor(self) -> float:
        """Latents of the process are the network's times this."""
        return self.vae.scaling_factor

    def moments(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Codec.moments`."""
        vae = cast(Any, self.vae)
        return vae.apply({"params": params["vae"]}, image, method=vae.encode)

    def encode(self, params: Params, image: jax.Array, noise: jax.Array | None) -> jax.Array:
        """See `Codec.encode`."""
        mean, logvar = self.moments(params, image)
        if noise is None:
            return mean.astype(jnp.float32) * self.vae.scaling_factor
        return self.draw(mean, logvar, noise)

    def draw(self, mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
        """See `Codec.draw`."""
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        return (mean + jnp.exp(0.5 * logvar) * noise) * self.vae.scaling_factor

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """See `Codec.decode`; above `TILE_ABOVE` latents a side in tiles."""
        latents = latents / self.vae.scaling_factor
        whole = partial(self.decode_unscaled, params)
        large = max(latents.shape[1:3]) > TILE_ABOVE
        return jnp.clip(tiled_decode(whole, latents) if large else whole(latents), -1.0, 1.0)

    def decode_unscaled(self, params: Params, latents: jax.Array) -> jax.Array:
        """See `Codec.decode_unscaled`."""
        vae = cast(Any, self.vae)
        return vae.apply({"params": params["vae"]}, latents, method=vae.decode)


def stable_diffusion(pipeline: Pipeline) -> Base:
    """The base that a folder or file holds; its parameters may be shapes.

    What the denoiser reads beside latents is recognised here, by the channels of its input.
    """
    xl = pipeline.is_xl
    reads = "mask" if pipeline.inpaints else "pose" if pipeline.reads_pose else ""
    return Base(
        text=ClipText(
            pipeline.text_encoders,
            pipeline.tokenizers,
            pipeline.text_encoder_names,
            penultimate=xl,
            empty_is_zero=xl and pipeline.force_zeros_for_empty_prompt,
        ),
        denoiser=UNetDenoiser(pipeline.unet, reads, sized=xl, scored=pipeline.requires_aesthetics_score),
        codec=AutoencoderCodec(pipeline.vae),
        process=VariancePreserving(pipeline.schedule),
        params=pipeline.params,
    )
