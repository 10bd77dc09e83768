"""Drawing pictures: the request, what it conditions the denoiser on, and the run from noise to image.

Covers text to image, image to image, inpainting with both kinds of denoiser, ControlNets, T2I-Adapters and HumanSD.
Source: Rombach et al. 2022 (latent diffusion); Meng et al. 2021 (SDEdit) for starts part-way; Zhang et al. 2023
(ControlNet); Mou et al. 2023 (T2I-Adapter).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.diffusion import (
    classifier_free,
    keep_known,
    rule_named,
    rule_of,
    sample,
    start_latents,
    start_noise,
    start_row,
)

PyTree = Any
Params = dict[str, PyTree]
POSE_LATENTS = ("sample", "mode")  # of the posterior of a pose picture's latents


@flax.struct.dataclass
class SampleRequest:
    """One compiled shape of sampling: arrays may change from call to call, the static fields choose the program.

    input_ids and negative_ids: {"input_ids": [N, L] or [N, n, L], ...}, one array a text encoder; seeds [N] int32;
    guidance and rescale (of guidance, 0 = none): scalars; start: number of steps left out at the noisy end (image to
    image), int32. image [N, H, W, 3] in [-1, 1] to start from; mask [N, H, W, 1], 1 = draw anew; conditions: one
    picture [N, H, W, 3] in [0, 1] a ControlNet, then one a T2I-Adapter, with their strengths in `scales`. pose: the
    skeletons [N, H, W, 3] in [0, 1] that a HumanSD denoiser reads as latents, with the prompt and without it;
    pose_latent: those are a "sample" of the posterior or its "mode".
    To replay a run: latents, its unit starting noise [N, h, w, c]; noise, that of each step [rows, N, h, w, c] for a
    stochastic rule; posterior_noise [2, N, h, w, c], for the latents of the image and of the masked image or the pose.
    None draws them from the seeds. scheduler: a rule's name, or None for the one that the pipeline's scheduler config
    asks for.
    guided False leaves guidance out, at half the cost; empty_negative: an SDXL pipeline's zeros for no negative prompt.
    """

    input_ids: dict[str, jax.Array]
    negative_ids: dict[str, jax.Array]
    seeds: jax.Array
    guidance: jax.Array
    rescale: jax.Array
    start: jax.Array | None = None
    image: jax.Array | None = None
    mask: jax.Array | None = None
    conditions: tuple[jax.Array, ...] = ()
    scales: tuple[jax.Array, ...] = ()
    pose: jax.Array | None = None
    latents: jax.Array | None = None
    noise: jax.Array | None = None
    posterior_noise: jax.Array | None = None
    height: int = flax.struct.field(pytree_node=False, default=64)
    width: int = flax.struct.field(pytree_node=False, default=64)
    steps: int = flax.struct.field(pytree_node=False, default=30)
    scheduler: str | None = flax.struct.field(pytree_node=False, default=None)
    guided: bool = flax.struct.field(pytree_node=False, default=True)
    empty_negative: bool = flax.struct.field(pytree_node=False, default=False)
    pose_latent: str = flax.struct.field(pytree_node=False, default="sample")


def draw_images(
    system: LatentDiffusion, params: Params, request: SampleRequest, key: jax.Array, lora: Params | None = None
) -> jax.Array:
    """Images [N, H, W, 3] in [-1, 1]; each depends on its own seed alone, not on its neighbours in the batch."""
    return system.decode(params, draw_latents(system, params, request, key, lora))


def draw_latents(
    system: LatentDiffusion, params: Params, request: SampleRequest, key: jax.Array, lora: Params | None = None
) -> jax.Array:
    """The scaled latents [N, h, w, c] that `draw_images` decodes."""
    schedule, steps = system.pipeline.schedule, request.steps
    rule = rule_named(request.scheduler) if request.scheduler else rule_of(schedule)
    keys = seed_keys(key, request.seeds)
    unit = unit_latents(system, request, keys)
    start, first, mask, after_step = None, unit, None, None
    if request.image is not None:
        known = system.encode_posterior(params, request.image, _posterior_noise(system, request, keys, 0))
        start = 0 if request.start is None else request.start
        first = start_latents(known, unit, schedule, steps, rule, start)
        if request.mask is not None:
            # A whole run leaves nothing of the picture under the mask, so it begins from noise alone.
            first = jnp.where(start == 0, start_noise(unit, schedule, steps, rule), first)
            factor = system.base.codec.downscale
            mask = request.mask[:, ::factor, ::factor].astype(jnp.float32)
            if system.base.denoiser.reads != "mask":
                after_step = keep_known(known, unit, mask, schedule, steps, rule)
    conditional, unconditional = conditionings(system, params, request, keys, mask, lora)

    def predict(x: jax.Array, times: jax.Array, conditioning: Conditioning = conditional) -> jax.Array:
        return system.denoise(params, x, times, conditioning, lora)

    denoiser = predict
    if request.guided:
        denoiser = classifier_free(predict, conditional, unconditional, request.guidance, request.rescale)

    return sample(
        denoiser, first, keys[:, 3], schedule, steps, rule, noise=request.noise, start=start, after_step=after_step
    )


def seed_keys(key: jax.Array, seeds: jax.Array) -> jax.Array:
    """Four keys a picture [N, 4]: for its starting noise, two posteriors and the steps; each by its seed alone."""
    return jax.vmap(lambda seed: jax.random.split(jax.random.fold_in(key, seed), 4))(seeds)


def unit_latents(system: LatentDiffusion, request: SampleRequest, keys: jax.Array) -> jax.Array:
    """The unit noise [N, h, w, c] that a request starts from: its own, or drawn with the `seed_keys`."""
    if request.latents is not None:
        return request.latents
    shape = system.latent_shape(request.height, request.width)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])


def _extra_channels(
    system: LatentDiffusion, params: Params, request: SampleRequest, keys: jax.Array, mask: jax.Array | None
) -> jax.Array | None:
    """What a denoiser reads beside its latents: for inpainting mask and latents of the picture with a hole, or those of
    the pose picture."""
    if system.base.denoiser.reads == "pose":
        assert request.pose is not None, "checked in `make_request`"
        noise = _posterior_noise(system, request, keys, 1) if request.pose_latent == "sample" else None
        return system.encode_posterior(params, 2.0 * request.pose - 1.0, noise)
    if system.base.denoiser.reads != "mask":
        return None
    assert request.image is not None and request.mask is not None and mask is not None, "checked in `make_request`"
    holed = request.image * (request.mask < 0.5)
    noise = _posterior_noise(system, request, keys, 1)
    return jnp.concatenate([mask, system.encode_posterior(params, holed, noise)], axis=-1)


def _posterior_noise(system: LatentDiffusion, request: SampleRequest, keys: jax.Array, which: int) -> jax.Array:
    if request.posterior_noise is not None:
        return request.posterior_noise[which]
    shape = system.latent_shape(request.height, request.width)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 1 + which])


def conditionings(
    system: LatentDiffusion,
    params: Params,
    request: SampleRequest,
    keys: jax.Array,
    mask: jax.Array | None = None,
    lora: Params | None = None,
) -> tuple[Conditioning, Conditioning]:
    """What the denoiser is told with the prompt and without it; only text and SDXL's numbers differ."""
    count, nets = request.seeds.shape[0], len(system.controlnets)
    hidden, pooled = system.encode_text(params, request.input_ids, lora)
    given = Conditioning(
        hidden,
        pooled,
        time_ids=system.base.denoiser.size_ids(request.height, request.width, count),
        extra=_extra_channels(system, params, request, keys, mask),
        conditions=request.conditions[:nets],
        scales=tuple(jnp.broadcast_to(scale, (count,)) for scale in request.scales[:nets]),
        features=system.adapter_features(params, request.conditions[nets:], request.scales[nets:]),
    )
    if request.empty_negative:
        hidden, pooled = jnp.zeros_like(hidden), jnp.zeros_like(pooled)
    else:
        hidden, pooled = system.encode_text(params, request.negative_ids, lora)
    time_ids = system.base.denoiser.size_ids(request.height, request.width, count, negative=True)
    return given, dataclasses.replace(given, hidden=hidden, pooled=pooled, time_ids=time_ids)


