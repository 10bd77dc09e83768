"""What every text-to-image latent diffusion system shares on top of a base: batches, noise, the denoiser's call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.base import Base, Params, numbered
from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.bases.stable_diffusion import stable_diffusion
from fairhuman_jax.contract import Batch, Shapes, System, sample_keys
from fairhuman_jax.models import ControlNet, T2IAdapter
from fairhuman_jax.weights import Pipeline

PyTree = Any


class Noised(NamedTuple):
    """Noisy latents, what the network should answer to them [B, h, w, c], and their timesteps [B]."""

    latents: jax.Array
    target: jax.Array
    timesteps: jax.Array


@dataclass(frozen=True, eq=False)
class LatentDiffusion(System):
    """A pipeline's networks with the functions that training and sampling on it have in common.

    Networks and schedule are static; parameters travel as the argument `params`, by network: those of
    `Pipeline.params`, and controlnet, controlnet_2, ... and adapter, adapter_2, ... for `controlnets` and `adapters`.
    `lora` trees go by the same names.
    """

    encodes: ClassVar[tuple[str, ...]] = ("image", "text")

    pipeline: Pipeline
    controlnets: tuple[ControlNet, ...] = field(default=(), kw_only=True)
    adapters: tuple[T2IAdapter, ...] = field(default=(), kw_only=True)

    @property
    def opened(self) -> Params:
        """The base's parameters."""
        return self.base.params

    def with_opened(self, params: Params) -> LatentDiffusion:
        """The system around the pipeline with other parameters."""
        return dataclasses.replace(self, pipeline=dataclasses.replace(self.pipeline, params=params))

    @cached_property
    def base(self) -> Base:
        """Text, denoiser, codec and process of the pipeline."""
        return stable_diffusion(self.pipeline)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of a picture."""
        codec = self.base.codec
        return height // codec.downscale, width // codec.downscale, codec.channels

    def tokenize(self, captions: Sequence[str], chunks: int | None = None) -> dict[str, np.ndarray]:
        """Captions -> token ids, int32 [B, L] by text encoder, or [B, chunks, L]."""
        return self.base.text.tokenize(captions, chunks)

    def reads(self, offered: Shapes, *, latents: bool = False, text: bool = False) -> Shapes:
        """Pictures or their latents, control images where a network reads them, token ids or text embeddings."""
        shapes, image = dict(offered), offered["image"]
        count, height, width = image.shape[:3]
        if self.controlnets or self.adapters or self.base.denoiser.reads == "pose":
            shapes["conditioning_image"] = image
        if latents:
            del shapes["image"]
            latent = jax.ShapeDtypeStruct((count, *self.latent_shape(height, width)), jnp.float16)
            shapes |= {"latent_mean": latent, "latent_logvar": latent}
        ids = {}
        for i, encoder in enumerate(self.pipeline.text_encoders):
            length = encoder.to_config()["max_position_embeddings"]
            ids[numbered("input_ids", i)] = jax.ShapeDtypeStruct((count, length), jnp.int32)
        if not text:
            return shapes | ids
        hidden, pooled = jax.eval_shape(self.encode_text, self.pipeline.params, ids)
        half = {"text_hidden": hidden.shape, "text_pooled": pooled.shape}
        return shapes | {name: jax.ShapeDtypeStruct(shape, jnp.float16) for name, shape in half.items()}

    def chunks(self, captions: Sequence[str]) -> int:
        """The number of chunks that hold the longest caption."""
        return self.base.text.chunks(captions)

    def encode_text(
        self, params: Params, ids: dict[str, jax.Array], lora: Params | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Token ids -> (hidden states [B, L, D], pooled vector [B, P])."""
        return self.base.text.encode(params, ids, lora)

    def text_states(self, params: Params, batch: Batch, lora: Params | None = None) -> tuple[jax.Array, jax.Array]:
        """`encode_text` of a batch, or its cached `text_hidden` [B, L, D] and `text_pooled` [B, P].

        Raises: ValueError for cached text where a text encoder's LoRA trains, which it would not reach.
        """
        if "text_hidden" not in batch:
            return self.encode_text(params, batch, lora)
        if trained := sorted(set(lora or ()) & set(self.base.text.names)):
            raise ValueError(f"a LoRA on {trained[0]} needs input_ids in the batch, not cached text_hidden")
        return batch["text_hidden"], batch["text_pooled"]

    def condition_images(self, batch: Batch | dict[str, np.ndarray]) -> tuple[jax.Array, ...]:
        """A batch's `conditioning_image`, uint8 [B, H, W, 3], in [0, 1]: one for each ControlNet and T2I-Adapter.

        Raises: ValueError for a batch without it where a network reads one.
        """
        networks = (*self.controlnets, *self.adapters)
        if not networks:
            return ()
        return (_condition_image(batch, f"a {type(networks[0]).__name__}"),) * len(networks)

    def pose_images(self, batch: Batch | dict[str, np.ndarray]) -> jax.Array | None:
        """A batch's `conditioning_image` in [0, 1] for a denoiser that reads the latents of a pose, else None.

        Raises: ValueError for a batch without it where the denoiser reads one.
        """
        return _condition_image(batch, "HumanSD") if self.base.denoiser.reads == "pose" else None

    def encode_image(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 images [B, H, W, 3] -> mean and log-variance of the latent posterior [B, h, w, c], unscaled."""
        return self.encode_moments(params, image.astype(jnp.float32) / 127.5 - 1.0)

    def encode_moments(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, 3] in [-1, 1] -> mean and log-variance of the latent posterior [B, h, w, c], unscaled."""
        return self.base.codec.moments(params, image)

    def encode_posterior(self, params: Params, image: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> scaled latents [B, h, w, c], drawn with `noise`, or the mean for None."""
        return self.base.codec.encode(params, image, noise)

    def latents(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, c] drawn from the posterior, from `image` or from cached `latent_mean/logvar`."""
        if "latent_mean" in batch:
            mean, logvar = batch["latent_mean"], batch["latent_logvar"]
        else:
            mean, logvar = self.encode_image(params, batch["image"])
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return self.base.codec.draw(mean, logvar, noise)

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents -> images [B, H, W, 3] in [-1, 1]."""
        return self.base.codec.decode(params, latents)

    def decode_unscaled(self, params: Params, latents: jax.Array) -> jax.Array:
        """The autoencoder's own latents [B, h, w, c] -> images [B, H, W, 3] about [-1, 1], in one piece."""
        return self.base.codec.decode_unscaled(params, latents)

    def adapter_features(
        self, params: Params, conditions: Sequence[jax.Array], scales: Sequence[jax.Array]
    ) -> tuple[jax.Array, ...]:
        """Features of all T2I-Adapters for their pictures [B, H, W, 3] in [0, 1], times their strengths and summed."""
        total: tuple[jax.Array, ...] = ()
        for i, (adapter, condition, scale) in enumerate(zip(self.adapters, conditions, scales, strict=True)):
            features = adapter.apply({"params": params[numbered("adapter", i)]}, condition)
            features = tuple(scale * feature for feature in cast(Any, features))
            total = tuple(a + b for a, b in zip(total, features, strict=True)) if total else features
        return total

    def denoise(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        conditioning: Conditioning,
        lora: Params | None = None,
    ) -> jax.Array:
        """The network's output for noisy latents [B, h, w, c] at timesteps [B]; ControlNets see the latents alone."""
        residuals = None
        for i, net in enumerate(self.controlnets):
            more = net.apply(
                {"params": params[numbered("controlnet", i)]},
                latents=latents,
                timesteps=timesteps,
                text=conditioning.hidden,
                condition=conditioning.conditions[i],
                scale=conditioning.scales[i],
                added_cond=self.base.denoiser.added(conditioning),
            )
            residuals = more if residuals is None else jax.tree.map(jnp.add, residuals, more)
        down, mid = (None, None) if residuals is None else cast(Any, residuals)
        if conditioning.extra is not None:
            latents = jnp.concatenate([latents, conditioning.extra], axis=-1)
        more = {"down_residuals": down, "mid_residual": mid, "adapter_features": conditioning.features or None}
        return self.base.denoiser(params, x=latents, t=timesteps, given=conditioning, lora=lora, **more)

    def noised(
        self, params: Params, batch: Batch, key: jax.Array, *, timestep_mode: str = "uniform", noise_offset: float = 0.0
    ) -> Noised:
        """The batch's latents under one draw of time and noise a sample, without gradient.

        `batch["times"]` in [0, 1), where present, replaces the drawn times (held-out losses at fixed times).
        `noise_offset` adds that much of one normal number per sample and channel to the noise.
        """
        process = self.base.process
        keys = jax.vmap(lambda k: jax.random.split(k, 4))(sample_keys(key, batch))
        clean = jax.lax.stop_gradient(self.latents(params, batch, keys[:, 0]))
        noise = jax.vmap(lambda k: jax.random.normal(k, clean.shape[1:]))(keys[:, 1])
        if noise_offset:
            shift = jax.vmap(lambda k: jax.random.normal(k, (1, 1, clean.shape[-1])))(keys[:, 2])
            noise = noise + noise_offset * shift
        if "times" in batch:
            timesteps = process.at_fraction(batch["times"])
        else:
            timesteps = jax.vmap(lambda k: process.times(k, timestep_mode))(keys[:, 3])
        noisy = process.noisy(clean, noise, timesteps)
        return Noised(noisy, process.target(clean, noise, timesteps), timesteps)

    def noisy_prediction(
        self,
        params: Params,
        batch: Batch,
        key: jax.Array,
        lora: Params | None = None,
        *,
        timestep_mode: str = "uniform",
        noise_offset: float = 0.0,
        conditions: Sequence[jax.Array] = (),
        extra: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """({"output", "target"} [B, h, w, c], timesteps [B]) for one draw of time and noise a sample (`noised`).

        `conditions`: one picture [B, H, W, 3] in [0, 1] a ControlNet, then one a T2I-Adapter, all at full strength.
        `extra` [B, h, w, k]: channels that the denoiser reads after the noisy latents.
        """
        noised = self.noised(params, batch, key, timestep_mode=timestep_mode, noise_offset=noise_offset)
        nets, ones = len(self.controlnets), jnp.ones(noised.timesteps.shape, jnp.float32)
        given = Conditioning(
            *self.text_states(params, batch, lora),
            time_ids=batch.get("time_ids"),
            extra=extra,
            conditions=tuple(conditions[:nets]),
            scales=(ones,) * nets,
            features=self.adapter_features(params, conditions[nets:], (jnp.float32(1.0),) * len(self.adapters)),
        )
        output = self.denoise(params, noised.latents, noised.timesteps, given, lora)
        return {"output": output, "target": noised.target}, noised.timesteps


def _condition_image(batch: Batch | dict[str, np.ndarray], reader: str) -> jax.Array:
    if "conditioning_image" not in batch:
        raise ValueError(
            f"{reader} reads conditioning_image, which the batches lack: choose data with condition images "
            "(data.conditioning for the people world, conditioning_image in metadata.jsonl)"
        )
    return jnp.asarray(batch["conditioning_image"]).astype(jnp.float32) / 255.0
