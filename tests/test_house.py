"""House rules that a reader of the source can check: sizes of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for part in ("fairhuman_jax", "configs", "benchmarks", "tools", "tests")
    for path in (ROOT / part).rglob("*.py")
)
MOST_LINES, MOST_OF_FUNCTION = 400, 60


def long_functions(text: str) -> list[str]:
    """Names of functions of more than `MOST_OF_FUNCTION` lines, from `def` to their last line."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node.name for node in found if (node.end_lineno or 0) - node.lineno + 1 > MOST_OF_FUNCTION]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert long_functions(text) == []


def test_a_long_function_is_found():
    body = "\n".join("    x = 1" for _ in range(60))
    assert long_functions(f"def short():\n    pass\n\n\ndef long():\n{body}\n") == ["long"]
