"""Training of an image autoencoder (AutoencoderKL) with face and hand weighted reconstruction.

Source: Rombach et al. 2022 (latent diffusion), appendix G, without the adversarial and perceptual terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fairhuman_jax.contract import Batch, Parts, PreviewConfig, System, SystemConfig, sample_keys
from fairhuman_jax.losses import halved, pyramid_loss
from fairhuman_jax.models import AutoencoderKL
from fairhuman_jax.weights import load_model, save_model

PyTree = Any
DOWN = "down_blocks."
LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "squared": lambda error, weight: jnp.mean(weight * jnp.square(error)),
    "absolute": lambda error, weight: jnp.mean(weight * jnp.abs(error)),
    "pyramid": pyramid_loss,
}


@dataclass(frozen=True)
class AutoencoderConfig(SystemConfig):
    """Training of an autoencoder, from scratch or grown out of a smaller one."""

    vae: Annotated[Mapping[str, Any], "config in diffusers' keys"] = field(default_factory=dict)
    kl_weight: Annotated[float, "weight of the latents' divergence from a unit normal, per latent number"] = 1e-5
    face_weight: Annotated[float, "added to the weight 1 of every pixel on faces"] = 3.0
    hand_weight: Annotated[float, "added to the weight 1 of every pixel on hands"] = 5.0
    loss: Annotated[
        Literal["squared", "absolute", "pyramid"], "errors: squared, absolute, or absolute in bands of frequencies"
    ] = "squared"
    crop: Annotated[int, "side of the square of each picture that a training step sees; 0 sees whole pictures"] = 0
    focus: Annotated[float, "probability that the square lies around a pixel of a face or hand"] = 0.7
    start: Annotated[str | None, "folder of a smaller autoencoder to grow out of"] = None
    anchor_weight: Annotated[
        float, "weight of the mean squared distance of the latents from those that `start` gives for reduced pictures"
    ] = 0.0
    remat: Annotated[str, "rematerialisation of the networks: none, full, attention or offload"] = "none"
    dtype: Annotated[str, "dtype of the computation"] = "float32"

    def build(self, shapes: bool = False) -> Autoencoder:
        """The network, not yet initialised, and what to start from.

        Raises: ValueError for config keys that are not supported, a loss that is not known, a crop that is no multiple
        of the latent's pixel, an anchor without a start, a start of other latents; as `load_model` for `start`.
        """
        vae = AutoencoderKL.from_config(self.vae, dtype=jnp.dtype(self.dtype), remat=self.remat)
        if self.loss not in LOSSES:
            raise ValueError(f"system.loss={self.loss!r}; known: {', '.join(LOSSES)}")
        if self.crop % vae.downscale:
            raise ValueError(f"system.crop={self.crop} must be a multiple of {vae.downscale} pixels")
        if self.start is None:
            if self.anchor_weight:
                raise ValueError("system.anchor_weight needs system.start, whose latents it keeps to")
            return Autoencoder(vae=vae, config=self)
        start, params = load_model(self.start, dtype="float32")
        start = cast(AutoencoderKL, start)
        if start.config["latent_channels"] > vae.config["latent_channels"] or start.downscale > vae.downscale:
            raise ValueError(
                f"system.start={self.start} has {start.config['latent_channels']} latent channels and reduces pictures "
                f"by {start.downscale}; expected at most {vae.config['latent_channels']} and {vae.downscale}"
            )
        return Autoencoder(vae=vae, config=self, start=start, start_params=params)


@dataclass(frozen=True, eq=False)
class Autoencoder(System):
    """Trainable: the network's parameters. Frozen: {"anchor"}, the parameters of `start`, where latents are anchored.
    One objective: reconstruction."""

    vae: AutoencoderKL
    config: AutoencoderConfig
    start: AutoencoderKL | None = None
    start_params: PyTree = None

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Random parameters, or those of `start` where they fit."""
        params = jax.jit(self.vae.init)(key, *self.vae.example_inputs())["params"]
        if self.start is None:
            return params, {}
        params = grown(params, self.start_params, self._levels)
        return params, {"anchor": self.start_params} if self.config.anchor_weight else {}

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"image": reconstruction of one draw of the latent, "mean", "logvar": of its posterior}; also "corner", int
        [B, 2], (top, left) of what was seen of each picture, where that is not all, and "anchor", the latents of
        `start` [B, h, w, c]. Held-out batches (with `times`) are seen whole."""
        keys, seen, found = sample_keys(key, batch), _pixels(batch["image"]), {}
        if self.config.crop and "times" not in batch:
            found["corner"] = self._corners(batch, keys)
            seen = cropped(seen, found["corner"], self.config.crop)
        mean, logvar = self._moments(trainable, seen)
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(keys)
        if "anchor" in frozen:
            found["anchor"] = self._anchor(frozen["anchor"], seen)
        image = self._decode(trainable, mean + jnp.exp(0.5 * logvar) * noise)
        return found | {"image": image, "mean": mean, "logvar": logvar}

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Weighted error of the pixels, plus `kl_weight` times the mean of (mean^2 + var - 1 - log var) / 2, plus
        `anchor_weight` times the mean squared distance of the latents from the anchor."""
        config = self.config
        wanted, weight = _pixels(batch["image"]), jnp.ones((1, 1, 1, 1), jnp.float32)
        for name, extra in (("face_mask", config.face_weight), ("hand_mask", config.hand_weight)):
            if name in batch:
                weight = weight + extra * batch[name].astype(jnp.float32)
        if "corner" in prediction:
            weight = jnp.broadcast_to(weight, (*wanted.shape[:3], 1))
            wanted, weight = (cropped(x, prediction["corner"], config.crop) for x in (wanted, weight))
        loss = LOSSES[config.loss](prediction["image"] - wanted, weight)
        mean, logvar = prediction["mean"], prediction["logvar"]
        loss = loss + config.kl_weight * 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        if "anchor" in prediction:
            anchor = prediction["anchor"]
            loss = loss + config.anchor_weight * jnp.mean(jnp.square(mean[..., : anchor.shape[-1]] - anchor))
        return {"reconstruction": loss}

    def sample(self, trainable: PyTree, frozen: PyTree, request: jax.Array, key: jax.Array) -> jax.Array:
        """Reconstructions in [-1, 1] of the images [N, H, W, 3] uint8 in `request`, from the posterior's mean."""
        mean, _ = self._moments(trainable, _pixels(request))
        return jnp.clip(self._decode(trainable, mean), -1.0, 1.0)

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[jax.Array, list[str]]:
        """The first held-out images, to be reconstructed."""
        images = held_out["image"][:16]
        return jnp.asarray(images), [""] * len(images)

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes a diffusers AutoencoderKL folder in float16 and returns it.

        Its `scaling_factor` is one over the standard deviation of the latents of `held_out`.
        """
        mean, logvar = self._moments(parts.trainable, _pixels(jnp.asarray(held_out["image"])))
        deviation = float(jnp.sqrt(jnp.var(mean) + jnp.mean(jnp.exp(logvar))))
        vae = AutoencoderKL.from_config(self.vae.to_config() | {"scaling_factor": round(1.0 / deviation, 5)})
        save_model(vae, parts.trainable, folder, dtype="float16")
        return folder

    @property
    def _levels(self) -> int:
        """Levels of this network outside those of `start`."""
        assert self.start is not None
        return len(self.vae.config["block_out_channels"]) - len(self.start.config["block_out_channels"])

    def _moments(self, params: PyTree, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cast(Any, self.vae).apply({"params": params}, image, method=self.vae.encode)

    def _decode(self, params: PyTree, latents: jax.Array) -> jax.Array:
        return cast(Any, self.vae).apply({"params": params}, latents, method=self.vae.decode)

    def _anchor(self, params: PyTree, image: jax.Array) -> jax.Array:
        """The latents that `start` gives for the image, reduced by the levels that it lacks."""
        for _ in range(self._levels):
            image = halved(image)
        return jax.lax.stop_gradient(cast(Any, self.start).apply({"params": params}, image, method="encode")[0])

    def _corners(self, batch: Batch, keys: jax.Array) -> jax.Array:
        """(top, left) of each sample's crop, int [B, 2]."""
        shape = batch["image"].shape
        regions = [batch[name] for name in ("face_mask", "hand_mask") if name in batch]
        regions = jnp.stack(regions or [jnp.zeros((*shape[:3], 1), jnp.uint8)], axis=1)[..., 0]
        place = functools.partial(crop_corner, side=self.config.crop, focus=self.config.focus)
        return jax.vmap(place)(keys, regions)


