"""Face-diffuser's two models: the subject model, which is FastComposer's, and the scene model, and their training.

Sampling with both of them is in systems/facediffuser/fusion.py.
Source: Face-diffuser (CVPR 2024, arXiv 2311.10329), facediffuser/model.py, model_text_only.py and train.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.bases.opening import computing_in, open_base, open_image_encoder, trained
from fairhuman_jax.contract import Batch, Parts, PreviewConfig, SystemConfig, sample_keys
from fairhuman_jax.losses import localization_loss, object_mask, object_masked_loss
from fairhuman_jax.models import CLIPVision, Postfuse
from fairhuman_jax.systems.facediffuser.fusion import StagedRequest, draw_delayed, make_staged_request
from fairhuman_jax.systems.facediffuser.subjects import SubjectDiffusion, subject_batch
from fairhuman_jax.weights import (
    MARKER,
    Pipeline,
    SubjectPipeline,
    load_subject_model,
    save_subject_model,
)
from fairhuman_jax.weights.shapes import image_encoder_config
from fairhuman_jax.weights.shipped import or_shipped

PyTree = Any
COIN_STREAM = 2**31 - 4  # folded into the step's key; no batch has so many positions


@dataclass(frozen=True)
class SubjectModelConfig(SystemConfig):
    """Training of a subject model: the denoiser, the fusion and the last layers of the image encoder.

    The projection of the image encoder must be as wide as the text. compat "reference" takes one coin a batch, the
    masked error's mean over the whole picture, and captions that lose their end token when truncated. The autoencoder
    is float32.
    """

    base: Annotated[str, "diffusers folder, single file, hub id, or people (shipped)"] = "people"
    image_encoder: Annotated[
        Any,
        "CLIP image encoder with projection: folder, hub id, people (shipped), or a config for a random one; "
        "None continues from the subject model in base",
    ] = "openai/clip-vit-large-patch14"
    image_layers: Annotated[int, "number of its last layers that train; 0 trains all"] = 2
    max_objects: Annotated[int, "subjects a caption has room for, as data.subjects.max_objects"] = 4
    mask_prob: Annotated[
        float, "probability, by sample and step, that the denoising error counts on subjects alone"
    ] = 0.5
    localization_weight: Annotated[float, "weight of the localization objective; 0 leaves it out"] = 1e-3
    localization_blocks: Annotated[int, "number of central blocks whose attention it reads"] = 5
    localization_normalize: Annotated[bool, "divide attention by its maximum first"] = False
    compat: Annotated[str | None, "reference: the published behaviour"] = None
    remat: Annotated[str, "rematerialisation of the networks: none, full, attention or offload"] = "none"
    attention: Annotated[str, "attention: auto, xla, cudnn or splash"] = "auto"
    dtype: Annotated[str, "dtype of text encoder and computation"] = "float32"

    def __post_init__(self) -> None:
        if not 0.0 <= self.mask_prob <= 1.0:
            raise ValueError(f"mask_prob is {self.mask_prob}; it is a probability")
        if self.localization_weight < 0.0:
            raise ValueError(f"localization_weight is {self.localization_weight}; it must be 0 or more")
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat is {self.compat!r}; known: None, reference")

    def build(self, shapes: bool = False) -> SubjectModel:
        """Reads base and image encoder; a subject model to go on from is read with `shapes` too.

        Raises: FileNotFoundError and ValueError for files that cannot be read or networks that do not fit together.
        """
        runtime: dict[str, Any] = {"remat": self.remat, "attention": self.attention}
        if self.image_encoder is None:
            begun = load_subject_model(self.base, dtype="float32", **runtime)
            parts = {name: begun.params[name] for name in ("image_encoder", "postfuse")}
            return self.attach(begun.pipeline, begun.image_encoder, parts)
        pipeline = open_base(self.base, shapes=shapes, **runtime)
        if shapes:
            encoder: Any = self.image_encoder
            if isinstance(encoder, str):
                encoder = image_encoder_config(or_shipped(encoder, "people_identity"))
            return self.attach(pipeline, CLIPVision.from_config(encoder, **runtime), {})
        if isinstance(self.image_encoder, str):
            encoder, params = open_image_encoder(self.image_encoder, dtype="float32", **runtime)
            return self.attach(pipeline, encoder, {"image_encoder": params})
        return self.attach(pipeline, CLIPVision.from_config(self.image_encoder, **runtime), {})

    def drawn_by(self, export: Path) -> dict[str, Any]:
        """The exported subject model, alone."""
        return {"system": "facediffuser", "base": str(export), "delayed": True}

    def attach(self, pipeline: Pipeline, encoder: CLIPVision, begun: dict[str, PyTree]) -> SubjectModel:
        """The system around open networks; of image_encoder and postfuse what is not in `begun` starts at random.

        Raises: ValueError for as for `build`.
        """
        width = pipeline.text_encoders[0].config["hidden_size"]
        if len(pipeline.text_encoders) != 1:
            raise ValueError(f"base {self.base}: a subject model starts from Stable Diffusion 1 or 2, not SDXL")
        if not isinstance(encoder, CLIPVision) or not encoder.with_projection:
            raise ValueError("image_encoder is no CLIP image encoder with projection (CLIPVisionModelWithProjection)")
        if encoder.config["projection_dim"] != width:
            raise ValueError(
                f"image_encoder projects to {encoder.config['projection_dim']}, but the text is {width} wide"
            )
        depth = encoder.config["num_hidden_layers"]
        if not 0 <= self.image_layers <= depth:
            raise ValueError(
                f"image_layers is {self.image_layers}; the image encoder has {depth} layers (0: all of it)"
            )
        pipeline.unet.central_blocks(self.localization_blocks)
        return SubjectModel(
            computing_in(pipeline, jnp.dtype(self.dtype)),
            self,
            begun,
            image_encoder=encoder.clone(dtype=jnp.dtype(self.dtype)),
            postfuse=Postfuse(width, jnp.dtype(self.dtype)),
            slots=self.max_objects,
            compat=self.compat,
        )


@dataclass(frozen=True, eq=False)
class SubjectModel(SubjectDiffusion):
    """Trainable: {"unet", "postfuse", "image_encoder": its last layers, or all}. Frozen: the rest of the pipeline and
    of the encoder.

    Batches carry pictures of subjects and their masks (data/subject_transforms.py). Objectives: denoising and, unless
    its weight is 0, localization, which has the weight in it: their sum is the published loss, and a fair rule
    balances them.
    """

    config: SubjectModelConfig
    begun: dict[str, PyTree]

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """What trains, in float32, and what stays frozen; parts that were not begun are random."""
        networks = {"postfuse": self.postfuse, "image_encoder": self.image_encoder}
        parts = dict(self.begun)
        for name, part_key in zip(networks, jax.random.split(key), strict=True):
            if name not in parts:
                parts[name] = jax.jit(networks[name].init)(part_key, *networks[name].example_inputs())["params"]
        frozen = {name: self.pipeline.params[name] for name in ("vae", "text_encoder")}
        trainable = {"unet": self.pipeline.params["unet"], **parts}
        if self.config.image_layers:
            frozen["image_encoder"], last = parted(parts["image_encoder"], self.config.image_layers)
            trainable["image_encoder"] = last
        return trained(trainable), frozen

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"output", "target" [B, h, w, c], "mask" [B, h, w, 1], "masked" [B], "columns": attention of each layer}.

        Raises: ValueError for a batch without subjects, or with another number of slots.
        """
        params = self.joined(trainable, frozen)
        pictures, positions, valid = subject_batch(batch, self.slots)
        hidden, pooled = self.encode_text(params, batch)
        given = Conditioning(self.augment(params, hidden, pictures, positions, valid), pooled)
        noised = self.noised(params, batch, key)
        if self.config.localization_weight:
            blocks = self.config.localization_blocks
            output, columns = self.watch(params, noised.latents, noised.timesteps, given, positions, blocks)
        else:
            output, columns = self.denoise(params, noised.latents, noised.timesteps, given), ()
        mask = object_mask(batch["object_masks"], output.shape[1:3])
        return {
            "output": output,
            "target": noised.target,
            "mask": mask,
            "masked": self._coins(batch, key).astype(jnp.float32),
            "columns": columns,
        }

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """denoising: the mean squared error, of some samples on subjects alone; localization, times its weight."""
        config, masked = self.config, prediction["masked"] > 0.5
        errors = object_masked_loss(
            prediction["output"], prediction["target"], prediction["mask"], masked, compat=config.compat
        )
        losses = {"denoising": jnp.mean(errors)}
        if config.localization_weight:
            _, _, valid = subject_batch(batch, self.slots)
            loss = localization_loss(
                prediction["columns"], batch["object_masks"], valid, normalize=config.localization_normalize
            )
            losses["localization"] = config.localization_weight * loss
        return losses

    def sample(self, trainable: PyTree, frozen: PyTree, request: StagedRequest, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] by FastComposer's delayed conditioning: this model alone."""
        return draw_delayed(self, self.joined(trainable, frozen), request, key)

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[StagedRequest, list[str]] | None:
        """The configured prompts, whose markers take the subjects of held-out samples in turn.

        Raises: ValueError for a prompt without marker.
        """
        if not config.prompts:
            return None
        shown = np.arange(self.slots) < held_out["num_objects"][:, None]
        pictures, wanted = held_out["object_pixels"][shown], [prompt.count(MARKER) for prompt in config.prompts]
        places = np.arange(sum(wanted)) % max(len(pictures), 1)
        references = [list(part) for part in np.split(pictures[places], np.cumsum(wanted)[:-1])]
        request = make_staged_request(
            self,
            config.prompts,
            [config.seed + i for i in range(len(wanted))],
            references=references,
            steps=config.steps,
            guidance=config.guidance,
            size=tuple(held_out["image"].shape[1:3]),
        )
        return request, [prompt.replace(MARKER, "*") for prompt in config.prompts]

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes the pipeline as a diffusers folder, with image_encoder and postfuse in it, in float16."""
        params = self.joined(parts.trainable, parts.frozen)
        pipeline = dataclasses.replace(self.pipeline, params=params)
        save_subject_model(
            SubjectPipeline(pipeline, self.image_encoder, self.postfuse, params), folder, dtype="float16"
        )
        return folder

    def joined(self, trainable: PyTree, frozen: PyTree) -> dict[str, PyTree]:
        """All parameters by network, the image encoder's in one piece."""
        params = {**frozen, **trainable}
        if self.config.image_layers:
            params["image_encoder"] = whole(frozen["image_encoder"], trainable["image_encoder"])
        return params

    def _coins(self, batch: Batch, key: jax.Array) -> jax.Array:
        """Whose denoising error counts on subjects alone, bool [B]; held-out losses are of whole pictures."""
        size, key = batch["num_objects"].shape, jax.random.fold_in(key, COIN_STREAM)
        if "times" in batch:
            return jnp.zeros(size, bool)
        if self.config.compat:
            return jnp.broadcast_to(jax.random.bernoulli(key, self.config.mask_prob), size)
        return jax.vmap(lambda k: jax.random.bernoulli(k, self.config.mask_prob))(sample_keys(key, batch))


def parted(encoder: PyTree, last: int) -> tuple[PyTree, PyTree]:
    """(an image encoder's parameters without its `last` layers, these alone); the layers are a stack."""
    layers = encoder["vision_model"]["encoder"]["layers"]
    first, end = (
        jax.tree.map(lambda leaf, part=part: leaf[part], layers) for part in (slice(-last), slice(-last, None))
    )
    return _with_layers(encoder, first), {"layers": end}


def whole(first: PyTree, last: PyTree) -> PyTree:
    """The inverse of `parted`."""
    layers = first["vision_model"]["encoder"]["layers"]
    joined = jax.tree.map(lambda a, b: jnp.concatenate([nn.meta.unbox(a), nn.meta.unbox(b)]), layers, last["layers"])
    return _with_layers(first, joined)


def _with_layers(encoder: PyTree, layers: PyTree) -> PyTree:
    vision = encoder["vision_model"]
    return encoder | {"vision_model": vision | {"encoder": vision["encoder"] | {"layers": layers}}}
