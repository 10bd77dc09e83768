"""The default run, which `train.py` takes without a configuration: a fair LoRA on the shipped people model.

python train.py
"""

from __future__ import annotations

from fairhuman_jax.doors.default_run import config

__all__ = ["config"]
