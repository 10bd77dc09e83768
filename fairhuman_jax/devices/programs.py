"""Traced programs that a second start finds again: tracing a UNet takes longer than drawing a small picture with it.

JAX keeps what it compiles (`kernels.keep_compiled_programs`), but traces and lowers a function to know which program to
look for. Here the lowered program is kept as well, under a description of everything that it was traced from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fairhuman_jax.kept import Undescribed, describe, kept

PyTree = Any
FOLDER = "programs"
OTHER_SETTINGS = ("jax_compilation_cache_dir",)  # of jax, which change no program


class KeptProgram:
    """`jax.jit(function)` whose lowered programs are kept on disk where `kernels.keep_compiled_programs` was called.

    function(*arguments) -> tree of arrays. It is described by its name and what `functools.partial` binds to it
    (`kept.describe`), so parameters must be arguments. Traced at every start, as by `jax.jit`, are: functions that have
    no description, arguments on several devices, and programs that `jax.export` refuses.
    """

    def __init__(self, function: Callable[..., PyTree]) -> None:
        self._function, self._jitted, self._programs = function, jax.jit(function), {}
        try:
            self._description: str | None = describe(function)
        except Undescribed:
            self._description = None

    def __call__(self, *arguments: PyTree) -> PyTree:
        """Runs the program of arguments with these shapes, dtypes and static fields."""
        leaves, structure = jax.tree.flatten(arguments)
        devices = {device for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
        if self._description is None or len(devices) != 1 or not jax.config.values["jax_compilation_cache_dir"]:
            return self._jitted(*arguments)
        key = (
            structure,
            tuple((np.shape(leaf), str(leaf.dtype), getattr(leaf, "weak_type", False)) for leaf in leaves),
        )
        if key not in self._programs:
            self._programs[key] = self._open(f"{key} {devices}", structure, leaves)
        return self._programs[key](*leaves)

    def _open(self, inputs: str, structure: Any, leaves: list[jax.Array]) -> Callable[..., PyTree]:
        """The program of such arguments, kept or traced now."""

        def flat(*leaves: jax.Array) -> PyTree:
            return self._function(*jax.tree.unflatten(structure, leaves))

        def make() -> bytes:
            return bytes(export.export(jax.jit(flat))(*leaves).serialize())

        settings = {name: getattr(jax.config, name, None) for name in jax.config.values if name not in OTHER_SETTINGS}
        inputs = "\n".join((str(self._description), inputs, str(settings), os.environ.get("XLA_FLAGS", "")))
        if " at 0x" in inputs:  # an object without a description of its content
            return jax.jit(flat)
        try:
            from jax import export

            return jax.jit(export.deserialize(bytearray(kept(FOLDER, inputs, make))).call)
        except (ImportError, NotImplementedError, TypeError, ValueError):
            return jax.jit(flat)
