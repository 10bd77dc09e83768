"""Time to start: two checkouts in turn, each run a process of its own, all caches warm.

    python benchmarks/start_up.py OLD NEW --bare PYTHON [--full PYTHON] [--rounds 5] [--only sample]

OLD and NEW are checkouts; --bare is an interpreter with the package's dependencies, --full one with torch too. Every
checkout and interpreter has caches of its own (compiled programs, Python's byte code), filled by two runs that do not
count. Seconds are medians over the rounds: by the clock, and of the processor (user and system time), which other work
on the machine moves less. A training is stopped when it has logged its first step.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from fairhuman_jax.commands import table

METRICS = "metrics.jsonl"  # a line a step, in a training's folder
Command = tuple[str, ...]
ROWS: dict[str, Command] = {
    "sample.py, 4 steps": ("sample.py", "a woman waving", "--steps", "4", "--output", "{output}"),
    "import fairhuman_jax": ("-c", "import fairhuman_jax"),
    "import numpy": ("-c", "import numpy"),
    "train.py to its first step": ("train.py", "--set", "output={output}", "--set", "train.log_every=1"),
}


def run(checkout: Path, python: Path, command: Command, caches: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor of one process. Raises: RuntimeError when it fails."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(caches / "cache"),
        "PYTHONPYCACHEPREFIX": str(caches / "bytecode"),
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPATH": "",
    }
    with tempfile.TemporaryDirectory() as output, open(Path(output) / "messages.txt", "w+") as messages:
        words = [str(python), *(word.format(output=output) for word in command)]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(words, cwd=checkout, env=environment, stdout=messages, stderr=messages)
        trained = command[0] == "train.py" and _wait_for_line(Path(output) / METRICS, process)
        if trained:
            process.kill()
        code = process.wait()
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if code and not trained:
            messages.seek(0)
            raise RuntimeError(f"{checkout}: {' '.join(words)}\n{messages.read()}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _wait_for_line(path: Path, process: subprocess.Popen) -> bool:
    """Whether the process wrote something to a file before it ended."""
    while process.poll() is None:
        if path.is_file() and path.stat().st_size:
            return True
        time.sleep(0.02)
    return False


def compare(sides: dict[str, Path], python: Path, command: Command, rounds: int, folder: Path) -> dict[str, float]:
    """Medians of both checkouts and their ratios."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(-2, rounds):
        for side, checkout in sides.items():
            taken = run(checkout, python, command, folder / f"{side}-{python.parent.parent.name}")
            if number >= 0:
                times[side].append(taken)
    wall, processor = ({side: statistics.median(t[i] for t in times[side]) for side in sides} for i in range(2))
    return {
        "old [s]": wall["old"],
        "new [s]": wall["new"],
        "ratio": wall["new"] / wall["old"],
        "old [cpu s]": processor["old"],
        "new [cpu s]": processor["new"],
        "cpu ratio": processor["new"] / processor["old"],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the build before")
    parser.add_argument("new", type=Path, help="checkout to compare with it")
    parser.add_argument("--bare", type=Path, required=True, metavar="PYTHON", help="interpreter without torch")
    parser.add_argument("--full", type=Path, metavar="PYTHON", help="interpreter with torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name has this word in it")
    options = parser.parse_args()
    # An interpreter's path is kept as it stands: a virtual environment's is a link.
    pythons = {"without torch": options.bare} | ({"with torch": options.full} if options.full else {})
    sides, rows = {"old": options.old, "new": options.new}, []
    with tempfile.TemporaryDirectory() as folder:
        for kind, python in pythons.items():
            for name, command in ROWS.items():
                if options.only in name:
                    found = compare(sides, python.absolute(), command, options.rounds, Path(folder))
                    rows.append({"start": name, "interpreter": kind, **found})
                    print(table(rows[-1:]), flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
