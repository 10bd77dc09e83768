"""load_pipeline and save_pipeline: round trips of the SD and the SDXL layout, and incomplete folders."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.weights import (
    Pipeline,
    build_small_clip_tokenizer,
    expected_params,
    load_pipeline,
    save_pipeline,
    tokenize,
)

UNET = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
VAE = {"block_out_channels": [4], "norm_num_groups": 2}
CLIP = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    tokenizer = build_small_clip_tokenizer(["two hands"], tmp_path_factory.mktemp("tokenizer"), model_max_length=6)
    clip = CLIP | {
        "vocab_size": len(tokenizer),
        "eos_token_id": len(tokenizer) - 1,
        "max_position_embeddings": 6,
    }
    parts = {
        "unet": UNet2DCondition.from_config(UNET),
        "vae": AutoencoderKL.from_config(VAE),
        "text_encoder": CLIPText.from_config(clip),
    }
    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), expected_params(module))
        for name, module in parts.items()
    }
    schedule = NoiseSchedule.from_config({"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"})
    return Pipeline(parts["unet"], parts["vae"], (parts["text_encoder"],), (tokenizer,), schedule, params)


@pytest.fixture
def folder(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "base")
    return tmp_path / "base"


def test_round_trip(pipeline, folder):
    again = load_pipeline(folder, remat="full")
    assert again.params.keys() == {"unet", "vae", "text_encoder"}
    for path, leaf in flatten_dict(pipeline.params).items():
        np.testing.assert_array_equal(flatten_dict(again.params)[path], leaf)
    assert again.schedule.to_config() == pipeline.schedule.to_config()
    assert again.schedule.prediction_type == "v_prediction"
    assert again.unet.remat == again.vae.remat == again.text_encoders[0].remat == "full"
    ids = [tokenize(part.tokenizers[0], ["two hands"]).tolist() for part in (pipeline, again)]
    assert ids[0] == ids[1]


def test_two_text_encoders_make_an_xl_folder(pipeline, tmp_path):
    (first,), (tokenizer,) = pipeline.text_encoders, pipeline.tokenizers
    second = CLIPText.from_config(
        first.to_config() | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 3}
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), expected_params(second))
    xl = replace(
        pipeline,
        text_encoders=(first, second),
        tokenizers=(tokenizer, tokenizer),
        params=pipeline.params | {"text_encoder_2": params},
    )
    save_pipeline(xl, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    again = load_pipeline(tmp_path)
    assert [encoder.with_projection for encoder in again.text_encoders] == [False, True]
    np.testing.assert_array_equal(
        again.params["text_encoder_2"]["text_projection"]["kernel"], params["text_projection"]["kernel"]
    )


@pytest.fixture
def refiner(pipeline):
    (encoder,), changes = pipeline.text_encoders, {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
    unet = UNet2DCondition.from_config(UNET | changes | {"projection_class_embeddings_input_dim": 6 * 2 + 3})
    encoder = CLIPText.from_config(
        encoder.to_config() | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 3}
    )
    rng = np.random.default_rng(1)
    params = {
        name: jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), expected_params(module))
        for name, module in {"unet": unet, "text_encoder_2": encoder}.items()
    }
    return replace(
        pipeline,
        unet=unet,
        text_encoders=(encoder,),
        params={"vae": pipeline.params["vae"], **params},
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    )


def test_refiner_has_the_second_text_encoder_alone(refiner, tmp_path):
    save_pipeline(refiner, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert not (tmp_path / "text_encoder").exists()
    again = load_pipeline(tmp_path)
    assert again.text_encoder_names == ("text_encoder_2",)
    assert again.params.keys() == {"unet", "vae", "text_encoder_2"}
    assert again.requires_aesthetics_score and not again.force_zeros_for_empty_prompt
    del index["tokenizer_2"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\(StableDiffusionXLImg2ImgPipeline\) has no tokenizer_2"):
        load_pipeline(tmp_path)


def test_autoencoder_stays_in_float32_where_float16_overflows(folder):
    half = load_pipeline(folder, dtype="float16")
    assert half.vae.dtype == jnp.float32
    assert half.unet.dtype == half.text_encoders[0].dtype == jnp.float16
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    assert load_pipeline(folder, dtype="float16").vae.dtype == jnp.float16
    assert load_pipeline(folder, dtype="bfloat16").vae.dtype == jnp.bfloat16


def test_incomplete_folders_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; a pipeline folder holds model_index\.json"):
        load_pipeline(tmp_path / "nowhere")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json does not exist"):
        load_pipeline(folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\(StableDiffusionPipeline\) has no vae"):
        load_pipeline(folder)
