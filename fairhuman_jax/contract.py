"""What the trainer needs of a system (docs/design.md, section 3); nothing in the trainer knows which one runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

PyTree = Any
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn while training: the same prompts, seeds and settings each time. Without prompts, none."""

    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 30
    guidance: float = 3.0


class System(Protocol):
    """A frozen record with four members for training and sampling, and three for the doors."""

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """The trees (trainable, frozen)."""
        ...

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """A tree of floating arrays: all that the objectives need."""
        ...

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """K named scalar losses, each a mean over the batch, in a fixed order."""
        ...

    def sample(self, trainable: PyTree, frozen: PyTree, request: Any, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] for a request of one shape."""
        ...

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions -> the integer arrays that a batch carries for them."""
        ...

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[Any, list[str]] | None:
        """A request for `sample` and a title for each of its images; None where there is nothing to draw."""
        ...

    def export(self, trainable: PyTree, frozen: PyTree, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes what was trained in the format that other programs read; returns the file or folder.

        `held_out` is a batch for statistics that such a format stores.
        """
        ...


class SystemConfig(Protocol):
    """A configuration that builds a system; reads files, so errors about them come from here."""

    def build(self) -> System: ...


def sample_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """One key a sample, by its `position` in the global batch: how a batch is split changes no random number."""
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(batch["position"])


def check_fixed(config: Any, fixed: dict[str, Any]) -> None:
    """What compat="reference" fixes must be at that value or at its default. Errors: an option that is at a third."""
    defaults = {option.name: option.default for option in fields(config)}
    for name, value in fixed.items():
        if getattr(config, name) not in (value, defaults[name]):
            raise ValueError(f"compat='reference' fixes {name} = {value!r}, but it is {getattr(config, name)!r}")
