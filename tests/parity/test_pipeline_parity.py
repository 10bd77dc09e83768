"""Whole sampling runs against diffusers' pipelines: the same latents for the same models, prompts and noise."""

from __future__ import annotations

import dataclasses
import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
from tiny_models import (
    SIZE,
    SMALL_UNET,
    quick_jit,
    random_network,
    random_params,
    tiny_pipeline,
    tiny_xl_pipeline,
    with_middle,
)

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.contract import Parts
from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.drawing.requests import draw_latents, make_request
from fairhuman_jax.models import ControlNet, T2IAdapter, UNet2DCondition
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable, ControlNetTrainable
from fairhuman_jax.weights import save_model, save_pipeline

PROMPTS, NEGATIVE = ["a person waves", "two hands"], "a face"
GUIDANCE, STEPS, SEED = 3.0, 6, 3
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
DDIM = STABLE_DIFFUSION | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
PNDM = STABLE_DIFFUSION | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
EULER = STABLE_DIFFUSION | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
DPM = STABLE_DIFFUSION | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
UNIPC = STABLE_DIFFUSION | {"_class_name": "UniPCMultistepScheduler"}
LATENT = (SIZE // 2, SIZE // 2, 4)


def with_schedule(pipeline, config):
    return dataclasses.replace(pipeline, schedule=NoiseSchedule.from_config(config))


@functools.cache
def inpainting_pipeline():
    """The tiny pipeline around a denoiser of nine channels."""
    pipeline = tiny_pipeline()
    unet = UNet2DCondition.from_config(SMALL_UNET | {"in_channels": 9})
    return dataclasses.replace(pipeline, unet=unet, params=pipeline.params | {"unet": random_params(unet, 9)})


def torch_pipeline(pipeline, folder, kind, **parts):
    save_pipeline(pipeline, folder)
    loaded = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32, **parts)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def pictures(count=1, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(count)]


def to_torch(array):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))


def image_batch(image):
    """uint8 [H, W, 3] -> one image a prompt, [B, 3, H, W] in [0, 1]."""
    return to_torch(np.tile(image[None] / np.float32(255.0), (len(PROMPTS), 1, 1, 1)))


def noises(count):
    """The first draws of a seeded torch generator, in our layout."""
    generator = torch.Generator().manual_seed(SEED)
    height, width, channels = LATENT
    draws = [torch.randn((len(PROMPTS), channels, height, width), generator=generator) for _ in range(count)]
    return [draw.numpy().transpose(0, 2, 3, 1) for draw in draws]


@functools.cache
def program(system):
    return quick_jit(functools.partial(draw_latents, system))


def ours(system, params=None, *, latents, posterior_noise=None, **options):
    options = {"steps": STEPS, "guidance": GUIDANCE, "size": (SIZE, SIZE), "negative": NEGATIVE} | options
    request = make_request(system, PROMPTS, [0, 1], **options)
    request = request.replace(latents=latents, posterior_noise=posterior_noise)
    return np.asarray(program(system)(params or system.pipeline.params, request, jax.random.key(0)))


def assert_same(found, theirs):
    expected = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(expected).max() < 1e3
    assert np.abs(found - expected).max() <= 1e-3 * max(1.0, expected.std())


def call(pipeline, **options):
    defaults = {
        "prompt": PROMPTS,
        "negative_prompt": [NEGATIVE] * len(PROMPTS),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
    }
    return pipeline(**defaults | options).images


@pytest.mark.parametrize("schedule", [PNDM, EULER, DPM], ids=lambda config: config["_class_name"])
def test_text_to_image(tmp_path, schedule):
    pipeline = with_schedule(tiny_pipeline(), schedule)
    (noise,) = noises(1)
    theirs = torch_pipeline(pipeline, tmp_path, "StableDiffusionPipeline")
    expected = call(theirs, latents=to_torch(noise), height=SIZE, width=SIZE, guidance_rescale=0.5)
    assert_same(ours(LatentDiffusion(pipeline), latents=noise, rescale=0.5), expected)


@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_sdxl(tmp_path, negative):
    pipeline = with_schedule(tiny_xl_pipeline(), EULER)
    pipeline = dataclasses.replace(pipeline, force_zeros_for_empty_prompt=True)
    (noise,) = noises(1)
    theirs = torch_pipeline(pipeline, tmp_path, "StableDiffusionXLPipeline")
    negatives = None if negative is None else [negative] * len(PROMPTS)
    expected = call(theirs, latents=to_torch(noise), height=SIZE, width=SIZE, negative_prompt=negatives)
    assert_same(ours(LatentDiffusion(pipeline), latents=noise, negative=negative), expected)


