"""Memory of full-size fair steps on TPU slices and GPUs, by their compilers and without them, as a Markdown table.

    python benchmarks/step_memory.py --systems lora --chips v5p --counts 8
    python benchmarks/step_memory.py --chips h100 --counts 1 --gradients plain stacked sequential replay
    python benchmarks/step_memory.py --list              # the rows that a command stands for, and which are there

Needs libtpu (the tpu-aot extra) or JAX's CUDA plugin (cuda). A row is one compilation of the trainer's step
(training/compile_only.py): minutes and up to 13 GB, in a process of its own. Rows are kept in a JSON file, by what they
are of, and never compiled again.
"plain" is the step of the global objective alone. Large trainables and, with `--shard-frozen`, the frozen base are
split over `--fsdp` chips (0: all).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairhuman_jax.devices.topologies import GPUS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"lora": "fair_lora_sdxl", "controlnet": "fair_controlnet_sdxl", "adapter": "fair_t2i_adapter_sdxl"}
GRADIENTS = ("plain", "stacked", "sequential", "replay")
TWO_SIDES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
THREE_SIDES = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
COUNTS = (1, *TWO_SIDES)
HOST = 8  # GPUs
SLICES = {"v5e": TWO_SIDES, "v6e": TWO_SIDES, "v5p": THREE_SIDES} | {
    gpu: {count: f"{count // HOST}x{HOST}" if count > HOST else str(count) for count in COUNTS} for gpu in GPUS
}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One compilation: a config of configs/, a slice and what is set on both."""

    system: str
    chip: str
    count: int
    gradients: str
    fsdp: int
    shard_frozen: bool
    samples: int
    encoded: bool
    settings: tuple[str, ...] = ()

    @property
    def topology(self) -> str:
        """Its name for the compiler."""
        return f"{self.chip}:{SLICES[self.chip][self.count]}"

    @property
    def key(self) -> str:
        """What it is kept under."""
        frozen = "+frozen" if self.shard_frozen else ""
        fixed = f"{self.system} {self.topology} {self.gradients} fsdp{self.fsdp}{frozen} {self.samples}/chip"
        fixed += " encoded" if self.encoded else ""
        return " ".join([fixed, *self.settings])

    def overrides(self) -> list[str]:
        """The configuration of the row, as `--set` takes it."""
        fair = "fair.method=single" if self.gradients == "plain" else f"fair.gradients={self.gradients}"
        return [
            f"train.batch_size={self.samples * self.count}",
            "train.accumulate=1",
            f"train.fsdp={self.fsdp}",
            f"train.shard_frozen={str(self.shard_frozen).lower()}",
            fair,
            *self.settings,
        ]


def chosen(options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a command line; small slices first, where refusals are quick."""
    for count, chip, system, gradients in itertools.product(
        options.counts, options.chips, options.systems, options.gradients
    ):
        if count not in SLICES[chip]:
            continue
        fsdp = math.gcd(options.fsdp or count, count)
        yield Row(
            system,
            chip,
            count,
            gradients,
            fsdp,
            options.shard_frozen,
            options.samples,
            options.encoded,
            tuple(options.settings),
        )


def compile_row(row: Row) -> dict[str, Any]:
    """The report of one row, made in this process."""
    from fairhuman_jax.config import load_config
    from fairhuman_jax.training.compile_only import compile_step

    config = load_config(ROOT / "configs" / f"{CONFIGS[row.system]}.py", row.overrides())
    return dataclasses.asdict(compile_step(config, row.topology, encoded=row.encoded))


def compile_apart(row: Row) -> dict[str, Any]:
    """The same in a process of its own, whose memory the next row gets back.

    Raises: ValueError for the process's last line.
    """
    given = json.dumps(dataclasses.asdict(row))
    done = subprocess.run([sys.executable, __file__, "--row", given], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: Row, report: dict[str, Any]) -> str:
    """One row of the table."""
    hbm = report["hbm"] / GIB
    cells = [row.system, row.gradients, row.topology, row.count, "{} x {}".format(*report["mesh"]), row.samples]
    if report["needed"] is not None:
        cells += ["", "", f"{report['needed']} of {hbm:.2f}: does not fit"]
    else:
        sizes = [f"{report[name] / GIB:.2f}" for name in ("arguments", "temporaries")]
        cells += [*sizes, f"{report['peak'] / GIB:.2f} of {hbm:.2f}"]
    traffic = ", ".join(
        f"{each['count']} {kind} ({each['bytes'] / GIB:.2f} GiB)" for kind, each in report["traffic"].items()
    )
    cells += [f"{report['flops'] / 1e12:.3g}", traffic, f"{report['seconds']:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def show(rows: list[Row], kept: dict[str, Any]) -> None:
    """The table of the rows that are there, and the smallest slice that holds each step."""
    heads = ["system", "gradients", "slice", "chips", "data x fsdp", "samples/chip", "arguments, GiB"]
    heads += ["temporaries, GiB", "peak, GiB", "TFLOP/chip", "collectives (results)", "compiled in, s"]
    print("\n| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    there = [(row, kept[row.key]) for row in rows if "error" not in kept.get(row.key, {"error": ""})]
    for row, report in there:
        print(line(row, report))
    print("\n| system | gradients | chip | smallest slice that fits |\n| --- | --- | --- | --- |")
    for system, gradients, chip in dict.fromkeys((row.system, row.gradients, row.chip) for row, _ in there):
        fitting = [
            row
            for row, report in there
            if (row.system, row.gradients, row.chip) == (system, gradients, chip) and report["needed"] is None
        ]
        smallest = min(fitting, key=lambda row: row.count).topology if fitting else "none of these"
        print(f"| {system} | {gradients} | {chip} | {smallest} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=CONFIGS, default=["lora", "controlnet"])
    parser.add_argument("--chips", nargs="+", choices=SLICES, default=["v5e", "v6e", "v5p"])
    parser.add_argument("--counts", nargs="+", type=int, choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=["stacked"])
    parser.add_argument("--fsdp", type=int, default=8, help="chips that share large leaves; 0 for all")
    parser.add_argument("--shard-frozen", action="store_true", help="split the frozen base over them too")
    parser.add_argument("--samples", type=int, default=1, help="pictures a chip")
    parser.add_argument("--encoded", action="store_true", help="latents and text embeddings in the batch")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "step_memory.json")
    parser.add_argument("--list", action="store_true", help="compile nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        given = json.loads(options.row)
        print(json.dumps(compile_row(Row(**given | {"settings": tuple(given["settings"])}))))
        return
    kept: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    rows = list(chosen(options))
    for row in rows:
        if options.list:
            print(f"{row.key}: {'kept' if row.key in kept else 'to be compiled'}")
        elif row.key not in kept:
            report = compile_apart(row)
            if "error" in report:
                print(f"{row.key}: {report['error']}", file=sys.stderr)
                continue
            kept[row.key] = report
            options.results.write_text(json.dumps(kept, indent=1, sort_keys=True))
    show(rows, kept)


if __name__ == "__main__":
    main()
