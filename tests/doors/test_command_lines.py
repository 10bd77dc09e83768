"""Command lines made of records: one screen of help, foreign options, values that cannot be read."""

from __future__ import annotations

import pytest

from fairhuman_jax.doors import sample_door
from fairhuman_jax.doors.options import flag
from fairhuman_jax.fields import fields_of
from fairhuman_jax.systems.registry import PIPELINES, pipeline_class


@pytest.mark.parametrize("name", PIPELINES)
def test_help_is_one_screen_with_a_sentence_for_each_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        sample_door(["--system", name, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and len(out.splitlines()) <= 50
    for field in fields_of(pipeline_class(name).Options):
        shown = field.name.upper() if field.name == "prompt" else flag(field.name)
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [shown])
        assert field.sentence and " ".join(field.sentence.split()[:3]) in line


def test_help_shows_the_options_of_one_system_alone(capsys):
    shown = {}
    for name in PIPELINES:
        with pytest.raises(SystemExit):
            sample_door(["--system", name, "--help"])
        shown[name] = capsys.readouterr().out
    assert "--pose" in shown["humansd"] and "--pose" not in shown["text"] + shown["facediffuser"]
    assert "--reference" in shown["facediffuser"] and "--reference" not in shown["text"] + shown["humansd"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "--system", "gan"], "system 'gan' is not known; known: text, humansd, facediffuser"),
        (["a", "--system", "text", "--pose", "x"], "--pose needs --system humansd; this is --system text"),
        (["a", "--system", "facediffuser", "--lora", "x"], "--lora needs --system text or humansd"),
        (["a", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["a", "--steps", "many"], "argument --steps: 'many': write a whole number"),
        (["a", "--seed", "1,x"], "argument --seed: '1,x': write 7 or 7,8,21"),
        (["a", "--guidance", "nan"], "--guidance nan: it must be a finite number"),
        (["a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["a", "--batch", "-1"], "--batch -1: at least 1"),
    ],
)
def test_a_command_line_that_cannot_be_followed_is_refused_in_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        sample_door(arguments)
    assert stop.value.code == 2 and expected in capsys.readouterr().err.strip().splitlines()[-1]
