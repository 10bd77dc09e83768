"""Configurations of networks whose files carry none, read off the shapes of their tensors.

What shapes cannot tell is taken from the published model of the same family: head counts (8 in SD 1.x, else 64
channels each), group norms of 32 groups, image sizes. For published sizes the result is the published config.
"""

from __future__ import annotations

import math
import re
from typing import Any

from fairhuman_jax.models import presets
from fairhuman_jax.weights.ldm.names import Layout, Stage, diffusers_layout
from fairhuman_jax.weights.tensors import Tensors

Config = dict[str, Any]

SD1, SD2, XL, REFINER = "SD 1.5", "SD 2.1", "SDXL base", "SDXL refiner"
UNETS = {SD1: presets.SD15_UNET, SD2: presets.SD21_UNET, XL: presets.SDXL_UNET, REFINER: presets.SDXL_REFINER_UNET}
CONTROLNETS = {SD1: presets.SD15_CONTROLNET, SD2: presets.SD21_CONTROLNET, XL: presets.SDXL_CONTROLNET}
HEAD_WIDTH = 64
CONDITION = "controlnet_cond_embedding"

_SCALED_LINEAR = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
_PNDM = {**_SCALED_LINEAR, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
_DDIM = {**_SCALED_LINEAR, "_class_name": "DDIMScheduler"}
_EULER = {
    **_SCALED_LINEAR,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
}
SCHEDULERS = {SD1: _PNDM, SD2: _DDIM, XL: _EULER, REFINER: _EULER}


def unet_family(tensors: Tensors) -> str:
    """The published model whose family a UNet or ControlNet in diffusers' names belongs to."""
    names = tensors.names()
    width = _text_width(tensors)
    if "add_embedding.linear_1.weight" in names:
        return REFINER if width == presets.SDXL_REFINER_UNET["cross_attention_dim"] else XL
    return SD2 if _linear(tensors) else SD1


def unet_config(tensors: Tensors) -> Config:
    """The `config.json` of a UNet in diffusers' names.

    Raises: ValueError for tensors that tell its size are missing.
    """
    family = unet_family(tensors)
    layout = diffusers_layout(tensors.names())
    config = UNETS[family] | _encoder_config(tensors, layout)
    config["up_block_types"] = [_block_type("Up", stage) for stage in layout.up]
    config["out_channels"] = _shape(tensors, "conv_out.weight")[0]
    return config


def controlnet_config(tensors: Tensors) -> Config:
    """The `config.json` of a ControlNet in diffusers' names. Errors as for `unet_config`; one of the refiner."""
    family = unet_family(tensors)
    if family not in CONTROLNETS:
        raise ValueError(f"{tensors.label} is a ControlNet of the {family}; those of {', '.join(CONTROLNETS)} are read")
    layout = diffusers_layout(tensors.names())
    blocks = range(1, layout.hints or 0, 2)
    widths = [
        _shape(tensors, f"{CONDITION}.{name}.weight")[0] for name in ("conv_in", *(f"blocks.{i}" for i in blocks))
    ]
    return (
        CONTROLNETS[family]
        | _encoder_config(tensors, layout)
        | {
            "conditioning_channels": _shape(tensors, f"{CONDITION}.conv_in.weight")[1],
            "conditioning_embedding_out_channels": widths,
        }
    )


def vae_config(tensors: Tensors, *, xl: bool) -> Config:
    """The `config.json` of an autoencoder in diffusers' names; SD's and SDXL's differ in no shape, so `xl` says."""
    names = tensors.names()
    levels = _count(names, r"encoder\.down_blocks\.(\d+)\.")
    widths = [_shape(tensors, f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    config = dict(presets.SDXL_VAE if xl else presets.SD_VAE)
    config |= {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(names, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "in_channels": _shape(tensors, "encoder.conv_in.weight")[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(tensors, "decoder.conv_in.weight")[1],
    }
    for key, mark in (
        ("use_quant_conv", "quant_conv.weight"),
        ("use_post_quant_conv", "post_quant_conv.weight"),
        ("mid_block_add_attention", "encoder.mid_block.attentions.0.group_norm.weight"),
    ):
        if mark not in names:
            config[key] = False
    return config


def text_config(tensors: Tensors, published: Config) -> Config:
    """The `config.json` of a text encoder in transformers' names; `published` gives what shapes do not."""
    vocabulary, width = _shape(tensors, "text_model.embeddings.token_embedding.weight")
    config = published | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "max_position_embeddings": _shape(tensors, "text_model.embeddings.position_embedding.weight")[0],
        "num_hidden_layers": _count(tensors.names(), r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
    }
    if "text_projection.weight" in tensors.names():
        config["projection_dim"] = _shape(tensors, "text_projection.weight")[0]
    return config


def vision_config(tensors: Tensors) -> Config:
    """The `config.json` of a CLIP image encoder with projection, in transformers' names."""
    embeddings = "vision_model.embeddings"
    width, channels, patch, _ = _shape(tensors, f"{embeddings}.patch_embedding.weight")
    cells = _shape(tensors, f"{embeddings}.position_embedding.weight")[0] - 1
    return presets.CLIP_L_VISION | {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * math.isqrt(cells),
        "intermediate_size": _shape(tensors, "vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(tensors.names(), r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "projection_dim": _shape(tensors, "visual_projection.weight")[0],
    }


def postfuse_config(tensors: Tensors) -> Config:
    """The `config.json` of a `Postfuse`."""
    return {"_class_name": "Postfuse", "width": _shape(tensors, "layer_norm.weight")[0]}


def scheduler_config(family: str, prediction_type: str, *, zero_snr: bool = False) -> Config:
    """The `scheduler_config.json` published with a family; `zero_snr` as networks trained down to no signal need it."""
    config = SCHEDULERS[family] | {"prediction_type": prediction_type}
    return config | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else config


def _encoder_config(tensors: Tensors, layout: Layout) -> Config:
    widths = [_shape(tensors, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(len(layout.down))]
    layers = [len(stage.attentions) for stage in layout.down]
    depths = [_depth(tensors, f"down_blocks.{i}") for i in range(len(widths))]
    if widths and not depths[-1]:
        depths[-1] = _depth(tensors, "mid_block")
    known = {depth for depth in depths if depth}
    config: Config = {
        "block_out_channels": widths,
        "down_block_types": [_block_type("Down", stage) for stage in layout.down],
        "in_channels": _shape(tensors, "conv_in.weight")[1],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "transformer_layers_per_block": known.pop() if len(known) == 1 else [depth or 1 for depth in depths],
        "mid_block_type": _mid_type(layout),
        "use_linear_projection": _linear(tensors),
    }
    if config["use_linear_projection"]:
        config["attention_head_dim"] = [max(1, width // HEAD_WIDTH) for width in widths]
    if (text := _text_width(tensors)) is not None:
        config["cross_attention_dim"] = text
    if "add_embedding.linear_1.weight" in tensors.names():
        config["projection_class_embeddings_input_dim"] = _shape(tensors, "add_embedding.linear_1.weight")[1]
    return config


def _mid_type(layout: Layout) -> str | None:
    if not layout.mid:
        return None
    return "UNetMidBlock2DCrossAttn" if any(layout.mid) else "UNetMidBlock2D"


def _block_type(direction: str, stage: Stage) -> str:
    return f"CrossAttn{direction}Block2D" if any(stage.attentions) else f"{direction}Block2D"


def _depth(tensors: Tensors, block: str) -> int:
    """Transformer blocks in the first attention of a block, 0 without one."""
    return _count(tensors.names(), re.escape(block) + r"\.attentions\.0\.transformer_blocks\.(\d+)\.")


def _linear(tensors: Tensors) -> bool:
    """Whether attention blocks begin with a linear map; without attention, whether the family has one."""
    name = next((name for name in tensors.names() if name.endswith("attentions.0.proj_in.weight")), None)
    return "add_embedding.linear_1.weight" in tensors.names() if name is None else len(tensors.shape(name)) == 2


def _text_width(tensors: Tensors) -> int | None:
    name = next((name for name in tensors.names() if name.endswith("attn2.to_k.weight")), None)
    return None if name is None else tensors.shape(name)[1]


def _count(names: tuple[str, ...], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a name."""
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors.names():
        raise ValueError(f"{tensors.label} has no {name} (in diffusers' naming), so its network cannot be told")
    return tensors.shape(name)
