"""ControlNet, T2IAdapter and CLIPVision: what training starts from, traced strength, refused configs and inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SMALL_UNET, WIDTH, assert_trees_close, quick_jit, random_params

from fairhuman_jax.models import CLIPVision, ControlNet, T2IAdapter, UNet2DCondition, controlnet_from_unet
from fairhuman_jax.weights import expected_params

EMBEDDING = {"conditioning_embedding_out_channels": (4, 6)}
ENCODER_CHANGES = {"down_block_types": ["DownBlock2D"], "mid_block_type": "UNetMidBlock2D"}
SHARED = {key: value for key, value in SMALL_UNET.items() if key not in ("up_block_types", "sample_size")}
CONTROLNET = SHARED | EMBEDDING | ENCODER_CHANGES
ADAPTER = {"channels": [4, 6], "num_res_blocks": 1, "downscale_factor": 2}
VISION = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "projection_dim": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    latents, condition = rng.normal(size=(2, 4, 6, 4)), rng.random((2, 8, 12, 3))
    return (
        jnp.float32(latents),
        jnp.array([3, 901]),
        jnp.float32(rng.normal(size=(2, 5, WIDTH))),
        jnp.float32(condition),
    )


def test_a_new_controlnet_changes_nothing_and_can_learn(inputs):
    unet = UNet2DCondition.from_config(SMALL_UNET | ENCODER_CHANGES | {"up_block_types": ["UpBlock2D"]})
    params = random_params(unet, 0)
    module, control = controlnet_from_unet(unet, params, jax.random.key(0), **EMBEDDING)
    assert jax.tree.map(jnp.shape, control) == jax.tree.map(jnp.shape, expected_params(module))

    @quick_jit
    def gradient(control):
        def loss(control):
            residuals = module.apply({"params": control}, *inputs)
            return sum(leaf.sum() for leaf in jax.tree.leaves(residuals)), residuals

        return jax.grad(loss, has_aux=True)(control)

    found, residuals = gradient(control)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(residuals))
    learns = {name for name, tree in found.items() if any(np.any(leaf) for leaf in jax.tree.leaves(tree))}
    assert learns == {name for name in found if name.startswith(("controlnet_down", "controlnet_mid"))}
    with pytest.raises(ValueError, match="conv_in of unet_params is not that of the given UNet"):
        controlnet_from_unet(unet, params | {"conv_in": {}}, jax.random.key(0))


def test_strength_is_traced_and_may_differ_in_a_batch(inputs):
    module = ControlNet.from_config(CONTROLNET)
    params = random_params(module, 1)
    traces = []

    @quick_jit
    def apply(scale):
        traces.append(scale)
        return module.apply({"params": params}, *inputs, scale)

    whole, half = apply(jnp.array([1.0, 1.0])), apply(jnp.array([1.0, 0.5]))
    assert len(traces) == 1
    expected = jax.tree.map(lambda leaf: leaf * jnp.array([1.0, 0.5]).reshape(2, 1, 1, 1), whole)
    assert_trees_close(half, expected)
    assert_trees_close(quick_jit(lambda s: module.apply({"params": params}, *inputs, s))(1.0), whole)


def test_wrong_inputs_are_refused_before_any_compute(inputs):
    module = ControlNet.from_config(CONTROLNET)
    latents, timesteps, text, condition = inputs
    for given, message in (
        ((latents, timesteps, text, condition[:, :6]), r"condition is \[6, 12, 3\], but latents 4x6 need \[8, 12, 3\]"),
        ((latents, timesteps, text, condition[..., :1]), "condition is"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), *given)
    with pytest.raises(ValueError, match=r"condition is \[7, 12, 3\]"):
        jax.eval_shape(T2IAdapter.from_config(ADAPTER).init, jax.random.key(0), condition[:, :7])
    with pytest.raises(ValueError, match=r"pixels are \[8, 12, 3\], not \[4, 4, 3\]"):
        jax.eval_shape(CLIPVision.from_config(VISION).init, jax.random.key(0), condition)


@pytest.mark.parametrize(
    ("network", "config", "change", "named"),
    [
        (ControlNet, CONTROLNET, {"controlnet_conditioning_channel_order": "grb"}, "grb"),
        (ControlNet, CONTROLNET, {"num_control_type": 6}, "num_control_type"),
        (ControlNet, CONTROLNET, {"_class_name": "ControlNetUnionModel"}, "ControlNetUnionModel"),
        (T2IAdapter, ADAPTER, {"adapter_type": "heavy_adapter"}, "heavy_adapter"),
        (T2IAdapter, ADAPTER, {"adapter_type": "full_adapter_xl", "channels": [4, 4, 6, 8]}, "equal from the third on"),
        (T2IAdapter, ADAPTER, {"adapters": []}, "adapters"),
        (T2IAdapter, ADAPTER, {"_class_name": "MultiAdapter"}, "MultiAdapter"),
        (CLIPVision, VISION, {"vision_config": {}}, "vision_config"),
        (CLIPVision, VISION, {"image_size": 5}, "image_size=5"),
        (CLIPVision, VISION, {"num_attention_heads": 3}, "3 heads"),
        (CLIPVision, VISION, {"architectures": ["SiglipVisionModel"]}, "SiglipVisionModel"),
    ],
)
def test_unsupported_configs_are_refused_by_name(network, config, change, named):
    with pytest.raises(ValueError, match=named):
        network.from_config({**config, **change})


@pytest.mark.parametrize("scan", [True, False])
def test_image_encoder_sees_all_patches_from_everywhere(scan):
    module = CLIPVision.from_config(VISION, scan=scan)
    params = random_params(module, 2)
    pixels = np.random.default_rng(1).normal(size=(1, 4, 4, 3)).astype(np.float32)
    changed = pixels.copy()
    changed[0, 3, 3] += 1.0
    out = quick_jit(module.apply)({"params": params}, np.concatenate([pixels, changed]))
    states = np.asarray(out["last_hidden_state"])
    moved = np.abs(states[0] - states[1]).max(axis=-1)
    assert moved.shape == (5,)
    assert moved.min() > 1e-3
    assert out["image_embeds"].shape == (2, 5)
