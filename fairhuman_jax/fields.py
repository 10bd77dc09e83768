"""What a record's fields say of themselves: a sentence, a range, choices; command lines and forms are made of it.

A field of a frozen dataclass is annotated as `steps: Annotated[int, "number of sampling steps", Range(1)] = 40`. The
sentence is its help text; `check_fields` holds a value against the rest.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class OptionError(ValueError):
    """An option that cannot be used.

    `field` names the field. The message names it and other fields in braces, as in "{mask} needs {init_image}": a
    command line puts its own spelling there (`worded`), str() the fields' names.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field, self.message = field, message
        super().__init__(self.worded(str))

    def worded(self, spell: Callable[[str], str]) -> str:
        """The message with each field's name as `spell` writes it."""
        return re.sub(r"\{(\w+)\}", lambda match: spell(match[1]), self.message)


@dataclass(frozen=True)
class Range:
    """The least and the most that a number may be; None is no bound. NaN is outside of every range."""

    least: float | None = None
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        low = -math.inf if self.least is None else self.least
        return low <= value <= (math.inf if self.most is None else self.most)

    def __str__(self) -> str:
        if self.most is None:
            return f"at least {self.least}"
        return f"at most {self.most}" if self.least is None else f"{self.least} to {self.most}"


@dataclass(frozen=True)
class Choice:
    """The texts that a field may be."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """How a command line writes a value: `read` turns the text into it and raises ValueError; `metavar` shows it."""

    read: Callable[[str], Any]
    metavar: str


@dataclass(frozen=True)
class Metavar:
    """What stands for the value in a command line's help."""

    text: str


@dataclass(frozen=True)
class Unrecorded:
    """Marks a field that a picture's recipe leaves out: it says how a request was given, not what was drawn."""


@dataclass(frozen=True)
class Field:
    """One field of a record. `owner`: the class that declares it; `kind`: its type without None and Annotated."""

    name: str
    kind: Any
    owner: type
    default: Any
    sentence: str = ""
    optional: bool = False
    range: Range | None = None
    choices: tuple[str, ...] = ()
    form: Form | None = None
    metavar: str | None = None
    recorded: bool = True

    @property
    def repeated(self) -> bool:
        """Whether the value is a tuple of any length."""
        return typing.get_origin(self.kind) is tuple and typing.get_args(self.kind)[-1] is ...

    @property
    def item(self) -> Any:
        """The type of a repeated field's items, or the field's own type."""
        return _plain(typing.get_args(self.kind)[0])[0] if self.repeated else self.kind


def fields_of(record: Any) -> list[Field]:
    """The fields of a dataclass (or of an instance of one) in the order of its constructor."""
    cls = record if isinstance(record, type) else type(record)
    hints = typing.get_type_hints(cls, include_extras=True)
    return [_field(field, hints[field.name], _owner(cls, field.name)) for field in dataclasses.fields(cls)]


def check_fields(record: Any) -> None:
    """Holds every number against its range and every text against its choices; None is always right.

    Raises: OptionError for the first field that is wrong.
    """
    for field in fields_of(record):
        value = getattr(record, field.name)
        for item in value if field.repeated else (value,):
            if item is None:
                continue
            if field.range is not None and item not in field.range:
                raise OptionError(field.name, f"{{{field.name}}} {item}: {field.range}")
            if isinstance(item, float) and not math.isfinite(item):
                raise OptionError(field.name, f"{{{field.name}}} {item}: it must be a finite number")
            if field.choices and item not in field.choices:
                raise OptionError(field.name, f"{{{field.name}}} {item!r}: known: {', '.join(field.choices)}")


def _field(field: dataclasses.Field, hint: Any, owner: type) -> Field:
    kind, extras = _unwrapped(hint)
    kind, optional = _plain(kind)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    found: dict[str, Any] = {}
    if typing.get_origin(kind) is typing.Literal:
        found["choices"], kind = typing.get_args(kind), str
    for extra in extras:
        found |= _said(extra)
    return Field(field.name, kind, owner, default, optional=optional, **found)


def _plain(kind: Any) -> tuple[Any, bool]:
    """(the type that a command line reads among the options of a union, whether None is one of them)."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    return (Path if Path in options else options[0]), len(options) < len(typing.get_args(kind))


def _said(extra: Any) -> dict[str, Any]:
    """What one annotation says of a field."""
    if isinstance(extra, str):
        return {"sentence": extra}
    if isinstance(extra, Range):
        return {"range": extra}
    if isinstance(extra, Choice):
        return {"choices": extra.values}
    if isinstance(extra, Form):
        return {"form": extra, "metavar": extra.metavar}
    if isinstance(extra, Metavar):
        return {"metavar": extra.text}
    return {"recorded": False} if isinstance(extra, Unrecorded) else {}


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(type, annotations) of `Annotated[type, ...]`, or the type alone."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *extras = typing.get_args(hint)
        return kind, tuple(extras)
    return hint, ()


def _owner(cls: type, name: str) -> type:
    """The class among `cls` and its bases that declares a field first, so that a subclass may change its default."""
    return next(base for base in reversed(cls.__mro__) if name in inspect.get_annotations(base))
