"""Plain text-to-image training of a whole latent diffusion model: how the shipped base is made.

The autoencoder is frozen; denoiser and text encoder train together under the one denoising objective.
Source: Rombach et al. 2022 (latent diffusion), equation 3; v-prediction: Salimans and Ho 2022, appendix D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import open_base, trained
from fairhuman_jax.contract import Batch, Parts, PreviewConfig, SystemConfig
from fairhuman_jax.diffusion import NoiseSchedule, snr
from fairhuman_jax.drawing.requests import SampleRequest, draw_images, preview_request
from fairhuman_jax.losses import denoising_loss, min_snr_weight
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.weights import Pipeline, expected_params, load_model, load_tokenizer, save_pipeline

PyTree = Any
CHANNELS = ("in_channels", "out_channels")  # of the latents


@dataclass(frozen=True)
class TextToImageConfig(SystemConfig):
    """A base model from nothing but a trained autoencoder and a tokenizer; configs have diffusers' and transformers'
    keys. The latents of `start` may have fewer channels, which are then the first of these.
    """

    vae: Annotated[str, "folder of the autoencoder"]
    tokenizer: Annotated[str, "folder of the tokenizer"]
    unet: Annotated[Mapping[str, Any], "config of the denoiser"] = field(default_factory=dict)
    text_encoder: Annotated[Mapping[str, Any], "config of the text encoder"] = field(default_factory=dict)
    scheduler: Annotated[Mapping[str, Any], "config of the noise schedule"] = field(default_factory=dict)
    start: Annotated[
        str | None, "pipeline folder (or people) whose denoiser and text encoder train on; None begins random ones"
    ] = None
    snr_gamma: Annotated[float | None, "gamma of min-SNR weighting; None does not weight"] = None
    remat: Annotated[str, "rematerialisation of the networks: none, full, attention or offload"] = "none"
    dtype: Annotated[str, "dtype of the computation"] = "float32"

    def build(self, shapes: bool = False) -> TextToImage:
        """Reads autoencoder and tokenizer, and what to start from.

        Raises: ValueError for folders that are missing or do not fit.
        """
        runtime = {"dtype": jnp.dtype(self.dtype), "remat": self.remat}
        vae, vae_params = load_model(self.vae, dtype=self.dtype, remat=self.remat)
        pipeline = Pipeline(
            unet=UNet2DCondition.from_config(dict(self.unet), **runtime),
            vae=cast(AutoencoderKL, vae),
            text_encoders=(CLIPText.from_config(self.text_encoder, **runtime),),
            tokenizers=(load_tokenizer(self.tokenizer),),
            schedule=NoiseSchedule.from_config(self.scheduler),
            params={"vae": vae_params},
        )
        return TextToImage(pipeline=self._started(pipeline), config=self)

    def drawn_by(self, export: Path) -> dict[str, Any]:
        """The exported pipeline."""
        return {"system": "text", "base": str(export)}

    def _started(self, pipeline: Pipeline) -> Pipeline:
        """With the parameters of `start`, whose networks must be those of this configuration; further channels of the
        latents have no effect at first, and the denoiser gives zeros for them."""
        if self.start is None:
            return pipeline
        start = open_base(self.start)
        for name, ours, theirs in (
            ("unet", pipeline.unet, start.unet),
            ("text_encoder", pipeline.text_encoders[0], start.text_encoders[0]),
        ):
            mine, other = ours.to_config(), theirs.to_config()
            fewer = {key: other[key] for key in CHANNELS if key in other and other[key] <= mine[key]}
            if mine | fewer != other:
                raise ValueError(f"system.start={self.start}: its {name} has another config than this run's")
        trained = {name: start.params[name] for name in ("unet", "text_encoder")}
        trained["unet"] = widened(trained["unet"], pipeline.unet)
        return replace(pipeline, params=pipeline.params | trained)


def widened(params: PyTree, network: nn.Module) -> PyTree:
    """`params` with zeros at the end of each axis that is longer in `network`."""

    def fill(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.pad(leaf, [(0, more - less) for more, less in zip(wanted.shape, leaf.shape, strict=True)])

    return jax.tree.map(fill, params, expected_params(network))


@dataclass(frozen=True, eq=False)
class TextToImage(LatentDiffusion):
    """Trainable: {"unet", "text_encoder"} parameters. Frozen: {"vae"}. One objective: denoising."""

    config: TextToImageConfig

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Denoiser and text encoder, random or those of `start`, and the frozen autoencoder."""
        networks = {"unet": self.pipeline.unet, "text_encoder": self.pipeline.text_encoders[0]}
        trainable = {}
        for name, network_key in zip(networks, jax.random.split(key), strict=True):
            if name in self.pipeline.params:
                trainable[name] = trained(self.pipeline.params[name])
            else:
                network = networks[name]
                trainable[name] = jax.jit(network.init)(network_key, *network.example_inputs())["params"]
        return trainable, {"vae": self.pipeline.params["vae"]}

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"output", "target": [B, h, w, c], "weight": [B]}."""
        prediction, timesteps = self.noisy_prediction({**frozen, **trainable}, batch, key)
        schedule = self.pipeline.schedule
        weight = jnp.ones(timesteps.shape, jnp.float32)
        if self.config.snr_gamma is not None:
            weight = min_snr_weight(snr(schedule, timesteps), self.config.snr_gamma, schedule.prediction_type)
        return prediction | {"weight": weight}

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The mean squared error of the network's output."""
        losses = denoising_loss(prediction["output"], prediction["target"])
        return {"denoising": jnp.mean(prediction["weight"] * losses)}

    def sample(self, trainable: PyTree, frozen: PyTree, request: SampleRequest, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1]."""
        return draw_images(self, {**frozen, **trainable}, request, key)

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[SampleRequest, list[str]] | None:
        """The configured prompts at the size of the training images (`preview_request`)."""
        return preview_request(self, config, held_out)

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes the whole pipeline as a diffusers folder in float16 and returns it."""
        save_pipeline(replace(self.pipeline, params={**parts.frozen, **parts.trainable}), folder, dtype="float16")
        return folder
