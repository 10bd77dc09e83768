"""Commands for data folders: `python -m fairhuman_jax.data {check,tfds} --help`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from fairhuman_jax.commands import add_command, run_commands
from fairhuman_jax.data.check import check_folder, sheet
from fairhuman_jax.data.check_subjects import check_subjects, subject_sheet
from fairhuman_jax.data.subject_folder import SPLITS
from fairhuman_jax.data.tfds_folder import build_tfds


def check(arguments: argparse.Namespace) -> int:
    """Read every file of a folder; report faults, sizes, areas or labels; exit code 1 if there are problems."""
    logging.disable(logging.WARNING)  # the report says it all
    subjects = (arguments.folder / SPLITS["train"]).is_file()
    look, draw = (check_subjects, subject_sheet) if subjects else (check_folder, sheet)
    report = look(arguments.folder, arguments.resolution, arguments.workers)
    print(report)
    if arguments.sheet:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        draw(arguments.folder).save(arguments.sheet)
        print(f"\npicture: {arguments.sheet}")
    return 0 if report.clean else 1


def _add_check(commands) -> None:
    parser = add_command(commands, check)
    parser.add_argument("folder", type=Path, help="of metadata.jsonl, or of image_ids_train.txt with its files")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a picture of samples with their masks")
    parser.add_argument("--resolution", type=int, default=1024, help="of the training to come (default 1024)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")


def tfds(arguments: argparse.Namespace) -> None:
    """Write a metadata.jsonl folder as a TFDS data set of ArrayRecord files; needs no TensorFlow."""
    folder, bad = build_tfds(arguments.folder, arguments.out, on_error=arguments.on_error)
    print(f"{folder}: written, {bad} bad samples left out")


def _add_tfds(commands) -> None:
    parser = add_command(commands, tfds)
    parser.add_argument("folder", type=Path, help="the metadata.jsonl folder")
    parser.add_argument("out", type=Path, help="TFDS's data_dir; the set goes to OUT/fair_human/1.0.0")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a bad sample (default stop)")


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; `arguments` default to the command line's. Exit codes: 0, 1 (problems found), 2 (cannot run)."""
    run_commands("python -m fairhuman_jax.data", __doc__, (_add_check, _add_tfds), arguments)


if __name__ == "__main__":
    main()
