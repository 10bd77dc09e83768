"""The systems by name: a line for each that draws and each that trains, and the only place that lists them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# name: the module and class of its pipeline, imported when it is asked for
PIPELINES = {
    "text": "fairhuman_jax.drawing.text:TextPipeline",
    "humansd": "fairhuman_jax.systems.humansd.pipeline:HumanSDPipeline",
    "facediffuser": "fairhuman_jax.systems.facediffuser.pipeline:FaceDiffuserPipeline",
}


# class of a system's configuration: the module that defines it
CONFIGS = {
    "FairHumanConfig": "fairhuman_jax.systems.fairhuman.system",
    "HumanSDConfig": "fairhuman_jax.systems.humansd.system",
    "SubjectModelConfig": "fairhuman_jax.systems.facediffuser.subject_model",
    "SceneModelConfig": "fairhuman_jax.systems.facediffuser.scene_model",
    "TextToImageConfig": "fairhuman_jax.systems.shipped.text_to_image",
    "AutoencoderConfig": "fairhuman_jax.systems.shipped.autoencoder",
    "PoseNetworkConfig": "fairhuman_jax.systems.shipped.pose_network",
    "IdentityEncoderConfig": "fairhuman_jax.systems.shipped.identity_encoder",
}


def pipeline_class(name: str) -> Any:
    """The class of pipelines (`contract.Pipeline`) of that name. Raises: ValueError for an unknown name."""
    if name not in PIPELINES:
        raise ValueError(f"system {name!r} is not known; known: {', '.join(PIPELINES)}")
    module, cls = PIPELINES[name].split(":")
    return getattr(importlib.import_module(module), cls)


def open_pipeline(base: str | None = None, *, system: str = "text", **options: Any) -> Any:
    """Opens models to draw with: `picture = open_pipeline("people")("a woman waving", seed=3)` is a PIL image.

    base: "people" (shipped, the default), a diffusers folder, a checkpoint file or a hub id. system: a name in
    `PIPELINES`. options: fields of the system's options, as in lora="style.safetensors:0.7", dtype="bfloat16",
    steps=30; those that name no model are defaults of each call. Returns a pipeline (`drawing.pipeline.PipelineBase`).
    Raises: OptionError for an unknown option or a wrong value; ValueError and OSError for models that cannot be read.
    """
    from fairhuman_jax.drawing.options import make_options

    pipeline = pipeline_class(system)
    named = {} if base is None else {"base": base}
    return pipeline.open(make_options(pipeline.Options, named | options))


def stored_run(folder: Path) -> Any:
    """The configuration of a run (`training.run_config.RunConfig`), as its folder stores it.

    Raises: FileNotFoundError for a folder without a run; ConfigError for a configuration that this version cannot read.
    """
    from fairhuman_jax.config import ConfigError, from_dict
    from fairhuman_jax.files import read_json
    from fairhuman_jax.training.run_config import CONFIG, RunConfig

    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no folder of a run; it holds {CONFIG}")
    stored = read_json(path)
    name = stored["system"].get("type") if isinstance(stored.get("system"), dict) else None
    if name in CONFIGS:
        importlib.import_module(CONFIGS[name])
    try:
        return from_dict(RunConfig, stored)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a configuration of this version ({error})") from error


def drawn_by_run(folder: Path) -> dict[str, Any]:
    """Options that draw with what a run trained: its system and models.

    Raises: FileNotFoundError for a run without an export; ValueError for one that trains nothing that draws; as
    `stored_run`.
    """
    config = stored_run(folder)
    options = config.system.drawn_by(folder / "export")
    if not (folder / "export").exists():
        raise FileNotFoundError(f"{folder}: the run has no export yet; `python train.py --resume {folder}` finishes it")
    return options
