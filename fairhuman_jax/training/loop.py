"""The training loop of every system, read top to bottom: prepare, measure, train, measure again, export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from fairhuman_jax.config import to_dict
from fairhuman_jax.contract import MakeMeasure, Measure, Parts, System
from fairhuman_jax.data.loader import BatchIterator
from fairhuman_jax.devices.processes import Agreement, fetch, is_main, own_rows, wait_for_all
from fairhuman_jax.devices.sharding import make_mesh, place, replicate, shard_batch
from fairhuman_jax.files import read_json, write_json
from fairhuman_jax.training.checkpoint import Checkpointer
from fairhuman_jax.training.combining import init_fair
from fairhuman_jax.training.datasets import held_out_batches, open_data, training_batches
from fairhuman_jax.training.held_out import make_held_out_losses
from fairhuman_jax.training.logging import METRICS, RunLogger, wandb_package
from fairhuman_jax.training.objectives import objective_names
from fairhuman_jax.training.preemption import Interrupted, StopSignal, shielded
from fairhuman_jax.training.reporting import (
    SKIPPED_IN_A_ROW,
    Clock,
    SkippedWatch,
    TraceWindow,
    before_and_after,
    first_batch,
    make_previewer,
    mean_weights,
)
from fairhuman_jax.training.run_config import CONFIG, RunConfig, check_resumed
from fairhuman_jax.training.state import TrainState, init_state
from fairhuman_jax.training.step import TrainStep, due_phases, optimizers_of, step_of_run

PyTree = Any


@dataclass(frozen=True)
class Result:
    """What a finished run reports: measured values, mean weights of the objectives, speed, files."""

    before: dict[str, float]
    after: dict[str, float]
    weights: dict[str, float]
    images_per_second: float
    skipped: int
    exported: Path
    picture: Path | None


@dataclass
class Run:
    """All parts of a run, made from its configuration; `state` is replaced step by step.

    names: labels of the objectives in logs. pending: (step, metrics) not yet fetched from the device.
    """

    config: RunConfig
    output: Path
    names: tuple[str, ...]
    system: System
    mesh: jax.sharding.Mesh
    frozen: PyTree
    state: TrainState
    step: TrainStep
    batches: BatchIterator
    checkpoints: Checkpointer
    logger: RunLogger
    watch: SkippedWatch
    measures: tuple[Measure, ...]
    draw: Callable[[PyTree, PyTree], np.ndarray] | None
    example: Mapping[str, np.ndarray]
    clock: Clock = field(default_factory=Clock)
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def losses(self) -> dict[str, float]:
        """What the system measures on held-out batches now; by default the mean of every objective."""
        parts = self.state.parts(self.frozen)
        return {name: value for measure in self.measures for name, value in measure(parts).items()}

    def picture(self, step: int) -> None:
        """Draws the preview, if the run has one, and logs it under `step`."""
        if self.draw is None:
            return
        self.logger.image(step, "sample", self.draw(self.state.averaged, self.frozen))
        self.pause()

    def pause(self) -> None:
        """Leaves the time since the last step out of both clocks."""
        self.logger.pause()
        self.clock.pause()

    def log(self) -> None:
        """Fetches the pending metrics, if any, and logs them."""
        if self.pending is not None:
            (index, metrics), self.pending = self.pending, None
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.logger.log(index, values)
            self.watch.note(index + 1, int(values["skipped"]))

    def save(self, done: int) -> None:
        """Starts a checkpoint after `done` steps. Their metrics are flushed first."""
        self.log()
        self.checkpoints.save(done, self.state, self.batches.get_state(), to_dict(self.config))

    def look(self, done: int) -> None:
        """Measures and draws a preview after `done` steps, where they are due."""
        settings = self.config.train
        if _due(done, settings.validate_every):
            self.log()
            self.logger.validation(done, self.losses())
            self.pause()
        if done < settings.steps and _due(done, settings.preview_every):
            self.picture(done)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends workers, the save in flight and the log; after an error no process waits for others."""
        failed = kind is not None and kind is not Interrupted
        self.batches.close()
        try:
            if not failed or jax.process_count() == 1:
                with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
                    self.checkpoints.close()
        finally:
            self.logger.close()


