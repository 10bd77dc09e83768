"""Training of a scene model: a denoiser on captions alone, the half of Face-diffuser that knows no people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import computing_in, open_base, trained
from fairhuman_jax.contract import Batch, Parts, PreviewConfig, SystemConfig
from fairhuman_jax.drawing.requests import SampleRequest, draw_images, preview_request
from fairhuman_jax.losses import denoising_loss
from fairhuman_jax.weights import (
    MARKER,
    Pipeline,
    save_pipeline,
)

PyTree = Any


@dataclass(frozen=True)
class SceneModelConfig(SystemConfig):
    """Training of a scene model: all of a denoiser on captions alone. The autoencoder is float32."""

    base: Annotated[str, "diffusers folder, single file, hub id, or people (shipped)"] = "people"
    remat: Annotated[str, "rematerialisation of the networks: none, full, attention or offload"] = "none"
    attention: Annotated[str, "attention: auto, xla, cudnn or splash"] = "auto"
    dtype: Annotated[str, "dtype of text encoder and computation"] = "float32"

    def build(self, shapes: bool = False) -> SceneModel:
        """Reads the base. Raises: FileNotFoundError and ValueError for files that are not there or cannot be read."""
        return self.attach(open_base(self.base, shapes=shapes, remat=self.remat, attention=self.attention))

    def drawn_by(self, export: Path) -> dict[str, Any]:
        """The exported pipeline."""
        return {"system": "text", "base": str(export)}

    def attach(self, pipeline: Pipeline) -> SceneModel:
        """The system around an open pipeline, whose parameters are float32 or shapes."""
        return SceneModel(computing_in(pipeline, jnp.dtype(self.dtype)), config=self)


@dataclass(frozen=True, eq=False)
class SceneModel(LatentDiffusion):
    """Trainable: {"unet"}. Frozen: the rest of the pipeline. One objective: denoising. Markers of captions go."""

    config: SceneModelConfig = field(kw_only=True)

    def tokenize(self, captions: Sequence[str], chunks: int | None = None) -> dict[str, np.ndarray]:
        """As every pipeline's, of the captions without their markers."""
        return super().tokenize([caption.replace(MARKER, "") for caption in captions], chunks)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """The base's denoiser in float32, and what stays frozen."""
        frozen = {name: params for name, params in self.pipeline.params.items() if name != "unet"}
        return {"unet": trained(self.pipeline.params["unet"])}, frozen

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"output", "target": [B, h, w, c]}."""
        return self.noisy_prediction({**frozen, **trainable}, batch, key)[0]

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The mean squared error of the network's output."""
        return {"denoising": jnp.mean(denoising_loss(prediction["output"], prediction["target"]))}

    def sample(self, trainable: PyTree, frozen: PyTree, request: SampleRequest, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1]."""
        return draw_images(self, {**frozen, **trainable}, request, key)

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[SampleRequest, list[str]] | None:
        """The configured prompts at the size of the training images (`preview_request`)."""
        return preview_request(self, config, held_out)

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes the pipeline as a diffusers folder in float16 and returns it."""
        save_pipeline(
            dataclasses.replace(self.pipeline, params={**parts.frozen, **parts.trainable}), folder, dtype="float16"
        )
        return folder
