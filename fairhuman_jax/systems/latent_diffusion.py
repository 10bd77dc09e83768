"""What every text-to-image latent diffusion system shares: text, latents, noise, the denoiser's call, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion import add_noise, classifier_free, ddim, sample, sample_timesteps, target
from fairhuman_jax.systems.contract import Batch, PreviewConfig, sample_keys
from fairhuman_jax.weights import Pipeline, tokenize

PyTree = Any
Params = dict[str, PyTree]


@flax.struct.dataclass
class SampleRequest:
    """One compiled shape of sampling: arrays may change from call to call, the static fields choose the program.

    input_ids and negative_ids: {"input_ids": [N, L], ...}, one array a text encoder; seeds [N] int32; guidance scalar;
    latents: starting noise [N, h, w, c] or None, to draw it from the seeds.
    """

    input_ids: dict[str, jax.Array]
    negative_ids: dict[str, jax.Array]
    seeds: jax.Array
    guidance: jax.Array
    latents: jax.Array | None = None
    height: int = flax.struct.field(pytree_node=False, default=64)
    width: int = flax.struct.field(pytree_node=False, default=64)
    steps: int = flax.struct.field(pytree_node=False, default=30)


@dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """A pipeline's networks with the functions that training and sampling on it have in common.

    Networks and schedule are static; parameters travel as the argument `params`, by network: unet, vae, text_encoder
    (and text_encoder_2). `lora` trees go by the same names.
    """

    pipeline: Pipeline

    @property
    def micro_conditioned(self) -> bool:
        """Whether the denoiser takes pooled text and sizes (SDXL)."""
        return self.pipeline.unet.to_config().get("addition_embed_type") == "text_time"

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions -> {"input_ids": int32 [B, L]}, with input_ids_2 for a second text encoder."""
        return {
            _ids_name(i): tokenize(tokenizer, list(captions)) for i, tokenizer in enumerate(self.pipeline.tokenizers)
        }

    def encode_text(
        self, params: Params, ids: dict[str, jax.Array], lora: Params | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Token ids -> (hidden states [B, L, D], pooled vector [B, P]).

        One encoder: its last hidden state. Two (SDXL): both penultimate states side by side, and the second's pooled.
        """
        outputs = []
        for i, encoder in enumerate(self.pipeline.text_encoders):
            name = _numbered("text_encoder", i)
            outputs.append(encoder.apply(_variables(params, lora, name), ids[_ids_name(i)]))
        if len(outputs) == 1:
            return outputs[0]["last_hidden_state"], outputs[0]["pooled"]
        return jnp.concatenate([output["penultimate"] for output in outputs], -1), outputs[-1]["pooled"]

    def encode_image(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 images [B, H, W, 3] -> mean and log-variance of the latent posterior [B, h, w, c], unscaled."""
        vae = cast(Any, self.pipeline.vae)
        pixels = image.astype(jnp.float32) / 127.5 - 1.0
        return vae.apply({"params": params["vae"]}, pixels, method=vae.encode)

    def latents(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, c] drawn from the posterior, from `image` or from cached `latent_mean/logvar`."""
        if "latent_mean" in batch:
            mean, logvar = batch["latent_mean"], batch["latent_logvar"]
        else:
            mean, logvar = self.encode_image(params, batch["image"])
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return (mean + jnp.exp(0.5 * logvar) * noise) * self.pipeline.vae.scaling_factor

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents -> images [B, H, W, 3] in [-1, 1]."""
        vae = cast(Any, self.pipeline.vae)
        image = vae.apply({"params": params["vae"]}, latents / vae.scaling_factor, method=vae.decode)
        return jnp.clip(image, -1.0, 1.0)

    def denoise(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        text: tuple[jax.Array, jax.Array],
        time_ids: jax.Array | None,
        lora: Params | None = None,
    ) -> jax.Array:
        """The network's output for noisy latents [B, h, w, c] at timesteps [B]."""
        hidden, pooled = text
        added = {"text_embeds": pooled, "time_ids": time_ids} if self.micro_conditioned else None
        unet = cast(Any, self.pipeline.unet)
        output = unet.apply(_variables(params, lora, "unet"), latents, timesteps, hidden, added)
        return output.astype(jnp.float32)

    def noisy_prediction(
        self,
        params: Params,
        batch: Batch,
        key: jax.Array,
        lora: Params | None = None,
        *,
        timestep_mode: str = "uniform",
        noise_offset: float = 0.0,
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """({"output", "target"} [B, h, w, c], timesteps [B]) for one draw of time and noise a sample.

        `batch["times"]` in [0, 1), where present, replaces the drawn times (held-out losses at fixed times).
        `noise_offset` adds that much of one normal number per sample and channel to the noise.
        """
        schedule = self.pipeline.schedule
        keys = jax.vmap(lambda k: jax.random.split(k, 4))(sample_keys(key, batch))
        clean = jax.lax.stop_gradient(self.latents(params, batch, keys[:, 0]))
        noise = jax.vmap(lambda k: jax.random.normal(k, clean.shape[1:]))(keys[:, 1])
        if noise_offset:
            shift = jax.vmap(lambda k: jax.random.normal(k, (1, 1, clean.shape[-1])))(keys[:, 2])
            noise = noise + noise_offset * shift
        steps = schedule.num_train_timesteps
        if "times" in batch:
            timesteps = jnp.floor(batch["times"] * steps).astype(jnp.int32)
        else:
            timesteps = jax.vmap(lambda k: sample_timesteps(k, (), steps, timestep_mode))(keys[:, 3])
        text = self.encode_text(params, batch, lora)
        noisy = add_noise(schedule, clean, noise, timesteps)
        output = self.denoise(params, noisy, timesteps, text, batch.get("time_ids"), lora)
        return {"output": output, "target": target(schedule, clean, noise, timesteps)}, timesteps

    def sample_images(
        self, params: Params, request: SampleRequest, key: jax.Array, lora: Params | None = None
    ) -> jax.Array:
        """DDIM with classifier-free guidance -> images [N, H, W, 3] in [-1, 1]; each depends on its own seed alone."""
        count = request.seeds.shape[0]
        factor = self.pipeline.vae.downscale
        latents = request.latents
        if latents is None:
            shape = (request.height // factor, request.width // factor, self.pipeline.vae.config["latent_channels"])
            keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(request.seeds)
            latents = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
        size = jnp.array([request.height, request.width, 0, 0, request.height, request.width], jnp.float32)
        time_ids = jnp.broadcast_to(size, (count, 6))

        def predict(x, timestep, text):
            rows = x.shape[0]
            timesteps = jnp.broadcast_to(timestep, (rows,))
            return self.denoise(params, x, timesteps, text, jnp.tile(time_ids, (rows // count, 1)), lora)

        conditional = self.encode_text(params, request.input_ids, lora)
        unconditional = self.encode_text(params, request.negative_ids, lora)
        guided = classifier_free(predict, conditional, unconditional, request.guidance)
        latents = sample(guided, latents, key, self.pipeline.schedule, request.steps, ddim())
        return self.decode(params, latents)

    def request(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        negative: str = "",
    ) -> SampleRequest:
        """A request for one image a prompt; `size` is (height, width), multiples of the latent factor and the stride
        of the denoiser."""
        ids, negatives = self.tokenize(prompts), self.tokenize([negative] * len(prompts))
        return SampleRequest(
            input_ids={name: jnp.asarray(array) for name, array in ids.items()},
            negative_ids={name: jnp.asarray(array) for name, array in negatives.items()},
            seeds=jnp.asarray(seeds, jnp.int32),
            guidance=jnp.float32(guidance),
            height=size[0],
            width=size[1],
            steps=steps,
        )

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[SampleRequest, list[str]]:
        """A request for the configured prompts at the size of the training images."""
        seeds = [config.seed + i for i in range(len(config.prompts))]
        if "image" in held_out:
            height, width = held_out["image"].shape[1:3]
        else:
            height, width = (side * self.pipeline.vae.downscale for side in held_out["latent_mean"].shape[1:3])
        size = (height, width)
        request = self.request(config.prompts, seeds, steps=config.steps, guidance=config.guidance, size=size)
        return request, list(config.prompts)


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name}_{index + 1}"


def _ids_name(index: int) -> str:
    return _numbered("input_ids", index)


def _variables(params: Params, lora: Params | None, name: str) -> dict[str, PyTree]:
    """The collections of one network's call."""
    collections = {"params": params[name]}
    if lora is not None and name in lora:
        collections["lora"] = lora[name]
    return collections
