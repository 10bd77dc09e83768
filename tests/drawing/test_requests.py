"""Sampling requests: what they may change without compiling, what a picture depends on, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from tiny_models import SIZE, fairhuman, quick_jit, tiny_pipeline, tiny_xl_pipeline, trained_lora

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.devices.sharding import make_mesh, replicate, shard_rows
from fairhuman_jax.diffusion import row_count, rule_named
from fairhuman_jax.drawing.requests import draw_images, draw_latents, make_request
from fairhuman_jax.models import ControlNet, T2IAdapter, UNet2DCondition

PROMPTS = ["a person waves", "two hands"]
KEY = jax.random.key(0)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def system() -> LatentDiffusion:
    return LatentDiffusion(tiny_pipeline())


def request(system, prompts=PROMPTS, seeds=(0, 1), **options):
    return make_request(system, prompts, list(seeds), **{"steps": 4, "guidance": 2.0, "size": (SIZE, SIZE)} | options)


def latents(system, asked, lora=None):
    return np.asarray(quick_jit(functools.partial(draw_latents, system))(system.pipeline.params, asked, KEY, lora))


@pytest.fixture
def compilations():
    """Counts the programs that XLA compiles from here on."""
    found = []

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def test_a_second_request_compiles_nothing(system, compilations):
    program = quick_jit(functools.partial(draw_images, system))
    options = {"image": picture(0), "mask": picture(1)[..., :1] // 128}
    first = request(system, strength=1.0, **options)
    jax.block_until_ready(program(system.pipeline.params, first, KEY))
    assert compilations, "the listener hears compilations"
    compilations.clear()
    options = {"image": picture(2), "mask": picture(3)[..., :1] // 128}
    second = request(
        system, ["a face", "a person smiles"], (7, 8), guidance=5.0, strength=0.5, negative="hands", **options
    )
    jax.block_until_ready(program(system.pipeline.params, second, jax.random.key(1)))
    assert not compilations


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral"])
def test_a_picture_depends_on_its_own_seed_alone(system, scheduler):
    both = latents(system, request(system, ["a face"] * 2, (5, 6), scheduler=scheduler))
    swapped = latents(system, request(system, ["a face"] * 2, (6, 9), scheduler=scheduler))
    np.testing.assert_allclose(both[1], swapped[0], rtol=0, atol=1e-4 * np.abs(both).max())
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_devices_draw_their_pictures_without_asking_each_other(system):
    mesh, asked = make_mesh(), request(system, ["a face"] * 8, range(8))
    placed = replicate(mesh, system.pipeline.params), shard_rows(mesh, asked, 8), KEY
    text = jax.jit(functools.partial(draw_images, system)).lower(*placed).compile().as_text()
    assert "num_partitions=8" in text
    assert not re.findall("all-to-all|all-gather|all-reduce|collective-permute", text)


def test_noise_can_be_handed_in(system):
    rule, shape = rule_named("euler_ancestral"), (2, *system.latent_shape(SIZE, SIZE))
    rows = row_count(system.pipeline.schedule, 4, rule)
    rng = np.random.default_rng(0)
    noise = {
        "latents": rng.normal(size=shape).astype(np.float32),
        "noise": rng.normal(size=(rows, *shape)).astype(np.float32),
    }
    asked = request(system, scheduler="euler_ancestral")
    replayed = latents(system, asked.replace(**noise))
    other_seeds = request(system, seeds=(8, 9), scheduler="euler_ancestral").replace(**noise)
    np.testing.assert_array_equal(replayed, latents(system, other_seeds))
    assert np.abs(replayed - latents(system, asked)).max() > 0.1


def test_guidance_of_one_leaves_the_negative_prompt_out(system):
    asked = request(system, guidance=1.0, negative="hands")
    assert not asked.guided
    plain = latents(system, asked)
    np.testing.assert_array_equal(plain, latents(system, request(system, guidance=1.0, negative="a face")))
    guided = latents(system, asked.replace(guided=True))
    np.testing.assert_allclose(plain, guided, rtol=0, atol=1e-3 * np.abs(plain).max())


def test_a_mask_keeps_the_picture_outside(system):
    image, mask = picture(0), np.zeros((SIZE, SIZE, 1), np.uint8)
    mask[:8] = 1
    drawn = latents(system, request(system, image=image, mask=mask, scheduler="ddim"))
    other = latents(system, request(system, seeds=(3, 4), image=image, mask=mask, scheduler="ddim"))
    spread = np.abs(drawn - other).max(axis=(0, 2, 3))
    # Below the mask only the draw of the picture's own latents differs, which is narrow.
    _, logvar = jax.jit(system.encode_image)(system.pipeline.params, image[None])
    width = 8.0 * np.exp(0.5 * np.asarray(logvar)).max() * system.pipeline.vae.scaling_factor
    assert spread[4:].max() <= width
    assert spread[:4].max() > 0.1


def test_long_prompts_go_on_in_chunks(system):
    long = "a person waves two hands a face a person smiles"
    cut, whole = request(system, [long] * 2), request(system, [long] * 2, long_prompts=True)
    assert cut.input_ids["input_ids"].ndim == 2
    tokens = whole.input_ids["input_ids"]
    assert tokens.ndim == 3 and tokens.shape == whole.negative_ids["input_ids"].shape
    hidden, pooled = system.encode_text(system.pipeline.params, whole.input_ids)
    first, first_pooled = system.encode_text(system.pipeline.params, cut.input_ids)
    assert hidden.shape[1] == tokens.shape[1] * tokens.shape[2]
    words = slice(0, tokens.shape[2] - 1)  # the end of a chunk differs from the end of a cut prompt in nothing else
    np.testing.assert_allclose(hidden[:, words], first[:, words], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pooled, first_pooled, rtol=0, atol=1e-5)
    short = request(system, long_prompts=True)
    np.testing.assert_allclose(latents(system, short), latents(system, request(system)), rtol=0, atol=1e-4)


def test_no_negative_prompt_is_zeros_where_the_pipeline_says_so():
    zeros, encoded = (
        LatentDiffusion(dataclasses.replace(tiny_xl_pipeline(), force_zeros_for_empty_prompt=said))
        for said in (True, False)
    )
    asked = [request(zeros), request(zeros, negative=""), request(encoded), request(LatentDiffusion(tiny_pipeline()))]
    assert [one.empty_negative for one in asked] == [True, False, False, False]
    system = zeros
    assert np.abs(latents(system, request(system)) - latents(system, request(system, negative=""))).max() > 1e-3


def test_text_lora_counts():
    system = fairhuman()
    lora = trained_lora(system)
    plain, adapted = (latents(system, request(system), tree) for tree in (None, lora))
    assert np.abs(plain - adapted).max() > 1e-2


def refusals():
    pipeline = tiny_pipeline()
    plain = LatentDiffusion(pipeline)
    config = {k: v for k, v in pipeline.unet.to_config().items() if k in ControlNet.config_fields()}
    net = ControlNet.from_config(config | {"conditioning_embedding_out_channels": (4, 8)})
    controlled = LatentDiffusion(pipeline, controlnets=(net,), adapters=(T2IAdapter(channels=(16, 32)),))
    nine = UNet2DCondition.from_config(pipeline.unet.to_config() | {"in_channels": 9})
    inpainting = LatentDiffusion(dataclasses.replace(pipeline, unet=nine))
    mask = np.zeros((SIZE, SIZE, 1), np.uint8)
    return {
        "a mask needs the image": (plain, {"mask": mask}),
        "it needs an image and a mask": (inpainting, {"image": picture(0)}),
        "2 ControlNets and adapters, but 1 condition images": (controlled, {"conditions": [picture(0)], "scales": [1]}),
        "0 ControlNets and adapters, but 1 condition": (plain, {"conditions": [picture(0)], "scales": [1.0]}),
        "image is 16x16, not 16x32 as asked": (plain, {"image": picture(0), "size": (16, 32)}),
        "expected 0.25 .. 1": (plain, {"image": picture(0), "strength": 0.1}),
        "scheduler 'fastest' is not known": (plain, {"scheduler": "fastest"}),
    }


@pytest.mark.parametrize("expected", list(refusals()))
def test_requests_that_do_not_fit_are_refused(expected):
    system, options = refusals()[expected]
    with pytest.raises(ValueError, match=expected):
        request(system, **options)
