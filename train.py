"""Trains what a configuration describes: `python train.py [CONFIG] [--set key=value ...] [--resume]`."""

from __future__ import annotations

from fairhuman_jax.doors import train_door

if __name__ == "__main__":
    train_door()
