"""What fields say of themselves, and values that are not what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from fairhuman_jax.fields import Choice, Metavar, OptionError, Range, Unrecorded, check_fields, fields_of


@dataclass(frozen=True)
class First:
    steps: Annotated[int, "number of steps", Range(1)] = 40
    picture: Annotated[Path | bytes | None, "a picture", Metavar("IMAGE")] = None


@dataclass(frozen=True)
class Second(First):
    steps: Annotated[int, "number of steps of the other kind", Range(1, 9)] = 5
    scales: Annotated[tuple[float, ...], "strengths", Range(0)] = ()
    rule: Annotated[str | None, "rule", Choice(("a", "b"))] = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    file: Annotated[Path | None, "a file", Unrecorded()] = None

    def __post_init__(self) -> None:
        check_fields(self)


def test_fields_say_their_sentence_kind_and_owner():
    found = {field.name: field for field in fields_of(Second)}
    assert list(found) == ["steps", "picture", "scales", "rule", "dtype", "file"]
    steps, picture, scales = found["steps"], found["picture"], found["scales"]
    assert (steps.sentence, steps.default, str(steps.range)) == ("number of steps of the other kind", 5, "1 to 9")
    assert steps.owner is First and scales.owner is Second
    assert (picture.kind, picture.optional, picture.metavar) == (Path, True, "IMAGE")
    assert scales.repeated and scales.item is float and not steps.repeated
    assert found["dtype"].choices == ("float32", "bfloat16") and found["rule"].choices == ("a", "b")
    assert found["rule"].recorded and not found["file"].recorded


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps 0: 1 to 9"),
        ({"steps": 10}, "steps 10: 1 to 9"),
        ({"scales": (1.0, -1.0)}, "scales -1.0: at least 0"),
        ({"scales": (math.nan,)}, "scales nan: at least 0"),
        ({"scales": (math.inf,)}, "scales inf: it must be a finite number"),
        ({"rule": "c"}, "rule 'c': known: a, b"),
        ({"dtype": "float64"}, "dtype 'float64': known: float32, bfloat16"),
    ],
)
def test_values_outside_are_refused(values, message):
    with pytest.raises(OptionError) as error:
        Second(**values)
    assert str(error.value) == message and error.value.field == next(iter(values))


def test_a_message_takes_the_spelling_of_its_reader():
    error = OptionError("mask", "{mask} needs {init_image}")
    assert str(error) == "mask needs init_image"
    assert error.worded(lambda name: "--" + name.replace("_", "-")) == "--mask needs --init-image"
