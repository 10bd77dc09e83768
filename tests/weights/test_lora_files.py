"""LoRA files: diffusers naming, stacks, strength, the other layouts, refusals."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from fairhuman_jax.models import TEXT_TARGETS, CLIPText, UNet2DCondition, init_lora
from fairhuman_jax.weights import expected_params, load_lora, save_lora

UNET = UNet2DCondition.from_config(
    {
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
        "norm_num_groups": 4,
        "use_linear_projection": True,
    }
)
CLIP = CLIPText.from_config(
    {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "eos_token_id": 19}
)
LAYER = "down_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k"


def random_lora(module, *targets, rank=2):
    params = expected_params(module)
    lora = init_lora(jax.random.key(0), params, rank, *targets)
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), lora)


def assert_equal_trees(a, b):
    flat_a, flat_b = flatten_dict(a), flatten_dict(b)
    assert flat_a.keys() == flat_b.keys()
    for path, leaf in flat_a.items():
        np.testing.assert_allclose(leaf, flat_b[path], rtol=1e-6, err_msg=".".join(path))


def rewrite(path, rename, **metadata):
    tensors = {rename(name): np.ascontiguousarray(tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata or None)
    return tensors


@pytest.fixture
def saved(tmp_path):
    lora = random_lora(UNET)
    return lora, save_lora({"unet": lora}, tmp_path)


def test_file_holds_diffusers_names_and_torch_order(saved):
    lora, path = saved
    tensors = load_file(path)
    assert path.name == "pytorch_lora_weights.safetensors"
    assert len(tensors) == 2 * 8 * 2 * 4  # factors, attention layers a block, depth, blocks with attention
    stack = lora["down_blocks.0"]["attentions.0"]["transformer_blocks"]["attn2"]["to_k"]
    np.testing.assert_array_equal(tensors[f"unet.{LAYER}.lora.down.weight"], stack["down"][1].T)
    np.testing.assert_array_equal(tensors[f"unet.{LAYER}.lora.up.weight"], stack["up"][1].T)
    assert tensors[f"unet.{LAYER}.lora.down.weight"].shape == (2, 6)


def test_round_trip_by_module_and_by_parameters(saved):
    lora, path = saved
    assert_equal_trees(load_lora(path.parent, UNET), lora)
    assert_equal_trees(load_lora(path, expected_params(UNET)), lora)


def test_several_components_share_a_file(tmp_path):
    loras = {"unet": random_lora(UNET), "text_encoder": random_lora(CLIP, TEXT_TARGETS)}
    path = save_lora(loras, tmp_path)
    name = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight"
    assert name in load_file(path)
    assert_equal_trees(load_lora(path, UNET), loras["unet"])
    assert_equal_trees(load_lora(path, CLIP, "text_encoder"), loras["text_encoder"])
    with pytest.raises(ValueError, match="holds no LoRA for 'text_encoder_2'"):
        load_lora(path, CLIP, "text_encoder_2")


def test_strength_is_folded_into_up(tmp_path):
    lora = random_lora(UNET)
    loaded = load_lora(save_lora({"unet": lora}, tmp_path, rank=2, alpha=6.0), UNET)
    for path, leaf in flatten_dict(loaded).items():
        factor = 3.0 if path[-1] == "up" else 1.0
        np.testing.assert_allclose(leaf, factor * flatten_dict(lora)[path], rtol=1e-6)
    with pytest.raises(ValueError, match="alpha has a meaning only with the rank"):
        save_lora({"unet": lora}, tmp_path, alpha=6.0)


def peft(name):
    name = name.replace(".lora.down.", ".lora_A.default.").replace(".lora.up.", ".lora_B.default.")
    return name.replace("unet.", "base_model.model.", 1)


def old_processor(name):
    name = name.replace(".to_out.0.lora.", ".processor.to_out_lora.")
    for layer in ("to_q", "to_k", "to_v"):
        name = name.replace(f".{layer}.lora.", f".processor.{layer}_lora.")
    return name


def kohya(name):
    module, factor = name.removeprefix("unet.").removesuffix(".weight").split(".lora.")
    return f"lora_unet_{module.replace('.', '_')}.lora_{factor}.weight"


@pytest.mark.parametrize("rename", [peft, old_processor, kohya])
def test_other_layouts_hold_the_same(saved, rename):
    lora, path = saved
    assert rename(f"unet.{LAYER}.lora.up.weight") in rewrite(path, rename)
    assert_equal_trees(load_lora(path, UNET), lora)


def test_alpha_of_every_layout_scales_up(saved):
    lora, path = saved
    tensors = rewrite(path, kohya)
    alphas = {
        name.replace(".lora_up.weight", ".alpha"): np.ones(1, np.float32) for name in tensors if "lora_up" in name
    }
    save_file(tensors | alphas, path)
    assert_half_strength(load_lora(path, UNET), lora)


def test_alpha_in_the_header_or_beside_the_file_scales_up(saved):
    lora, path = saved
    rewrite(path, str, lora_adapter_metadata=json.dumps({"unet.r": 2, "unet.lora_alpha": 1}))
    assert_half_strength(load_lora(path, UNET), lora)
    rewrite(path, peft)
    (path.parent / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    assert_half_strength(load_lora(path, UNET), lora)
    (path.parent / "adapter_config.json").write_text(json.dumps({"use_rslora": True}))
    with pytest.raises(ValueError, match="trained with use_rslora"):
        load_lora(path, UNET)


def assert_half_strength(loaded, lora):
    flat = flatten_dict(lora)
    for path, leaf in flatten_dict(loaded).items():
        np.testing.assert_allclose(leaf, flat[path] * (0.5 if path[-1] == "up" else 1.0), rtol=1e-6)


def test_layers_left_out_of_a_stack_get_zeros(saved):
    lora, path = saved
    tensors = {name: tensor for name, tensor in load_file(path).items() if LAYER not in name}
    save_file(tensors, path)
    stack = load_lora(path, UNET)["down_blocks.0"]["attentions.0"]["transformer_blocks"]["attn2"]["to_k"]
    assert not stack["up"][1].any()
    np.testing.assert_array_equal(
        stack["up"][0], lora["down_blocks.0"]["attentions.0"]["transformer_blocks"]["attn2"]["to_k"]["up"][0]
    )


def test_unreadable_layouts_are_refused_by_name(saved):
    _, path = saved
    tensors = load_file(path)
    for extra, named in (
        (f"unet.{LAYER}.dora_scale", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "sgm"),
        (f"unet.{LAYER}.strange", "in no layout that is read"),
        ("unet.conv_in.lora.down.weight", "adapts conv_in, which is no linear layer"),
    ):
        save_file(tensors | {extra: np.zeros((2, 4), np.float32)}, path)
        with pytest.raises(ValueError, match=named):
            load_lora(path, UNET)


def test_wrong_shapes_and_missing_factors_are_refused(saved):
    _, path = saved
    tensors = load_file(path)
    save_file(tensors | {f"unet.{LAYER}.lora.down.weight": np.zeros((2, 7), np.float32)}, path)
    with pytest.raises(ValueError, match=r"attn2\.to_k is 6 -> 8, but its factors are"):
        load_lora(path, UNET)
    del tensors[f"unet.{LAYER}.lora.up.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"attn2\.to_k is 6 -> 8, but its factors are"):
        load_lora(path, UNET)
