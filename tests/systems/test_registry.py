"""The registry: every line names what it says, and every field of a configuration says what it means."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from fairhuman_jax.contract import PreviewConfig, SystemConfig
from fairhuman_jax.data.subject_transforms import SubjectConfig
from fairhuman_jax.fields import fields_of
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable, ControlNetTrainable, LoraTrainable
from fairhuman_jax.systems.registry import CONFIGS, PIPELINES, pipeline_class
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

OTHERS = (RunConfig, DataConfig, TrainConfig, OptimizerConfig, FairConfig, PreviewConfig, SubjectConfig)
TRAINABLES = (LoraTrainable, ControlNetTrainable, AdapterTrainable)


def config_class(name: str) -> type:
    return getattr(importlib.import_module(CONFIGS[name]), name)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_have_the_names_they_are_listed_by(name):
    assert pipeline_class(name).name == name


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_systems_are_listed_by_their_class(name):
    assert issubclass(config_class(name), SystemConfig)


def test_every_configuration_of_a_system_is_listed():
    for name in CONFIGS:
        config_class(name)
    own = {cls.__name__ for cls in SystemConfig.__subclasses__() if cls.__module__.startswith("fairhuman_jax.")}
    assert own == set(CONFIGS)


@pytest.mark.parametrize("cls", [*OTHERS, *TRAINABLES, *map(config_class, CONFIGS)], ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_means(cls):
    for field in fields_of(cls):
        assert field.sentence or dataclasses.is_dataclass(field.kind), field.name
