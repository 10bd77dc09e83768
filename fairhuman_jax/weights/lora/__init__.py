"""LoRA files: read in every usual dialect, written in diffusers' and kohya's."""

from __future__ import annotations

from fairhuman_jax.weights.lora.reading import load_lora, load_loras
from fairhuman_jax.weights.lora.writing import save_lora

__all__ = ["load_lora", "load_loras", "save_lora"]
