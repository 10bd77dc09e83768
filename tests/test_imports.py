"""Dependency direction, read from the source, and an import that starts no device and loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fairhuman_jax

ROOT = Path(fairhuman_jax.__file__).parent
# The rooms of the package from the ground up; a room may import itself, its neighbours in a row and the rows below.
ROOMS = (
    ("commands", "config", "contract", "fields", "files", "kept", "lazy", "packages", "resizing"),
    ("devices", "diffusion", "losses", "models"),
    ("weights",),
    ("keypoints",),
    ("bases", "data"),
    ("annotate",),
    ("drawing", "evaluate", "training"),
    ("systems",),
    ("doors",),
)
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
PURE = {"losses": {"losses", "resizing"}, "diffusion": {"diffusion"}}
MODULES = {
    ".".join(part for part in path.relative_to(ROOT.parent).with_suffix("").parts if part != "__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at any depth of its code, TYPE_CHECKING blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
    return found


def room(module: str) -> str:
    """The room of the package that a module belongs to; the package itself has none."""
    return ([*module.split("."), ""])[1]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other by imports (strongly connected components of two or more modules)."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph[module]
        reached[start] = seen
    groups = {frozenset(other for other in reached[m] if m in reached[other]) for m in graph if m in reached[m]}
    return [sorted(group) for group in groups]


def test_every_room_has_its_rank():
    assert {room(module) for module in MODULES if room(module)} == set(RANK)


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_imports_point_downwards(module):
    for name in imports(MODULES[module]):
        if name.startswith("fairhuman_jax."):
            assert RANK[room(name)] <= RANK[room(module)], f"{module} imports {name}"
        elif room(module) in PURE:
            top = name.split(".")[0]
            assert top in ("jax", "numpy") or top in sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize("pure", PURE)
def test_losses_and_diffusion_need_nothing_else_of_the_package(pure):
    for module, path in MODULES.items():
        if room(module) == pure:
            assert {room(name) for name in imports(path) if name.startswith("fairhuman_jax.")} <= PURE[pure]


def test_no_circle_of_files():
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    assert circles(graph) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}) == [["a", "b", "c"]]


def test_importing_starts_no_device_and_loads_no_torch():
    code = """
import sys
import fairhuman_jax, fairhuman_jax.losses, fairhuman_jax.diffusion
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
heavy = {"torch", "flax", "transformers", "orbax"} & set(sys.modules)
assert not heavy, heavy
import fairhuman_jax.models, fairhuman_jax.weights, fairhuman_jax.data, fairhuman_jax.systems.fairhuman.system
assert not xla_bridge._backends, "a backend was started"
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
