"""Drawing pictures with people in them: by scene and subject model in stages, or by a subject model alone.

Source: Face-diffuser (CVPR 2024, arXiv 2311.10329), facediffuser/pipeline.py and inference.py; FastComposer (arXiv
2305.10431), fastcomposer/pipeline.py, for delayed conditioning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.diffusion import (
    BASELINES,
    FusionMaps,
    delayed_sample,
    pndm,
    rule_named,
    snf_fuse,
    stage_steps,
    staged_sample,
)
from fairhuman_jax.drawing.requests import SampleRequest, conditionings, make_request, seed_keys, unit_latents
from fairhuman_jax.systems.facediffuser.subjects import SubjectDiffusion
from fairhuman_jax.weights import MARKER, load_subject_model, tokenize_subjects

PyTree = Any
Params = dict[str, PyTree]
SCENE = "scene_unet"


@flax.struct.dataclass
class StagedRequest:
    """What to draw: a request for the prompts without their markers, and the subjects.

    references [N, K, S, S, 3] in [0, 1], positions int32 and valid bool [N, K]: pictures of subjects and the words that
    they belong to. start_merge_step, final_step: the last rows of the first two stages, int32 scalars; of a delayed run
    the first alone. subject_guidance: of the subject model, the request's own being the scene model's; gains [2]: of
    scene and subject model in the fusion; temperature: of a soft mask.
    soft, per_channel: how `snf_fuse` masks; baseline: what the subject model is guided from; stacked: both networks in
    one call on stacked parameters, which takes the memory of two more denoisers; stages: the two rows as constants of
    the program, for maps.
    """

    request: SampleRequest
    references: jax.Array
    positions: jax.Array
    valid: jax.Array
    start_merge_step: jax.Array
    final_step: jax.Array
    subject_guidance: jax.Array
    gains: jax.Array
    temperature: jax.Array
    soft: bool = flax.struct.field(pytree_node=False, default=False)
    per_channel: bool = flax.struct.field(pytree_node=False, default=False)
    baseline: str = flax.struct.field(pytree_node=False, default="text")
    stacked: bool = flax.struct.field(pytree_node=False, default=False)
    stages: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)


@dataclass(frozen=True, eq=False)
class FaceDiffuser(SubjectDiffusion):
    """Scene and subject model with one text encoder and one autoencoder, the subject model's.

    Parameters: those of SubjectDiffusion, and "scene_unet", of the same network as "unet".
    """


def draw_staged(system: SubjectDiffusion, params: Params, request: StagedRequest, key: jax.Array) -> jax.Array:
    """Images [N, H, W, 3] in [-1, 1] by both models in stages; each depends on its own seed alone."""
    return system.decode(params, draw_staged_latents(system, params, request, key)[0])


def draw_with_maps(
    system: SubjectDiffusion, params: Params, request: StagedRequest, key: jax.Array
) -> tuple[jax.Array, FusionMaps]:
    """(images, the maps that fused the steps of stage 2) of a request whose `stages` are constants."""
    latents, maps = draw_staged_latents(system, params, request, key, return_maps=True)
    assert maps is not None, "the call returns maps"
    return system.decode(params, latents), maps


def draw_staged_latents(
    system: SubjectDiffusion, params: Params, request: StagedRequest, key: jax.Array, *, return_maps: bool = False
) -> tuple[jax.Array, FusionMaps | None]:
    """(scaled latents [N, h, w, c], maps where they are asked for) of both models, in stages."""
    base = request.request
    keys = seed_keys(key, base.seeds)
    text, null, augmented = told(system, params, request, keys)
    scene_params = params | {"unet": params[SCENE]}
    start, final = request.stages or (request.start_merge_step, request.final_step)
    fuse = partial(
        snf_fuse,
        gain_t=request.gains[0],
        gain_s=request.gains[1],
        per_channel=request.per_channel,
        temperature=request.temperature if request.soft else None,
    )

    def both(latents: jax.Array, times: jax.Array, scene: Conditioning, subject: Conditioning) -> Any:
        """One call on stacked parameters; only the denoiser's differ."""
        unets, given = (
            jax.tree.map(lambda a, b: jnp.stack([a, b]), *pair)
            for pair in ((params[SCENE], params["unet"]), (scene, subject))
        )
        outputs = jax.vmap(lambda unet, told: system.denoise(params | {"unet": unet}, latents, times, told))(
            unets, given
        )
        return outputs[0], outputs[1]

    drawn = staged_sample(
        partial(system.denoise, scene_params),
        partial(system.denoise, params),
        *_start(system, base, keys),
        null=null,
        text=text,
        augmented=augmented,
        scale_t=base.guidance,
        scale_s=request.subject_guidance,
        start_merge_step=start,
        final_step=final,
        baseline=request.baseline,
        both=both if request.stacked else None,
        fuse=fuse,
        return_maps=return_maps,
        noise=base.noise,
    )
    return drawn if return_maps else (drawn, None)


