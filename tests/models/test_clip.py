"""CLIPText: scanned and unrolled forms, pooling rules, causality, LoRA, remat, refused configs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fairhuman_jax.models import TEXT_TARGETS, CLIPText, init_lora
from fairhuman_jax.models.clip import CLIPEncoder

TINY = {
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 12,
    "projection_dim": 5,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
    "bos_token_id": 28,
    "eos_token_id": 29,
}
IDS = np.array([[28, 3, 4, 29, 29, 29], [28, 5, 6, 7, 8, 29]], np.int32)


def random_params(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), shapes)


def run(module, variables, ids=IDS):
    return jax.jit(module.apply)(variables, ids)


def unstacked(tree):
    flat = {}
    for path, leaf in flatten_dict(tree).items():
        if "layers" not in path:
            flat[path] = leaf
            continue
        for i in range(leaf.shape[0]):
            flat[tuple(f"layers.{i}" if part == "layers" else part for part in path)] = leaf[i]
    return unflatten_dict(flat)


@pytest.fixture(scope="module")
def params():
    return random_params(CLIPText.from_config(TINY))


@pytest.fixture(scope="module")
def scanned(params):
    """Outputs of the scanned encoder in float32."""
    return run(CLIPText.from_config(TINY), {"params": params})


def test_scanned_and_unrolled_encoders_agree(params, scanned):
    unrolled = run(CLIPText.from_config(TINY, scan=False), {"params": unstacked(params)})
    assert set(scanned) == {"last_hidden_state", "penultimate", "pooled"}
    for name, value in scanned.items():
        np.testing.assert_allclose(value, unrolled[name], atol=1e-6)


def test_lora_reaches_every_scanned_layer(params):
    module = CLIPText.from_config(TINY)
    lora = init_lora(jax.random.key(2), params, 2, TEXT_TARGETS)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    scanned = run(module, {"params": params, "lora": lora}, IDS)["pooled"]
    unrolled = run(CLIPText.from_config(TINY, scan=False), {"params": unstacked(params), "lora": unstacked(lora)})[
        "pooled"
    ]
    np.testing.assert_allclose(scanned, unrolled, atol=1e-6)
    assert float(jnp.abs(scanned - run(module, {"params": params}, IDS)["pooled"]).max()) > 1e-2


def test_pooled_state_is_at_the_first_end_token(params):
    module = CLIPText.from_config(TINY | {"architectures": ["CLIPTextModel"]})
    bare = {"text_model": params["text_model"]}
    out = run(module, {"params": bare}, IDS)
    expected = out["last_hidden_state"][np.arange(2), [3, 5]]
    np.testing.assert_array_equal(out["pooled"], expected)


def test_old_configs_pool_at_the_largest_id(params):
    module = CLIPText.from_config(TINY | {"architectures": ["CLIPTextModel"], "eos_token_id": 2})
    ids = np.array([[28, 2, 9, 29, 3, 3]], np.int32)
    out = run(module, {"params": {"text_model": params["text_model"]}}, ids)
    np.testing.assert_array_equal(out["pooled"], out["last_hidden_state"][:, 3])


def test_later_tokens_do_not_change_earlier_states(params):
    module = CLIPText.from_config(TINY)
    changed = IDS.copy()
    changed[:, 4:] = 11
    before = run(module, {"params": params}, IDS)["last_hidden_state"]
    after = run(module, {"params": params}, changed)["last_hidden_state"]
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=1e-6)
    assert float(jnp.abs(after[:, 4:] - before[:, 4:]).max()) > 1e-2


def test_penultimate_state_skips_last_layer_and_norm(params):
    shorter = unflatten_dict(
        {path: leaf[:2] if "layers" in path else leaf for path, leaf in flatten_dict(params).items()}
    )
    two_layers = run(CLIPText.from_config(TINY | {"num_hidden_layers": 2}), {"params": shorter})
    penultimate = run(CLIPText.from_config(TINY), {"params": params})["penultimate"]
    wide = penultimate - penultimate.mean(-1, keepdims=True)
    normed = wide / jnp.sqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
    norm = params["text_model"]["final_layer_norm"]
    expected = normed * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(two_layers["last_hidden_state"], expected, atol=1e-5)


def test_rematerialised_gradients_equal_plain_ones():
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    layer = {"heads": 2, "intermediate_size": 4, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    params = CLIPEncoder(2, layer).init(jax.random.key(0), x)["params"]

    @jax.jit
    def gradients(params):
        def loss(params, remat):
            return jnp.square(CLIPEncoder(2, layer, remat=remat).apply({"params": params}, x)[0]).mean()

        return [jax.grad(loss)(params, remat) for remat in ("none", "full", "attention")]

    plain, *rematerialised = gradients(params)
    for got in rematerialised:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, got)


def test_published_text_encoders_have_their_number_of_parameters():
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    big = {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    }
    for config, count in ((large, 123_060_480), (big, 694_659_840)):
        module = CLIPText.from_config(config)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
        assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config": {}}, "text_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "swoosh"}, "swoosh"),
        ({"eos_token_id": 49407}, "eos_token_id=49407"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"architectures": ["BertModel"]}, "BertModel"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        CLIPText.from_config(TINY | change)


def test_too_many_tokens_are_refused(params):
    with pytest.raises(ValueError, match="8 tokens a prompt, but the model has 7 positions"):
        CLIPText.from_config(TINY).apply({"params": params}, np.zeros((1, 8), np.int32))


def test_bfloat16_compute_keeps_close(params, scanned):
    rough = run(CLIPText.from_config(TINY, dtype=jnp.bfloat16), {"params": params})["pooled"]
    assert rough.dtype == jnp.bfloat16
    exact = scanned["pooled"]
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.1 * float(exact.std()))
