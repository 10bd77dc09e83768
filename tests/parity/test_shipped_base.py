"""The shipped base through torch diffusers: the same picture for the same noise; and what the package carries."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.drawing.requests import draw_images, make_request

PROMPTS = [
    "an upper body photo of a woman with long blond hair wearing a red t-shirt, waving, smiling, white background",
    "a portrait of an old man with short grey hair wearing a blue shirt, looking at the camera, dark background",
]
STEPS, GUIDANCE = 10, 3.0


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(str(resources.files("fairhuman_jax") / "assets" / "people-base"))


def test_same_picture_as_diffusers(folder):
    system = LatentDiffusion(open_base("people"))
    noise = np.random.default_rng(0).normal(size=(2, 16, 16, 8)).astype(np.float32)
    request = make_request(system, PROMPTS, [0, 1], steps=STEPS, guidance=GUIDANCE, size=(64, 64))
    request = request.replace(latents=noise)
    ours = (np.asarray(draw_images(system, system.pipeline.params, request, jax.random.key(0))) + 1.0) / 2.0

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    assert np.abs(ours - theirs).max() < 2e-3
    # Not a blank: the two prompts give different, structured pictures.
    assert np.std(ours) > 0.1 and np.abs(ours[0] - ours[1]).mean() > 0.05


def test_size_and_format(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40 * 2**20
    for network in ("unet", "vae", "text_encoder"):
        (weights,) = (folder / network).glob("*.safetensors")
        header = weights.read_bytes()[:100_000]
        assert b'"F16"' in header and b'"F32"' not in header


def test_every_caption_word_is_one_token():
    tokenizer = open_base("people").tokenizers[0]
    words = PROMPTS[0].replace(",", " ,").split()
    assert len(tokenizer(PROMPTS[0])["input_ids"]) == len(words) + 2 + PROMPTS[0].count("-") * 2
