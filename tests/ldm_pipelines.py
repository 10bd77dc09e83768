"""Small pipelines of the three families, wide enough for the shapes to tell everything that published ones tell."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from tiny_models import random_params, tiny_tokenizer

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition, presets
from fairhuman_jax.weights import Pipeline
from fairhuman_jax.weights.ldm.configs import SD1, SD2, XL, scheduler_config
from fairhuman_jax.weights.ldm.reading import Component
from fairhuman_jax.weights.safetensors_io import TensorFiles, write_tensors
from fairhuman_jax.weights.tensors import ParamTensors

WIDTHS = [64, 128]
UNET = {
    "block_out_channels": WIDTHS,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
UNETS = {
    SD1: presets.SD15_UNET | UNET | {"cross_attention_dim": 64},
    SD2: presets.SD21_UNET | UNET | {"cross_attention_dim": 64, "attention_head_dim": [1, 2]},
    XL: presets.SDXL_UNET
    | {
        "block_out_channels": WIDTHS,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 192,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
    },
}
VAE = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}
CLIP = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 1}
SECOND = {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 64}  # another width than the first encoder's


def text(published: dict, **changes) -> CLIPText:
    """A small text encoder for the small tokenizer, otherwise as published."""
    return CLIPText.from_config(
        published | CLIP | {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 6} | changes
    )


@functools.cache
def shared_params() -> dict:
    """Parameters of the autoencoder and of the first text encoder, which have one shape in all families."""
    vae = AutoencoderKL.from_config(presets.SD_VAE | VAE)
    return {"vae": random_params(vae, 0), "text_encoder": random_params(text(presets.SD15_TEXT), 1)}


@functools.cache
def pipeline(family: str) -> Pipeline:
    """A pipeline of random parameters whose every config but its sizes is the published one."""
    unet = UNet2DCondition.from_config(UNETS[family])
    params = shared_params() | {"unet": random_params(unet, 2)}
    if family == XL:
        encoders = (text(presets.SDXL_TEXT), text(presets.SDXL_TEXT_2, **SECOND))
        params["text_encoder_2"] = random_params(encoders[1], 3)
    else:
        encoders = (text(presets.SD15_TEXT if family == SD1 else presets.SD21_TEXT),)
    vae = AutoencoderKL.from_config((presets.SDXL_VAE if family == XL else presets.SD_VAE) | VAE)
    prediction = "v_prediction" if family == SD2 else "epsilon"
    schedule = NoiseSchedule.from_config(scheduler_config(family, prediction))
    return Pipeline(unet, vae, encoders, tuple(tiny_tokenizer() for _ in encoders), schedule, params)


def assert_holds(component: Component, params) -> None:
    """The component's tensors are those of a parameter tree, under the same names."""
    expected = ParamTensors.of(params, "expected")
    assert set(component.tensors.names()) == set(expected.names())
    for name in expected.names():
        assert component.tensors.shape(name) == component.tensors.read(name).shape
        np.testing.assert_array_equal(
            component.tensors.read(name).squeeze(), expected.read(name).squeeze(), err_msg=name
        )


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    files = TensorFiles([path])
    return {name: files.read(name) for name in files.names()}


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of these tensors, and of this metadata alone."""
    dtypes = {name: array.dtype for name, array in arrays.items()}
    write_tensors(path, {name: array.shape for name, array in arrays.items()}, dtypes, arrays.__getitem__, metadata)
    return path
