"""UNet2DCondition against diffusers' UNet2DConditionModel on the same random weights, in float32 on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.models import COLUMNS, UNet2DCondition, watched_columns

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from torch_twins import assert_parity, nchw, randomised, to_flax  # noqa: E402

SD15 = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "sample_size": 8,
}
SD15_DEEP = {
    **SD15,
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SD21 = {
    **SD15,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [1, 2],
    "use_linear_projection": True,
    "upcast_attention": True,
    "in_channels": 8,
}
SDXL = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 2, 3],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
    "sample_size": 8,
}
REFINER = {
    **SDXL,
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2, 4, 4],
    "transformer_layers_per_block": 2,
    "projection_class_embeddings_input_dim": 5 * 8 + 20,
}


def torch_unet(config: dict):
    """A diffusers UNet whose every parameter is random and whose output has about unit size."""
    torch.manual_seed(0)
    model = randomised(diffusers.UNet2DConditionModel(**config))
    with torch.no_grad():
        model.conv_out.weight.mul_(4.0)
    return model


def inputs(config: dict, height: int, width: int) -> dict:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    values = {
        "latents": normal(2, height, width, config.get("in_channels", 4)),
        "timesteps": np.array([3, 901]),
        "text": normal(2, 5, config["cross_attention_dim"]),
    }
    if "addition_embed_type" in config:
        time_ids = np.array([[512, 384, 0, 8, 256, 256], [1024, 1024, 16, 0, 1024, 1024]], np.float32)
        count = UNet2DCondition.from_config(config).time_ids(20)
        values["added_cond"] = {"text_embeds": normal(2, 20), "time_ids": time_ids[:, :count]}
    return values


def torch_inputs(values: dict) -> dict:
    given = {
        "sample": nchw(values["latents"]),
        "timestep": torch.from_numpy(values["timesteps"]),
        "encoder_hidden_states": torch.from_numpy(values["text"]),
    }
    if "added_cond" in values:
        given["added_cond_kwargs"] = {key: torch.from_numpy(value) for key, value in values["added_cond"].items()}
    if "down_residuals" in values:
        given["down_block_additional_residuals"] = tuple(nchw(value) for value in values["down_residuals"])
        given["mid_block_additional_residual"] = nchw(values["mid_residual"])
    if "adapter_features" in values:
        given["down_intrablock_additional_residuals"] = [nchw(value) for value in values["adapter_features"]]
    return given


def check_forward(config: dict, values: dict) -> None:
    original = torch_unet(config)
    with torch.no_grad():
        expected = original(**torch_inputs(values)).sample
    module = UNet2DCondition.from_config(dict(original.config))
    params = to_flax(original.state_dict(), module)
    assert_parity(quick_jit(module.apply)({"params": params}, **values), expected)


def test_sd15_with_controlnet_residuals_at_an_odd_size():
    values = inputs(SD15, 9, 14)
    rng = np.random.default_rng(2)
    sizes = [(9, 14, 32)] * 3 + [(5, 7, 32)] + [(5, 7, 64)] * 2 + [(3, 4, 64)] * 3
    values["down_residuals"] = [rng.normal(size=(2, *size)).astype(np.float32) for size in sizes]
    values["mid_residual"] = rng.normal(size=(2, 3, 4, 64)).astype(np.float32)
    check_forward(SD15, values)


def test_inpainting_unet_of_nine_channels():
    config = {**SD15, "in_channels": 9}
    check_forward(config, inputs(config, 8, 8))


@pytest.mark.parametrize("config", [SDXL, REFINER], ids=["base", "refiner"])
def test_sdxl_with_added_conditioning(config):
    check_forward(config, inputs(config, 8, 8))


def test_sdxl_with_adapter_features():
    values = inputs(SDXL, 8, 8)
    rng = np.random.default_rng(3)
    sizes = [(4, 4, 16), (4, 4, 32), (2, 2, 32), (2, 2, 32)]
    values["adapter_features"] = [rng.normal(size=(2, *size)).astype(np.float32) for size in sizes]
    check_forward(SDXL, values)


def test_sd21_values_and_gradients():
    values = inputs(SD21, 8, 8)
    original = torch_unet(SD21)
    target = np.random.default_rng(4).normal(size=(2, 8, 8, 4)).astype(np.float32)
    prediction = original(**torch_inputs(values)).sample
    torch.square(prediction - nchw(target)).mean().backward()
    module = UNet2DCondition.from_config(dict(original.config), remat="full")

    def loss(params):
        out = module.apply({"params": params}, **values)
        return jnp.square(out - target).mean(), out

    params = to_flax(original.state_dict(), module)
    found, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_parity(out, prediction)
    expected = to_flax({name: value.grad for name, value in original.named_parameters()}, module)
    largest = max(np.abs(value).max() for value in jax.tree.leaves(expected))
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(ours - theirs)
        assert error <= 1e-4 * np.linalg.norm(theirs) + 1e-6 * largest, jax.tree_util.keystr(path)


def test_watched_columns_are_the_probabilities_of_all_hooked_layers():
    """Eleven cross-attentions in the shape of Stable Diffusion 1, at a size that does not halve evenly."""
    values = inputs(SD15_DEEP, 10, 14)
    positions = np.array([[1, 4, 0], [2, 3, 3]], np.int32)
    original = torch_unet(SD15_DEEP)
    expected = []

    def record(attention, args, kwargs):
        query, key = attention.to_q(args[0]), attention.to_k(kwargs["encoder_hidden_states"])
        query, key = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        expected.append(torch.softmax(scores, -1).numpy())

    hooked = ("down_blocks.1.", "down_blocks.2.", "mid_block.", "up_blocks.1.", "up_blocks.2.")
    for name, module in original.named_modules():
        if name.startswith(hooked) and name.endswith("attn2"):
            module.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        prediction = original(**torch_inputs(values)).sample
    module = UNet2DCondition.from_config(dict(original.config))
    params = to_flax(original.state_dict(), module)

    @quick_jit
    def watch(params):
        out, collections = module.apply({"params": params}, **values, watched=positions, mutable=[COLUMNS])
        return out, watched_columns(collections)

    out, columns = watch(params)
    assert_parity(out, prediction)
    assert len(columns) == len(expected) == 11
    sizes = [column.shape[2:4] for column in columns]
    assert sizes == [(5, 7)] * 2 + [(3, 4)] * 2 + [(2, 2)] + [(3, 4)] * 3 + [(5, 7)] * 3
    for column, weights in zip(columns, expected, strict=True):
        for sample, tokens in enumerate(positions):
            wanted = weights[sample][..., tokens].reshape(column.shape[1:])
            np.testing.assert_allclose(column[sample], wanted, rtol=0, atol=2e-5)


def test_config_round_trip_loads_in_diffusers():
    original = torch_unet(SDXL)
    ours = UNet2DCondition.from_config(dict(original.config)).to_config()
    again = diffusers.UNet2DConditionModel.from_config(ours)
    differing = {key for key, value in ours.items() if not key.startswith("_") and original.config[key] != value}
    assert differing == set()
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == {
        name: tuple(value.shape) for name, value in original.state_dict().items()
    }
