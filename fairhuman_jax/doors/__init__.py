"""The two command lines: `train.py` and `sample.py` (installed as fairhuman-train and fairhuman-sample)."""

from __future__ import annotations

from fairhuman_jax.doors.sample import sample_door
from fairhuman_jax.doors.train import report, train_door

__all__ = ["report", "sample_door", "train_door"]