def draw_delayed(system: SubjectDiffusion, params: Params, request: StagedRequest, key: jax.Array) -> jax.Array:
    """Images [N, H, W, 3] in [-1, 1] of the subject model alone: text up to start_merge_step, then with subjects."""
    base = request.request
    keys = seed_keys(key, base.seeds)
    text, null, augmented = told(system, params, request, keys)
    latents = delayed_sample(
        partial(system.denoise, params),
        *_start(system, base, keys),
        null=null,
        text=text,
        augmented=augmented,
        scale=request.subject_guidance,
        start_merge_step=request.stages[0] if request.stages else request.start_merge_step,
        noise=base.noise,
    )
    return system.decode(params, latents)


def _start(system: SubjectDiffusion, base: SampleRequest, keys: jax.Array) -> tuple[Any, ...]:
    """What both samplers begin with: unit noise, keys, schedule, number of steps, and the rule, PNDM unless named."""
    rule = rule_named(base.scheduler) if base.scheduler else pndm()
    return unit_latents(system, base, keys), keys[:, 3], system.pipeline.schedule, base.steps, rule


def told(
    system: SubjectDiffusion, params: Params, request: StagedRequest, keys: jax.Array
) -> tuple[Conditioning, Conditioning, Conditioning]:
    """What denoisers are told: the text, nothing (or the negative prompt), and the text with subjects."""
    text, null = conditionings(system, params, request.request, keys)
    hidden = system.augment(params, text.hidden, request.references, request.positions, request.valid)
    return text, null, dataclasses.replace(text, hidden=hidden)


def _reference_pictures(
    prompts: Sequence[str], counts: np.ndarray, references: Sequence[Sequence[np.ndarray]], slots: int
) -> np.ndarray:
    """Pictures of subjects, float32 [N, slots, S, S, 3] in [0, 1].

    Raises: ValueError for a number of pictures that is not that of a prompt's markers; pictures of several sizes.
    """
    for prompt, count, given in zip(prompts, counts, references, strict=True):
        if count != len(given):
            raise ValueError(f"{prompt!r} marks {count} subjects, but there are {len(given)} reference pictures")
    shapes = {picture.shape for given in references for picture in given}
    if len(shapes) > 1:
        raise ValueError(f"reference pictures are of several sizes: {', '.join(map(str, sorted(shapes)))}")
    (shape,) = shapes
    pictures = np.zeros((len(prompts), slots, *shape), np.float32)
    for row, given in enumerate(references):
        pictures[row, : len(given)] = np.stack(given) / 255.0
    return pictures


