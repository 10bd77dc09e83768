"""FairHuman: global, face and hand objectives over one frozen text-to-image model.

What trains is a LoRA, a ControlNet or a T2I-Adapter (systems/fairhuman/trainables.py).
Source: FairHuman (ICCV 2025, arXiv 2507.02714), the three trainers *_sdxl_mpd_fair.py of its examples.
Deviations from the reference are listed in docs/porting_notes.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.contract import Batch, Parts, PreviewConfig, SystemConfig, check_fixed, sample_keys
from fairhuman_jax.diffusion import NoiseSchedule, snr
from fairhuman_jax.drawing.requests import SampleRequest, draw_images, preview_request
from fairhuman_jax.losses import latent_mask, min_snr_weight, region_losses, x0_weight
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable, ControlNetTrainable, LoraTrainable, TrainedPart
from fairhuman_jax.weights import Pipeline, load_model

PyTree = Any
DROPOUT_STREAM = 2**31 - 1  # folded into the step's key; no batch has so many positions


@dataclass(frozen=True)
class FairHumanConfig(SystemConfig):
    """Three objectives (global, face, hand) on what a `trainable` adds to a frozen base.

    compat "reference" takes the losses of the published trainer of that trainable, with weights on the global loss
    alone for LoRA and one coin a batch for control dropout; the combination is FairConfig's matter (mpd for LoRA, else
    sum). Raises: ValueError for two timestep weights at once; options that `compat` fixes otherwise; control dropout
    without control.
    """

    base: Annotated[str, "diffusers folder, single file, hub id, or people (shipped)"] = "people"
    vae: Annotated[str | None, "another autoencoder for the base: folder, file or hub id"] = None
    trainable: Annotated[
        LoraTrainable | ControlNetTrainable | AdapterTrainable, "what trains: a LoRA, a ControlNet or a T2I-Adapter"
    ] = field(default_factory=LoraTrainable)
    local_scale: Annotated[
        float, "factor on the face and hand losses; under the fair rule a larger one lowers their share"
    ] = 1.0
    normalize: Annotated[str, "divide local losses by all latents (pixels) or by those of the region (area)"] = "pixels"
    mask_method: Annotated[str, "latent masks by the covered area, or by every n-th pixel (stride)"] = "area"
    mask_threshold: Annotated[float, "least covered share of a latent that counts as region"] = 0.25
    snr_gamma: Annotated[float | None, "gamma of min-SNR weighting of all three losses; None does not weight"] = None
    x0_weight: Annotated[
        float | None, "largest weight of the added error of the x0 estimate; inf is no bound, None adds none"
    ] = None
    noise_offset: Annotated[float, "factor of a normal number added to the noise, by sample and channel"] = 0.0
    timestep_mode: Annotated[str, "density of the timesteps: uniform, or cubic, which favours noise"] = "uniform"
    control_dropout: Annotated[float, "probability of a black condition image, by sample and step"] = 0.0
    compat: Annotated[str | None, "reference: losses of the published trainer"] = None
    remat: Annotated[str, "rematerialisation of the networks: none, full, attention or offload"] = "none"
    attention: Annotated[str, "attention: auto, xla, cudnn or splash"] = "auto"
    dtype: Annotated[str, "dtype of frozen weights and computation"] = "float32"

    def __post_init__(self) -> None:
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat is {self.compat!r}; known: None, 'reference'")
        if self.compat:
            check_fixed(self, self.trainable.REFERENCE)
        if self.snr_gamma is not None and self.x0_weight is not None:
            raise ValueError("snr_gamma and x0_weight are two answers to one question: set one of them")
        if not 0.0 <= self.control_dropout <= 1.0:
            raise ValueError(f"control_dropout is {self.control_dropout}; it is a probability")
        if self.control_dropout and not self.trainable.CONDITIONED:
            raise ValueError("control_dropout is for a ControlNet or an adapter; a LoRA reads no condition image")

    def build(self, shapes: bool = False) -> FairHuman:
        """Reads the base model, and the trainable's start.

        With `shapes` another `vae` is not looked for: its shapes are those of the base's.
        Raises: FileNotFoundError and ValueError for files that are not there or cannot be read.
        """
        runtime: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat, "attention": self.attention}
        pipeline = open_base(self.base, shapes=shapes, **runtime)
        if self.vae is not None and not shapes:
            vae, params = load_model(self.vae, **runtime)
            pipeline = replace(pipeline, vae=vae, params=pipeline.params | {"vae": params})
        return self.attach(pipeline)

    def drawn_by(self, export: Path) -> dict[str, Any]:
        """The base with the exported LoRA, ControlNet or T2I-Adapter."""
        return {"system": "text", "base": self.base, self.trainable.OPTION: (str(export),)}

    def attach(self, pipeline: Pipeline, kind: type[FairHuman] | None = None) -> FairHuman:
        """The system around an open pipeline, whose parameters may be shapes; `kind` is `FairHuman` or a subclass."""
        part = self.trainable.build(pipeline)
        config = replace(self, **self.trainable.REFERENCE) if self.compat else self
        return (kind or FairHuman)(pipeline=pipeline, config=config, part=part, **part.networks())


@dataclass(frozen=True, eq=False)
class FairHuman(LatentDiffusion):
    """Trainable: LoRA trees by network, {"controlnet"} or {"adapter"}. Frozen: the base's parameters by network.

    Objectives: global, face, hand. Made by `FairHumanConfig.attach`.
    """

    config: FairHumanConfig
    part: TrainedPart

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(what the trainable starts from, float32, and the frozen base)."""
        params = self.pipeline.params
        return self.part.init(params, key), params

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"output", "target": [B, h, w, c], "weight": [B]}; weight is min-SNR's, that of the x0 error, or one.

        Raises: ValueError for a ControlNet or adapter without `conditioning_image` in the batch.
        """
        config = self.config
        added, lora = self.part.applied(trainable)
        prediction, timesteps = self.noisy_prediction(
            {**frozen, **added},
            batch,
            key,
            lora,
            timestep_mode=config.timestep_mode,
            noise_offset=config.noise_offset,
            conditions=self._conditions(batch, key),
        )
        return prediction | {"weight": self._weight(timesteps)}

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Losses global, face, hand (losses.region_losses); a batch without masks has empty regions."""
        config = self.config
        factor = self.pipeline.vae.downscale
        face, hand = (
            latent_mask(batch[name], factor, config.mask_method, config.mask_threshold) if name in batch else None
            for name in ("face_mask", "hand_mask")
        )
        options: dict[str, Any] = {"local_scale": config.local_scale, "normalize": config.normalize}
        if config.compat and config.trainable.WEIGHT_ON_GLOBAL_ONLY:
            options = {"compat": config.compat}
        weight = prediction["weight"]
        return region_losses(prediction["output"], prediction["target"], face, hand, weight=weight, **options)

    def sample(self, trainable: PyTree, frozen: PyTree, request: SampleRequest, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] of the base with what was trained."""
        added, lora = self.part.applied(trainable)
        return draw_images(self, {**frozen, **added}, request, key, lora)

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[SampleRequest, list[str]] | None:
        """The configured prompts at the size of the training images (`preview_request`)."""
        return preview_request(self, config, held_out)

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes a LoRA file, or the folder of a ControlNet or T2I-Adapter, as diffusers reads them."""
        return self.part.export(parts.trainable, folder)

    def _conditions(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, ...]:
        """The condition images [B, H, W, 3] in [0, 1]; some black, except where losses are held out."""
        rate = self.config.control_dropout
        conditions = self.condition_images(batch)
        if not rate or "times" in batch:
            return conditions
        key = jax.random.fold_in(key, DROPOUT_STREAM)
        if self.config.compat:
            black = jax.random.bernoulli(key, rate)
        else:
            black = jax.vmap(lambda k: jax.random.bernoulli(k, rate))(sample_keys(key, batch))
        return tuple(jnp.where(black.reshape(-1, 1, 1, 1), 0.0, condition) for condition in conditions)

    def _weight(self, timesteps: jax.Array) -> jax.Array:
        """The losses' weight at each timestep, [B]."""
        config, schedule = self.config, self.pipeline.schedule
        if config.snr_gamma is not None:
            return min_snr_weight(snr(schedule, timesteps), config.snr_gamma, schedule.prediction_type)
        if config.x0_weight is not None:
            return _with_x0_error(schedule, timesteps, config.x0_weight)
        return jnp.ones(timesteps.shape, jnp.float32)


def _with_x0_error(schedule: NoiseSchedule, timesteps: jax.Array, maximum: float) -> jax.Array:
    """Squared error of a prediction plus that of its x0 estimate, as a multiple of the first, at most `maximum`.

    1 / a for epsilon; 2 - a for v, whose x0 error is sqrt(1 - a) times its own; 2 for x0 itself.
    """
    alphas = jnp.asarray(schedule.alphas_cumprod)[timesteps]
    if schedule.prediction_type == "epsilon":
        return x0_weight(alphas, maximum)
    own = jnp.zeros_like(alphas) if schedule.prediction_type == "sample" else alphas
    return jnp.minimum(2.0 - own, maximum)