@pytest.mark.parametrize("kind", ["StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"])
def test_controlnets(tmp_path, kind):
    pipeline = with_schedule(with_middle(tiny_xl_pipeline() if "XL" in kind else tiny_pipeline()), UNIPC)
    config = {k: v for k, v in pipeline.unet.to_config().items() if k in ControlNet.config_fields()}
    net = ControlNet.from_config(config | {"conditioning_embedding_out_channels": (4, 8)})
    count = 1 if "XL" in kind else 2
    params, loaded = dict(pipeline.params), []
    for i in range(count):
        name = f"controlnet_{i + 1}" if i else "controlnet"
        params[name] = random_params(net, 20 + i)
        save_model(net, params[name], tmp_path / name)
        loaded.append(diffusers.ControlNetModel.from_pretrained(tmp_path / name))
    scales, conditions = [0.8, 0.5][:count], pictures(count)
    (noise,) = noises(1)
    theirs = torch_pipeline(pipeline, tmp_path / "base", kind, controlnet=loaded if count > 1 else loaded[0])
    images = [image_batch(condition) for condition in conditions]
    expected = call(
        theirs,
        latents=to_torch(noise),
        image=images if count > 1 else images[0],
        height=SIZE,
        width=SIZE,
        controlnet_conditioning_scale=scales if count > 1 else scales[0],
    )
    system = LatentDiffusion(pipeline, controlnets=(net,) * count)
    found = ours(system, params, latents=noise, conditions=conditions, scales=scales)
    assert_same(found, expected)
    weaker = ours(system, params, latents=noise, conditions=conditions, scales=[0.1] * count)
    assert np.abs(found - weaker).max() > 1e-2


@pytest.mark.parametrize("kind", ["StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"])
def test_t2i_adapters(tmp_path, kind):
    large = "XL" in kind
    pipeline = with_schedule(tiny_xl_pipeline() if large else tiny_pipeline(), DPM)
    adapter = T2IAdapter.from_config(
        {
            "adapter_type": "full_adapter_xl" if large else "full_adapter",
            "channels": list(pipeline.unet.block_out_channels),
            "num_res_blocks": 1,
            "downscale_factor": 2,
        }
    )
    params = pipeline.params | {"adapter": random_params(adapter, 30)}
    save_model(adapter, params["adapter"], tmp_path / "adapter")
    loaded = diffusers.T2IAdapter.from_pretrained(tmp_path / "adapter")
    (condition,), (noise,) = pictures(), noises(1)
    theirs = torch_pipeline(pipeline, tmp_path / "base", kind, adapter=loaded)
    expected = call(
        theirs,
        latents=to_torch(noise),
        image=image_batch(condition),
        height=SIZE,
        width=SIZE,
        adapter_conditioning_scale=0.7,
    )
    system = LatentDiffusion(pipeline, adapters=(adapter,))
    assert_same(ours(system, params, latents=noise, conditions=[condition], scales=[0.7]), expected)


@pytest.mark.parametrize("part", ["controlnet", "adapter"])
def test_what_a_trainer_exports_draws_the_same(tmp_path, part):
    pipeline = with_schedule(with_middle(tiny_pipeline()), UNIPC)
    trainable = ControlNetTrainable() if part == "controlnet" else AdapterTrainable(num_res_blocks=1)
    system = FairHumanConfig(trainable=trainable).attach(pipeline)
    tree = random_network(system)
    folder = system.export(Parts(tree, {}, {}), tmp_path / "export", {})
    kind, network, strength = {
        "controlnet": ("StableDiffusionControlNetPipeline", "ControlNetModel", "controlnet_conditioning_scale"),
        "adapter": ("StableDiffusionAdapterPipeline", "T2IAdapter", "adapter_conditioning_scale"),
    }[part]
    loaded = getattr(diffusers, network).from_pretrained(folder)
    (condition,), (noise,) = pictures(), noises(1)
    theirs = torch_pipeline(pipeline, tmp_path / "base", kind, **{part: loaded})
    picture = image_batch(condition)
    expected = call(theirs, latents=to_torch(noise), image=picture, height=SIZE, width=SIZE, **{strength: 0.7})
    found = ours(system, pipeline.params | tree, latents=noise, conditions=[condition], scales=[0.7])
    assert_same(found, expected)


@pytest.mark.parametrize("schedule", [DDIM, PNDM, EULER, DPM], ids=lambda config: config["_class_name"])
def test_image_to_image(tmp_path, schedule):
    pipeline = with_schedule(tiny_pipeline(), schedule)
    (image,), (posterior, noise) = pictures(), noises(2)
    theirs = torch_pipeline(pipeline, tmp_path, "StableDiffusionImg2ImgPipeline")
    system, pair = LatentDiffusion(pipeline), np.stack([posterior] * 2)
    for strength in (0.6, 1.0):
        generator = torch.Generator().manual_seed(SEED)
        expected = call(theirs, image=image_batch(image), strength=strength, generator=generator)
        assert_same(ours(system, latents=noise, posterior_noise=pair, image=image, strength=strength), expected)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(tmp_path, channels):
    pipeline = with_schedule(tiny_pipeline() if channels == 4 else inpainting_pipeline(), DDIM)
    (image,) = pictures()
    mask = np.zeros((SIZE, SIZE, 1), np.uint8)
    mask[3:12, 5:16] = 1
    theirs = torch_pipeline(pipeline, tmp_path, "StableDiffusionInpaintPipeline")
    system = LatentDiffusion(pipeline)
    for strength in (0.6, 1.0):
        posterior, noise, hole = noises(3)
        if channels == 9 and strength == 1.0:  # diffusers then leaves the picture's own latents out
            noise, hole = posterior, noise
        expected = call(
            theirs,
            image=image_batch(image),
            mask_image=image_batch(mask * np.uint8(255))[:, :1],
            strength=strength,
            generator=torch.Generator().manual_seed(SEED),
            height=SIZE,
            width=SIZE,
        )
        pair = np.stack([posterior, hole])
        found = ours(system, latents=noise, posterior_noise=pair, image=image, mask=mask, strength=strength)
        assert_same(found, expected)
