from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from fairhuman_jax.config import (
    ConfigError,
    apply_overrides,
    describe,
    from_dict,
    from_json,
    load_config,
    to_dict,
    to_json,
)


class Mode(enum.Enum):
    FAST = 1
    EXACT = 2


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate = {self.learning_rate} must be positive")


@dataclass(frozen=True)
class Folder:
    root: Path = Path("photos")


@dataclass(frozen=True)
class People:
    size: int = 64
    signs: tuple[str, ...] = ("open", "fist")


@dataclass(frozen=True)
class System:
    pass


@dataclass(frozen=True)
class Fair(System):
    priority: tuple[float, ...] | None = None
    combiner: Literal["mpd", "sum"] = "mpd"


@dataclass(frozen=True)
class Config:
    system: System = field(default_factory=Fair)
    source: People | Folder = field(default_factory=People)
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 100
    remat: bool = False
    name: str = "run"
    seed: int | str | None = 0
    mode: Mode = Mode.FAST
    mesh: tuple[tuple[str, int], ...] = (("data", 1),)
    extra: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("steps=2_000", "steps", 2000),
        ("steps=1e5", "steps", 100000),
        ("remat=true", "remat", True),
        ("remat=off", "remat", False),
        ("name=a=b", "name", "a=b"),
        ("name='12'", "name", "12"),
        ("name=", "name", ""),
        ("seed=none", "seed", None),
        ("seed=7", "seed", 7),
        ("seed=time", "seed", "time"),
        ("mode=EXACT", "mode", Mode.EXACT),
        ("optimizer.learning_rate=3e-5", "optimizer.learning_rate", 3e-5),
        ("optimizer.clip=None", "optimizer.clip", None),
        ("optimizer.clip=2", "optimizer.clip", 2.0),
        ("optimizer.betas=(0.8, 0.9)", "optimizer.betas", (0.8, 0.9)),
        ("optimizer.betas=0,1", "optimizer.betas", (0.0, 1.0)),
        ("source.signs=wave, point", "source.signs", ("wave", "point")),
        ("source.signs=", "source.signs", ()),
        ("system.priority=[1, 2, 0.5]", "system.priority", (1.0, 2.0, 0.5)),
        ("system.combiner=sum", "system.combiner", "sum"),
        ("mesh=(('data', 2), ('fsdp', 4))", "mesh", (("data", 2), ("fsdp", 4))),
        ("extra={'a': [1, 2]}", "extra", {"a": [1, 2]}),
    ],
)
def test_override_is_read_by_the_fields_type(text, key, value):
    changed = apply_overrides(Config(), [text])
    found: Any = changed
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    assert from_json(Config, to_json(changed)) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz=1", r"Config has no 'stepz'; did you mean steps.*It has: system, source, optimizer, steps"),
        ("optimizer.learning_rat=1", r"Optimizer has no 'learning_rat'; did you mean learning_rate\?"),
        ("steps=1.5", "steps=1.5: needs int"),
        ("steps=many", "needs int"),
        ("remat=maybe", "needs true or false"),
        ("system.combiner=pcgrad", "needs one of 'mpd', 'sum'"),
        ("mode=SLOW", "needs one of FAST, EXACT"),
        ("optimizer.betas=(1, 2, 3)", r"needs tuple\[float, float\]"),
        ("optimizer.clip=high", r"needs float \| None"),
        ("optimizer=fast", r"needs its fields set one by one \(a Optimizer\)"),
        ("steps.more=1", "steps is 100 and has no fields"),
        ("steps", "write it as key=value"),
        ("optimizer.learning_rate=-1", "learning_rate = -1.0 must be positive"),
    ],
)
def test_wrong_override_is_one_clear_line(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        apply_overrides(Config(), [text])
    assert "\n" not in str(error.value)


def test_later_overrides_win_and_the_original_stays():
    config = Config()
    changed = apply_overrides(config, ["steps=5", "steps=6", "optimizer.warmup=2"])
    assert (changed.steps, changed.optimizer.warmup, config.steps, config.optimizer.warmup) == (6, 2, 100, 0)


def test_round_trip_keeps_classes():
    config = Config(system=Fair((1.0, 2.0, 2.0)), source=Folder(Path("a/b")), mesh=(("x", 2),), seed=None)
    stored = json.loads(json.dumps(to_dict(config)))
    assert stored["source"] == {"type": "Folder", "root": "a/b"} and stored["system"]["type"] == "Fair"
    assert from_dict(Config, stored) == config
    assert from_dict(Config, {"type": "Config"}) == Config()
    for change, words in (
        ({"source": {"type": "Cloud"}}, "Config.source: unknown class 'Cloud'; known here: People, Folder"),
        ({"step": 1}, "Config has no 'step'; did you mean steps"),
        ({"steps": "1"}, "Config.steps: needs int, found '1'"),
        ({"remat": 1}, "Config.remat: needs true or false"),
        ({"optimizer": {"type": "Optimizer", "betas": [1.0]}}, "Config.optimizer.betas: needs"),
    ):
        with pytest.raises(ConfigError, match=words):
            from_dict(Config, stored | change)
    with pytest.raises(ConfigError, match=r"Config.extra.a: a object cannot be stored"):
        to_dict(Config(extra={"a": object()}))


def test_describe_lists_every_key_as_set_takes_it():
    text = describe(Config())
    lines = {line.split(" = ")[0].strip(): line.split(" = ")[1] for line in text.splitlines()[1:]}
    assert lines["optimizer.betas"] == "(0.9, 0.999)" and lines["source"] == "People" and lines["name"] == "'run'"
    assert len({line.index(" = ") for line in text.splitlines()[1:]}) == 1


CONFIGS = Path(__file__).parents[1] / "configs"
BODY = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Small:
    steps: int = 3
"""


@pytest.mark.parametrize("ending", ["CONFIG = Small()", "def config():\n    return Small()"])
def test_configuration_files(tmp_path, ending):
    path = tmp_path / "small.py"
    path.write_text(f"from __future__ import annotations\n{BODY}\n{ending}\n")
    assert load_config(path, ["steps=4"]).steps == 4
    assert load_config(str(path)).steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1", "neither config"), ("CONFIG = {'a': 1}", "dataclass instance, found dict"), (None, "no such")],
)
def test_unusable_configuration_files(tmp_path, text, message):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_comes_back_from_its_json(path):
    config = load_config(path)
    assert from_json(type(config), to_json(config)) == config


@dataclass(frozen=True)
class Spoken:
    rate: Annotated[float, "step size of the optimiser"] = 0.5
    plain: int = 1


def test_a_field_s_sentence_is_shown_beside_its_value_and_changes_nothing_else():
    assert describe(Spoken()).splitlines() == ["Spoken", "  rate  = 0.5  # step size of the optimiser", "  plain = 1"]
    assert from_json(Spoken, to_json(apply_overrides(Spoken(), ["rate=2"]))) == Spoken(2.0)
