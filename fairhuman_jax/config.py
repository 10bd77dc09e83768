"""Configurations: frozen dataclasses written in short Python files, changed with `a.b=c`, stored as JSON.

A configuration file defines `config() -> Config` or `CONFIG`, where Config is any frozen dataclass, nested at
will. Nothing is registered by name: which system or data set runs is the class of the object that the file
builds.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fairhuman_jax.fields import fields_of

C = TypeVar("C")
_TYPE = "type"
SHOWN = 24  # characters of a value up to which notes stay aligned
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ConfigError(ValueError):
    """A configuration that cannot be used; one line that says where and what would be right."""


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """The configuration of a Python file, with `overrides` ("a.b=c") applied in order.

    Raises: ConfigError when there is no such file, neither `config()` nor `CONFIG` in it, an unknown key, a wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    spec = importlib.util.spec_from_file_location(f"fairhuman_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: a configuration is a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses that the file itself defines look their module up
    spec.loader.exec_module(module)
    if hasattr(module, "config"):
        config = module.config()
    elif hasattr(module, "CONFIG"):
        config = module.CONFIG
    else:
        raise ConfigError(f"{path}: defines neither config() nor CONFIG")
    if not _is_config(config):
        raise ConfigError(f"{path}: the configuration must be a dataclass instance, found {type(config).__name__}")
    return apply_overrides(config, overrides)


def apply_overrides(config: C, overrides: Iterable[str]) -> C:
    """A copy of `config` with each "a.b=c" applied; values are read by the field's declared type."""
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {text}: write it as key=value, for instance optimizer.learning_rate=1e-4")
        config = _replace(config, key.strip().split("."), value.strip(), key.strip())
    return config


def _replace(config: Any, names: Sequence[str], value: str, key: str) -> Any:
    hints = _hints(type(config))
    name, *rest = names
    if name not in hints:
        raise ConfigError(f"--set {key}: {_unknown(name, type(config))}")
    current = getattr(config, name)
    if not rest:
        new = _parse(value, hints[name], key)
    elif _is_config(current):
        new = _replace(current, rest, value, key)
    else:
        raise ConfigError(f"--set {key}: {name} is {current!r} and has no fields")
    try:
        return dataclasses.replace(config, **{name: new})
    except (ValueError, TypeError) as error:  # the dataclass's own checks
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--set {key}={value}: {error}") from None


def _unknown(name: str, cls: type) -> str:
    valid = list(_hints(cls))
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(close)}?" if close else ";"
    return f"{cls.__name__} has no {name!r}{meant} It has: {', '.join(valid)}"


# -- values --------------------------------------------------------------------------------------------------


def _parse(text: str, hint: Any, key: str) -> Any:
    """Text of the command line -> a value of the declared type."""
    try:
        return parse_value(text, hint)
    except ConfigError:
        raise ConfigError(f"--set {key}={text}: needs {_name(hint)}") from None


