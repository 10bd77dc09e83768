"""The key rule: names, transposes, stacks, dialects."""

from __future__ import annotations

import numpy as np

from fairhuman_jax.weights.keys import canonical_names, leaves


def test_names_shapes_and_transposes_of_every_leaf_kind():
    rng = np.random.default_rng(0)
    params = {
        "down_blocks.0": {
            "transformer_blocks": {"attn1": {"to_out.0": {"kernel": rng.normal(size=(2, 3, 5))}}},
            "conv": {"kernel": rng.normal(size=(3, 1, 4, 6)), "bias": rng.normal(size=(6,))},
            "norm": {"scale": rng.normal(size=(4,))},
        },
        "token_embedding": {"embedding": rng.normal(size=(9, 4))},
    }
    found = {name: (leaf, leaf.shape) for leaf in leaves(params) for name in leaf.names}
    assert {name: shape for name, (_, shape) in found.items()} == {
        "down_blocks.0.transformer_blocks.0.attn1.to_out.0.weight": (5, 3),
        "down_blocks.0.transformer_blocks.1.attn1.to_out.0.weight": (5, 3),
        "down_blocks.0.conv.weight": (6, 4, 3, 1),
        "down_blocks.0.conv.bias": (6,),
        "down_blocks.0.norm.weight": (4,),
        "token_embedding.weight": (9, 4),
    }
    stacked = params["down_blocks.0"]["transformer_blocks"]["attn1"]["to_out.0"]["kernel"]
    name = "down_blocks.0.transformer_blocks.1.attn1.to_out.0.weight"
    np.testing.assert_array_equal(found[name][0].to_torch(stacked, name), stacked[1].T)
    conv = params["down_blocks.0"]["conv"]["kernel"]
    torch_conv = found["down_blocks.0.conv.weight"][0].to_torch(conv, "down_blocks.0.conv.weight")
    assert torch_conv[5, 2, 1, 0] == conv[1, 0, 2, 5]


def test_leaves_come_back_from_torch_order():
    rng = np.random.default_rng(1)
    params = {
        "layers": {"fc": {"kernel": rng.normal(size=(3, 2, 4))}},
        "conv": {"kernel": rng.normal(size=(3, 1, 4, 6))},
    }
    arrays = {
        ("layers", "fc", "kernel"): params["layers"]["fc"]["kernel"],
        ("conv", "kernel"): params["conv"]["kernel"],
    }
    for leaf in leaves(params):
        tensors = {name: leaf.to_torch(arrays[leaf.path], name) for name in leaf.names}
        back = leaf.from_torch(tensors.__getitem__, np.dtype(np.float64))
        np.testing.assert_array_equal(back, arrays[leaf.path])
        assert back.ctypes.data % 64 == 0
        index = (slice(1, 3), slice(0, 1), slice(None), slice(2, 5))[: back.ndim]
        part = leaf.from_torch(tensors.__getitem__, np.dtype(np.float64), index)
        np.testing.assert_array_equal(part, arrays[leaf.path][index])
        assert leaf.from_torch(tensors.__getitem__, np.dtype(np.float16)).dtype == np.float16


def test_text_encoder_names_with_and_without_prefix():
    bare = ["embeddings.token_embedding.weight", "final_layer_norm.bias", "text_projection.weight"]
    assert set(canonical_names("CLIPText", bare)) == {
        "text_model.embeddings.token_embedding.weight",
        "text_model.final_layer_norm.bias",
        "text_projection.weight",
    }
    prefixed = ["text_model.final_layer_norm.bias", "text_model.embeddings.position_ids"]
    assert canonical_names("CLIPText", prefixed) == {prefixed[0]: prefixed[0]}


def test_image_encoder_names():
    """transformers 5 writes the bare names, the version with projection and version 4 those with a prefix."""
    bare = ["embeddings.class_embedding", "embeddings.position_ids", "pre_layrnorm.weight"]
    assert canonical_names("CLIPVision", bare) == {f"vision_model.{name}": name for name in (bare[0], bare[2])}
    assert list(canonical_names("CLIPVision", ["vision_model.a", "visual_projection.weight"])) == [
        "vision_model.a",
        "visual_projection.weight",
    ]


def test_large_matrices_are_transposed_whole():
    """Larger than the block that is copied at a time, and no multiple of it."""
    params = {"fc": {"kernel": np.arange(70.0 * 150).reshape(70, 150)}}
    (leaf,) = leaves(params)
    tensors = {leaf.names[0]: np.ascontiguousarray(params["fc"]["kernel"].T)}
    array = leaf.from_torch(tensors.__getitem__, np.dtype(np.float32))
    np.testing.assert_array_equal(array, params["fc"]["kernel"])


def test_old_autoencoder_attention_names():
    old = ["encoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.proj_attn.bias"]
    assert list(canonical_names("AutoencoderKL", old)) == [
        "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid_block.attentions.0.to_out.0.bias",
    ]
