"""Files that are not what they should be: each is refused in one line that names the file and what would be right."""

from __future__ import annotations

import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fairhuman_jax.models import AutoencoderKL
from fairhuman_jax.weights import expected_params, load_model, save_model
from fairhuman_jax.weights.recognition import looks_like
from fairhuman_jax.weights.tensors import open_tensors

VAE = {"block_out_channels": [4], "norm_num_groups": 2, "mid_block_add_attention": False}
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    module = AutoencoderKL.from_config(VAE)
    save_model(module, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), expected_params(module)), folder)
    return (folder / "config.json").read_bytes(), (folder / NAME).read_bytes()


@pytest.fixture
def folder(original, tmp_path):
    (tmp_path / "config.json").write_bytes(original[0])
    (tmp_path / NAME).write_bytes(original[1])
    return tmp_path


def refusal(folder) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes); get it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 64, "is a GGUF file"),
        (b"<!DOCTYPE html><html>", "is a web page, not a model"),
        (b"\n <HTML>", "is a web page, not a model"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"no weights at all, but text", "is truncated or not a safetensors file"),
        (
            struct.pack("<Q", 1 << 62) + b"{}",
            "is truncated or not a safetensors file (10 bytes cannot hold its header)",
        ),
        (struct.pack("<Q", 4) + b"[1]\n", "is truncated or not a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "missing (decoder.conv_in.bias, decoder.conv_in.weight, "),
    ],
    ids=["empty", "git-lfs", "gguf", "html", "HTML", "hdf5", "text", "long header", "no header", "no tensors"],
)
def test_other_files_under_the_name_of_weights(folder, content, message):
    (folder / NAME).write_bytes(content)
    assert message in refusal(folder)


def test_truncated_weights_say_how_much_is_missing(folder):
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole[:-1])
    assert f"it should have {len(whole)} bytes or more and has {len(whole) - 1}" in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "holds 1 float8 tensors (F8_E4M3, as x)"),
        ({"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}, "holds 1 F4 tensors"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}, "gives a tensor [4] the bytes 0 to 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}, "gives a tensor [1] the bytes -8 to -4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, "gives a tensor [-1]"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "it should have"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "its header is no description of tensors"),
        ({"shape": [1], "data_offsets": [0, 4]}, "its header is no description of tensors"),
    ],
)
def test_headers_that_lie(folder, entry, message):
    header = json.dumps({"x": entry}).encode()
    (folder / NAME).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert message in refusal(folder)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(folder)


def test_tensors_of_the_wrong_shape_or_type(folder):
    tensors = load_file(folder / NAME)
    tensors["encoder.conv_in.weight"] = np.ones((4, 1, 3, 3), np.float32)
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"].astype(np.int8)
    save_file(tensors, folder / NAME)
    message = refusal(folder)
    assert "1 of the wrong shape (encoder.conv_in.weight [4, 1, 3, 3] for [4, 3, 3, 3])" in message
    assert "1 not of a floating type (decoder.conv_in.weight int8)" in message


def test_values_are_not_looked_at(folder):
    tensors = load_file(folder / NAME)
    tensors["encoder.conv_in.bias"][:2] = np.nan, np.inf
    save_file(tensors, folder / NAME)
    bias = load_model(folder)[1]["encoder"]["conv_in"]["bias"]
    np.testing.assert_array_equal(bias, tensors["encoder.conv_in.bias"])


@pytest.mark.parametrize(
    ("names", "likeness"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8)}, "a LoRA"),
        ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 8)}, "a LoRA"),
        ({"x.hada_w1_a": (4, 8)}, "a LoHa"),
        ({"x.lokr_w1": (4, 8)}, "a LoKr"),
        (
            {"up_blocks.1.resnets.0.time_emb_proj.weight": (8, 8), "conv_in.weight": (320, 9, 3, 3)}
            | {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
            "the UNet for inpainting of SD 1.x (cross-attention 768)",
        ),
        (
            {"up_blocks.1.resnets.0.time_emb_proj.weight": (8, 8), "conv_in.weight": (320, 4, 3, 3)}
            | {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048)},
            "the UNet of SDXL (cross-attention 2048)",
        ),
        (
            {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}
            | {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
            "a ControlNet for SD 2.x (cross-attention 1024)",
        ),
        (
            {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}
            | {"first_stage_model.decoder.up.0.block.0.norm1.weight": (8,)},
            "a whole LDM checkpoint for SD 2.x (cross-attention 1024)",
        ),
        ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet in the naming of a single file"),
        ({"adapter.body.0.resnets.0.block1.weight": (8, 8, 3, 3)}, "a T2I-Adapter"),
        ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "a CLIP text encoder (CLIP ViT-L/14)"),
        ({"something.else": (1,)}, None),
    ],
)
def test_what_files_look_like(tmp_path, names, likeness):
    save_file({name: np.zeros(shape, np.uint8) for name, shape in names.items()}, tmp_path / "x.safetensors")
    assert looks_like(open_tensors(tmp_path / "x.safetensors")) == likeness


def test_errors_say_what_the_file_looks_like(folder):
    save_file({"lora_unet_x.lora_down.weight": np.ones((4, 8), np.float32)}, folder / NAME)
    assert refusal(folder).endswith("; it looks like a LoRA")
    save_file({"a": np.ones(1, np.float32)}, folder / "a.safetensors")
    save_file({"a": np.ones(1, np.float32)}, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors holds a, which a\.safetensors holds too"):
        open_tensors([folder / "a.safetensors", folder / "b.safetensors"])