def parse_value(text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`. Raises: ConfigError when it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first(text, sorted(arguments, key=_preference))
    if origin is typing.Literal:
        return _first(text, [type(option) for option in arguments], allowed=arguments)
    if hint is type(None) and text.lower() in ("none", "null"):
        return None
    if hint is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    if hint in (int, float):
        return _number(text, hint)
    if hint is str:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if hint is Path:
        return Path(text)
    if isinstance(hint, type) and issubclass(hint, enum.Enum) and text in hint.__members__:
        return hint[text]
    if (origin or hint) in (tuple, list):
        return _sequence(text, origin or hint, arguments)
    if hint is Any or (origin or hint) in (dict, Mapping):
        return _python(text, dict if hint is not Any else object)
    raise ConfigError(text)


def _preference(hint: Any) -> int:
    """Narrow types first, so that `none` and `3` do not become strings in `str | int | None`."""
    order = [type(None), bool, int, float]
    return order.index(hint) if hint in order else len(order) + (hint in (str, Path, Any))


def _first(text: str, hints: Iterable[Any], allowed: Sequence[Any] | None = None) -> Any:
    for hint in hints:
        try:
            value = parse_value(text, hint)
        except ConfigError:
            continue
        if allowed is None or any(value == option and type(value) is type(option) for option in allowed):
            return value
    raise ConfigError(text)


def _number(text: str, kind: type) -> int | float:
    try:
        return kind(text.replace("_", ""))
    except ValueError:
        if kind is int:  # 1e5 is a whole number to everybody but Python
            value = _number(text, float)
            if value == value // 1:
                return int(value)
        raise ConfigError(text) from None


def _sequence(text: str, kind: Any, arguments: tuple[Any, ...]) -> Any:
    """`(1, 2)`, `[1, 2]`, `1,2` or `` -> tuple or list."""
    if kind is list:
        arguments = (*arguments, ...) if arguments else (Any, ...)
    if not arguments:
        arguments = (Any, ...)
    if arguments[-1] is ... and typing.get_origin(arguments[0]) not in (tuple, list):
        inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        parts = [part.strip() for part in inner.split(",") if part.strip()]
        return kind(parse_value(part, arguments[0]) for part in parts)
    values = _python(text if text[:1] in "([" else f"({text},)", (tuple, list))
    return kind(_decode(list(values), kind.__class_getitem__(arguments), "value"))


def _python(text: str, kind: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(value, kind):
        raise ConfigError(text)
    return value


# -- storing -------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of JSON values; each dataclass carries its class name under "type"."""
    return _encode(config, type(config).__name__)


def to_json(config: Any) -> str:
    """Indented JSON text of a configuration, to be stored with a checkpoint."""
    return json.dumps(to_dict(config), indent=2)


def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """The configuration that `to_dict` wrote; classes are the field types of `cls` and their subclasses.

    Raises: ConfigError for an unknown key, an unknown class or a wrong type.
    """
    return _decode(values, cls, cls.__name__)


def from_json(cls: type[C], text: str) -> C:
    """The configuration that `to_json` wrote."""
    return from_dict(cls, json.loads(text))


def _encode(value: Any, where: str) -> Any:
    if _is_config(value):
        fields = {name: _encode(getattr(value, name), f"{where}.{name}") for name in _hints(type(value))}
        return {_TYPE: type(value).__name__} | fields
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_encode(item, where) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{where}.{key}") for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{where}: a {type(value).__name__} cannot be stored; use numbers, text, tuples and dataclasses")


def _decode(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and _TYPE in value:
        return _decode_config(value, hint, where)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(arguments, key=_preference):
            try:
                return _decode(value, option, where)
            except ConfigError:
                continue
    elif origin is typing.Literal and value in arguments:
        return value
    elif (origin or hint) in (tuple, list) and isinstance(value, (list, tuple)):
        kind: Any = origin or hint
        if kind is tuple and arguments and arguments[-1] is not ...:
            if len(arguments) == len(value):
                return tuple(_decode(v, h, where) for v, h in zip(value, arguments, strict=True))
        else:
            return kind(_decode(item, arguments[0] if arguments else Any, where) for item in value)
    elif (origin or hint) in (dict, Mapping) and isinstance(value, Mapping):
        item_hint = arguments[1] if arguments else Any
        return {key: _decode(item, item_hint, f"{where}.{key}") for key, item in value.items()}
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum) and value in hint.__members__:
        return hint[str(value)]
    elif hint is Any or (hint is float and type(value) is int) or (hint in (bool, int, str) and type(value) is hint):
        return float(typing.cast(Any, value)) if hint is float else value
    elif hint in (float, type(None)) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: needs {_name(hint)}, found {value!r}")


def _decode_config(value: Mapping[str, Any], hint: Any, where: str) -> Any:
    classes = {cls.__name__: cls for cls in _classes(hint)}
    if value[_TYPE] not in classes:
        raise ConfigError(f"{where}: unknown class {value[_TYPE]!r}; known here: {', '.join(classes) or 'none'}")
    cls = classes[value[_TYPE]]
    hints = _hints(cls)
    for name in value:
        if name != _TYPE and name not in hints:
            raise ConfigError(f"{where}: {_unknown(name, cls)}")
    fields = {name: _decode(item, hints[name], f"{where}.{name}") for name, item in value.items() if name != _TYPE}
    return cls(**fields)


def _classes(hint: Any) -> Iterator[type]:
    """Dataclasses that a field of this type may hold."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            yield from _classes(option)
    elif isinstance(hint, type):
        if dataclasses.is_dataclass(hint):
            yield hint
        for child in hint.__subclasses__():
            yield from _classes(child)


def differences(first: Any, second: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the first, value in the second) of each leaf where two results of `to_dict` differ.

    A key that one of them lacks has the value None there, so a field that is new at its default None is no difference.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for name in dict.fromkeys((*first, *second)):
            yield from differences(first.get(name), second.get(name), f"{key}.{name}".lstrip("."))
    elif first != second:
        yield key, first, second


# -- showing -------------------------------------------------------------------------------------------------


def describe(config: Any) -> str:
    """One aligned line a value, keys as `--set` takes them, each with what its field says."""
    rows = list(_leaves(config, ""))
    width = max((len(key) for key, *_ in rows), default=0)
    values = max((len(value) for _, value, _ in rows if len(value) <= SHOWN), default=0)
    lines = [f"  {key:<{width}} = {value:<{values}}  {note and '# ' + note}".rstrip() for key, value, note in rows]
    return "\n".join([type(config).__name__, *lines])


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    notes = {field.name: field.sentence for field in fields_of(type(config))}
    for name in _hints(type(config)):
        value = getattr(config, name)
        if _is_config(value):
            yield f"{prefix}{name}", type(value).__name__, notes[name]
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", repr(value), notes[name]


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _hints(cls: type) -> dict[str, Any]:
    """Field name -> type of the fields that the constructor takes, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    if hint is bool:
        return "true or false"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"its fields set one by one (a {hint.__name__})"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
