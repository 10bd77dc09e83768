"""The systems that draw, by name: a line a system, and the only place that lists them."""

from __future__ import annotations

import importlib
from typing import Any

# name: the module and class of its pipeline, imported when it is asked for
PIPELINES = {
    "text": "fairhuman_jax.drawing.text:TextPipeline",
    "humansd": "fairhuman_jax.systems.humansd.pipeline:HumanSDPipeline",
    "facediffuser": "fairhuman_jax.systems.facediffuser.pipeline:FaceDiffuserPipeline",
}


def pipeline_class(name: str) -> Any:
    """The class of pipelines (`contract.Pipeline`) of that name. Raises: ValueError for an unknown name."""
    if name not in PIPELINES:
        raise ValueError(f"system {name!r} is not known; known: {', '.join(PIPELINES)}")
    module, cls = PIPELINES[name].split(":")
    return getattr(importlib.import_module(module), cls)


def open_pipeline(base: str = "people", *, system: str = "text", **options: Any) -> Any:
    """Opens models to draw with: `picture = open_pipeline("people")("a woman waving", seed=3)` is a PIL image.

    base: "people" (shipped), a diffusers folder, a checkpoint file or a hub id. system: a name in `PIPELINES`. options:
    fields of the system's options, as in lora="style.safetensors:0.7", dtype="bfloat16", steps=30; those that name no
    model are defaults of each call. Returns a pipeline (`drawing.pipeline.PipelineBase`).
    Raises: OptionError for an unknown option or a wrong value; ValueError and OSError for models that cannot be read.
    """
    from fairhuman_jax.drawing.options import make_options

    pipeline = pipeline_class(system)
    return pipeline.open(make_options(pipeline.Options, {"base": base, **options}))
