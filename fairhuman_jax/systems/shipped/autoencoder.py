"""Training of an image autoencoder (AutoencoderKL) with face and hand weighted reconstruction.

Source: Rombach et al. 2022 (latent diffusion), appendix G, without the adversarial and perceptual terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.contract import Batch, Parts, PreviewConfig, System, SystemConfig, sample_keys
from fairhuman_jax.models import AutoencoderKL
from fairhuman_jax.weights import save_model

PyTree = Any


@dataclass(frozen=True)
class AutoencoderConfig(SystemConfig):
    """Training of an autoencoder from scratch."""

    vae: Annotated[Mapping[str, Any], "config in diffusers' keys"] = field(default_factory=dict)
    kl_weight: Annotated[float, "weight of the latents' divergence from a unit normal, per latent number"] = 1e-5
    face_weight: Annotated[float, "added to the weight 1 of every pixel on faces"] = 3.0
    hand_weight: Annotated[float, "added to the weight 1 of every pixel on hands"] = 5.0
    remat: Annotated[str, "rematerialisation of the networks: none, full, attention or offload"] = "none"
    dtype: Annotated[str, "dtype of the computation"] = "float32"

    def build(self, shapes: bool = False) -> Autoencoder:
        """The network, not yet initialised. Raises: ValueError for config keys that are not supported."""
        vae = AutoencoderKL.from_config(self.vae, dtype=jnp.dtype(self.dtype), remat=self.remat)
        return Autoencoder(vae=vae, config=self)


@dataclass(frozen=True, eq=False)
class Autoencoder(System):
    """Trainable: the network's parameters. Frozen: nothing. One objective: reconstruction."""

    vae: AutoencoderKL
    config: AutoencoderConfig

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Random parameters."""
        return jax.jit(self.vae.init)(key, *self.vae.example_inputs())["params"], {}

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"image": reconstruction of one draw of the latent, "mean", "logvar": of its posterior}."""
        mean, logvar = self._encode(trainable, batch["image"])
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(sample_keys(key, batch))
        image = self._decode(trainable, mean + jnp.exp(0.5 * logvar) * noise)
        return {"image": image, "mean": mean, "logvar": logvar}

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Weighted mean squared error plus `kl_weight` times the mean of (mean^2 + var - 1 - log var) / 2.

        Squared, because short training with absolute errors sharpened edges long before it got colours right.
        """
        config = self.config
        error = jnp.square(prediction["image"] - _pixels(batch["image"]))
        weight = jnp.ones((1, 1, 1, 1), jnp.float32)
        for name, extra in (("face_mask", config.face_weight), ("hand_mask", config.hand_weight)):
            if name in batch:
                weight = weight + extra * batch[name].astype(jnp.float32)
        mean, logvar = prediction["mean"], prediction["logvar"]
        divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        return {"reconstruction": jnp.mean(weight * error) + config.kl_weight * divergence}

    def sample(self, trainable: PyTree, frozen: PyTree, request: jax.Array, key: jax.Array) -> jax.Array:
        """Reconstructions in [-1, 1] of the images [N, H, W, 3] uint8 in `request`, from the posterior's mean."""
        mean, _ = self._encode(trainable, request)
        return jnp.clip(self._decode(trainable, mean), -1.0, 1.0)

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[jax.Array, list[str]]:
        """The first held-out images, to be reconstructed."""
        images = held_out["image"][:16]
        return jnp.asarray(images), [""] * len(images)

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes a diffusers AutoencoderKL folder in float16 and returns it.

        Its `scaling_factor` is one over the standard deviation of the latents of `held_out`.
        """
        mean, logvar = self._encode(parts.trainable, jnp.asarray(held_out["image"]))
        deviation = float(jnp.sqrt(jnp.var(mean) + jnp.mean(jnp.exp(logvar))))
        vae = AutoencoderKL.from_config(self.vae.to_config() | {"scaling_factor": round(1.0 / deviation, 5)})
        save_model(vae, parts.trainable, folder, dtype="float16")
        return folder

    def _encode(self, params: PyTree, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cast(Any, self.vae).apply({"params": params}, _pixels(image), method=self.vae.encode)

    def _decode(self, params: PyTree, latents: jax.Array) -> jax.Array:
        return cast(Any, self.vae).apply({"params": params}, latents, method=self.vae.decode)


def _pixels(image: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0
