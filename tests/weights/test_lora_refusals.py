"""LoRA files that are no use here: each is refused in one line that says why."""

from __future__ import annotations

import json

import lora_dialects as dialects
import numpy as np
import pytest
from lora_dialects import CLIP, LAYER, UNET, params, random_lora, rewrite
from safetensors.numpy import load_file, save_file

from fairhuman_jax.weights.lora import load_lora, load_loras, save_lora


@pytest.fixture
def path(tmp_path):
    return save_lora({"unet": random_lora(UNET)}, tmp_path)


def assert_refused(path, named):
    """By both readers, in one line that names the file."""
    for load in (lambda: load_lora(path, params(UNET)), lambda: load_loras([(path, 1.0)], {"unet": params(UNET)})):
        with pytest.raises((ValueError, FileNotFoundError), match=named) as refusal:
            load()
        assert "\n" not in str(refusal.value)
        assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (f"unet.{LAYER}.dora_scale", "holds DoRA "),
        (f"unet.{LAYER}.lora_magnitude_vector", "holds DoRA "),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "holds LoHa "),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "holds LoKr "),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "holds OFT "),
        ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "holds GLoRA "),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", r"holds \(IA\)\^3 "),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "CP decomposition"),
        ("lora_unet_conv_in.diff", "holds weight differences"),
        ("lora_unet_conv_in.diff_b", "holds weight differences"),
        ("lora_unet_mid_block_attentions_0_norm.w_norm", "norm weights"),
        ("base_model.model.conv_in.lora_B.default.bias", "LoRA with biases"),
        ("lora_prior_unet_down_blocks_0.lora_down.weight", "Stable Cascade"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux or Stable Diffusion 3"),
        ("bundle_emb.name.string_to_param.*", "holds textual inversion"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(path, extra, named):
    save_file(load_file(path) | {extra: np.zeros((2, 4), np.float32)}, path)
    assert_refused(path, named)


def test_other_kinds_of_settings_are_refused_by_name(path):
    beside = path.parent / "adapter_config.json"
    beside.write_text(json.dumps({"peft_type": "LOHA"}))
    assert_refused(path, "is a LOHA adapter")
    beside.write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    assert_refused(path, "is a DoRA adapter")
    rewrite(path, str, lora_adapter_metadata="[not json")
    assert_refused(path, "lora_adapter_metadata is no JSON object")


def test_a_lora_for_another_base_is_recognised(path):
    rewrite(path, dialects.kohya_original)
    tensors = load_file(path)
    for width, base in (
        (768, r"SD 1\.x"),
        (1024, r"SD 2\.x"),
        (2048, "SDXL"),
        (7, "an unusual base"),
    ):
        name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
        save_file({name: np.zeros((2, width), np.float32), **tensors}, path)
        assert_refused(path, f"looks like a LoRA for {base}.*: its cross-attention takes text {width} wide.* 6 ")


def test_a_text_encoder_that_the_model_does_not_have(tmp_path):
    path = save_lora({"unet": random_lora(UNET), "text_encoder_2": random_lora(CLIP, ("q_proj",))}, tmp_path)
    with pytest.raises(ValueError, match="adapts text_encoder_2, but this model's components are unet"):
        load_loras([(path, 1.0)], {"unet": params(UNET), "vae": {}})


def test_unknown_tensors_are_listed(path):
    tensors = load_file(path)
    zeros = np.zeros((2, 4), np.float32)
    save_file(tensors | {f"unet.{LAYER}.strange": zeros, "unet.conv_in.odd": zeros}, path)
    assert_refused(path, rf"2 tensors \(unet\.conv_in\.odd, unet\.{LAYER}\.strange\) in no layout that is read")
    save_file(tensors | {f"unet.extra.{i}.lora.down.weight": zeros for i in range(6)}, path)
    assert_refused(
        path, r"6 tensors \(unet\.extra\.0\.lora\.down\.weight, .*, \.\.\.\) for layers that this model's unet"
    )


def test_pairs_that_do_not_fit_are_refused(path):
    tensors = load_file(path)
    name = f"unet.{LAYER.replace('to_k', 'to_q')}.lora"
    down, up = tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"]
    for changed, named in (
        ({f"{name}.down.weight": down[:, :7].copy()}, r"attn2\.to_q is 8 -> 8, but its factors are down \[2, 7\]"),
        ({f"{name}.up.weight": np.zeros((8, 3), np.float32)}, r"factors are down \[2, 8\] and up \[8, 3\]"),
        ({f"{name}.up.weight": up.T.copy()}, r"factors are down \[2, 8\] and up \[2, 8\]"),
        ({f"{name}.down.weight": down[:0], f"{name}.up.weight": up[:, :0].copy()}, r"down \[0, 8\] and up \[8, 0\]"),
        ({f"{name}.alpha": np.ones(2, np.float32)}, r"alpha should be one number and holds 2"),
        ({"unet.conv_in.lora.down.weight": np.zeros((2, 4, 1, 1), np.float32)}, "conv_in has no up"),
        ({"unet.conv_in.alpha": np.ones((), np.float32)}, "conv_in has no down and no up"),
        ({name.replace("unet.", "base_model.model.") + "_A.weight": down}, "holds one factor twice"),
    ):
        save_file(tensors | changed, path)
        assert_refused(path, named)
    kernels = {f"unet.conv_in.lora.{factor}.weight": np.zeros((8, 8, 1, 1), np.float32) for factor in ("down", "up")}
    save_file(tensors | kernels, path)
    assert_refused(path, r"conv_in is 4 -> 8, 3x3, but its factors are down \[8, 8, 1, 1\]")
    del tensors[f"{name}.up.weight"]
    save_file(tensors, path)
    assert_refused(path, r"attn2\.to_q has no up")


def test_files_that_cannot_be_read(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_refused(path, "truncated or not a safetensors file")
    path.write_bytes(b"")
    assert_refused(path, "is empty")
    save_file({}, path)
    assert_refused(path, "holds no tensors")
    path.unlink()
    assert_refused(path, "does not exist")
    assert_refused(path.parent, "and no safetensors file")
    for name in "ab":
        (path.parent / f"{name}.safetensors").write_bytes(content)
    assert_refused(path.parent, "2 other safetensors files: name one")
