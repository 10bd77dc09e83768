"""The command line of `sample.py`: options of the chosen system, then jobs, pictures and their files."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairhuman_jax.commands import USER_ERRORS, add_debug, refuse
from fairhuman_jax.contract import Drawing, Job, Pipeline
from fairhuman_jax.devices.kernels import choose_cpu_kernels, keep_compiled_programs, split_cpu
from fairhuman_jax.doors.options import OneScreen, add_options, flag, flags_of, given, worded
from fairhuman_jax.drawing.files import CONTACT_SHEET, free_path, left_to_draw, write_drawing, write_png
from fairhuman_jax.drawing.options import make_options
from fairhuman_jax.drawing.recipes import options_in, read_recipe
from fairhuman_jax.fields import OptionError, fields_of
from fairhuman_jax.systems.registry import PIPELINES, drawn_by_run, pipeline_class

DEFAULT = "text"


def sample_door(arguments: Sequence[str] | None = None) -> None:
    """`sample.py [PROMPT ...] [--system NAME] [options of the system]`. Exit code 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = _first_parser()
    start, _ = first.parse_known_args(arguments)
    parser, options = first, start
    try:
        recipe = read_recipe(start.like) if start.like else {}
        trained = drawn_by_run(start.run) if start.run else {}
        name = _system(start.system or trained.get("system") or recipe.get("system"), arguments)
        parser = _parser(name)
        _refuse_foreign(arguments, name)
        options = parser.parse_args(arguments)
        written = _sample(pipeline_class(name), options, recipe, trained)
    except USER_ERRORS as error:
        refuse(parser, ValueError(worded(error)) if isinstance(error, OptionError) else error, start.debug)
    print("\n".join(map(str, written)))


def _sample(pipeline: Any, options: argparse.Namespace, recipe: dict[str, Any], trained: dict[str, Any]) -> list[Path]:
    """Draws what a command line requests and returns the files; recipe and trained are options that it refers to."""
    told = given(options, pipeline.Options)
    models = {name: value for name, value in trained.items() if name != "system"}
    record = make_options(pipeline.Options, options_in(recipe, pipeline.Options) | models | told)
    jobs = pipeline.jobs(record)
    keep_compiled_programs()
    if getattr(record, "mesh", 1) not in (None, 1):
        split_cpu(record.mesh)
    choose_cpu_kernels(getattr(record, "dtype", "float32"))
    left = left_to_draw(jobs, options.output)
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} pictures are in {options.output} already", file=sys.stderr)
    if not left:
        return []
    # A picture's pixels depend on the shape of its batch in the last bit, so a redraw fills the same place of one.
    other = told.keys() & {"prompt", "prompts", "seed", "number", "batch"}
    again = None if other else recipe.get("batch")
    opened = pipeline.open(record)
    with _warnings_in_a_line():
        drawn = _redrawn(opened, left * int(again), recipe) if again else opened.draw(left, _Bar(len(left)))
        return _write(opened, drawn, options.output)


def _redrawn(pipeline: Pipeline, jobs: Sequence[Job], recipe: dict[str, Any]) -> Iterator[Drawing]:
    """The drawing in the place of a batch, and by the model, that a recipe names."""
    drawings = [drawing for drawing in pipeline.draw(jobs) if drawing.label == recipe.get("label", "")]
    yield drawings[int(recipe.get("place", 0))]


def _write(pipeline: Pipeline, drawn: Iterator[Drawing], output: Path) -> list[Path]:
    """Writes drawings as they come, and a contact sheet of several."""
    drawings, written = [], []
    for drawing in drawn:
        drawings.append(drawing)
        written += write_drawing(output, drawing)
    sheet = pipeline.sheet(drawings)
    return written if sheet is None else [*written, write_png(free_path(output / CONTACT_SHEET), sheet)]


class _Bar:
    """A progress bar of pictures that says what it waits for."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="image")

    def __call__(self, state: str, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.set_description(state)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Prints warnings of drawing as one line each, with flags in place of field names."""
    from fairhuman_jax.drawing.pipeline import DrawingWarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, DrawingWarning):
            print(str(message).replace("long_prompt", "--long-prompt"), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DrawingWarning)
        warnings.showwarning = show
        yield


# ---- the command line ------------------------------------------------------------------------------------------------


def _first_parser() -> argparse.ArgumentParser:
    """What decides which options there are."""
    parser = argparse.ArgumentParser(prog="sample.py", add_help=False, allow_abbrev=False)
    _add_choice(parser)
    add_debug(parser)
    return parser


def _add_choice(parser: Any) -> None:
    names = ", ".join(PIPELINES)
    parser.add_argument("--system", metavar="NAME", help=f"{names} (default: the one whose options are given)")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="draw with what a training run trained")
    parser.add_argument(
        "--like", type=Path, metavar="PNG", help="draw the recipe of a picture again; options change it"
    )


def _parser(name: str) -> argparse.ArgumentParser:
    """The command line of one system."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        usage=f"sample.py PROMPT ... [--system {name}] [options]",
        description="Draws prompts. PNGs carry their recipe; several pictures make a contact sheet too.",
        formatter_class=OneScreen,
        allow_abbrev=False,
    )
    own = parser.add_argument_group("system and output")
    _add_choice(own)
    own.add_argument(
        "--output",
        type=Path,
        default=Path("samples"),
        metavar="FOLDER",
        help="folder of the pictures (default samples)",
    )
    add_debug(own)
    add_options(parser, pipeline_class(name).Options)
    return parser


def _system(named: str | None, arguments: Sequence[str]) -> str:
    """The named system, or the first one that has all options on the command line.

    Raises: ValueError for a name that is not known.
    """
    if named == "auto":
        print(f"--system auto is now --system {DEFAULT}", file=sys.stderr)
        return DEFAULT
    if named is not None:
        pipeline_class(named)
        return named
    flags = set(flags_of(arguments))
    for name in PIPELINES:
        if flags <= _flags(name):
            return name
    return DEFAULT


def _flags(name: str) -> set[str]:
    """All flags of a system's command line."""
    own = {"--system", "--run", "--like", "--output", "--debug", "--help"}
    return own | {flag(field.name) for field in fields_of(pipeline_class(name).Options)}


def _refuse_foreign(arguments: Sequence[str], name: str) -> None:
    """Refuses an option of another system by that system's name."""
    for option in flags_of(arguments):
        if option in _flags(name):
            continue
        owners = [other for other in PIPELINES if option in _flags(other)]
        if owners:
            raise ValueError(
                f"{option} needs --system {' or '.join(owners)}; this is --system {name}, and it takes no {option}"
            )
