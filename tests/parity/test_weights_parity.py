"""What is written here, diffusers loads and computes the same with; what passes through here keeps every bit."""

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
    load_pipeline,
    save_lora,
    save_model,
    save_pipeline,
    tokenize,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from torch_twins import transformers_tokenizer  # noqa: E402

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


def bits(module):
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in module.state_dict().items()}


def assert_same_bits(ours, theirs):
    found, expected = bits(ours), bits(theirs)
    assert found.keys() == expected.keys() and len(expected) > 0
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


XL_UNET = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 6 * 2 + 8,
}
KINDS = {
    "SD": (diffusers.StableDiffusionPipeline, UNET, {}),
    "inpainting": (diffusers.StableDiffusionInpaintPipeline, UNET | {"in_channels": 9}, {}),
    "XL": (diffusers.StableDiffusionXLPipeline, XL_UNET | {"cross_attention_dim": 16}, {}),
    "refiner": (diffusers.StableDiffusionXLImg2ImgPipeline, XL_UNET, {"requires_aesthetics_score": True}),
}


def torch_pipeline_of(kind, tokenizer):
    """A pipeline of random weights made by diffusers itself."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    network, unet, options = KINDS[kind]
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    config = CLIPTextConfig(**CLIP, **ends, vocab_size=len(tokenizer), projection_dim=8)
    first, second = {"text_encoder": CLIPTextModel(config), "tokenizer": tokenizer}, {}
    parts = {"vae": diffusers.AutoencoderKL(**VAE), "unet": diffusers.UNet2DConditionModel(**unet)}
    if kind in ("XL", "refiner"):
        second = {"text_encoder_2": CLIPTextModelWithProjection(config), "tokenizer_2": tokenizer}
        first = first if kind == "XL" else {"text_encoder": None, "tokenizer": None}
        options = options | {"force_zeros_for_empty_prompt": kind == "XL"}
    else:
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return network(**parts, **first, **second, scheduler=diffusers.DDIMScheduler(), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_through_here_is_the_same_bit_for_bit(kind, pipeline, tmp_path):
    tokenizer = transformers_tokenizer(pipeline.tokenizers[0])
    theirs = torch_pipeline_of(kind, tokenizer).to(torch.float16 if kind == "XL" else torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16" if kind == "XL" else None)
    loaded = load_pipeline(tmp_path / "theirs", variant="fp16" if kind == "XL" else None, host=True)
    save_pipeline(loaded, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", torch_dtype=theirs.dtype)
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours").__class__ is type(theirs)
    for name, module in theirs.components.items():
        if isinstance(module, torch.nn.Module):
            assert_same_bits(getattr(again, name), module)
    for option in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        assert getattr(again.config, option, None) == getattr(theirs.config, option, None)


NETWORKS = {
    "controlnet": lambda: diffusers.ControlNetModel(
        **{
            key: UNET[key]
            for key in ("block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups")
        },
        down_block_types=UNET["down_block_types"],
        cross_attention_dim=8,
        transformer_layers_per_block=2,
        conditioning_embedding_out_channels=[4, 8],
    ),
    "adapter": lambda: diffusers.T2IAdapter(channels=[4, 8], num_res_blocks=1, downscale_factor=2),
    "adapter_xl": lambda: diffusers.T2IAdapter(
        channels=[4, 8, 8], num_res_blocks=2, downscale_factor=4, adapter_type="full_adapter_xl"
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_network_through_here_is_the_same_bit_for_bit(kind, tmp_path):
    torch.manual_seed(1)
    theirs = NETWORKS[kind]()
    for parameter in theirs.parameters():  # ControlNets start with zeros, which would hide a swap
        torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=kind != "adapter", max_shard_size="4KB")
    save_model(*load_model(tmp_path / "theirs"), tmp_path / "ours")
    assert_same_bits(type(theirs).from_pretrained(tmp_path / "ours"), theirs)


def test_image_encoders_of_transformers(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**CLIP, image_size=4, patch_size=2, projection_dim=4)
    for network in (CLIPVisionModel, CLIPVisionModelWithProjection):
        theirs = network(config)
        theirs.save_pretrained(tmp_path / "theirs")
        save_model(*load_model(tmp_path / "theirs"), tmp_path / "ours")
        again, info = network.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_same_bits(again, theirs)


def test_text_encoders_of_old_and_new_transformers(pipeline, folder, tmp_path):
    """Version 4 wrote `text_model.` before every name and a buffer of positions, version 5 writes neither."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel

    new = CLIPTextModel.from_pretrained(folder / "text_encoder")
    new.save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    tensors = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in load_file(tmp_path / "new" / "model.safetensors").items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    for version in ("old", "new"):
        _, params = load_model(tmp_path / version)
        jax.tree.map(np.testing.assert_array_equal, params, pipeline.params["text_encoder"])


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
