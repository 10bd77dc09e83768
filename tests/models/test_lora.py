"""Trees of low-rank updates: counts on the full SDXL UNet, initial distribution, strength, sums, merging."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.models import UNet2DCondition, init_lora, presets, scale_lora
from fairhuman_jax.models.layers import Conv, Linear
from fairhuman_jax.models.lora import concatenate_lora, merge_lora
from fairhuman_jax.models.transformer import Transformer2D
from fairhuman_jax.weights import expected_params

PARAMS = {
    "attn": {name: {"kernel": jnp.ones((6, 4))} for name in ("to_q", "to_out.0")},
    "transformer_blocks": {"to_q": {"kernel": jnp.ones((3, 200, 4))}, "norm": {"scale": jnp.ones((3, 4))}},
    "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
}


@pytest.mark.parametrize(("scan", "tensors"), [(True, 176), (False, 1120)])
def test_sdxl_unet_counts(scan, tensors):
    """1,451,520 r parameters at rank r = 4; 1120 tensors, many of them in one stacked leaf."""
    shapes = expected_params(UNet2DCondition.from_config(presets.SDXL_UNET, scan=scan))
    lora = jax.eval_shape(lambda key: init_lora(key, shapes, 4), jax.random.key(0))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(lora)) == 1_451_520 * 4
    assert len(jax.tree.leaves(lora)) == tensors


def test_initial_factors():
    lora = init_lora(jax.random.key(0), PARAMS, 8, ("to_q", "to_out.0"))
    stacked = lora["transformer_blocks"]["to_q"]
    assert stacked["down"].shape == (3, 200, 8)
    assert stacked["up"].shape == (3, 8, 4)
    assert set(lora["attn"]) == {"to_q", "to_out.0"}
    assert not any(np.any(leaf) for leaf in (stacked["up"], lora["attn"]["to_q"]["up"]))
    assert float(stacked["down"].std()) == pytest.approx(1 / 8, rel=0.05)
    assert abs(float(stacked["down"].mean())) < 0.01
    assert float(jnp.abs(lora["attn"]["to_q"]["down"] - lora["attn"]["to_out.0"]["down"]).max()) > 0.01


def test_initial_factors_of_a_convolution():
    params = {"conv": {"kernel": jnp.ones((3, 3, 40, 4))}, "conv_in": {"kernel": jnp.ones((1, 1, 4, 4))}}
    lora = init_lora(jax.random.key(0), params, 8, ("conv",))
    assert lora.keys() == {"conv"}
    assert lora["conv"]["down"].shape == (3, 3, 40, 8)
    assert lora["conv"]["up"].shape == (8, 4)
    assert float(lora["conv"]["down"].std()) == pytest.approx(1 / 8, rel=0.05)


def test_scaled_update_moves_the_output_in_proportion():
    layer = Linear(4)
    params = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
    lora = init_lora(jax.random.key(0), {"to_q": params}, 2, ("to_q",))["to_q"]
    lora = {"down": lora["down"], "up": jnp.ones((2, 4))}
    x = jnp.arange(6.0)

    def moved(strength):
        scaled = scale_lora({"to_q": lora}, strength)["to_q"]
        return layer.apply({"params": params, "lora": scaled}, x) - layer.apply({"params": params}, x)

    np.testing.assert_allclose(moved(0.5), 0.5 * moved(1.0), rtol=1e-5)
    assert float(jnp.abs(moved(1.0)).max()) > 0.1


def test_targets_that_name_nothing_are_refused():
    with pytest.raises(ValueError, match="name no linear layer and no convolution: to_x"):
        init_lora(jax.random.key(0), PARAMS, 2, ("to_q", "to_x"))
    with pytest.raises(ValueError, match="none were given"):
        init_lora(jax.random.key(0), PARAMS, 2, ())
    with pytest.raises(ValueError, match="at least 1"):
        init_lora(jax.random.key(0), PARAMS, 0)


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def random_variables(module, targets, *inputs):
    """Parameters and a LoRA of rank 2 for them, all nonzero."""
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    lora = jax.eval_shape(lambda key: init_lora(key, {"layer": params}, 2, targets), jax.random.key(0))
    return random_like(params), random_like(lora["layer"], 1)


@pytest.mark.parametrize(
    ("module", "targets", "shape"),
    [
        (Linear(6), ("layer",), (2, 4)),
        (Conv(6), ("layer",), (2, 5, 5, 4)),
        (Conv(6, strides=2), ("layer",), (2, 6, 6, 4)),
        (Conv(6, strides=2, padding=((0, 1), (0, 1))), ("layer",), (2, 6, 6, 4)),
        (Conv(6, kernel_size=1, padding=0), ("layer",), (2, 3, 3, 4)),
        (Transformer2D(heads=2, depth=2, num_groups=2), ("to_q", "to_v", "net.2", "proj_in"), (1, 2, 2, 4)),
    ],
)
def test_merged_and_live_updates_are_the_same(module, targets, shape):
    rng = np.random.default_rng(3)
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32)]
    if isinstance(module, Transformer2D):
        inputs.append(jnp.asarray(rng.normal(size=(1, 3, 5)), jnp.float32))
    params, lora = random_variables(module, targets, *inputs)

    @quick_jit
    def outputs(params, lora):
        kinds = ({"params": params, "lora": lora}, {"params": merge_lora(params, lora)}, {"params": params})
        return [module.apply(variables, *inputs) for variables in kinds]

    live, merged, plain = outputs(params, lora)
    assert float(jnp.abs(live - plain).max()) > 0.05
    np.testing.assert_allclose(merged, live, atol=2e-5)


def test_merging_sums_in_float32_and_keeps_the_dtype_and_the_rest():
    kernel = jnp.ones((4, 3), jnp.bfloat16)
    params = {"a": {"kernel": kernel, "bias": jnp.ones(3, jnp.bfloat16)}, "b": {"kernel": kernel}}
    # Just over half of bfloat16's step at 1: rounding the update before adding it would lose it.
    up = jnp.tile(jnp.array([[2**-8], [2**-17]]), (1, 3))
    merged = merge_lora(params, {"a": {"down": jnp.ones((4, 2)), "up": up}})
    assert merged["a"]["kernel"].dtype == jnp.bfloat16
    assert float(merged["a"]["kernel"][0, 0]) == 1 + 2**-7
    assert merged["b"]["kernel"] is kernel
    assert merged["a"]["bias"] is params["a"]["bias"]


def test_a_sum_of_updates_acts_as_both():
    layer, x = Conv(3), jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), jnp.float32)
    params, first = random_variables(layer, ("layer",), x)
    second = random_like({"down": jnp.zeros((3, 3, 2, 5)), "up": jnp.zeros((5, 3))}, 7)
    both = concatenate_lora([{"a": first, "b": first}, {"a": second}])
    assert both["a"]["down"].shape == (3, 3, 2, 7)
    np.testing.assert_array_equal(both["b"]["up"], first["up"])

    @quick_jit
    def moved(lora):
        return layer.apply({"params": params, "lora": lora}, x) - layer.apply({"params": params}, x)

    np.testing.assert_allclose(moved(both["a"]), moved(first) + moved(second), atol=1e-5)
    on_host = concatenate_lora([{"a": jax.tree.map(np.asarray, first)}] * 2)
    assert isinstance(on_host["a"]["up"], np.ndarray)
    with pytest.raises(ValueError, match="no LoRA was given"):
        concatenate_lora([])


def test_merging_into_other_layers_is_refused():
    lora = {"a": {"down": jnp.ones((4, 2)), "up": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="adapts a, which these parameters do not have"):
        merge_lora({"b": {"kernel": jnp.ones((4, 3))}}, lora)
    with pytest.raises(ValueError, match=r"on a is \(4, 2\) and \(2, 3\), but the kernel is \(4, 1\)"):
        merge_lora({"a": {"kernel": jnp.ones((4, 1))}}, lora)
