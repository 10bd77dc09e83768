"""What a start of `sample.py` imports, and that a second one finds its programs, wherever the source lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fairhuman_jax

ROOT = Path(fairhuman_jax.__file__).parent.parent
CODE = """
import sys
from fairhuman_jax.doors import sample_door
sample_door(["a woman waving", "--steps", "1", "--output", sys.argv[1]])
heavy = {"torch", "tensorboardX", "orbax", "grain", "tensorflow_datasets", "transformers", "tensorflow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def draw(root: Path, cache: Path, output: Path) -> bytes:
    """Draws one picture in a process of its own with the source in `root`."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(output)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    (path,) = output.iterdir()
    return path.read_bytes()


def test_a_moved_source_finds_its_compiled_programs_and_imports_nothing_heavy(tmp_path):
    first = draw(ROOT, tmp_path / "cache", tmp_path / "first")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    names = {path.parent.name for path in kept}
    assert names == {"xla", "programs", "shapes"}, names
    shutil.copytree(ROOT / "fairhuman_jax", tmp_path / "moved" / "fairhuman_jax")
    assert draw(tmp_path / "moved", tmp_path / "cache", tmp_path / "second") == first
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert again == kept
