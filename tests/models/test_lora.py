"""init_lora and scale_lora: counts on the full SDXL UNet, initial distribution, targets, strength."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.models import UNet2DCondition, init_lora, presets, scale_lora
from fairhuman_jax.models.layers import Linear
from fairhuman_jax.weights import expected_params

PARAMS = {
    "attn": {name: {"kernel": jnp.ones((6, 4))} for name in ("to_q", "to_out.0")},
    "transformer_blocks": {"to_q": {"kernel": jnp.ones((3, 200, 4))}, "norm": {"scale": jnp.ones((3, 4))}},
    "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
}


@pytest.mark.parametrize(("scan", "tensors"), [(True, 176), (False, 1120)])
def test_sdxl_unet_counts(scan, tensors):
    """Rank 4: 1,451,520 r parameters; 1120 tensors, of which stacks hold many in one."""
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
    with pytest.raises(ValueError, match="name no linear layer: to_x"):
        init_lora(jax.random.key(0), PARAMS, 2, ("to_q", "to_x"))
    with pytest.raises(ValueError, match="none were given"):
        init_lora(jax.random.key(0), PARAMS, 2, ())
    with pytest.raises(ValueError, match="conv is a convolution"):
        init_lora(jax.random.key(0), PARAMS, 2, ("conv",))
    with pytest.raises(ValueError, match="at least 1"):
        init_lora(jax.random.key(0), PARAMS, 0)