def make_request(
    system: LatentDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    negative: str | None = None,
    rescale: float = 0.0,
    scheduler: str | None = None,
    strength: float = 1.0,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    conditions: Sequence[np.ndarray] = (),
    scales: Sequence[float] = (),
    pose: np.ndarray | None = None,
    pose_latent: str = "sample",
    long_prompts: bool = False,
) -> SampleRequest:
    """A request for one image a prompt.

    size: (height, width). image, conditions and pose: uint8 [H, W, 3], mask: uint8 [H, W, 1] in {0, 1}, of that size
    and the same for all prompts. strength in (0, 1]: share of the steps that an image goes through. pose_latent: sample
    or mode. long_prompts: in chunks. Raises: ValueError for a picture of another size; a mask without an image; an
    inpainting denoiser without both; a HumanSD denoiser without pose, or pose for another; a number of conditions that
    is not that of ControlNets and adapters; an unknown scheduler.
    """
    _check(system, size, image, mask, conditions, scales)
    _check_pose(system, size, pose, pose_latent)
    if scheduler is not None:
        rule_named(scheduler)
    count = len(prompts)
    chunks = system.chunks([*prompts, negative or ""]) if long_prompts else None
    ids, negative_ids = system.tokenize(prompts, chunks), system.tokenize([negative or ""] * count, chunks)

    def spread(pixels: np.ndarray) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(pixels, jnp.float32), (count, *pixels.shape))

    return SampleRequest(
        input_ids={name: jnp.asarray(array) for name, array in ids.items()},
        negative_ids={name: jnp.asarray(array) for name, array in negative_ids.items()},
        seeds=jnp.asarray(seeds, jnp.int32),
        guidance=jnp.float32(guidance),
        rescale=jnp.float32(rescale),
        start=None if image is None else jnp.int32(start_row(steps, strength)),
        image=None if image is None else spread(image / 127.5 - 1.0),
        mask=None if mask is None else spread(mask),
        conditions=tuple(spread(condition / 255.0) for condition in conditions),
        scales=tuple(jnp.float32(scale) for scale in scales),
        pose=None if pose is None else spread(pose / 255.0),
        height=size[0],
        width=size[1],
        steps=steps,
        scheduler=scheduler,
        guided=guidance > 1.0,
        empty_negative=negative is None and system.base.text.empty_is_zero,
        pose_latent=pose_latent,
    )


