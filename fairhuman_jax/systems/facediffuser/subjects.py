"""Subjects in the text: pictures of people become part of the states of the words that name them.

What training and sampling of subject models share. Source: FastComposer (arXiv 2305.10431), section 4.1; Face-diffuser
(arXiv 2311.10329), whose subject model is FastComposer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.contract import Batch, Shapes
from fairhuman_jax.models import COLUMNS, CLIPVision, Postfuse, embed_subjects, watched_columns
from fairhuman_jax.weights import tokenize_subjects

PyTree = Any
Params = dict[str, PyTree]
IDS = "input_ids"


@dataclass(frozen=True, eq=False)
class SubjectDiffusion(LatentDiffusion):
    """A latent diffusion model with an image encoder and a fusion of its embeddings into the text.

    Parameters: those of the pipeline, "image_encoder" and "postfuse". `slots`: subjects that a caption has room for;
    `compat`: of `weights.tokenize_subjects`.
    """

    image_encoder: CLIPVision = field(kw_only=True)
    postfuse: Postfuse = field(kw_only=True)
    slots: int = field(default=4, kw_only=True)
    compat: str | None = field(default=None, kw_only=True)

    def reads(self, offered: Shapes, *, latents: bool = False, text: bool = False) -> Shapes:
        """As of every base, with the subjects' words; text is encoded with its subjects, so never beforehand."""
        shapes = super().reads(offered, latents=latents)
        count = next(iter(shapes.values())).shape[0]
        shapes["subject_positions"] = jax.ShapeDtypeStruct((count, self.slots), jnp.int32)
        shapes["subject_valid"] = jax.ShapeDtypeStruct((count, self.slots), jnp.bool_)
        return shapes

    def tokenize(self, captions: Sequence[str], chunks: int | None = None) -> dict[str, np.ndarray]:
        """Captions -> {"input_ids" int32 [B, L], "subject_positions" int32 [B, slots], "subject_valid" bool}.

        A subject's word is the one before a marker (`weights.tokenize_subjects`); a caption may have none.
        Raises: ValueError for chunks, which would part a word from its position.
        """
        if chunks is not None:
            raise ValueError("captions with subjects are one chunk: long prompts are cut")
        tokens = tokenize_subjects(self.pipeline.tokenizers[0], captions, self.slots, strict=False, compat=self.compat)
        return {IDS: tokens.ids, "subject_positions": tokens.positions, "subject_valid": tokens.valid}

    def embed(self, params: Params, pictures: jax.Array) -> jax.Array:
        """Pictures [B, N, S, S, 3] in [0, 1] -> embeddings [B, N, D]: the image encoder's, not of unit length."""
        embeddings = embed_subjects(self.image_encoder, params["image_encoder"], pictures)
        return embeddings.reshape(*pictures.shape[:2], -1)

    def augment(
        self, params: Params, hidden: jax.Array, pictures: jax.Array, positions: jax.Array, valid: jax.Array
    ) -> jax.Array:
        """Text states [B, L, D] with those at the valid positions [B, N] fused with the embeddings of `pictures`."""
        subjects = self.embed(params, pictures)
        fused = self.postfuse.apply({"params": params["postfuse"]}, hidden, subjects, positions, valid)
        return cast(jax.Array, fused)

    def watch(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        given: Conditioning,
        positions: jax.Array,
        blocks: int,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(`denoise`, attention to the tokens at `positions` [B, N] in the `blocks` central blocks, for each layer)."""
        unet = cast(Any, self.pipeline.unet)
        output, collections = unet.apply(
            {"params": params["unet"]},
            latents=latents,
            timesteps=timesteps,
            text=given.hidden,
            watched=positions,
            watched_blocks=blocks,
            mutable=[COLUMNS],
        )
        return output.astype(jnp.float32), watched_columns(collections)


def subject_batch(batch: Batch, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(pictures [B, N, S, S, 3] in [0, 1], positions [B, N], valid bool [B, N]) of a batch.

    A slot is valid where the caption marks a word and the batch has a picture. Raises: ValueError for no pictures, or
    another number of slots than the system's.
    """
    if "object_pixels" not in batch:
        raise ValueError(
            "a subject model reads object_pixels, which the batches lack: set data.subjects, for the people world or a "
            "folder in FastComposer's layout"
        )
    pictures = batch["object_pixels"]
    if pictures.shape[1] != slots:
        raise ValueError(
            f"batches hold {pictures.shape[1]} subjects (data.subjects.max_objects), the system {slots} "
            "(system.max_objects): make them equal"
        )
    there = jnp.arange(slots) < batch["num_objects"][:, None]
    return pictures.astype(jnp.float32) / 255.0, batch["subject_positions"], batch["subject_valid"] & there
