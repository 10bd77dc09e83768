"""Watched cross-attention: blocks, shapes, order; scanned and rematerialised forms; effects on output and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit, random_params

from fairhuman_jax.models import COLUMNS, UNet2DCondition, presets, watched_columns
from fairhuman_jax.models.attention import attention_columns

# Two blocks with cross-attention, with one and two stacks of two transformer blocks.
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
POSITIONS = np.array([[1, 3, 0], [4, 2, 2]], np.int32)
RNG = np.random.default_rng(0)
INPUTS = (
    RNG.normal(size=(2, 4, 6, 4)).astype(np.float32),
    np.array([17, 400]),
    RNG.normal(size=(2, 5, 12)).astype(np.float32),
)
WEIGHTS = RNG.normal(size=(6, 2, 2, 4, 6, 3)).astype(np.float32)


def unrolled(tree):
    split = {}
    for key, value in tree.items():
        if key == "transformer_blocks":
            split |= {f"{key}.{i}": jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(2)}
        else:
            split[key] = unrolled(value) if isinstance(value, dict) else value
    return split


def watch(params, **runtime):
    """(output, columns) and the gradients of a loss on the columns only."""
    module = UNet2DCondition.from_config(TINY, **runtime)

    def loss(params):
        out, collections = module.apply(
            {"params": params}, *INPUTS, watched=POSITIONS, watched_blocks=2, mutable=[COLUMNS]
        )
        columns = watched_columns(collections)
        return sum(jnp.vdot(column, weight) for column, weight in zip(columns, WEIGHTS, strict=True)), (out, columns)

    gradients, outputs = quick_jit(jax.grad(loss, has_aux=True))(params)
    return outputs, gradients


@pytest.fixture(scope="module")
def params():
    return random_params(UNet2DCondition.from_config(TINY), 1)


@pytest.fixture(scope="module")
def scanned(params):
    return watch(params)


def test_columns_are_those_of_the_explicit_softmax():
    query, key = RNG.normal(size=(2, 6, 3, 4)), RNG.normal(size=(2, 5, 3, 4))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / 2.0
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    found = attention_columns(jnp.asarray(query, jnp.bfloat16), jnp.asarray(key, jnp.bfloat16), POSITIONS)
    assert found.dtype == jnp.float32
    for sample, positions in enumerate(POSITIONS):
        np.testing.assert_allclose(found[sample], weights[sample][..., positions], atol=0.02)
    assert np.isnan(attention_columns(query, key, POSITIONS + 3)).any()


def test_every_cross_attention_of_a_block_gives_its_columns(scanned):
    columns = scanned[0][1]
    assert [column.shape for column in columns] == [(2, 2, 4, 6, 3)] * 6
    assert all((column > 0).all() and (column < 1).all() for column in columns)
    np.testing.assert_array_equal(columns[0][1, ..., 1], columns[0][1, ..., 2])  # one token, watched twice
    assert len({float(column[0, 0, 0, 0, 0]) for column in columns}) == 6


@pytest.mark.parametrize("runtime", [{"remat": "full"}, {"scan": False, "remat": "full"}], ids=str)
def test_scanned_unrolled_and_rematerialised_networks_give_the_same(runtime, params, scanned):
    (out, columns), gradients = scanned
    split = not runtime.get("scan", True)
    (found_out, found), found_gradients = watch(unrolled(params) if split else params, **runtime)
    np.testing.assert_allclose(found_out, out, atol=2e-5)
    for ours, theirs in zip(found, columns, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    expected = unrolled(gradients) if split else gradients
    assert jax.tree.structure(found_gradients) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(np.abs(theirs).max())))


def test_watching_does_not_change_the_prediction(params, scanned):
    plain = quick_jit(UNet2DCondition.from_config(TINY).apply)({"params": params}, *INPUTS)
    np.testing.assert_allclose(plain, scanned[0][0], atol=1e-6)


def test_gradients_flow_through_the_columns_and_no_further(scanned):
    gradients = scanned[1]
    cross = gradients["up_blocks.0"]["attentions.1"]["transformer_blocks"]["attn2"]
    for name in ("to_q", "to_k"):
        assert (np.abs(cross[name]["kernel"]).max((1, 2)) > 1e-4).all()
    # The columns do not depend on the last watched attention's values or on any later parameter.
    assert not cross["to_v"]["kernel"][1].any() and cross["to_v"]["kernel"][0].any()
    assert not gradients["conv_out"]["kernel"].any()
    assert np.abs(gradients["conv_in"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize(
    ("config", "count", "names"),
    [
        (presets.SD15_UNET, 5, "down_blocks.1 down_blocks.2 mid_block up_blocks.1 up_blocks.2"),
        (presets.SD15_UNET, 4, "down_blocks.1 down_blocks.2 mid_block up_blocks.1"),
        (presets.SD15_UNET, 1, "mid_block"),
        (
            presets.SD15_UNET,
            7,
            "down_blocks.0 down_blocks.1 down_blocks.2 mid_block up_blocks.1 up_blocks.2 up_blocks.3",
        ),
        (presets.SDXL_UNET, 5, "down_blocks.1 down_blocks.2 mid_block up_blocks.0 up_blocks.1"),
        (TINY, 1, "down_blocks.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_the_central_blocks(config, count, names):
    assert " ".join(UNet2DCondition.from_config(config).central_blocks(count)) == names


def test_eleven_layers_of_the_published_network():
    module = UNet2DCondition.from_config(presets.SD15_UNET)
    inputs = (jnp.zeros((1, 64, 64, 4)), jnp.zeros(1), jnp.zeros((1, 77, 768)))
    params = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    watched = jnp.zeros((1, 4), jnp.int32)

    def call(params):
        return watched_columns(module.apply(params, *inputs, watched=watched, mutable=[COLUMNS])[1])

    columns = jax.eval_shape(call, params)
    sides = [32, 32, 16, 16, 8, 16, 16, 16, 32, 32, 32]
    assert [column.shape for column in columns] == [(1, 8, side, side, 4) for side in sides]


@pytest.mark.parametrize(
    ("watched", "options", "message"),
    [
        (POSITIONS[:1], {"mutable": [COLUMNS]}, r"watched must be positions \[2, N\], got \[1, 3\]"),
        (POSITIONS, {}, r"need apply\(..., mutable=\['attention_columns'\]\)"),
        (POSITIONS, {"mutable": [COLUMNS], "watched_blocks": 3}, r"3 blocks .* there are 2 \(down_blocks.0, up_"),
        (POSITIONS, {"mutable": [COLUMNS], "watched_blocks": 0}, "0 blocks"),
    ],
)
def test_wrong_requests_are_refused(watched, options, message, params):
    module = UNet2DCondition.from_config(TINY)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params: module.apply(
                {"params": params}, *INPUTS, watched=watched, **{"watched_blocks": 2} | options
            ),
            params,
        )
