"""Files that ship with the package: the tokenizer's table, and small models of the people world."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PEOPLE = "people"  # takes the place of a path to a pipeline, a pose network or an image encoder


def shipped(name: str) -> Path:
    """A file or folder of `fairhuman_jax/assets`."""
    return Path(str(resources.files("fairhuman_jax") / "assets" / name))


def or_shipped(path: str | Path, name: str) -> str | Path:
    """`path` itself, or the asset `name` where it is "people"."""
    return shipped(name) if str(path) == PEOPLE else path