def prepare(config: RunConfig, *, resume: bool) -> Run:
    """Builds everything, reads the data and, on `resume`, the newest checkpoint; nothing is trained yet.

    Raises: ValueError and OSError for what the configuration names and cannot be used; ConfigError for a stored
    configuration that differs.
    """
    settings, output = config.train, Path(config.output)
    if settings.wandb is not None:
        wandb_package()
    checkpoints = _open_checkpoints(output, settings.keep_checkpoints, resume=resume)
    if resume:
        check_resumed(config)

    # ---- system ----------------------------------------------------------------------------------------------------
    mesh = make_mesh(settings.fsdp)
    init_key, step_key, held_out_key, preview_key = jax.random.split(jax.random.key(settings.seed), 4)
    system = config.system.build()
    trainable, frozen = system.init(init_key)
    trainable = place(mesh, trainable)
    frozen = place(mesh, frozen) if settings.shard_frozen else replicate(mesh, frozen)

    # ---- data ------------------------------------------------------------------------------------------------------
    training, held_out = open_data(config.data)
    batches = training_batches(training, system, config.data, settings, frozen)
    held_out_host = held_out_batches(held_out, system, config.data, settings.batch_size)
    held_out_device = [shard_batch(mesh, own_rows(batch)) for batch in held_out_host]

    # ---- state and step --------------------------------------------------------------------------------------------
    parts = Parts(trainable, system.init_statistics(trainable, frozen), frozen)
    names = {phase.name: objective_names(phase, parts, held_out_device[0]) for phase in system.phases}
    optimizers = optimizers_of(config, system)
    state = place(mesh, first_state(config, system, parts, optimizers, names, step_key))
    if resume:
        state, position = checkpoints.restore(state)
        batches.set_state(position)
    start = int(state.step)
    return Run(
        config=config,
        output=output,
        names=objective_labels(names),
        system=system,
        mesh=mesh,
        frozen=frozen,
        state=state,
        step=step_of_run(config, system, optimizers, mesh),
        batches=batches,
        checkpoints=checkpoints,
        logger=_open_logger(config, objective_labels(names), start),
        watch=SkippedWatch(start, _skipped(state), min(SKIPPED_IN_A_ROW, settings.steps)),
        measures=tuple(make(held_out_device, held_out_key) for make in measures_of(system).values()),
        draw=make_previewer(system, config.preview, mesh, held_out_host[0], preview_key),
        example=held_out_host[0],
    )


def first_state(
    config: RunConfig,
    system: System,
    parts: Parts,
    optimizers: Mapping[str, optax.GradientTransformation],
    names: Mapping[str, Sequence[str]],
    key: jax.Array,
) -> TrainState:
    """The state of a run before its first step; names: the objectives of each phase."""
    return init_state(
        parts.trainable,
        optimizers,
        key,
        ema=config.train.ema_decay is not None,
        fair={phase: init_fair(config.fair, len(own)) for phase, own in names.items()},
        phases=system.phases,
        statistics=parts.statistics,
    )


def train(config: RunConfig, *, resume: bool = False) -> Result:
    """Runs `config` to its last step, on from its newest checkpoint when `resume`; results lie in `config.output`.

    A first SIGTERM or SIGINT during training ends the step, writes a checkpoint and raises `Interrupted`; a second one
    ends the process. Between processes, which share `config.output`, all of them stop at the same step.
    """
    with prepare(config, resume=resume) as run:
        if int(run.state.step) == 0:
            measure_before(run)
        with StopSignal() as stop:
            take_steps(run, stop)
        return measure_after(run)


