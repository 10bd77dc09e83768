"""Single files that are written: their names, what their metadata keep, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ldm_pipelines import arrays_of, assert_holds, pipeline

import fairhuman_jax
from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.weights import build_small_clip_tokenizer, load_pipeline
from fairhuman_jax.weights.ldm import load_single_file, open_single_file
from fairhuman_jax.weights.ldm.configs import SD1, SD2, XL
from fairhuman_jax.weights.ldm.slots import ldm_unet_slots
from fairhuman_jax.weights.ldm.writing import networks, save_single_file
from fairhuman_jax.weights.safetensors_io import TensorFiles

PEOPLE_BASE = Path(fairhuman_jax.__file__).parent / "assets" / "people-base"


def test_configs_that_shapes_do_not_tell_are_kept(tmp_path):
    base = load_pipeline(PEOPLE_BASE, host=True)  # 16 groups, 32 channels a head, 8 latent channels, 48 tokens
    path = save_single_file(base, tmp_path / "people.safetensors")
    single = open_single_file(path)
    assert {name: component.config for name, component in single.components.items()} == {
        name: module.to_config() for name, module in networks(base).items()
    }
    assert NoiseSchedule.from_config(single.scheduler_config) == base.schedule
    for name, component in single.components.items():
        assert_holds(component, base.params[name])
    build_small_clip_tokenizer(["two hands"], tmp_path / "small")
    with pytest.raises(ValueError, match=r"the tokenizer has 5\d\d tokens, the text_encoder of .* 837"):
        load_single_file(path, tokenizer=tmp_path / "small")


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            SD1,
            {
                "model.diffusion_model.input_blocks.1.1.proj_in.weight": (64, 64, 1, 1),
                "model.diffusion_model.input_blocks.2.0.op.weight": (64, 64, 3, 3),
                "model.diffusion_model.output_blocks.1.1.conv.weight": (128, 128, 3, 3),
                "first_stage_model.decoder.mid.attn_1.proj_out.weight": (64, 64, 1, 1),
                "first_stage_model.decoder.up.1.upsample.conv.weight": (64, 64, 3, 3),
                "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (64, 64),
            },
        ),
        (
            SD2,
            {
                "model.diffusion_model.input_blocks.1.1.proj_in.weight": (64, 64),
                "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (192, 64),
                "cond_stage_model.model.positional_embedding": (6, 64),
            },
        ),
        (
            XL,
            {
                "model.diffusion_model.label_emb.0.0.weight": (256, 1600),
                "model.diffusion_model.output_blocks.1.2.conv.weight": (128, 128, 3, 3),
                "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (64,),
                "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias": (384,),
                "conditioner.embedders.1.model.text_projection": (128, 64),
            },
        ),
    ],
)
def test_names_and_shapes_are_those_of_the_original_code(family, names, tmp_path):
    arrays = arrays_of(save_single_file(pipeline(family), tmp_path / "model.safetensors"))
    assert {name: arrays[name].shape for name in names} == names
    total = sum(component.size for tree in pipeline(family).params.values() for component in leaves_of(tree))
    assert sum(array.size for array in arrays.values()) == total


def leaves_of(tree):
    return [leaf for value in tree.values() for leaf in (leaves_of(value) if isinstance(value, dict) else [value])]


def test_fused_attention_keeps_the_order_query_key_value(tmp_path):
    arrays = arrays_of(save_single_file(pipeline(SD2), tmp_path / "model.safetensors"))
    fused = arrays["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
    attention = pipeline(SD2).params["text_encoder"]["text_model"]["encoder"]["layers"]["self_attn"]
    expected = [np.asarray(attention[name]["kernel"][1]).T for name in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_array_equal(fused, np.concatenate(expected))


def test_sdxl_v_prediction_is_said_in_the_three_ways_programs_look_for(tmp_path):
    config = pipeline(XL).schedule.to_config()
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    changed = replace(pipeline(XL), schedule=NoiseSchedule.from_config(config))
    path = save_single_file(changed, tmp_path / "model.safetensors")
    files = TensorFiles([path])
    assert (files.shape("v_pred"), files.shape("ztsnr")) == ((0,), (0,))
    assert files.metadata["modelspec.prediction_type"] == "v"
    assert json.loads(files.metadata["fairhuman_jax.configs"])["scheduler"]["prediction_type"] == "v_prediction"
    assert open_single_file(path).scheduler_config == config


def test_half_precision_is_written_when_asked_for(tmp_path):
    path = save_single_file(pipeline(SD1), tmp_path / "model.safetensors", "float16")
    single = open_single_file(path)
    assert {
        component.tensors.dtype(name) for component in single.components.values() for name in component.tensors.names()
    } == {jnp.dtype("float16")}
    half = {"vae": {"decoder": pipeline(SD1).params["vae"]["decoder"]}}
    kernel = np.asarray(half["vae"]["decoder"]["conv_in"]["kernel"], np.float16)
    np.testing.assert_array_equal(
        single.components["vae"].tensors.read("decoder.conv_in.weight"), kernel.transpose(3, 2, 0, 1)
    )


def test_what_has_no_place_in_a_single_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without middle block has no place in an LDM file"):
        ldm_unet_slots(["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "", linear=True)
    with pytest.raises(ValueError, match=r"model.ckpt: a single file is written as .safetensors"):
        save_single_file(pipeline(SD1), tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == []
