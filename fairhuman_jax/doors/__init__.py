"""The command lines `train.py`, `sample.py` and `encode.py` (installed as fairhuman-train and so on)."""

from __future__ import annotations

from fairhuman_jax.doors.encode import encode_door
from fairhuman_jax.doors.sample import sample_door
from fairhuman_jax.doors.train import report, train_door

__all__ = ["encode_door", "report", "sample_door", "train_door"]
