"""The command line of `encode.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from fairhuman_jax.commands import USER_ERRORS, add_debug, refuse
from fairhuman_jax.config import load_config
from fairhuman_jax.data.shards import SHARD_BYTES
from fairhuman_jax.devices.kernels import choose_cpu_kernels, dtype_of, keep_compiled_programs
from fairhuman_jax.training.encoded_folder import encode_folder


def encode_door(arguments: Sequence[str] | None = None) -> None:
    """`encode.py CONFIG FOLDER [--set key=value ...] [--no-text] [--shard-megabytes N]`. Exit code 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="encode.py",
        description="Encodes the data of a configuration once; train with --set data.folder=FOLDER afterwards.",
    )
    parser.add_argument("config", help="a file of configs/")
    parser.add_argument("folder", type=Path, help="where the shards go; an encoding that was stopped goes on there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one field")
    parser.add_argument("--no-text", action="store_true", help="keep captions as text: for training text encoders")
    parser.add_argument("--shard-megabytes", type=int, default=SHARD_BYTES >> 20, help="size of a shard (default 512)")
    add_debug(parser)
    options = parser.parse_args(arguments)
    keep_compiled_programs()
    try:
        config = load_config(options.config, options.set)
        choose_cpu_kernels(dtype_of(config.system))
        system = config.system.build()
        _, params = system.init(jax.random.key(config.train.seed))
        size = options.shard_megabytes << 20
        done = encode_folder(config.data, system, params, options.folder, text=not options.no_text, shard_bytes=size)
    except USER_ERRORS as error:
        refuse(parser, error, options.debug)
    print(f"{done.folder}: {done.written} samples encoded, {done.kept} kept, {done.bad} could not be read")
