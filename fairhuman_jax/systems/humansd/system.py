"""HumanSD: a text-to-image denoiser that reads a skeleton's latents beside its own, under a heatmap-guided loss.

All of the denoiser trains; its first convolution is widened by channels that start at zero, so it begins as the base.
Source: HumanSD (ICCV 2023, arXiv 2304.04269), ldm/models/diffusion/ddpm.py and configs/humansd of its code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import computing_in, open_base, trained
from fairhuman_jax.bases.stable_diffusion import stable_diffusion
from fairhuman_jax.contract import Batch, Parts, PreviewConfig, SystemConfig, check_fixed, sample_keys
from fairhuman_jax.diffusion import to_epsilon
from fairhuman_jax.drawing.requests import SampleRequest, check_pose_latent, draw_images, preview_request
from fairhuman_jax.losses import denoising_loss, heatmap_mask, heatmap_weight, humansd_loss
from fairhuman_jax.models import HigherHRNet, stage_mean
from fairhuman_jax.weights import Pipeline, save_pipeline
from fairhuman_jax.weights.mmpose import load_pose_network

PyTree = Any
LOSSES = ("plain", "reference", "intent", "fair")
BN_MODES = ("eval", "batch_stats")
# Folded into the step's key, each for one use; no batch has so many positions.
DROPOUT_STREAM, POSE_STREAM, WEIGHT_STREAM = (2**31 - 1 - i for i in range(3))
REFERENCE_SCHEDULER = "ddim_humansd"
REFERENCE_NEGATIVE = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality"
)
REFERENCE_ADDED = "detailed background, best quality, extremely detailed"


@dataclass(frozen=True)
class HumanSDConfig(SystemConfig):
    """Full training of a denoiser on skeletons, whose latents it reads beside its own.

    The loss is plain; reference, weighted as published by joints that a pose network does not see in the decoded error;
    intent, by the joints that it sees; or fair, with the squared error where it sees joints as a second objective for
    RunConfig.fair to balance. The reference loss shows the network raw pictures, as published. compat "reference" takes
    the published behaviour, also in previews (49 of 50 steps, negative prompt); the loss is then reference, or plain
    for the published ablation. Autoencoder and pose network are float32 always. Raises: ValueError for unknown names
    and options that `compat` fixes otherwise.
    """

    base: Annotated[str, "diffusers folder, single file, hub id, or people (shipped)"] = "people"
    pose_latent: Annotated[str, "sample or mode of the skeleton's posterior"] = "mode"
    loss: Annotated[str, "plain, reference, intent or fair"] = "plain"
    pose_network: Annotated[
        str | None, "HigherHRNet of every loss but plain: people (shipped), a folder or a checkpoint of mmpose"
    ] = None
    bn_mode: Annotated[
        str, "batch norms of the pose network by stored moments (eval) or those of the batch (batch_stats)"
    ] = "eval"
    heat_threshold: Annotated[float, "heat above which a joint is seen"] = 0.05
    pose_loss_weight: Annotated[float, "weight of the reference and intent terms"] = 0.1
    pose_dropout: Annotated[float, "probability of a black skeleton, by sample and step"] = 0.0
    compat: Annotated[str | None, "reference: the published behaviour"] = None
    remat: Annotated[str, "rematerialisation of the networks: none, full, attention or offload"] = "none"
    attention: Annotated[str, "attention: auto, xla, cudnn or splash"] = "auto"
    dtype: Annotated[str, "dtype of text encoder and computation"] = "float32"

    REFERENCE: ClassVar[dict[str, Any]] = {
        "pose_latent": "sample",
        "bn_mode": "batch_stats",
        "heat_threshold": 0.05,
        "pose_loss_weight": 0.1,
        "pose_dropout": 0.0,
    }

    def __post_init__(self) -> None:
        check_pose_latent(self.pose_latent)
        for name, known in (("loss", LOSSES), ("bn_mode", BN_MODES), ("compat", (None, "reference"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(map(str, known))}")
        if not 0.0 <= self.pose_dropout <= 1.0:
            raise ValueError(f"pose_dropout is {self.pose_dropout}; it is a probability")
        if self.compat:
            if self.loss not in ("reference", "plain"):
                raise ValueError(f"compat='reference' knows the losses reference and plain, but loss is {self.loss!r}")
            check_fixed(self, self.REFERENCE)

    def build(self, shapes: bool = False) -> HumanSD:
        """Reads the base and, for its losses, the pose network.

        Raises: ValueError for a loss without its pose network; FileNotFoundError and ValueError for files that are not
        there, cannot be read or do not fit.
        """
        return self.attach(open_base(self.base, shapes=shapes, remat=self.remat, attention=self.attention))

    def drawn_by(self, export: Path) -> dict[str, Any]:
        """The exported pipeline, which reads skeletons."""
        return {"system": "humansd", "base": str(export), "compat": self.compat}

    def attach(self, pipeline: Pipeline) -> HumanSD:
        """The system around an open pipeline, whose parameters are float32 or shapes.

        Raises: ValueError for as for `build`.
        """
        network, variables = None, None
        if self.loss != "plain":
            if self.pose_network is None:
                raise ValueError(f"loss {self.loss!r} needs pose_network: 'people', a folder or a checkpoint of mmpose")
            network, variables = load_pose_network(self.pose_network, dtype="float32")
        pipeline = computing_in(with_pose_channels(pipeline), jnp.dtype(self.dtype))
        config = dataclasses.replace(self, **self.REFERENCE) if self.compat else self
        return HumanSD(pipeline=pipeline, config=config, pose_network=network, pose_variables=variables)


@dataclass(frozen=True, eq=False)
class HumanSD(LatentDiffusion):
    """Trainable: {"unet", "pose_kernel"}, the latter the part of conv_in's kernel [3, 3, c, C] that reads the pose: it
    starts at zero, so that a run may want another rate for it. Frozen: {"vae", "text_encoder"}, and "pose_network"
    unless the loss is plain.

    Batches carry the skeleton as `conditioning_image`, uint8 [B, H, W, 3] on black. One objective, denoising; with the
    fair loss also pose. Made by `HumanSDConfig.attach`.
    """

    config: HumanSDConfig
    pose_network: HigherHRNet | None = None
    pose_variables: PyTree | None = None

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """The base's denoiser in float32, what its first convolution reads of a pose apart, and what stays frozen."""
        frozen = {name: params for name, params in self.pipeline.params.items() if name != "unet"}
        if self.pose_variables is not None:
            frozen["pose_network"] = self.pose_variables
        unet = trained(self.pipeline.params["unet"])
        own, pose = jnp.split(unet["conv_in"]["kernel"], 2, axis=2)
        return {"unet": unet | {"conv_in": unet["conv_in"] | {"kernel": own}}, "pose_kernel": pose}, frozen

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"output", "target": [B, h, w, c]}, with the loss's "weight" or mask [B, h, w, c or 1] unless it is plain.

        The branch of the pose network is no part of what is differentiated. Raises: ValueError for a batch without
        `conditioning_image`; pictures of a size that the pose network does not read.
        """
        params = joined(trainable, frozen)
        pose = self.pose_latents(params, batch, key)
        prediction, timesteps = self.noisy_prediction(params, batch, key, extra=pose)
        if self.config.loss == "plain":
            return prediction
        return prediction | {"weight": self._weight(params, prediction, timesteps, batch, key)}

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The configured loss as denoising; for the fair one plain denoising, and pose: mean(e^2 M)."""
        output, target = prediction["output"], prediction["target"]
        if self.config.loss in ("plain", "fair"):
            losses = {"denoising": jnp.mean(denoising_loss(output, target))}
            if self.config.loss == "fair":
                losses["pose"] = jnp.mean(jnp.square(output - target) * prediction["weight"])
            return losses
        factor = self.config.pose_loss_weight
        return {"denoising": humansd_loss(output, target, prediction["weight"], pose_loss_weight=factor)[0]}

    def sample(self, trainable: PyTree, frozen: PyTree, request: SampleRequest, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] for prompts and the skeletons in `request.pose`."""
        return draw_images(self, joined(trainable, frozen), request, key)

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[SampleRequest, list[str]] | None:
        """The configured prompts with held-out skeletons; under compat with the published schedule and negative."""
        asked = preview_request(self, config, held_out)
        if asked is None:
            return None
        request, titles = asked
        request = dataclasses.replace(request, pose_latent=self.config.pose_latent)
        if self.config.compat:
            ids = self.tokenize([REFERENCE_NEGATIVE] * len(titles))
            negative = {name: jnp.asarray(array) for name, array in ids.items()}
            request = dataclasses.replace(request, scheduler=REFERENCE_SCHEDULER, negative_ids=negative)
        return request, titles

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes the pipeline, its denoiser widened, as a diffusers folder in float16 and returns it."""
        save_pipeline(
            dataclasses.replace(self.pipeline, params=joined(parts.trainable, parts.frozen)), folder, dtype="float16"
        )
        return folder

    def pose_latents(self, params: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, c] of the skeletons; some of black, except where losses are held out."""
        pictures = self.pose_images(batch)
        assert pictures is not None, "attach has widened the denoiser"
        if self.config.pose_dropout and "times" not in batch:
            keys = sample_keys(jax.random.fold_in(key, DROPOUT_STREAM), batch)
            black = jax.vmap(lambda k: jax.random.bernoulli(k, self.config.pose_dropout))(keys)
            pictures = jnp.where(black.reshape(-1, 1, 1, 1), 0.0, pictures)
        noise = None
        if self.config.pose_latent == "sample":
            shape = self.latent_shape(*pictures.shape[1:3])
            keys = sample_keys(jax.random.fold_in(key, POSE_STREAM), batch)
            noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
        return self.encode_posterior(params, 2.0 * pictures - 1.0, noise)

    def heatmaps(self, params: PyTree, pictures: jax.Array) -> jax.Array:
        """Pictures [B, H, W, 3] in [0, 1] -> the pose network's mean heat maps [B, H / 2, W / 2, J]."""
        network = self.pose_network
        assert network is not None, "the configuration asks for one with each loss but the plain"
        if self.config.loss != "reference":
            pictures = network.normalise(pictures)
        stages = network.apply(params["pose_network"], pictures, self.config.bn_mode == "eval")
        return stage_mean(*cast(Any, stages))

    def _weight(
        self, params: PyTree, prediction: PyTree, timesteps: jax.Array, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """The weight of the reference loss or the mask of the others, from the error of the implied noise."""
        # The noise that a prediction implies is affine in it, so the noisy latents drop out of the difference.
        origin = jnp.zeros_like(prediction["target"])
        eps_hat, eps = (
            to_epsilon(self.pipeline.schedule, prediction[name], origin, timesteps) for name in ("output", "target")
        )
        options: dict[str, Any] = {
            "vae_decode": lambda latents: self.decode_unscaled(params, latents),
            "pose_heatmap_fn": lambda pictures: self.heatmaps(params, pictures),
            "latent_scale": self.pipeline.vae.scaling_factor,
            "heat_threshold": self.config.heat_threshold,
        }
        if self.config.loss != "reference":
            return heatmap_mask(eps_hat, eps, **options)
        keys = sample_keys(jax.random.fold_in(key, WEIGHT_STREAM), batch)
        encode = {"vae_encode_moments": lambda pictures: self.encode_moments(params, pictures)}
        return heatmap_weight(eps_hat, eps, key=keys, **encode, **options)


def joined(trainable: PyTree, frozen: PyTree) -> dict[str, PyTree]:
    """The pipeline's parameters, the kernel of the denoiser's first convolution in one piece."""
    unet = trainable["unet"]
    own, pose = (nn.meta.unbox(part) for part in (unet["conv_in"]["kernel"], trainable["pose_kernel"]))
    first = unet["conv_in"] | {"kernel": jnp.concatenate([own, pose], axis=2)}
    return {**frozen, "unet": unet | {"conv_in": first}}


def with_pose_channels(pipeline: Pipeline) -> Pipeline:
    """The pipeline with a denoiser that reads a pose's latents after its own: it answers as before, whatever the pose.

    The kernel of its first convolution [3, 3, c, C] becomes [3, 3, 2 c, C], zero from c on; one that reads a pose
    already stays as it is. Parameters may be shapes. Raises: ValueError for a denoiser that reads something else.
    """
    unet, channels = pipeline.unet, pipeline.vae.config["latent_channels"]
    if stable_diffusion(pipeline).denoiser.reads == "pose":
        return pipeline
    if unet.in_channels != channels:
        raise ValueError(
            f"the base's denoiser reads {unet.in_channels} channels; HumanSD starts from {channels}, those of its "
            f"latents, or from {2 * channels}, a HumanSD model"
        )
    params = dict(pipeline.params["unet"])
    params["conv_in"] = params["conv_in"] | {"kernel": _widened(params["conv_in"]["kernel"], channels)}
    wide = unet.clone(in_channels=2 * channels)
    return dataclasses.replace(pipeline, unet=wide, params=pipeline.params | {"unet": params})


def _widened(kernel: Any, more: int) -> Any:
    def pad(kernel: jax.Array) -> jax.Array:
        return jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))

    return jax.eval_shape(pad, kernel) if isinstance(kernel, jax.ShapeDtypeStruct) else pad(kernel)
