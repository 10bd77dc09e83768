"""Results of slow computations on the host, kept in the user's cache folder and found again by their inputs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_dir

from fairhuman_jax.files import replacing

PACKAGE = Path(__file__).parent
CHECKSUM = hashlib.sha256().digest_size  # bytes that a file begins with
LIBRARIES = ("jax", "jaxlib", "flax", "numpy")
NOT_INPUTS = ("params", "tokenizers", "parent")  # fields: arguments of compiled programs, host objects, flax's own
TYPES = ("builtins", "numpy", "jax.numpy")  # modules whose types are known by name


class Undescribed(TypeError):
    """A value that has no description of its content, as a function with a closure."""


def kept(kind: str, inputs: str, make: Callable[[], bytes]) -> bytes:
    """`make()`, or what it gave before for the same inputs with the same source of the package and its libraries.

    kind: the name of a folder in the user's cache folder. A folder that cannot be written keeps nothing; a file that is
    not whole is made again.
    """
    key = hashlib.sha256("\n".join((source_digest(), inputs)).encode()).hexdigest()
    path = Path(user_cache_dir("fairhuman_jax")) / kind / key
    with suppress(OSError):
        checksum, content = (whole := path.read_bytes())[:CHECKSUM], whole[CHECKSUM:]
        if hashlib.sha256(content).digest() == checksum:
            return content
    content = make()
    with suppress(OSError), replacing(path) as file:
        file.write(hashlib.sha256(content).digest() + content)
    return content


@functools.cache
def source_digest() -> str:
    """sha256 of the package's Python files and of its libraries' versions; the folder's own name does not count."""
    digest = hashlib.sha256(" ".join(f"{name} {version(name)}" for name in LIBRARIES).encode())
    for folder, folders, names in os.walk(PACKAGE):
        folders.sort()
        for name in sorted(name for name in names if name.endswith(".py")):
            path = Path(folder) / name
            digest.update(f"{path.relative_to(PACKAGE)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def describe(value: Any) -> str:
    """A text that is the same for values of the same content, and for no others.

    Covers numbers, texts, containers, numpy arrays, dtypes, records (dataclasses and flax modules, without the fields
    `NOT_INPUTS`), and functions and methods of this package without a closure, bound by `functools.partial` or not.
    Raises: Undescribed for anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.dtype, np.generic)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple)):
        return f"{_name(type(value))}[{','.join(map(describe, value))}]"
    if isinstance(value, Mapping):
        return f"map{{{','.join(f'{describe(key)}:{describe(value[key])}' for key in sorted(value))}}}"
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)},{describe(value.args)},{describe(value.keywords)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.name not in NOT_INPUTS]
        return f"{_name(type(value))}({','.join(f'{name}={describe(getattr(value, name))}' for name in fields)})"
    if inspect.ismethod(value):
        return f"{_name(value)} of {describe(value.__self__)}"
    if callable(value):
        return _name(value)
    raise Undescribed(f"{type(value).__name__} {value!r:.60}")


def _name(value: Any) -> str:
    """The dotted name of a class or function that can be known by it."""
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "<none>")
    ours = module.split(".")[0] == __package__ or (
        isinstance(value, type) and module in ("builtins", "jax.numpy", "numpy")
    )
    if not ours or "<" in name:
        raise Undescribed(f"{module}.{name}")
    return f"{module}.{name}"
