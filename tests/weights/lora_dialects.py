"""A small UNet and text encoder with every kind of layer, LoRA trees for them, and files of them in other dialects."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from fairhuman_jax.models import CLIPText, UNet2DCondition, init_lora
from fairhuman_jax.weights import expected_params

UNET = UNet2DCondition.from_config(
    {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
        "norm_num_groups": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    }
)
CLIP = CLIPText.from_config(
    {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "eos_token_id": 19}
)
LAYER = "down_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERY_LAYER = (
    *ATTENTION,
    *("net.0.proj", "net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2"),
)
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# The original block numbers of UNET, written out: one resnet a down block, so two numbers a block.
ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ORIGINAL_PARTS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


@functools.cache
def _params(name):
    return expected_params({"UNet2DCondition": UNET, "CLIPText": CLIP}[name])


def params(module):
    """Shapes of UNET's or CLIP's parameters, worked out once."""
    return _params(type(module).__name__)


def random_lora(module, targets=ATTENTION, rank=2, seed=5):
    lora = jax.eval_shape(lambda key: init_lora(key, params(module), rank, targets), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), lora)


def assert_equal_trees(a, b, strength=1.0):
    """`a` is `b` at `strength`."""
    flat_a, flat_b = flatten_dict(a), flatten_dict(b)
    assert flat_a.keys() == flat_b.keys()
    for path, leaf in flat_a.items():
        expected = flat_b[path] * (strength if path[-1] == "up" else 1.0)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7, err_msg=".".join(path))


def rewrite(path, rename, **metadata):
    """The file's tensors under other names, written in its place."""
    tensors = {rename(name): np.ascontiguousarray(tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata or None)
    return tensors


def split(name):
    """`unet.X.lora.down.weight` -> (unet, X, down)."""
    component, rest = name.split(".", 1)
    layer, factor = re.findall(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight$", rest)[0]
    return component, layer, factor


def peft(name):
    _, layer, factor = split(name)
    return f"base_model.model.{layer}.lora_{'A' if factor == 'down' else 'B'}.default.weight"


def peft_in_diffusers(name):
    component, layer, factor = split(name)
    return f"{component}.{layer}.lora_{'A' if factor == 'down' else 'B'}.weight"


def old_processor(name):
    component, layer, factor = split(name)
    match = re.fullmatch(r"(.+)\.(to_[qkv]|to_out)(?:\.0)?", layer)
    return f"{component}.{match[1]}.processor.{match[2]}_lora.{factor}.weight" if match else name


def oldest(name):
    return old_processor(name).removeprefix("unet.")


def kohya(name):
    component, layer, factor = split(name)
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
    return f"{prefix}_{layer.replace('.', '_')}.lora_{factor}.weight"


def original(layer):
    for ours, theirs in ORIGINAL.items():
        if layer == ours:
            return theirs
        if layer.startswith(f"{ours}."):
            rest = layer.removeprefix(f"{ours}.")
            return f"{theirs}.{ORIGINAL_PARTS.get(rest, rest)}"
    raise KeyError(layer)


def kohya_original(name):
    component, layer, factor = split(name)
    return kohya(name if component != "unet" else f"unet.{original(layer)}.lora.{factor}.weight")


def comfy(name):
    _, layer, factor = split(name)
    return f"diffusion_model.{original(layer)}.lora_{factor}.weight"


def dotted_kohya(name):
    component, layer, factor = split(name)
    return f"{component}.{layer}.lora_{factor}.weight"
