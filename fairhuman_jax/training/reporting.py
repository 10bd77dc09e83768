"""What the loop measures and draws beside the training itself: speed, pictures, traces, runs that learn nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from fairhuman_jax.contract import PreviewConfig, System
from fairhuman_jax.data.loader import BatchIterator
from fairhuman_jax.data.preview import overlay, sheet
from fairhuman_jax.devices.sharding import WHOLE
from fairhuman_jax.training.logging import read_metrics

PyTree = Any
SKIPPED_IN_A_ROW = 20


class Clock:
    """Steps a second, without the first (compilation) and without pauses."""

    def __init__(self) -> None:
        self._ticks, self._seconds, self._since = 0, 0.0, None

    def tick(self) -> None:
        """One step is done."""
        now = time.monotonic()
        if self._since is not None:
            self._ticks += 1
            self._seconds += now - self._since
        self._since = now

    def pause(self) -> None:
        """What follows up to the next tick is not counted."""
        self._since = None

    @property
    def ticks_per_second(self) -> float:
        """0 where nothing was timed."""
        return self._ticks / self._seconds if self._seconds else 0.0


class TraceWindow:
    """A trace of some steps by jax's profiler, in `folder`; `window` is (first step, number of steps) or None."""

    def __init__(self, folder: Path, window: tuple[int, int] | None) -> None:
        self._folder = folder
        self._first, self._count = window or (0, 0)
        self._open = False

    def begin(self, index: int) -> None:
        """To be called before step `index` is dispatched."""
        if not self._open and self._first <= index < self._first + self._count:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def end(self, done: int, result: PyTree) -> None:
        """To be called after step `done - 1`; the window's last one is waited for."""
        if self._open and done >= self._first + self._count:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was traced so far."""
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


class SkippedWatch:
    """Ends a run that learns nothing: `limit` steps in a row without a finite gradient."""

    def __init__(self, step: int, skipped: int, limit: int) -> None:
        self._step, self._skipped, self._limit = step, skipped, limit
        self._since = step

    def note(self, done: int, skipped: int) -> None:
        """`skipped` of the first `done` steps were skipped. Raises: ValueError once the limit is reached."""
        if skipped - self._skipped < done - self._step:
            self._since = done
        self._step, self._skipped = done, skipped
        if done - self._since >= self._limit:
            raise ValueError(
                f"nothing is learnt: no gradient of steps {self._since} to {done - 1} was finite; "
                "lower optimizer.learning_rate, or look for broken samples, or compute in a wider dtype"
            )


def make_previewer(
    system: System, config: PreviewConfig, mesh: Mesh, held_out: Mapping[str, np.ndarray], key: jax.Array
) -> Callable[[PyTree, PyTree], np.ndarray] | None:
    """`draw(trainable, frozen) -> contact sheet uint8 [H, W, 3]`: the same request each time; None: nothing to draw."""
    asked = system.preview(config, dict(held_out))
    if asked is None:
        return None
    request, titles = asked
    sample = jax.jit(system.sample, out_shardings=NamedSharding(mesh, WHOLE))

    def draw(trainable: PyTree, frozen: PyTree) -> np.ndarray:
        return np.asarray(sheet(np.asarray(sample(trainable, frozen, request, key)), titles))

    return draw


def first_batch(batches: BatchIterator, example: Mapping[str, np.ndarray]) -> Image.Image:
    """The next batch with its masks, left in its place; of `example` where training is on cached latents."""
    start = batches.get_state()
    batch = next(batches)
    batches.set_state(start)
    return overlay(batch if "image" in batch else example)


def before_and_after(output: Path, steps: int) -> Image.Image:
    """The first and the last preview, one above the other."""
    first, last = (Image.open(output / "images" / f"sample_{step:07d}.png") for step in (0, steps))
    both = Image.new("RGB", (first.width, first.height + last.height + 8), "white")
    both.paste(first, (0, 0))
    both.paste(last, (0, first.height + 8))
    return both


def mean_weights(metrics: Path, names: Sequence[str]) -> dict[str, float]:
    """Mean of each objective's weight over the logged steps; 0 where none was logged."""
    records = read_metrics(metrics)
    logged = {name: [record.get(f"weight/{name}") for record in records] for name in names}
    found = {name: [weight for weight in weights if weight is not None] for name, weights in logged.items()}
    return {name: float(np.mean(weights)) if weights else 0.0 for name, weights in found.items()}
