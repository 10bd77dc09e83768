"""Dependency direction, read from the source, and an import that starts no device and loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fairhuman_jax

ROOT = Path(fairhuman_jax.__file__).parent
# A package may import those of its own layer and of the layers before it.
LAYERS = (
    ("config", "commands"),
    ("models", "losses", "diffusion"),
    ("weights", "data", "annotate"),
    ("systems",),
    ("training", "evaluation"),
    ("doors", "evaluate"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PURE = ("losses", "diffusion")


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, at any depth of its code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # within the file's own folder, so never to another part
                assert node.level <= len(path.relative_to(ROOT).parts) - 1, f"{path}: import from above its part"
                continue
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "fairhuman_jax" else [module]
    return found


def part(path: Path) -> str:
    """The top-level part of the package that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__")


def test_every_part_has_its_layer():
    assert {part(path) for path in FILES} <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    for name in imports(path):
        if name.startswith("fairhuman_jax."):
            imported = name.split(".")[1]
            assert RANK[imported] <= RANK[part(path)], f"{part(path)} imports {name}"
        elif part(path) in PURE:
            top = name.split(".")[0]
            assert top in ("jax", "numpy") or top in sys.stdlib_module_names, f"{part(path)} imports {name}"


@pytest.mark.parametrize("part", PURE)
def test_losses_and_diffusion_need_nothing_else_of_the_package(part):
    for path in (ROOT / part).rglob("*.py"):
        own = [name for name in imports(path) if name.startswith("fairhuman_jax.")]
        assert all(name.split(".")[1] == part for name in own)


def test_importing_starts_no_device_and_loads_no_torch():
    code = """
import sys
import fairhuman_jax, fairhuman_jax.losses, fairhuman_jax.diffusion
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
heavy = {"torch", "flax", "transformers", "orbax"} & set(sys.modules)
assert not heavy, heavy
import fairhuman_jax.models, fairhuman_jax.weights, fairhuman_jax.data, fairhuman_jax.systems.fairhuman
assert not xla_bridge._backends, "a backend was started"
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
