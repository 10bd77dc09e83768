"""The default run under three rules: fair (mpd), plain sum, and the global loss alone, as a Markdown table.

    python benchmarks/objectives.py                     # 3 rules x 3 seeds of configs/people_lora.py
    python benchmarks/objectives.py --steps 20 --seeds 1
    python benchmarks/objectives.py --set train.batch_size=8 --set optimizer.learning_rate=3e-4

Every run starts from the same base on the same pictures. The seed gives the LoRA's start, the order of the pictures,
times and noise of the training steps, and the noise of the held-out question; the three rules of one seed share all of
these. Means are over seeds, with the sample standard deviation. Runs that lie finished in --output, with the same
settings, are not done again; unfinished ones are removed and done anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax

from fairhuman_jax.config import load_config
from fairhuman_jax.training.loop import train

METHODS = ("mpd", "sum", "single")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "people_lora.py"


def run(method: str, seed: int, steps: int | None, changes: Sequence[str], output: Path) -> dict[str, Any]:
    """Held-out losses before and after, and mean weights, of one run; read back if it was done before."""
    folder = output / f"{method}-{seed}"
    settings = [*changes, f"fair.method={method}", f"train.seed={seed}", f"output={folder}"]
    settings += ["train.checkpoint_every=0", "preview.steps=1"]
    if steps is not None:
        settings.append(f"train.steps={steps}")
    done = folder / "result.json"
    if done.is_file() and (found := json.loads(done.read_text()))["settings"] == settings:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    result = train(load_config(CONFIG, settings))
    found = {"settings": settings, "before": result.before, "after": result.after, "weights": result.weights}
    done.write_text(json.dumps(found))
    return found


def spread(values: Sequence[float], form: str) -> str:
    """mean ± standard deviation."""
    text = format(mean(values), form)
    return f"{text} ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else text


def rows(results: dict[str, list[dict]]) -> list[str]:
    """One line of the table for each rule and objective."""
    lines = ["| rule | held-out loss | before | after | change, % | mean weight |", f"|{' --- |' * 6}"]
    for method, runs in results.items():
        for name in runs[0]["before"]:
            before, after = ([each[when][name] for each in runs] for when in ("before", "after"))
            change = [100 * (last / first - 1) for first, last in zip(before, after, strict=True)]
            weights = [each["weights"][name] for each in runs]
            columns = ((before, ".5f"), (after, ".5f"), (change, "+.2f"), (weights, ".3f"))
            cells = [method, name, *(spread(values, form) for values, form in columns)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Parse the command line, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the configuration's)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train.py, for all runs")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str((options.output / "xla").absolute()))
    batch_size = load_config(CONFIG, options.set).train.batch_size
    jax.config.update("jax_num_cpu_devices", math.gcd(batch_size, os.cpu_count() or 1))
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        for method in METHODS:
            results[method].append(run(method, seed, options.steps, options.set, options.output))
    print("\n".join(rows(results)))


if __name__ == "__main__":
    main()
