"""The command lines `train.py`, `sample.py` and `encode.py` (installed as fairhuman-train and so on)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairhuman_jax.lazy import lazy_names

if TYPE_CHECKING:
    from fairhuman_jax.doors.encode import encode_door
    from fairhuman_jax.doors.sample import sample_door
    from fairhuman_jax.doors.train import report, train_door

__all__ = ["encode_door", "report", "sample_door", "train_door"]

__getattr__ = lazy_names(__name__, {"encode": "encode_door", "sample": "sample_door", "train": "report train_door"})
