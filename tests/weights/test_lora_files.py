"""LoRA files: diffusers naming, stacks, strength, the other dialects, several files at once, kohya export."""

from __future__ import annotations

import json

import jax
import lora_dialects as dialects
import numpy as np
import pytest
from lora_dialects import (
    ATTENTION,
    CLIP,
    EVERY_LAYER,
    LAYER,
    TEXT_LAYERS,
    UNET,
    assert_equal_trees,
    params,
    random_lora,
    rewrite,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fairhuman_jax.models.lora import concatenate_lora, scale_lora
from fairhuman_jax.weights.lora import load_lora, load_loras, save_lora
from fairhuman_jax.weights.lora.names import sgm_names


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


def test_convolutions_are_stored_as_two_convolutions(tmp_path):
    lora = random_lora(UNET, ("conv1",))
    tensors = load_file(save_lora({"unet": lora}, tmp_path))
    name, ours = "unet.mid_block.resnets.0.conv1.lora", lora["mid_block"]["resnets.0"]["conv1"]
    assert tensors[f"{name}.down.weight"].shape == (2, 16, 3, 3)
    assert tensors[f"{name}.up.weight"].shape == (16, 2, 1, 1)
    assert tensors[f"{name}.down.weight"][1, 5, 0, 2] == ours["down"][0, 2, 5, 1]
    assert tensors[f"{name}.up.weight"][7, 1, 0, 0] == ours["up"][1, 7]


def test_round_trip_by_module_and_by_parameters(saved):
    lora, path = saved
    assert_equal_trees(load_lora(path.parent, UNET), lora)
    assert_equal_trees(load_lora(path, params(UNET)), lora)
    path.rename(path.with_name("mine.safetensors"))
    assert_equal_trees(load_lora(path.parent, params(UNET)), lora)


def test_several_components_share_a_file(tmp_path):
    loras = {"unet": random_lora(UNET), "text_encoder": random_lora(CLIP, TEXT_LAYERS)}
    path = save_lora(loras, tmp_path)
    name = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight"
    assert name in load_file(path)
    assert_equal_trees(load_lora(path, params(UNET)), loras["unet"])
    assert_equal_trees(load_lora(path, params(CLIP), "text_encoder"), loras["text_encoder"])
    with pytest.raises(ValueError, match="holds no LoRA for 'text_encoder_2'; it adapts text_encoder, unet"):
        load_lora(path, params(CLIP), "text_encoder_2")


def test_strength_is_folded_into_up(tmp_path):
    lora = random_lora(UNET)
    path = save_lora({"unet": lora}, tmp_path, rank=2, alpha=6.0)
    assert_equal_trees(load_lora(path, params(UNET)), lora, strength=3.0)
    with pytest.raises(ValueError, match="alpha has a meaning only with the rank"):
        save_lora({"unet": lora}, tmp_path, alpha=6.0)


@pytest.mark.parametrize(
    ("rename", "example"),
    [
        ("peft", "base_model.model.conv_in.lora_A.default.weight"),
        ("peft_in_diffusers", "unet.mid_block.resnets.0.conv1.lora_B.weight"),
        ("old_processor", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"),
        ("oldest", "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"),
        ("kohya", "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_ff_net_0_proj.lora_down.weight"),
        ("kohya_original", "lora_unet_output_blocks_1_1_conv.lora_down.weight"),
        ("comfy", "diffusion_model.output_blocks.3.0.skip_connection.lora_up.weight"),
        ("dotted_kohya", "unet.add_embedding.linear_2.lora_down.weight"),
    ],
)
def test_every_dialect_holds_the_same(tmp_path, rename, example):
    lora = random_lora(UNET, EVERY_LAYER)
    path = save_lora({"unet": lora}, tmp_path)
    assert example in rewrite(path, getattr(dialects, rename))
    assert_equal_trees(load_lora(path, params(UNET)), lora)


def without_text_model(name):
    return name.replace(".text_model.", ".")


def old_text(name):
    for ours, theirs in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        name = name.replace(f".{ours}.lora_linear_layer.", f".{theirs}_lora.")
    return name


def kohya_first(name):
    return dialects.kohya(name).replace("lora_te_", "lora_te1_")


def clip_l(name):
    return dialects.dotted_kohya(name).replace("text_encoder.", "clip_l.")


@pytest.mark.parametrize("rename", [dialects.kohya, kohya_first, dialects.peft, without_text_model, old_text, clip_l])
def test_every_dialect_of_a_text_encoder_holds_the_same(tmp_path, rename):
    lora = random_lora(CLIP, TEXT_LAYERS)
    path = save_lora({"text_encoder": lora}, tmp_path)
    before = set(load_file(path))
    assert before != set(rewrite(path, rename))
    assert_equal_trees(load_lora(path, params(CLIP), "text_encoder"), lora)
    assert load_loras([(path, 1.0)], {"text_encoder": params(CLIP)}).keys() == {"text_encoder"}


def layers_of(attended_down, attended_up):
    """One layer of each part of a UNet with two resnets a down block."""
    sides = (("down", 2, attended_down, "downsamplers"), ("up", 3, attended_up, "upsamplers"))
    for side, resnets, attended, resamplers in sides:
        for block, attention in enumerate(attended):
            for layer in range(resnets):
                yield f"{side}_blocks.{block}.resnets.{layer}.conv1"
                if attention:
                    yield f"{side}_blocks.{block}.attentions.{layer}.proj_in"
            if block + 1 < len(attended):
                yield f"{side}_blocks.{block}.{resamplers}.0.conv"
    yield from ("mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in", "mid_block.resnets.1.conv1")


def test_original_block_numbers_of_published_networks():
    """SDXL as the spec has it, and Stable Diffusion 1.x, whose first upsampler is in a block without attention."""
    found = sgm_names(layers_of((0, 1, 1), (1, 1, 0)))
    facts = {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "down_blocks.2.attentions.0.proj_in": "input_blocks.7.1.proj_in",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
        "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.attentions.0.proj_in": "output_blocks.3.1.proj_in",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    }
    assert {layer: found[layer] for layer in facts} == facts
    found = sgm_names(layers_of((1, 1, 1, 0), (0, 1, 1, 1)))
    assert found["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert found["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert found["down_blocks.3.resnets.1.conv1"] == "input_blocks.11.0.in_layers.2"


def test_one_by_one_convolutions_and_linear_layers_are_alike(saved):
    """Files hold either shape for either; both projections here are convolutions and attention is linear."""
    _, path = saved
    lora = random_lora(UNET, (*ATTENTION, "proj_in"))
    tensors = load_file(save_lora({"unet": lora}, path.parent))
    other = {
        name: array.reshape(array.shape[:2]) if array.ndim == 4 else array[:, :, None, None]
        for name, array in tensors.items()
    }
    assert {array.ndim for name, array in other.items() if "proj_in" in name} == {2}
    save_file(other, path)
    assert_equal_trees(load_lora(path, params(UNET)), lora)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_every_layer_scales_up(saved, shape):
    lora, path = saved
    tensors = rewrite(path, dialects.kohya)
    alphas = {
        name.replace(".lora_up.weight", ".alpha"): np.ones(shape, np.float16) for name in tensors if "lora_up" in name
    }
    save_file(tensors | alphas, path)
    assert_equal_trees(load_lora(path, params(UNET)), lora, strength=0.5)


def settings_in_header(path, settings):
    rewrite(path, str, lora_adapter_metadata=json.dumps({f"unet.{key}": value for key, value in settings.items()}))


def settings_beside(path, settings):
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("give", [settings_in_header, settings_beside])
def test_settings_of_peft_scale_up(saved, give):
    lora, path = saved
    give(path, {"r": 2, "lora_alpha": 1})
    assert_equal_trees(load_lora(path, params(UNET)), lora, strength=0.5)
    give(path, {"r": 2, "lora_alpha": 1, "use_rslora": True})
    assert_equal_trees(load_lora(path, params(UNET)), lora, strength=2**-0.5)
    give(path, {"r": 8, "rank_pattern": {"attn2.to_k": 2}, "lora_alpha": 2, "alpha_pattern": {"attn2.to_k": 8}})
    loaded = load_lora(path, params(UNET))["mid_block"]["attentions.0"]["transformer_blocks"]["attn2"]
    expected = lora["mid_block"]["attentions.0"]["transformer_blocks"]["attn2"]
    np.testing.assert_allclose(loaded["to_k"]["up"], 4.0 * expected["to_k"]["up"], rtol=1e-6)
    np.testing.assert_array_equal(loaded["to_v"]["up"], expected["to_v"]["up"])


def test_layers_left_out_of_a_stack_get_zeros_and_smaller_ranks_are_padded(saved):
    lora, path = saved
    tensors = {name: tensor for name, tensor in load_file(path).items() if LAYER not in name}
    other = LAYER.replace("to_k", "to_v")
    for factor, index in (("down", np.s_[:1]), ("up", np.s_[:, :1])):
        tensors[f"unet.{other}.lora.{factor}.weight"] = tensors[f"unet.{other}.lora.{factor}.weight"][index].copy()
    save_file(tensors, path)
    loaded = load_lora(path, params(UNET))["down_blocks.0"]["attentions.0"]["transformer_blocks"]["attn2"]
    expected = lora["down_blocks.0"]["attentions.0"]["transformer_blocks"]["attn2"]
    assert not loaded["to_k"]["up"][1].any()
    np.testing.assert_array_equal(loaded["to_k"]["up"][0], expected["to_k"]["up"][0])
    first = expected["to_v"]["down"][1][:, :1] @ expected["to_v"]["up"][1][:1]
    np.testing.assert_allclose(loaded["to_v"]["down"][1] @ loaded["to_v"]["up"][1], first, rtol=1e-5)


def test_several_files_are_one_update_of_their_summed_rank(tmp_path):
    everywhere = {"unet": random_lora(UNET, EVERY_LAYER, 3, 1), "text_encoder": random_lora(CLIP, TEXT_LAYERS)}
    attention = {"unet": random_lora(UNET, ATTENTION, 2, 2)}
    entries = [(save_lora(everywhere, tmp_path / "a"), 0.5), (save_lora(attention, tmp_path / "b").parent, -2.0)]
    loaded = load_loras(entries, {"unet": params(UNET), "text_encoder": params(CLIP), "vae": {}})
    assert loaded.keys() == {"unet", "text_encoder"}
    assert_equal_trees(loaded["text_encoder"], everywhere["text_encoder"], strength=0.5)
    expected = concatenate_lora([scale_lora(everywhere["unet"], 0.5), scale_lora(attention["unet"], -2.0)])
    assert_equal_trees(loaded["unet"], expected)
    to_k = loaded["unet"]["mid_block"]["attentions.0"]["transformer_blocks"]["attn2"]["to_k"]
    assert to_k["down"].shape == (2, 6, 5)
    assert loaded["unet"]["conv_in"]["up"].shape == (3, 8)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_kohya_export(tmp_path, dtype, tolerance):
    loras = {"unet": random_lora(UNET, EVERY_LAYER), "text_encoder": random_lora(CLIP, TEXT_LAYERS)}
    path = save_lora(loras, tmp_path, rank=2, alpha=1.0, dialect="kohya", dtype=dtype)
    with safe_open(path, "numpy") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"
        alpha = file.get_tensor("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha")
    assert (alpha.shape, alpha) == ((), 1.0)
    for component, network in (("unet", UNET), ("text_encoder", CLIP)):
        loaded = load_lora(path, params(network), component)
        expected = scale_lora(loras[component], 0.5)
        for ours, again in zip(jax.tree.leaves(expected), jax.tree.leaves(loaded), strict=True):
            assert np.abs(ours - again).max() <= tolerance * np.abs(ours).max()


@pytest.mark.parametrize(
    ("width", "base", "first"), [(768, "sd_v1", "lora_te_"), (2048, "sdxl_base_v1-0", "lora_te1_")]
)
def test_kohya_export_tells_the_base(tmp_path, width, base, first):
    to_k = {"down": np.ones((width, 1), np.float32), "up": np.ones((1, 4), np.float32)}
    text = {"text_model": {"q_proj": {"down": np.ones((3, 1), np.float32), "up": np.ones((1, 3), np.float32)}}}
    loras = {"unet": {"mid_block": {"attn2": {"to_k": to_k}}}, "text_encoder": text}
    path = save_lora(loras, tmp_path / "mine.safetensors", dialect="kohya")
    assert path == tmp_path / "mine.safetensors"
    with safe_open(path, "numpy") as file:
        assert file.metadata()["ss_base_model_version"] == base
        assert f"{first}text_model_q_proj.alpha" in set(file.keys())


def test_unknown_dialects_and_types_are_refused(tmp_path):
    for settings, named in (({"dialect": "sgm"}, "unknown dialect 'sgm'"), ({"dtype": "int8"}, "unknown dtype 'int8'")):
        with pytest.raises(ValueError, match=named):
            save_lora({"unet": random_lora(UNET)}, tmp_path, **settings)
    with pytest.raises(ValueError, match="unknown component 'vae'"):
        save_lora({"vae": {}}, tmp_path)
    with pytest.raises(ValueError, match="does not fit into float16"):
        save_lora({"unet": scale_lora(random_lora(UNET), 1e6)}, tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())
