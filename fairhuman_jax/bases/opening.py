"""From the names of models to networks ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.bases.base import numbered
from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.models import CLIPVision, ControlNet, T2IAdapter
from fairhuman_jax.weights import Pipeline, load_model, load_pipeline
from fairhuman_jax.weights.shapes import pipeline_shapes
from fairhuman_jax.weights.shipped import PEOPLE, or_shipped

PyTree = Any


def open_base(base: str, *, dtype: str = "float32", shapes: bool = False, **options: Any) -> Pipeline:
    """The pipeline that `base` names: one that ships with the package ("people"), or one that `load_pipeline` reads.

    dtype: of frozen parameters and computation; options: those of `load_pipeline` (variant, revision, tokenizer, and
    remat, attention, scan for the networks). With `shapes` parameters are shapes, tokenizers are left out, and the
    published models are known without their files (weights.shapes).
    Raises: FileNotFoundError when there is no such base; ValueError for files that cannot be read.
    """
    read = pipeline_shapes if shapes else load_pipeline
    try:
        return read(str(or_shipped(base, "people-base")), dtype=dtype, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"base model {error}; shipped with the package: {PEOPLE}") from error


def open_system(
    base: str,
    *,
    controlnets: Sequence[str] = (),
    adapters: Sequence[str] = (),
    dtype: str = "float32",
    **options: Any,
) -> tuple[LatentDiffusion, dict[str, PyTree]]:
    """A pipeline with ControlNets and T2I-Adapters to sample with, and all parameters by network.

    Raises: FileNotFoundError, ValueError, as loading; a ControlNet or adapter that was made for another base.
    """
    pipeline = open_base(base, dtype=dtype, **options)
    params = dict(pipeline.params)
    nets: dict[str, list[Any]] = {"controlnet": [], "adapter": []}
    for kind, paths, network in (("controlnet", controlnets, ControlNet), ("adapter", adapters, T2IAdapter)):
        for i, path in enumerate(paths):
            net, params[numbered(kind, i)] = load_model(path, dtype=dtype)
            if not isinstance(net, network):
                raise ValueError(f"{path} is a {type(net).__name__}, not a {network.__name__}")
            _check_fit(path, net, pipeline)
            nets[kind].append(net)
    system = LatentDiffusion(pipeline, controlnets=tuple(nets["controlnet"]), adapters=tuple(nets["adapter"]))
    return system, params


def computing_in(pipeline: Pipeline, dtype: jnp.dtype) -> Pipeline:
    """The pipeline with denoiser and text encoders computing in `dtype`, the latter's parameters in it too."""
    params = dict(pipeline.params)
    for name in pipeline.text_encoder_names:
        params[name] = in_dtype(params[name], dtype)
    encoders = tuple(encoder.clone(dtype=dtype) for encoder in pipeline.text_encoders)
    unet = pipeline.unet.clone(dtype=dtype)
    return dataclasses.replace(pipeline, unet=unet, text_encoders=encoders, params=params)


def trained(params: PyTree) -> PyTree:
    """Parameters as they train: in float32, whatever they are stored and computed in."""
    return in_dtype(params, jnp.dtype("float32"))


def in_dtype(params: PyTree, dtype: jnp.dtype) -> PyTree:
    """Arrays, or shapes of such, in `dtype`."""

    def cast(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)

    return jax.tree.map(cast, params)


def _check_fit(path: str, net: ControlNet | T2IAdapter, pipeline: Pipeline) -> None:
    """Refuses what was made for another base."""
    unet = pipeline.unet
    if isinstance(net, ControlNet):
        ours, theirs = unet.cross_attention_dim, net.cross_attention_dim
        what = "reads text of width"
    else:
        ours, theirs = unet.block_out_channels, tuple(net.channels)[: len(unet.block_out_channels)]
        what = "makes features of widths"
    if ours != theirs:
        raise ValueError(f"{path} {what} {theirs}, but the base has {ours}: it was made for another base")


def open_image_encoder(path: str, **options: Any) -> tuple[CLIPVision, PyTree]:
    """A CLIP image encoder and its parameters: "people", which ships with the package, or what `load_model` reads.

    Raises: ValueError, as `load_model`; another network.
    """
    encoder, params = load_model(str(or_shipped(path, "people_identity")), **options)
    if not isinstance(encoder, CLIPVision):
        raise ValueError(f"{path} is a {type(encoder).__name__}, not a CLIP image encoder")
    return encoder, params