def make_staged_request(
    system: SubjectDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    references: Sequence[Sequence[np.ndarray]],
    steps: int,
    guidance: float,
    size: tuple[int, int],
    subject_guidance: float | None = None,
    alpha: float = 0.3,
    beta: float = 0.6,
    start_merge_step: int | None = None,
    final_step: int | None = None,
    negative: str | None = None,
    scheduler: str | None = None,
    gains: tuple[float, float] = (1.0, 1.0),
    temperature: float | None = None,
    per_channel: bool = False,
    baseline: str = "text",
    stacked: bool = False,
    constant_stages: bool = False,
) -> StagedRequest:
    """A request for one image a prompt, whose markers take the pictures in `references`, uint8 [S, S, 3], in order.

    alpha, beta: fractions of the steps after which the stages end; start_merge_step, final_step: the steps themselves.
    Raises: ValueError for a prompt without marker, with one inside a word, or with one whose word is cut off; a number
    of pictures that is not that of the markers, or above the system's slots; pictures of several sizes; an unknown
    baseline or scheduler; guidance of 1 or less; a fraction outside [0, 1].
    """
    if (least := min(guidance, guidance if subject_guidance is None else subject_guidance)) <= 1.0:
        raise ValueError(f"guidance is {least}; staged drawing needs more than 1")
    if baseline not in BASELINES:
        raise ValueError(f"baseline is {baseline!r}; known: {', '.join(BASELINES)}")
    tokens = tokenize_subjects(system.pipeline.tokenizers[0], prompts, system.slots)
    pictures = _reference_pictures(prompts, tokens.counts, references, system.slots)
    given = stage_steps(steps, alpha, beta)
    start = given[0] if start_merge_step is None else start_merge_step
    final = given[1] if final_step is None else final_step
    own: dict[str, Any] = {"steps": steps, "guidance": guidance, "size": size, "negative": negative}
    plain = make_request(system, [text.replace(MARKER, "") for text in prompts], seeds, scheduler=scheduler, **own)
    return StagedRequest(
        request=dataclasses.replace(plain, input_ids={"input_ids": jnp.asarray(tokens.ids)}),
        references=jnp.asarray(pictures),
        positions=jnp.asarray(tokens.positions),
        valid=jnp.asarray(tokens.valid),
        start_merge_step=jnp.int32(start),
        final_step=jnp.int32(final),
        subject_guidance=jnp.float32(guidance if subject_guidance is None else subject_guidance),
        gains=jnp.asarray(gains, jnp.float32),
        temperature=jnp.float32(temperature or 1.0),
        soft=bool(temperature),
        per_channel=per_channel,
        baseline=baseline,
        stacked=stacked,
        stages=(start, final) if constant_stages else None,
    )


def open_staged(
    base: str, scene: str | None = None, *, dtype: str = "float32", slots: int = 4, **options: Any
) -> tuple[FaceDiffuser, dict[str, PyTree]]:
    """A subject model and, unless it draws alone, the scene model to draw with it, with all parameters by network.

    base: what `load_subject_model` reads; scene: a pipeline of the same network, whose autoencoder and text encoder are
    not kept. `options` go to both (attention). Raises: ValueError, as loading; networks or text encoders that differ.
    """
    pipeline, encoder, postfuse, params = load_subject_model(base, dtype=dtype, **options)
    params = dict(params)
    if scene is not None:
        other = open_base(scene, dtype=dtype, **options)
        if other.unet.to_config() != pipeline.unet.to_config():
            raise ValueError(f"{scene}: its denoiser has another config than that of the subject model {base}")
        if not _agree(other.params["text_encoder"], params["text_encoder"]):
            raise ValueError(
                f"{scene}: its text encoder is not that of the subject model {base}, which both are to be told by"
            )
        params[SCENE] = other.params["unet"]
    return FaceDiffuser(pipeline, image_encoder=encoder, postfuse=postfuse, slots=slots), params


def _agree(first: PyTree, second: PyTree) -> bool:
    """Whether two trees are one up to rounding to bfloat16, as published text encoders are."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(a.shape == b.shape and bool(jnp.allclose(a, b, rtol=2**-7, atol=1e-5)) for a, b in pairs)
