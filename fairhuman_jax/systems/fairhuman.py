"""FairHuman: global, face and hand objectives over one frozen text-to-image model; LoRA is what trains.

Source: FairHuman (ICCV 2025, arXiv 2507.02714), examples/text_to_image/train_text_to_image_lora_sdxl_mpd_fair.py.
Deviations from the reference are listed in docs/porting_notes.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion import snr
from fairhuman_jax.losses import latent_mask, min_snr_weight, region_losses
from fairhuman_jax.models import init_lora, scale_lora
from fairhuman_jax.systems.contract import Batch
from fairhuman_jax.systems.latent_diffusion import LatentDiffusion, SampleRequest
from fairhuman_jax.systems.pipelines import open_pipeline
from fairhuman_jax.weights import save_lora

PyTree = Any
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class FairHumanConfig:
    """LoRA fine-tuning with three objectives.

    base: a diffusers folder, or "people" for the shipped model; rank and alpha: of the LoRA (strength alpha / rank,
    alpha None = rank); targets: the linear layers it covers; local_scale: factor on the face and hand losses (25 is
    the reference's, which under the fair rule lowers their share); normalize: "pixels" divides local losses by all
    latents (reference), "area" by those of the region; mask_method: latent masks by "stride" (reference) or "area";
    snr_gamma: min-SNR weighting of all three losses; remat: none, full, attention or offload; dtype: of computation.
    """

    base: str = "people"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    local_scale: float = 1.0
    normalize: str = "pixels"
    mask_method: str = "area"
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    timestep_mode: str = "uniform"
    remat: str = "none"
    dtype: str = "float32"

    def build(self) -> FairHuman:
        """Reads the base model. Errors: a base that is not there or cannot be read."""
        pipeline = open_pipeline(self.base, dtype=self.dtype, remat=self.remat)
        return FairHuman(pipeline=pipeline, config=self)


@dataclass(frozen=True, eq=False)
class FairHuman(LatentDiffusion):
    """Trainable: {"unet": LoRA}. Frozen: the base's parameters by network. Objectives: global, face, hand."""

    config: FairHumanConfig

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """A LoRA that changes nothing yet (up = 0), and the frozen base."""
        params = self.pipeline.params
        return {"unet": init_lora(key, params["unet"], self.config.rank, self.config.targets)}, params

    def lora(self, trainable: PyTree) -> PyTree:
        """The trainables at their strength alpha / rank, as the networks take them."""
        config = self.config
        strength = 1.0 if config.alpha is None else config.alpha / config.rank
        return {name: scale_lora(tree, strength) for name, tree in trainable.items()}

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"output", "target": [B, h, w, c], "weight": [B]}; weight is min-SNR's, or one."""
        config = self.config
        prediction, timesteps = self.noisy_prediction(
            frozen,
            batch,
            key,
            self.lora(trainable),
            timestep_mode=config.timestep_mode,
            noise_offset=config.noise_offset,
        )
        weight = jnp.ones(timesteps.shape, jnp.float32)
        if config.snr_gamma is not None:
            schedule = self.pipeline.schedule
            weight = min_snr_weight(snr(schedule, timesteps), config.snr_gamma, schedule.prediction_type)
        return prediction | {"weight": weight}

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Losses global, face, hand (losses.region_losses); a batch without masks has empty regions."""
        config = self.config
        masks = {
            name: latent_mask(batch[name], self.pipeline.vae.downscale, config.mask_method) if name in batch else None
            for name in ("face_mask", "hand_mask")
        }
        return region_losses(
            prediction["output"],
            prediction["target"],
            masks["face_mask"],
            masks["hand_mask"],
            weight=prediction["weight"],
            local_scale=config.local_scale,
            normalize=config.normalize,
        )

    def sample(self, trainable: PyTree, frozen: PyTree, request: SampleRequest, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] of the base with its LoRA."""
        return self.sample_images(frozen, request, key, self.lora(trainable))

    def export(self, trainable: PyTree, frozen: PyTree, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes `pytorch_lora_weights.safetensors` in diffusers' naming and returns its path."""
        config = self.config
        return save_lora(trainable, folder, rank=config.rank, alpha=config.alpha)
