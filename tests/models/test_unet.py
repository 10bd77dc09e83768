"""UNet2DCondition: full-size shapes, scanned and rematerialised forms, LoRA, compute dtype, rejected configs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.models import presets
from fairhuman_jax.models.transformer import Transformer2D
from fairhuman_jax.models.unet import UNet2DCondition
from fairhuman_jax.models.unet_blocks import resize_nearest

TINY = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
    return latents, np.array([17]), rng.normal(size=(1, 3, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def params(inputs):
    module = UNet2DCondition.from_config(TINY)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), shapes)


@pytest.fixture(scope="module")
def reference(params, inputs):
    """Output and parameter gradients of the scanned UNet without rematerialisation."""
    return value_and_gradients(UNet2DCondition.from_config(TINY), params, inputs)


def value_and_gradients(module, params, inputs):
    def loss(params):
        out = module.apply({"params": params}, *inputs)
        return jnp.square(out).mean(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, gradients


def unstacked(tree):
    """The tree with every scanned `transformer_blocks` split into `transformer_blocks.N`."""
    split = {}
    for key, value in tree.items():
        if key == "transformer_blocks":
            depth = jax.tree.leaves(value)[0].shape[0]
            split |= {f"{key}.{i}": jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(depth)}
        else:
            split[key] = unstacked(value) if isinstance(value, dict) else value
    return split


def assert_close(found, expected, tolerance=2e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * (np.abs(theirs).max() + 1e-3))


def test_a_scanned_stack_is_one_array_a_leaf():
    def arrays(scan):
        module = UNet2DCondition.from_config(presets.SDXL_UNET, scan=scan)
        return jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"])

    scanned, unrolled = arrays(True), arrays(False)
    assert (len(scanned), len(unrolled)) == (500, 1680)
    assert sum(leaf.size for leaf in scanned) == sum(leaf.size for leaf in unrolled)


def test_scanned_equals_unrolled(params, inputs, reference):
    out, gradients = value_and_gradients(UNet2DCondition.from_config(TINY, scan=False), unstacked(params), inputs)
    assert_close((out, gradients), (reference[0], unstacked(reference[1])))


def test_initial_layers_of_a_scanned_stack_differ():
    module = Transformer2D(heads=1, depth=2, num_groups=1)
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 4)))["params"]
    kernel = params["transformer_blocks"]["attn1"]["to_q"]["kernel"]
    assert kernel.shape == (2, 4, 4)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


@pytest.mark.parametrize("remat", ["full", "attention", "offload"])
def test_rematerialised_equals_plain(remat, params, inputs, reference):
    assert_close(value_and_gradients(UNet2DCondition.from_config(TINY, remat=remat), params, inputs), reference)


@pytest.mark.parametrize("scan", [True, False])
def test_rematerialisation_recomputes_what_its_policy_says(scan, params, inputs):
    params = params if scan else unstacked(params)

    def products_and_moves(remat):
        module = UNet2DCondition.from_config(TINY, remat=remat, scan=scan)
        gradient = jax.grad(lambda params: module.apply({"params": params}, *inputs).sum())
        text = str(jax.make_jaxpr(gradient)(params))
        return text.count("dot_general["), text.count("device_put[")

    (plain, _), (attention, stay), (full, _) = (products_and_moves(name) for name in ("none", "attention", "full"))
    assert plain < attention < full
    assert products_and_moves("offload")[0] == attention
    assert products_and_moves("offload")[1] > stay


def test_lora_updates_of_a_scanned_stack_equal_merged_weights(params, inputs, reference):
    rng = np.random.default_rng(1)
    path = ("down_blocks.0", "attentions.0", "transformer_blocks", "attn2", "to_k")
    down, up = rng.normal(size=(2, 12, 3)), rng.normal(size=(2, 3, 16))
    lora = {"down": jnp.asarray(down, jnp.float32), "up": jnp.asarray(up, jnp.float32)}
    for name in reversed(path):
        lora = {name: lora}
    merged = jax.tree.map(lambda leaf: leaf, params)
    node = merged
    for name in path:
        node = node[name]
    node["kernel"] = node["kernel"] + down @ up
    apply = jax.jit(UNet2DCondition.from_config(TINY).apply)
    adapted = apply({"params": params, "lora": lora}, *inputs)
    assert_close(adapted, apply({"params": merged}, *inputs))
    assert np.abs(adapted - reference[0]).max() > 0.1 * reference[0].std()


def test_several_cotangents_pull_back_through_one_vmap(params, inputs, reference):
    module = UNet2DCondition.from_config(TINY, remat="attention")
    out, gradients = reference
    cotangents = jnp.stack([2 * out / out.size, jnp.zeros_like(out)])

    @jax.jit
    def pull_back(params):
        _, backward = jax.vjp(lambda params: module.apply({"params": params}, *inputs), params)
        return jax.vmap(backward)(cotangents)[0]

    found = pull_back(params)
    assert_close(jax.tree.map(lambda leaf: leaf[0], found), gradients)
    assert max(float(jnp.abs(leaf[1]).max()) for leaf in jax.tree.leaves(found)) == 0


def test_bfloat16_compute_returns_float32_near_the_float32_result(params, inputs, reference):
    module = UNet2DCondition.from_config(TINY, dtype=jnp.bfloat16)
    out = jax.jit(module.apply)({"params": params}, *inputs)
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - reference[0]).max() < 0.1 * reference[0].std()


def test_rejects_unsupported_config_values_by_name():
    for change, message in [
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"attention_head_dim": [1, 2]}, "attention_head_dim"),
        ({"down_block_types": ["KDownBlock2D"]}, "KDownBlock2D"),
        ({"block_out_channels": [16, 16]}, "block_out_channels"),
        ({"cross_attention_dim": [12, 13]}, "cross_attention_dim"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types"),
        ({"new_trick": 1}, "new_trick"),
        ({"_class_name": "ControlNetModel"}, "ControlNetModel"),
    ]:
        with pytest.raises(ValueError, match=message):
            UNet2DCondition.from_config({**TINY, **change})
    with pytest.raises(ValueError, match="rematerialise"):
        UNet2DCondition.from_config(TINY, remat="rematerialise")


def test_rejects_wrong_inputs_before_any_compute(inputs):
    module = UNet2DCondition.from_config(TINY)
    latents, timesteps, text = inputs
    for given, message in [
        ((latents, timesteps, None), "needs text"),
        ((latents, timesteps, text[..., :5]), "needs text"),
        ((latents, timesteps, text, None, (latents,)), "down_residuals must be 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), *given)
    sdxl = UNet2DCondition.from_config(presets.SDXL_UNET)
    with pytest.raises(ValueError, match="added_cond"):
        jax.eval_shape(sdxl.init, jax.random.key(0), *sdxl.example_inputs()[:3])


def test_resize_nearest_to_an_odd_size():
    rows = jnp.arange(3.0).reshape(1, 3, 1, 1)
    assert resize_nearest(rows, (5, 2))[0, :, 0, 0].tolist() == [0, 0, 1, 1, 2]
    assert resize_nearest(rows, (4, 2))[0, :, 0, 0].tolist() == [0, 0, 1, 2]
    assert resize_nearest(rows)[0, :, 1, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_unet_without_text_or_middle_block_runs():
    config = {
        **TINY,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "mid_block_type": None,
    }
    module = UNet2DCondition.from_config(config)
    latents = jnp.zeros((2, 5, 7, 4))
    shapes = jax.eval_shape(module.init_with_output, jax.random.key(0), latents, jnp.int32(3))
    assert shapes[0].shape == (2, 5, 7, 4)
    assert "mid_block" not in shapes[1]["params"]
