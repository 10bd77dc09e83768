"""Command lines made of records of options: one option a field, with its sentence, default and range."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from fairhuman_jax.config import ConfigError, parse_value
from fairhuman_jax.fields import Field, OptionError, fields_of

POSITIONAL = "prompt"  # the field that takes what stands on a command line without a flag


class OneScreen(argparse.HelpFormatter):
    """Help with a line an option and no empty lines between groups."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=140)

    def format_help(self) -> str:
        """The help without the empty lines that separate groups."""
        return re.sub(r"\n\n+(?=\S)", "\n", super().format_help())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--flag VALUE`, the value once."""
        if not action.option_strings:
            return self._metavar_formatter(action, action.dest)(1)[0]
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return f"{', '.join(action.option_strings)}{value}"


def flag(name: str) -> str:
    """A field's name as a command line writes it."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, cls: Any) -> None:
    """Adds an option for each field of a record, in groups by the class that declares it; defaults stay unset."""
    groups: dict[type, Any] = {}
    for field in fields_of(cls):
        if field.owner not in groups:
            groups[field.owner] = parser.add_argument_group(field.owner.TITLE)
        group = groups[field.owner]
        if field.name == POSITIONAL:
            group.add_argument(POSITIONAL, nargs="*", metavar=POSITIONAL.upper(), help=field.sentence)
        elif field.kind is bool:
            group.add_argument(flag(field.name), action="store_true", default=None, help=field.sentence)
        else:
            group.add_argument(
                flag(field.name),
                action="append" if field.repeated else "store",
                type=_reader(field),
                choices=field.choices or None,
                metavar=_metavar(field),
                help=_help(field),
            )


def given(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The values of a record's fields that a command line gives, for `drawing.options.make_options`."""
    values: dict[str, Any] = {}
    for field in fields_of(cls):
        value = getattr(options, field.name, None)
        if value is None or value == []:
            continue
        numbers = field.repeated and field.item in (int, float)  # "--seed 1,2 --seed 5" gives three
        values[field.name] = tuple(number for part in value for number in part) if numbers else value
    return values


def flags_of(arguments: Sequence[str]) -> list[str]:
    """The flags on a command line, each without its value."""
    return [argument.split("=", 1)[0] for argument in arguments if re.match(r"--\w", argument)]


def worded(error: Exception) -> str:
    """An error's message with fields spelled as flags."""
    return error.worded(flag) if isinstance(error, OptionError) else str(error)


def _reader(field: Field) -> Callable[[str], Any]:
    """Text -> a value of the field, or one of its items."""
    kind = tuple[field.item, ...] if field.repeated and field.item in (int, float) else field.item

    def read(text: str) -> Any:
        try:
            return field.form.read(text) if field.form else parse_value(text, kind)
        except ConfigError:
            shown = "7 or 7,8,21" if field.repeated else "a whole number" if field.item is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: write {shown}") from None
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _metavar(field: Field) -> str:
    shown = {int: "N", float: "X", str: "NAME"}.get(field.item, "FILE")
    return field.metavar or shown


def _help(field: Field) -> str:
    """The sentence with choices, default and range."""
    notes = []
    if field.choices:
        notes.append(", ".join(field.choices))
    if field.default not in (None, ()) and "default" not in field.sentence:
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        notes.append(f"default {default}")
    if field.range is not None:
        notes.append(str(field.range))
    sentence, end = field.sentence, ")"
    if notes and sentence.endswith(end):
        sentence, notes = sentence[:-1], ["", *notes]
        return f"{sentence}{'; '.join(notes)}{end}".replace("%", "%%")
    return (f"{sentence} ({'; '.join(notes)})" if notes else sentence).replace("%", "%%")