def measure_before(run: Run) -> None:
    """Writes what a run's folder holds before its first step."""
    losses = run.losses()
    if is_main():
        write_json(run.output / CONFIG, to_dict(run.config))
        first_batch(run.batches, run.example).save(run.output / "batch.png")
        write_json(run.output / "before.json", losses)
    run.picture(0)


def take_steps(run: Run, stop: StopSignal) -> None:
    """Takes all steps from the state's own to the last one. Raises: Interrupted, with the checkpoint complete."""
    settings, refresh_every = run.config.train, run.config.fair.refresh_every
    agreed, trace = Agreement(run.mesh), TraceWindow(run.output / "profile", settings.profile)
    start = int(run.state.step)
    if start:
        run.look(start)  # after the checkpoint of a run that was stopped there was no time for it
    for index in range(start, settings.steps):
        batch = shard_batch(run.mesh, shielded(run.batches.__next__))
        trace.begin(index)
        due = due_phases(run.system, index)
        run.state, metrics = run.step(run.state, run.frozen, batch, index % refresh_every == 0, due)
        # The metrics read here are those of the step before: the device has its next work before the host waits.
        run.log()
        if settings.log_every and index % settings.log_every == 0:
            run.pending = index, metrics
        run.clock.tick()

        done = index + 1
        trace.end(done, metrics)
        signum = agreed(stop.received)
        if signum or done == settings.steps or _due(done, settings.checkpoint_every):
            run.save(done)
        if signum:
            trace.close()
            run.checkpoints.wait()
            raise Interrupted(signum, done)
        run.look(done)
    trace.close()
    jax.block_until_ready(run.state.step)
    run.pause()
    run.checkpoints.wait()


def measure_after(run: Run) -> Result:
    """Measures, draws and exports; the first process writes, all report."""
    steps = run.config.train.steps
    before, after = read_json(run.output / "before.json"), run.losses()
    run.picture(steps)
    parts = Parts(*fetch(tuple(run.state.parts(run.frozen))))
    exported, picture = run.output / "export", run.output / "before_after.png" if run.draw else None
    if is_main():
        exported = run.system.export(parts, exported, dict(run.example))
        if picture:
            before_and_after(run.output, steps).save(picture)
    wait_for_all("exported")
    return Result(
        before={name: float(before[name]) for name in after},
        after=after,
        weights=mean_weights(run.output / METRICS, run.names),
        images_per_second=run.clock.ticks_per_second * run.config.train.batch_size,
        skipped=_skipped(run.state),
        exported=exported,
        picture=picture,
    )


def objective_labels(names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The objectives as logs name them: by their phase too, where phases are several."""
    several = len(names) > 1
    return tuple(f"{phase}.{name}" if several else name for phase, own in names.items() for name in own)


def measures_of(system: System) -> Mapping[str, MakeMeasure]:
    """What a system measures on held-out batches; by default the mean of every objective."""
    return {"losses": partial(make_held_out_losses, system)} if system.measures is None else system.measures


def _skipped(state: TrainState) -> int:
    """Steps without a finite gradient, of all phases together."""
    return int(sum(state.skipped.values()))


def _open_logger(config: RunConfig, names: tuple[str, ...], start: int) -> RunLogger:
    return RunLogger(
        config.output,
        config.train.steps,
        start_step=start,
        images_per_step=config.train.batch_size,
        bar_keys=[f"{kind}/{name}" for kind in ("loss", "weight") for name in names],
        wandb=config.train.wandb,
        config=to_dict(config),
        enabled=is_main(),
    )


def _open_checkpoints(output: Path, keep: int, *, resume: bool) -> Checkpointer:
    """The run's checkpoints. Raises: ValueError for a new run over an old one; FileNotFoundError for none to resume."""
    checkpoints = Checkpointer(output / "checkpoints", keep=keep)
    if resume:
        checkpoints.newest()
    elif checkpoints.latest_step is not None:
        raise ValueError(
            f"{output} holds a run at step {checkpoints.latest_step}: --resume goes on with it, "
            "--set output=FOLDER starts another"
        )
    return checkpoints


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
