"""The training loop of every system, read top to bottom: prepare, measure, train, measure again, export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from fairhuman_jax.config import to_dict
from fairhuman_jax.data.loader import BatchIterator
from fairhuman_jax.data.preview import overlay
from fairhuman_jax.evaluation.held_out import make_held_out_losses
from fairhuman_jax.systems.contract import PreviewConfig, System
from fairhuman_jax.training.checkpoint import Checkpointer
from fairhuman_jax.training.config import RunConfig
from fairhuman_jax.training.datasets import held_out_batches, open_data, training_batches
from fairhuman_jax.training.logging import RunLogger, read_metrics
from fairhuman_jax.training.objectives import objective_names
from fairhuman_jax.training.sharding import make_mesh, replicate, shard_batch
from fairhuman_jax.training.state import TrainState, init_state, make_optimizer
from fairhuman_jax.training.step import make_train_step

PyTree = Any


@dataclass(frozen=True)
class Result:
    """What a finished run reports: held-out losses, mean weights of the objectives, speed, files."""

    before: dict[str, float]
    after: dict[str, float]
    weights: dict[str, float]
    images_per_second: float
    skipped: int
    exported: Path
    picture: Path


@dataclass
class Run:
    """All parts of a run, made from its configuration; `state` is replaced step by step."""

    config: RunConfig
    names: tuple[str, ...]
    system: System
    mesh: jax.sharding.Mesh
    frozen: PyTree
    state: TrainState
    step: Callable
    batches: BatchIterator
    checkpoints: Checkpointer
    logger: RunLogger
    measure: Callable[[PyTree, PyTree], dict[str, float]]
    draw: Callable[[PyTree, PyTree], np.ndarray]
    example: Mapping[str, np.ndarray]

    def losses(self) -> dict[str, float]:
        """Held-out losses now, in the system's order."""
        losses = self.measure(self.state.averaged, self.frozen)
        return {name: losses[name] for name in self.names}

    def picture(self, step: int) -> None:
        """The preview now, filed under `step`."""
        self.logger.image(step, "sample", self.draw(self.state.averaged, self.frozen))
        self.logger.pause()

    def log(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Reads the metrics of one step from the device and files them."""
        if pending is not None:
            values = jax.device_get(pending[1])
            self.logger.log(pending[0], {name: float(value) for name, value in values.items()})


def prepare(config: RunConfig, *, resume: bool) -> Run:
    """Builds everything, reads the data and, on `resume`, the newest checkpoint; nothing is trained yet."""
    settings, output = config.train, Path(config.output)
    checkpoints = _open_checkpoints(output, settings.keep_checkpoints, resume=resume)

    # ---- system ----------------------------------------------------------------------------------------------------
    mesh = make_mesh(settings.fsdp)
    init_key, step_key, held_out_key, preview_key = jax.random.split(jax.random.key(settings.seed), 4)
    system = config.system.build()
    trainable, frozen = system.init(init_key)
    frozen = replicate(mesh, frozen)

    # ---- data ------------------------------------------------------------------------------------------------------
    training, held_out = open_data(config.data)
    batches = training_batches(training, system, config.data, settings, frozen)
    held_out_host = held_out_batches(held_out, system, config.data, settings.batch_size)
    held_out_device = [shard_batch(mesh, batch) for batch in held_out_host]

    # ---- state and step --------------------------------------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, settings.steps)
    state = init_state(trainable, optimizer, step_key, ema=settings.ema_decay is not None)
    state = replicate(mesh, state)
    if resume:
        state, position = checkpoints.restore(state)
        batches.set_state(position)

    names = objective_names(system, trainable, frozen, held_out_device[0])
    return Run(
        config=config,
        names=names,
        system=system,
        mesh=mesh,
        frozen=frozen,
        state=state,
        step=make_train_step(
            system,
            optimizer,
            mesh,
            config.fair,
            accumulate=settings.accumulate,
            clip_norm=config.optimizer.clip_norm,
            ema_decay=settings.ema_decay,
        ),
        batches=batches,
        checkpoints=checkpoints,
        logger=RunLogger(
            output,
            settings.steps,
            start_step=int(state.step),
            images_per_step=settings.batch_size,
            bar_keys=[f"{kind}/{name}" for kind in ("loss", "weight") for name in names],
            enabled=jax.process_index() == 0,
        ),
        measure=make_held_out_losses(system, held_out_device, held_out_key),
        draw=_previewer(system, config.preview, held_out_host[0], preview_key),
        example=held_out_host[0],
    )


def train(config: RunConfig, *, resume: bool = False) -> Result:
    """Runs `config` to its last step, on from its newest checkpoint when `resume`; results lie in `config.output`."""
    run = prepare(config, resume=resume)
    settings, output = config.train, Path(config.output)

    # ---- before ----------------------------------------------------------------------------------------------------
    first = int(run.state.step)
    if first == 0:
        (output / "config.json").write_text(json.dumps(to_dict(config), indent=1))
        _first_batch(run).save(output / "batch.png")
        (output / "before.json").write_text(json.dumps(run.losses()))
        run.picture(0)

    # ---- train -----------------------------------------------------------------------------------------------------
    pending, clock = None, Clock()
    for index in range(first, settings.steps):
        batch = shard_batch(run.mesh, next(run.batches))
        run.state, metrics = run.step(run.state, run.frozen, batch)
        # The metrics read here are those of the step before: the device has its next work before the host waits.
        run.log(pending)
        pending = (index, metrics) if index % settings.log_every == 0 else None
        clock.tick()
        done = index + 1
        if done == settings.steps or _due(done, settings.checkpoint_every):
            run.checkpoints.save(done, run.state, run.batches.get_state(), to_dict(config))
        if done < settings.steps and _due(done, settings.preview_every):
            run.picture(done)
            clock.pause()
    run.log(pending)
    jax.block_until_ready(run.state.step)
    clock.pause()

    # ---- after -----------------------------------------------------------------------------------------------------
    after = run.losses()
    run.picture(settings.steps)
    trained, frozen = jax.device_get((run.state.averaged, run.frozen))
    exported = run.system.export(trained, frozen, output / "export", dict(run.example))
    run.batches.close()
    run.checkpoints.close()
    run.logger.close()
    return Result(
        before=json.loads((output / "before.json").read_text()),
        after=after,
        weights=_mean_weights(output, run.names),
        images_per_second=clock.ticks_per_second * settings.batch_size,
        skipped=int(run.state.skipped),
        exported=exported,
        picture=_before_and_after(output, settings.steps),
    )


def _first_batch(run: Run) -> Image.Image:
    """Picture of the first training batch with its masks, or of a held-out one where training is on cached latents."""
    start = run.batches.get_state()
    batch = next(run.batches)
    run.batches.set_state(start)
    return overlay(batch if "image" in batch else run.example)


def _open_checkpoints(output: Path, keep: int, *, resume: bool) -> Checkpointer:
    """The run's checkpoints; refuses to write a new run over an old one, or to resume what does not exist."""
    checkpoints = Checkpointer(output / "checkpoints", keep=keep)
    if resume:
        checkpoints.newest()
    elif checkpoints.latest_step is not None:
        raise ValueError(
            f"{output} holds a run at step {checkpoints.latest_step}: --resume goes on with it, "
            "--set output=FOLDER starts another"
        )
    return checkpoints


def _previewer(
    system: System, config: PreviewConfig, held_out: Mapping[str, np.ndarray], key: jax.Array
) -> Callable[[PyTree, PyTree], np.ndarray]:
    """`draw(trainable, frozen) -> contact sheet uint8 [H, W, 3]`: the same request each time."""
    request, titles = system.preview(config, dict(held_out))
    sample = jax.jit(system.sample)

    def draw(trainable: PyTree, frozen: PyTree) -> np.ndarray:
        return np.asarray(sheet(np.asarray(sample(trainable, frozen, request, key)), titles))

    return draw


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


def sheet(images: np.ndarray, titles: list[str]) -> Image.Image:
    """Contact sheet of images [N, H, W, 3] in [-1, 1] with a title below each."""
    pixels = np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return overlay({"image": pixels}, titles)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _mean_weights(output: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Mean of each objective's weight over the logged steps."""
    records = read_metrics(output / "metrics.jsonl")
    weights = {name: [record[f"weight/{name}"] for record in records] for name in names}
    return {name: float(np.mean([w for w in values if w is not None])) for name, values in weights.items()}


def _before_and_after(output: Path, steps: int) -> Path:
    """The first and the last preview, one above the other."""
    first, last = (Image.open(output / "images" / f"sample_{step:07d}.png") for step in (0, steps))
    both = Image.new("RGB", (first.width, first.height + last.height + 8), "white")
    both.paste(first, (0, 0))
    both.paste(last, (0, first.height + 8))
    path = output / "before_after.png"
    both.save(path)
    return path
