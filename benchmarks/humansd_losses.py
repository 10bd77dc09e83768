"""HumanSD's losses compared on the people world at equal steps: published, intended, plain, and two fair objectives.

    python benchmarks/humansd_losses.py                       # 4 losses x 3 seeds of people_humansd, cut short
    python benchmarks/humansd_losses.py --limit-minutes 30    # the same command goes on where it stopped

Measured after training, for every loss alike: the held-out denoising error given each picture's own skeleton, another's
and none, at the same times and with the same noise (`humansd_poses.py`). What a skeleton is worth is the difference of
"wrong" and "own". The seed gives the order of the pictures, times and noise; all losses of one seed share these. ± is a
95 % interval by Student's t over seeds. Finished runs in --output with the same settings are not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from humansd_poses import CONFIG, errors
from objectives import Record, cell, finished, interval, run

from fairhuman_jax.commands import table
from fairhuman_jax.devices.kernels import choose_cpu_kernels
from fairhuman_jax.systems.humansd.system import LOSSES


def loss_settings(loss: str) -> list[str]:
    """`--set` arguments of a loss."""
    return [f"system.loss={loss}"] + ([] if loss == "plain" else ["system.pose_network=people"])


def one(loss: str, seed: int, options: argparse.Namespace) -> Record | None:
    """The record of a run with the errors of its export; None if it is not there and may not begin."""
    folder = options.output / f"{loss}-{seed}"
    settings = [f"train.steps={options.steps}", "train.checkpoint_every=0", "preview.steps=1", *options.set]
    settings += [*loss_settings(loss), f"train.seed={seed}", f"output={folder}"]
    found = finished(folder, settings)
    if found is not None and "errors" in found:
        return found
    if options.ends is not None and time.monotonic() > options.ends:
        return None
    found = found or run(CONFIG, settings, folder)
    found["errors"] = errors(str(folder / "export"))
    (folder / "result.json").write_text(json.dumps(found))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of every run")
    parser.add_argument("--output", type=Path, default=Path("runs/humansd_losses"))
    parser.add_argument("--limit-minutes", type=float, help="begin no run after so many minutes")
    options = parser.parse_args()
    options.ends = None if options.limit_minutes is None else time.monotonic() + 60 * options.limit_minutes
    choose_cpu_kernels()

    records: dict[str, list[Record]] = {loss: [] for loss in options.losses}
    for seed in range(options.seeds):
        for loss in options.losses:
            if record := one(loss, seed, options):
                records[loss].append(record)
                print(
                    f"{loss}, seed {seed}: {record['errors']}, {record['images_per_second']:.1f} images/s", flush=True
                )
    rows = []
    for loss, runs in records.items():
        if not runs:
            continue
        given = {name: [record["errors"][name] for record in runs] for name in ("own", "wrong", "black")}
        worth = [wrong - own for own, wrong in zip(given["own"], given["wrong"], strict=True)]
        columns = {name: cell(interval(values), ".4f") for name, values in given.items()}
        rate = sum(record["images_per_second"] for record in runs) / len(runs)
        rows.append(
            {"loss": loss, **columns, "wrong - own": cell(interval(worth), ".4f"), "seeds": len(runs), "images/s": rate}
        )
    print(table(rows))


if __name__ == "__main__":
    main()
