"""What save_pipeline and save_lora write, diffusers loads and computes the same with."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import TEXT_TARGETS, AutoencoderKL, CLIPText, UNet2DCondition, init_lora
from fairhuman_jax.weights import (
    Pipeline,
    build_small_clip_tokenizer,
    expected_params,
    load_lora,
    load_model,
    save_lora,
    save_pipeline,
    tokenize,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "sample_size": 8,
}
VAE = {"block_out_channels": [4], "norm_num_groups": 2}
CLIP = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
CAPTIONS = ["two raised hands", "a zebra"]


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.3).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    tokenizer = build_small_clip_tokenizer(CAPTIONS[:1], tmp_path_factory.mktemp("tokenizer"))
    modules = {
        "unet": UNet2DCondition.from_config(UNET),
        "vae": AutoencoderKL.from_config(VAE),
        "text_encoder": CLIPText.from_config(CLIP | {"vocab_size": len(tokenizer), "eos_token_id": len(tokenizer) - 1}),
    }
    params = {name: random_like(expected_params(module), 0) for name, module in modules.items()}
    schedule = NoiseSchedule.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    )
    return Pipeline(modules["unet"], modules["vae"], (modules["text_encoder"],), (tokenizer,), schedule, params)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    save_pipeline(pipeline, path)
    return path


@pytest.fixture
def torch_pipeline(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


def unet_inputs():
    rng = np.random.default_rng(2)
    return rng.normal(size=(2, 8, 8, 4)).astype(np.float32), rng.normal(size=(2, 5, 8)).astype(np.float32)


def torch_unet_output(unet, latents, text):
    with torch.no_grad():
        out = unet(torch.from_numpy(latents.transpose(0, 3, 1, 2)), torch.tensor([3, 500]), torch.from_numpy(text))
    return out.sample.numpy().transpose(0, 2, 3, 1)


def our_unet_output(pipeline, latents, text, **collections):
    variables = {"params": pipeline.params["unet"], **collections}
    return jax.jit(pipeline.unet.apply)(variables, latents, np.array([3, 500]), text)


def assert_close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 2e-4 * theirs.std()


def test_saved_pipeline_is_the_same_in_diffusers(pipeline, torch_pipeline):
    latents, text = unet_inputs()
    assert_close(our_unet_output(pipeline, latents, text), torch_unet_output(torch_pipeline.unet, latents, text))
    tokenizer = torch_pipeline.tokenizer
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.tolist() == tokenize(pipeline.tokenizers[0], CAPTIONS).tolist()
    with torch.no_grad():
        theirs = torch_pipeline.text_encoder(ids).last_hidden_state.numpy()
    encoder = pipeline.text_encoders[0]
    ours = jax.jit(encoder.apply)({"params": pipeline.params["text_encoder"]}, ids.numpy())
    assert_close(ours["last_hidden_state"], theirs)
    np.testing.assert_allclose(
        pipeline.schedule.alphas_cumprod, torch_pipeline.scheduler.alphas_cumprod.numpy(), rtol=1e-5
    )


def test_saved_pipeline_draws_in_diffusers(torch_pipeline):
    torch_pipeline.set_progress_bar_config(disable=True)
    image = torch_pipeline("two raised hands", num_inference_steps=2, height=8, width=8, output_type="np").images
    assert image.shape == (1, 8, 8, 3)
    assert np.isfinite(image).all()


def test_unet_saved_by_diffusers_loads(pipeline, torch_pipeline, tmp_path):
    torch_pipeline.unet.save_pretrained(tmp_path, variant="fp16")
    module, params = load_model(tmp_path)
    assert module.to_config().items() >= UNET.items()
    for ours, again in zip(jax.tree.leaves(pipeline.params["unet"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_lora_acts_the_same_in_diffusers(pipeline, torch_pipeline, tmp_path):
    pytest.importorskip("peft")
    latents, text = unet_inputs()
    params = pipeline.params
    loras = {
        "unet": random_like(init_lora(jax.random.key(0), params["unet"], 2), 4),
        "text_encoder": random_like(init_lora(jax.random.key(1), params["text_encoder"], 2, TEXT_TARGETS), 5),
    }
    ours = our_unet_output(pipeline, latents, text, lora=loras["unet"])
    plain = torch_unet_output(torch_pipeline.unet, latents, text)
    assert np.abs(ours - plain).max() > 0.05 * plain.std()
    torch_pipeline.load_lora_weights(save_lora(loras, tmp_path, rank=2, alpha=2.0).parent)
    assert_close(ours, torch_unet_output(torch_pipeline.unet, latents, text))
    ids = tokenize(pipeline.tokenizers[0], CAPTIONS)
    with torch.no_grad():
        theirs = torch_pipeline.text_encoder(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    variables = {"params": params["text_encoder"], "lora": loras["text_encoder"]}
    encoded = jax.jit(pipeline.text_encoders[0].apply)(variables, ids)
    assert_close(encoded["last_hidden_state"], theirs)

    torch_pipeline.save_lora_weights(tmp_path / "torch", unet_lora_layers=dict(_peft_factors(torch_pipeline.unet)))
    for ours_leaf, again in zip(
        jax.tree.leaves(loras["unet"]),
        jax.tree.leaves(load_lora(tmp_path / "torch", pipeline.unet)),
        strict=True,
    ):
        np.testing.assert_allclose(again, ours_leaf, rtol=1e-6)


def _peft_factors(unet):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(unet, adapter_name="default_0")