def preview_request(
    system: LatentDiffusion, config: PreviewConfig, held_out: dict[str, np.ndarray]
) -> tuple[SampleRequest, list[str]] | None:
    """A request for the configured prompts at the size of the training images.

    ControlNets, T2I-Adapters and HumanSD's denoiser are given the first held-out condition images, again from the
    start where prompts are more. None without prompts.
    """
    if not config.prompts:
        return None
    count = len(config.prompts)
    seeds = [config.seed + i for i in range(count)]
    if "image" in held_out:
        height, width = held_out["image"].shape[1:3]
    else:
        height, width = (side * system.base.codec.downscale for side in held_out["latent_mean"].shape[1:3])
    size = (height, width)
    conditions, pose = system.condition_images(held_out), system.pose_images(held_out)
    blank = np.zeros((*size, 3), np.uint8)
    request = make_request(
        system,
        config.prompts,
        seeds,
        steps=config.steps,
        guidance=config.guidance,
        size=size,
        conditions=[blank] * len(conditions),
        scales=[1.0] * len(conditions),
        pose=None if pose is None else blank,
    )
    given = jax.tree.map(lambda pictures: pictures[jnp.arange(count) % len(pictures)], (conditions, pose))
    return dataclasses.replace(request, conditions=given[0], pose=given[1]), list(config.prompts)


def _check(
    system: LatentDiffusion,
    size: tuple[int, int],
    image: np.ndarray | None,
    mask: np.ndarray | None,
    conditions: Sequence[np.ndarray],
    scales: Sequence[float],
) -> None:
    if mask is not None and image is None:
        raise ValueError("a mask needs the image that it is for")
    if system.base.denoiser.reads == "mask" and mask is None:
        raise ValueError("this denoiser was trained for inpainting: it needs an image and a mask")
    wanted = len(system.controlnets) + len(system.adapters)
    if not wanted == len(conditions) == len(scales):
        raise ValueError(
            f"{wanted} ControlNets and adapters, but {len(conditions)} condition images and {len(scales)} strengths"
        )
    pictures = {"image": image, "mask": mask} | {f"condition {i + 1}": c for i, c in enumerate(conditions)}
    for name, pixels in pictures.items():
        if pixels is not None and pixels.shape[:2] != tuple(size):
            raise ValueError(f"{name} is {pixels.shape[0]}x{pixels.shape[1]}, not {size[0]}x{size[1]} as asked")


def _check_pose(system: LatentDiffusion, size: tuple[int, int], pose: np.ndarray | None, pose_latent: str) -> None:
    check_pose_latent(pose_latent)
    if system.base.denoiser.reads == "pose" and pose is None:
        raise ValueError("this denoiser reads a pose beside its latents (HumanSD): it needs a pose picture")
    if pose is None:
        return
    if system.base.denoiser.reads != "pose":
        channels = system.base.denoiser.channels
        raise ValueError(
            f"a pose picture is for HumanSD, whose denoiser reads its latents; this one has {channels} channels"
        )
    if pose.shape != (*size, 3):
        raise ValueError(f"the pose picture is {list(pose.shape)}, not {[*size, 3]} as asked")


def check_pose_latent(name: str) -> None:
    """Raises: ValueError for a name that is not in `POSE_LATENTS`."""
    if name not in POSE_LATENTS:
        raise ValueError(f"pose_latent is {name!r}; known: {', '.join(POSE_LATENTS)}")
