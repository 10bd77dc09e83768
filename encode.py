"""Encodes pictures and captions before a training: `python encode.py CONFIG FOLDER [--set key=value ...]`."""

from __future__ import annotations

from fairhuman_jax.doors import encode_door

if __name__ == "__main__":
    encode_door()
