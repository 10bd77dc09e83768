"""The command line of `train.py`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fairhuman_jax.commands import USER_ERRORS, add_debug, refuse, table
from fairhuman_jax.config import ConfigError, apply_overrides, describe, load_config
from fairhuman_jax.devices.kernels import choose_cpu_kernels, dtype_of, keep_compiled_programs
from fairhuman_jax.devices.processes import connect, is_main, refuse_one_of_many
from fairhuman_jax.doors import default_run
from fairhuman_jax.systems.registry import stored_run
from fairhuman_jax.training.checkpoint import has_checkpoint
from fairhuman_jax.training.loop import Result, train
from fairhuman_jax.training.preemption import Interrupted
from fairhuman_jax.training.run_config import RunConfig


def train_door(arguments: Sequence[str] | None = None) -> None:
    """`train.py [CONFIG] [--set key=value ...] [--resume [RUN] | --auto-resume] [--show] [--compile-only TOPOLOGY]`.

    One of several processes has `[--distributed | --coordinator HOST:PORT --processes N --process I]` beside that.

    Exit codes: 2 for bad input, 1 for a failure between processes, 143 and 130 after SIGTERM and SIGINT.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = _config(options)
        if options.show:
            print(describe(config))
        elif options.compile_only:
            from fairhuman_jax.training.compile_only import compile_only

            print(compile_only(config, options.compile_only))
        else:
            _run(options, config, sys.argv[1:] if arguments is None else arguments)
    except USER_ERRORS as error:
        refuse(parser, error, options.debug)


def _config(options: argparse.Namespace) -> RunConfig:
    """The configuration of a file, or that of the run to resume, with the changes of the command line.

    Raises: ConfigError for a file or change that cannot be used; FileNotFoundError for a folder without a run.
    """
    resumed = Path(options.resume) if isinstance(options.resume, str) else None
    if resumed is not None and resumed.suffix == ".py":  # "--resume CONFIG", in the other order
        options.config, resumed = str(resumed), None
    if resumed is None:
        return load_config(options.config or default_run.__file__, options.set)
    if options.config is not None:
        raise ConfigError(f"--resume {resumed} reads the run's own configuration: leave out {options.config}")
    return apply_overrides(dataclasses.replace(stored_run(resumed), output=str(resumed)), options.set)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains what a configuration describes; without one, a fair LoRA on the shipped people model.",
    )
    parser.add_argument("config", nargs="?", help="a file of configs/ (default: the fair LoRA on the people model)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one field, as in train.steps=50"
    )
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="RUN",
        help="continue from the newest checkpoint; RUN is a run's folder, whose own configuration is read",
    )
    resume.add_argument(
        "--auto-resume", action="store_true", help="resume where the run has a checkpoint, otherwise start it"
    )
    parser.add_argument("--show", action="store_true", help="print the configuration with its fields and stop")
    parser.add_argument(
        "--compile-only",
        metavar="TOPOLOGY",
        help="compile for TPUs or GPUs that need not be there, as v5p:4x4x4 or h100:8, print what each needs and stop",
    )
    several = parser.add_argument_group("one of several processes that train together")
    several.add_argument(
        "--distributed", action="store_true", help="find the others by SLURM, Open MPI, GKE or the TPU"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    several.add_argument(
        "--timeout", type=int, default=300, metavar="SECONDS", help="how long to wait for another one (default 300)"
    )
    add_debug(parser)
    return parser


def _run(options: argparse.Namespace, config: RunConfig, arguments: Sequence[str]) -> None:
    """Trains, and says how it ended."""
    if not options.debug:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what goes wrong with a checkpoint is said in one line
    peers = (options.coordinator, options.processes, options.process)
    together = options.distributed or any(part is not None for part in peers)
    if options.distributed and peers != (None, None, None):
        raise ConfigError(
            "--distributed finds coordinator, processes and process itself: use it, or the three options, not both"
        )
    if together and not options.distributed and None in peers:
        raise ConfigError("--coordinator, --processes and --process go together")
    keep_compiled_programs()
    choose_cpu_kernels(dtype_of(config.system))
    if not together:
        refuse_one_of_many()
    try:
        if together:
            connect(*peers, timeout=options.timeout)
        resume = bool(options.resume) or (options.auto_resume and has_checkpoint(config.output))
        result = train(config, resume=resume)
    except Interrupted as stop:
        line = f"{stop}; continue with: python train.py {shlex.join(_again(arguments))}"
        _leave(line if is_main() else "", stop.exit_code, together)
    except KeyboardInterrupt:
        _leave("stopped by SIGINT outside of training; nothing was saved by that", 130, together)
    except Exception as error:
        if not together or options.debug:
            raise
        _leave(" ".join(str(error).split()), 2 if isinstance(error, USER_ERRORS) else 1, together)
    if is_main():
        print(report(result))


def _again(arguments: Sequence[str]) -> list[str]:
    """The command line that resumes what this one began."""
    if "--resume" in arguments:
        return list(arguments)
    return [*(argument for argument in arguments if argument != "--auto-resume"), "--resume"]


def _leave(line: str, code: int, together: bool) -> NoReturn:
    """Ends the process with one line; one of several at once, without waiting for those that may never come."""
    if line:
        sys.stderr.write(f"train.py: {line}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    if together:
        os._exit(code)
    raise SystemExit(code)


def _change(before: float, after: float) -> str:
    """A share of a loss, or the amount where a loss may be negative, as localization may."""
    if before > 0:
        return f"{100 * (after / before - 1):+.1f} %"
    return f"{after - before:+.5f}" if after != before else "-"


def report(result: Result) -> str:
    """The closing table of a run and where its files are."""
    rows = []
    for name, before in result.before.items():
        after = result.after[name]
        row = {"held-out loss": name, "before": f"{before:.5f}", "after": f"{after:.5f}"}
        row["change"] = _change(before, after)
        if result.weights:
            row["mean weight"] = f"{result.weights[name]:.3f}"
        rows.append(row)
    lines = [table(rows), f"{result.images_per_second:.1f} images/s, {result.skipped} steps skipped"]
    picture = [f"picture: {result.picture}"] if result.picture else []
    return "\n".join([*lines, *picture, f"trained: {result.exported}"])