def crop_corner(key: jax.Array, regions: jax.Array, side: int, focus: float) -> jax.Array:
    """(top, left), int [2], of a square of `side` pixels inside the picture of `regions` [K, H, W].

    With probability `focus`, a pixel of one region is drawn (each region that has any is as likely as the others), and
    the square lies so that it holds the pixel, at least a quarter of the side from its edges where the picture allows
    it. Otherwise, or where all regions are empty, every place is as likely.
    """
    keys = jax.random.split(jax.random.fold_in(key, 1), 4)
    count, height, width = regions.shape
    flat = regions.reshape(count, -1).astype(jnp.float32)
    odds = (flat / jnp.maximum(flat.sum(axis=1, keepdims=True), 1.0)).sum(axis=0)
    pixel = jax.random.categorical(keys[0], jnp.log(odds))
    pixel = jnp.stack([pixel // width, pixel % width])
    most = jnp.array([height - side, width - side])
    near = pixel - jax.random.randint(keys[1], (2,), side // 4, side - side // 4)
    anywhere = jax.random.randint(keys[2], (2,), 0, most + 1)
    chosen = (jax.random.uniform(keys[3]) < focus) & (odds.sum() > 0)
    return jnp.where(chosen, jnp.clip(near, 0, most), anywhere)


def cropped(x: jax.Array, corner: jax.Array, side: int) -> jax.Array:
    """[B, H, W, C] and (top, left) int [B, 2] -> [B, side, side, C]."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (*at, 0), (side, side, row.shape[-1])))(x, corner)


def grown(params: PyTree, start: PyTree, levels: int) -> PyTree:
    """`params` of an autoencoder, with those of `start` in them, which has `levels` levels fewer at its outer end and
    as many latent channels or fewer.

    The encoder's level i + levels takes over level i; the decoder's levels keep their numbers. Leaves of other shapes
    stay as they are, except: what the decoder gains to double sizes begins as plain repetition of pixels, plus its own
    random start times 0.3; further latent channels begin as random features that hardly reach the decoder.
    """
    new, old = (cast(dict[tuple[str, ...], jax.Array], flatten_dict(tree)) for tree in (params, start))
    result: dict[tuple[str, ...], jax.Array] = {}
    for path, leaf in new.items():
        source = path
        if path[0] == "encoder" and path[1].startswith(DOWN):
            source = (path[0], f"{DOWN}{int(path[1].removeprefix(DOWN)) - levels}", *path[2:])
        if source in old and old[source].shape == leaf.shape:
            leaf = jnp.array(old[source], jnp.float32)  # a copy: the train step gives up the memory of trainables
        elif source in old and path[:-1] in LATENT_LAYERS:
            leaf = LATENT_LAYERS[path[:-1]](leaf, jnp.asarray(old[source], jnp.float32))
        elif path[0] == "decoder" and "upsamplers.0" in path and leaf.ndim == 4:
            leaf = 0.3 * leaf + jnp.zeros_like(leaf).at[1, 1].set(jnp.eye(leaf.shape[2], leaf.shape[3]))
        result[path] = leaf
    return unflatten_dict(result)


def _more_moments(leaf: jax.Array, old: jax.Array) -> jax.Array:
    """Last layer of the encoder, outputs [..., 2 C]: the first 2 c are the old ones."""
    return leaf.at[..., : old.shape[-1]].set(old)


def _more_quantised(leaf: jax.Array, old: jax.Array) -> jax.Array:
    """The 1 x 1 layer behind it, outputs [..., C means and C log-variances]: further means are the further inputs, and
    further log-variances begin at -4."""
    wide, narrow = leaf.shape[-1] // 2, old.shape[-1] // 2
    blank = jnp.zeros_like(leaf)
    if leaf.ndim == 1:
        return (
            blank.at[wide + narrow :].set(-4.0).at[:narrow].set(old[:narrow]).at[wide : wide + narrow].set(old[narrow:])
        )
    blank = blank.at[..., : 2 * narrow, :narrow].set(old[..., :narrow])
    blank = blank.at[..., : 2 * narrow, wide : wide + narrow].set(old[..., narrow:])
    further = jnp.arange(wide - narrow)
    return blank.at[..., 2 * narrow + further, narrow + further].set(1.0)


def _more_unquantised(leaf: jax.Array, old: jax.Array) -> jax.Array:
    """The 1 x 1 layer before the decoder: further channels pass."""
    narrow = old.shape[-1]
    if leaf.ndim == 1:
        return jnp.zeros_like(leaf).at[:narrow].set(old)
    blank = jnp.zeros_like(leaf).at[..., :narrow, :narrow].set(old)
    further = jnp.arange(narrow, leaf.shape[-1])
    return blank.at[..., further, further].set(1.0)


def _more_inputs(leaf: jax.Array, old: jax.Array) -> jax.Array:
    """First layer of the decoder, inputs [..., C, W]: the first c are the old ones, the others a tenth of random."""
    return (0.1 * leaf).at[..., : old.shape[-2], :].set(old)


LATENT_LAYERS: dict[tuple[str, ...], Callable[[jax.Array, jax.Array], jax.Array]] = {
    ("encoder", "conv_out"): _more_moments,
    ("quant_conv",): _more_quantised,
    ("post_quant_conv",): _more_unquantised,
    ("decoder", "conv_in"): _more_inputs,
}


def _pixels(image: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0
