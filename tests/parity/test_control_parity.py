"""ControlNet and T2IAdapter against diffusers on the same random weights, alone and in front of their UNets."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.models import ControlNet, T2IAdapter, UNet2DCondition, controlnet_from_unet
from fairhuman_jax.weights.keys import leaves

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from torch_twins import assert_parity, nchw, normal, randomised, to_flax  # noqa: E402

ENCODER = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
SMALL = {"conditioning_embedding_out_channels": [4, 6]}
SD15 = ENCODER | SMALL
SD21 = SD15 | {
    "attention_head_dim": [1, 2],
    "use_linear_projection": True,
    "controlnet_conditioning_channel_order": "bgr",
    "global_pool_conditions": True,
}
SDXL = SD15 | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
SDXL_SMALL = SDXL | {"down_block_types": ["DownBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D"}
UNET_SD15 = ENCODER | {
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_SDXL = ENCODER | {
    "block_out_channels": [16, 16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}


def controlnet(config: dict):
    torch.manual_seed(0)
    return randomised(diffusers.ControlNetModel(**config))


def inputs(config: dict) -> dict:
    values = {
        "latents": normal(2, 6, 8, 4, seed=1),
        "timesteps": np.array([3, 901]),
        "text": normal(2, 5, 12, seed=2),
        "condition": np.random.default_rng(3).random((2, 12, 16, 3), np.float32),
    }
    if "addition_embed_type" in config:
        time_ids = np.array([[512, 384, 0, 8, 256, 256]] * 2, np.float32)
        values["added_cond"] = {"text_embeds": normal(2, 10, seed=4), "time_ids": time_ids}
    return values


def torch_outputs(model, values: dict, scale: float):
    added = {key: torch.from_numpy(value) for key, value in values.get("added_cond", {}).items()}
    with torch.no_grad():
        return model(
            nchw(values["latents"]),
            torch.from_numpy(values["timesteps"]),
            torch.from_numpy(values["text"]),
            nchw(values["condition"]),
            conditioning_scale=scale,
            added_cond_kwargs=added,
            return_dict=False,
        )


@pytest.mark.parametrize("config", [SD15, SD21, SDXL, SDXL_SMALL], ids=["SD15", "SD21", "SDXL", "SDXL-small"])
def test_controlnet_residuals(config):
    model, values = controlnet(config), inputs(config)
    module = ControlNet.from_config(dict(model.config))
    params = to_flax(model.state_dict(), module)
    down, mid = quick_jit(module.apply)({"params": params}, **values, scale=0.7)
    expected_down, expected_mid = torch_outputs(model, values, 0.7)
    for ours, theirs in zip((*down, mid), (*expected_down, expected_mid), strict=True):
        assert_parity(ours, theirs)


def test_controlnet_of_a_unet_is_the_one_of_diffusers():
    torch.manual_seed(0)
    unet = randomised(diffusers.UNet2DConditionModel(**UNET_SDXL))
    twin = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 6))
    module = UNet2DCondition.from_config(dict(unet.config))
    params = to_flax(unet.state_dict(), module)
    start, started = controlnet_from_unet(module, params, jax.random.key(0), conditioning_embedding_out_channels=(4, 6))
    written = {key: value for key, value in start.to_config().items() if not key.startswith("_")}
    assert written == json.loads(json.dumps({key: twin.config[key] for key in written}))
    found = {leaf.names: leaf for leaf in leaves(started)}
    assert {name for names in found for name in names} == set(twin.state_dict())
    flat = to_flax(twin.state_dict(), start)
    del flat["controlnet_cond_embedding"], started["controlnet_cond_embedding"]
    jax.tree.map(np.testing.assert_array_equal, started, flat)


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapter_and_condition(config: dict, height: int, width: int):
    torch.manual_seed(0)
    model = randomised(diffusers.T2IAdapter(**config))
    condition = np.random.default_rng(5).random((2, height, width, config["in_channels"]), np.float32)
    module = T2IAdapter.from_config(dict(model.config))
    return model, module, to_flax(model.state_dict(), module), condition


ADAPTERS = {
    "full": {"adapter_type": "full_adapter", "channels": [6, 6, 8], "downscale_factor": 4, "in_channels": 1},
    "xl": {"adapter_type": "full_adapter_xl", "channels": [6, 8, 10, 10], "downscale_factor": 4, "in_channels": 3},
    "light": {"adapter_type": "light_adapter", "channels": [8, 12, 16], "downscale_factor": 4, "in_channels": 3},
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapter_features_at_an_odd_size(config):
    model, module, params, condition = adapter_and_condition(config, 28, 20)
    with torch.no_grad():
        expected = model(nchw(condition))
    found = quick_jit(module.apply)({"params": params}, condition)
    for ours, theirs in zip(found, expected, strict=True):
        assert_parity(ours, theirs)


@pytest.mark.parametrize(
    ("config", "adapter", "latents"),
    [
        (UNET_SD15, {"adapter_type": "full_adapter", "channels": [16, 16, 32, 32], "downscale_factor": 2}, 16),
        (UNET_SDXL, {"adapter_type": "full_adapter_xl", "channels": [16, 16, 32, 32], "downscale_factor": 4}, 16),
    ],
    ids=["SD15", "SDXL"],
)
def test_four_features_enter_the_unet_where_diffusers_adds_them(config, adapter, latents):
    model, module, params, condition = adapter_and_condition({**adapter, "in_channels": 3}, 32, 32)
    torch.manual_seed(1)
    unet = randomised(diffusers.UNet2DConditionModel(**config))
    twin = UNet2DCondition.from_config(dict(unet.config))
    noisy, text = normal(2, latents, latents, 4, seed=6), normal(2, 5, 12, seed=7)
    with torch.no_grad():
        features = model(nchw(condition))
        assert len(features) == 4
        given = [feature.clone() for feature in features]
        expected = unet(nchw(noisy), 7, torch.from_numpy(text), down_intrablock_additional_residuals=given).sample
        plain = unet(nchw(noisy), 7, torch.from_numpy(text)).sample

    @quick_jit
    def both(params, unet_params):
        features = module.apply({"params": params}, condition)
        return twin.apply({"params": unet_params}, noisy, 7, text, adapter_features=features)

    assert_parity(both(params, to_flax(unet.state_dict(), twin)), expected)
    assert (expected - plain).abs().max() > 0.1 * expected.std()
