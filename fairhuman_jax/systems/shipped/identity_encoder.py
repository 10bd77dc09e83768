"""Training of an image encoder that tells people apart, for subject models to begin from.

A picture of a person is to be known among a batch of scenes by who is in them: other clothes, pose and light.
Source: contrastive learning as in CLIP (Radford et al. 2021), with a scene in the place of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.contract import Batch, Parts, PreviewConfig, System, SystemConfig
from fairhuman_jax.losses import contrastive_loss
from fairhuman_jax.models import CLIPVision, embed_subjects
from fairhuman_jax.weights import save_model

PyTree = Any
GREY = 0.5  # what hides the rest of a scene


@dataclass(frozen=True)
class IdentityEncoderConfig(SystemConfig):
    """Training of an image encoder that tells people apart."""

    network: Annotated[Mapping[str, Any], "config of a CLIP image encoder with projection"] = field(
        default_factory=dict
    )
    temperature: Annotated[float, "temperature of the contrastive loss"] = 0.1

    def build(self, shapes: bool = False) -> IdentityEncoder:
        """The network, not yet initialised.

        Raises: ValueError for config keys that are not known; no projection; no temperature.
        """
        if self.temperature <= 0.0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        network = CLIPVision.from_config(self.network)
        if not network.with_projection:
            raise ValueError("network is no CLIP image encoder with projection (CLIPVisionModelWithProjection)")
        return IdentityEncoder(network, self)


@dataclass(frozen=True, eq=False)
class IdentityEncoder(System):
    """Trainable: the encoder's parameters. Frozen: nothing. One objective: contrastive.

    A batch is one of subjects (`data.subjects`): `image` uint8 [B, H, W, 3], `object_pixels` uint8 [B, N, S, S, 3],
    pictures of the people in it, `object_masks` [B, N, H, W], where they are, and `num_objects` [B]. Partners are
    looked for among the people of each device's part of a batch.
    """

    network: CLIPVision
    config: IdentityEncoderConfig

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Random parameters."""
        return jax.jit(self.network.init)(key, *self.network.example_inputs())["params"], {}

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"reference", "scene": embeddings [B N, D], "valid": float [B N], 1 where there is a person}."""
        if "object_pixels" not in batch:
            raise ValueError("an identity encoder reads object_pixels, which the batches lack: set data.subjects")
        count = batch["object_pixels"].shape[1]
        there = jnp.arange(count) < batch["num_objects"][:, None]
        return {
            "reference": self.embed(trainable, batch["object_pixels"].astype(jnp.float32) / 255.0),
            "scene": self.embed(trainable, people_alone(batch)),
            "valid": there.reshape(-1).astype(jnp.float32),
        }

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The symmetric cross entropy of finding each other."""
        pair, valid = (prediction["reference"], prediction["scene"]), prediction["valid"] > 0.5
        return {"contrastive": contrastive_loss(*pair, valid, self.config.temperature)}

    def embed(self, params: PyTree, pictures: jax.Array) -> jax.Array:
        """Pictures [B, N, H, W, 3] in [0, 1] -> embeddings [B N, D], not of unit length."""
        return embed_subjects(self.network, params, pictures)

    def sample(self, trainable: PyTree, frozen: PyTree, request: Batch, key: jax.Array) -> jax.Array:
        """The first person of each sample beside the scene that is nearest to it, images [B, H, 2 H, 3] in [-1, 1]."""
        found = {name: leaf for name, leaf in request.items() if name in ("image", "num_objects")}
        found |= {name: request[name][:, :1] for name in ("object_pixels", "object_masks")}
        prediction = self.predict(trainable, frozen, found, key)
        pair = [prediction[name] for name in ("reference", "scene")]
        pair = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in pair]
        nearest = jnp.argmax(pair[0] @ pair[1].T, axis=-1)
        people, scenes = request["object_pixels"][:, 0] / 255.0, request["image"][nearest] / 255.0
        people = jax.image.resize(people, scenes.shape, "bilinear")
        return 2.0 * jnp.concatenate([people, scenes], axis=2) - 1.0

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[Batch, list[str]]:
        """The first held-out people, who are looked for among their scenes."""
        names = ("image", "object_pixels", "object_masks", "num_objects")
        request = {name: jnp.asarray(held_out[name][:16]) for name in names}
        return request, [""] * len(request["image"])

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes a folder that transformers and `load_model` read, in float16, and returns it."""
        save_model(self.network, parts.trainable, folder, dtype="float16")
        return folder


def people_alone(batch: Batch) -> jax.Array:
    """Each person where he is in the picture, [B, N, H, W, 3] in [0, 1], on grey."""
    masks = batch["object_masks"][..., None].astype(jnp.float32)
    return masks * (batch["image"].astype(jnp.float32)[:, None] / 255.0) + (1.0 - masks) * GREY
