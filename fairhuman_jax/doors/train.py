"""The command line of `train.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fairhuman_jax.config import describe, load_config
from fairhuman_jax.doors.common import (
    USER_ERRORS,
    add_debug,
    keep_compiled_programs,
    make_every_core_a_device,
    refuse,
)
from fairhuman_jax.training.logging import table
from fairhuman_jax.training.loop import Result, train


def train_door(arguments: Sequence[str] | None = None) -> None:
    """`train.py [CONFIG] [--set key=value ...] [--resume] [--show]`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains what a configuration describes; without one, a fair LoRA on the shipped people model.",
    )
    parser.add_argument("config", nargs="?", default="configs/people_lora.py", help="a file of configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one field, as in train.steps=50"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this run")
    parser.add_argument("--show", action="store_true", help="print the configuration with its fields and stop")
    add_debug(parser)
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        if options.show:
            print(describe(config))
            return
        keep_compiled_programs()
        make_every_core_a_device(config.train.batch_size // config.train.accumulate)
        result = train(config, resume=options.resume)
    except USER_ERRORS as error:
        refuse(parser, error, options.debug)
    print(report(result))


def report(result: Result) -> str:
    """The closing table of a run and where its files are."""
    rows = []
    for name, before in result.before.items():
        after = result.after[name]
        row = {"held-out loss": name, "before": f"{before:.5f}", "after": f"{after:.5f}"}
        row["change"] = f"{100 * (after / before - 1):+.1f} %" if before else "-"
        if result.weights:
            row["mean weight"] = f"{result.weights[name]:.3f}"
        rows.append(row)
    lines = [table(rows), f"{result.images_per_second:.1f} images/s, {result.skipped} steps skipped"]
    return "\n".join([*lines, f"picture: {result.picture}", f"trained: {result.exported}"])
