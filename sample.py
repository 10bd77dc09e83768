"""Draws prompts: `python sample.py "a woman in a red shirt waving" [--lora PATH] [--seed N] ...`."""

from __future__ import annotations

from fairhuman_jax.doors import sample_door

if __name__ == "__main__":
    sample_door()
