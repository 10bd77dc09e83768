"""Single-file checkpoints in the original (LDM) naming: recognised, read, written. FastComposer's are read here too."""

from __future__ import annotations

from fairhuman_jax.weights.ldm.reading import load_component, load_single_file, open_single_file
from fairhuman_jax.weights.ldm.writing import save_single_file

__all__ = ["load_component", "load_single_file", "open_single_file", "save_single_file"]
