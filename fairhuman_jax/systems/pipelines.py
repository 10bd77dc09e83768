"""From the names of models to networks ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from fairhuman_jax.models import ControlNet, T2IAdapter
from fairhuman_jax.systems.latent_diffusion import LatentDiffusion, numbered
from fairhuman_jax.weights import Pipeline, load_model, load_pipeline
from fairhuman_jax.weights.shapes import pipeline_shapes

PyTree = Any
SHIPPED = {"people": "people-base"}


def open_pipeline(base: str, *, dtype: str = "float32", shapes_only: bool = False, **options: Any) -> Pipeline:
    """The pipeline that `base` names: one that ships with the package ("people"), or what `load_pipeline` reads.

    `dtype` is that of frozen parameters and computation; `options` go to `load_pipeline` (variant, revision,
    tokenizer, and remat, attention, scan for the networks). With `shapes_only` parameters are shapes, tokenizers are
    left out, and the published models are known without their files (weights.shapes).
    """
    read = pipeline_shapes if shapes_only else load_pipeline
    if base in SHIPPED:
        return read(str(resources.files("fairhuman_jax") / "assets" / SHIPPED[base]), dtype=dtype, **options)
    try:
        return read(base, dtype=dtype, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"base model {error}; shipped with the package: {', '.join(SHIPPED)}") from error


def open_system(
    base: str,
    *,
    controlnets: Sequence[str] = (),
    adapters: Sequence[str] = (),
    dtype: str = "float32",
    **options: Any,
) -> tuple[LatentDiffusion, dict[str, PyTree]]:
    """A pipeline with ControlNets and T2I-Adapters to sample with, and all parameters by network.

    Errors: those of loading; a ControlNet or adapter that was made for another base.
    """
    pipeline = open_pipeline(base, dtype=dtype, **options)
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
