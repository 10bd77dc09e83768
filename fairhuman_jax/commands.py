"""What every command line does: subcommands, and one line for what cannot be done."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

USER_ERRORS = (ValueError, OSError)


def add_debug(parser: Any) -> None:
    """The option that shows where an error came from."""
    parser.add_argument("--debug", action="store_true", help="show where an error came from")


def refuse(parser: argparse.ArgumentParser, error: Exception, debug: bool) -> NoReturn:
    """One line that says what was wrong, and exit code 2."""
    if debug:
        raise error
    parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")


def add_command(commands: Any, run: Callable[[argparse.Namespace], int | None], name: str | None = None) -> Any:
    """The parser of a subcommand, called as the function is; its docstring is the help."""
    parser = commands.add_parser(name or run.__name__, help=run.__doc__, description=run.__doc__)
    add_debug(parser)
    parser.set_defaults(run=run)
    return parser


def run_commands(
    prog: str,
    description: str | None,
    subcommands: Sequence[Callable[[Any], Any]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Parses `arguments` (default: the command line's) and runs what they name.

    subcommands: each adds its parser, by `add_command`. Ends the process with the number that the command returns, if
    it does, or with 2 and one line for one of USER_ERRORS.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in subcommands:
        add(commands)
    options = parser.parse_args(arguments)
    try:
        code = options.run(options)
    except USER_ERRORS as error:
        refuse(parser, error, options.debug)
    if code is not None:
        parser.exit(code)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Aligned text table: header, rule, one line a dict; numbers to the right, missing values as "-"."""
    names = list(columns or dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) if cells else len(name) for i, name in enumerate(names)]
    right = [
        any(name in row for row in rows)
        and all(isinstance(row.get(name, 0.0), (int, float, np.number, type(None))) for row in rows)
        for name in names
    ]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(names), "  ".join("-" * width for width in widths), *(line(cell) for cell in cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return str(value)
