"""Rules of combination compared at equal steps: held-out losses with 95 % confidence intervals, as tables and a plot.

    python benchmarks/objectives.py                                   # 6 arms x 5 seeds of configs/people_lora.py
    python benchmarks/objectives.py --limit-minutes 30                # the same command goes on where it stopped
    python benchmarks/objectives.py --arms sum mpd pcgrad mpd/8 --seeds 3 --steps 60
    python benchmarks/objectives.py --set train.batch_size=8 --set optimizer.learning_rate=3e-4

An arm is a rule of losses.COMBINERS, or RULE/N for `refresh_every=N`. Every run starts from the same base on the same
pictures. The seed gives the trainable's start, the order of the pictures, times and noise of the training steps, and
the noise of the held-out question; all arms of one seed share these, so differences are taken seed by seed: intervals
are those of Student's t over seeds. "Base" is the model before the first step. Runs that lie finished in --output, with
the same settings, are not done again; unfinished ones are removed and done anew.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t as student

from fairhuman_jax.config import load_config
from fairhuman_jax.devices.kernels import choose_cpu_kernels
from fairhuman_jax.losses import COMBINERS
from fairhuman_jax.training.logging import METRICS, read_metrics
from fairhuman_jax.training.loop import train
from fairhuman_jax.training.preemption import Interrupted

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("sum", "mpd", "uncertainty", "cagrad", "mpd/4", "mpd/16")
REFERENCE = "sum"
DESCRIBED = ("weight/", "norm/", "cosine/")
CONFIDENCE = 0.95
Record = dict[str, Any]
Records = Mapping[str, Mapping[int, Record]]  # arm, seed
Interval = tuple[float, float]  # mean and half of the interval's length


def arm_settings(arm: str) -> list[str]:
    """`--set` arguments of an arm. Raises: ValueError for a rule that does not exist or a bad interval."""
    method, _, every = arm.partition("/")
    if method not in COMBINERS:
        raise ValueError(f"arm {arm!r}: no rule {method!r}; known: {', '.join(COMBINERS)}")
    if every and not (every.isdecimal() and int(every) > 0):
        raise ValueError(f"arm {arm!r}: after the slash stands a number of steps, as in mpd/4")
    return [f"fair.method={method}", f"fair.refresh_every={every or 1}"]


def finished(folder: Path, settings: Sequence[str]) -> Record | None:
    """The record of a run that was done before with the same settings."""
    path = folder / "result.json"
    if path.is_file() and (found := json.loads(path.read_text()))["settings"] == list(settings):
        return found
    return None


def run(config: Path, settings: Sequence[str], folder: Path) -> Record:
    """One run from its first step to its last, on record in `folder`/result.json."""
    shutil.rmtree(folder, ignore_errors=True)
    result = train(load_config(config, list(settings)))
    found = {name: getattr(result, name) for name in ("before", "after", "images_per_second", "skipped")}
    found |= {"settings": list(settings), "means": means(read_metrics(folder / METRICS))}
    (folder / "result.json").write_text(json.dumps(found))
    jax.clear_caches()  # compiled programs are on disk; those in memory would pile up
    return found


def means(logged: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Weights, gradient norms and cosines, averaged over the logged steps that have them."""
    names = dict.fromkeys(name for line in logged for name in line if name.startswith(DESCRIBED))
    return {name: mean(value for line in logged if (value := line.get(name)) is not None) for name in names}


def study(options: argparse.Namespace) -> dict[str, dict[int, Record]]:
    """All arms of one seed, then of the next; ends early rather than begin a run that would pass the limit."""
    shared = [*options.set, "train.checkpoint_every=0", "preview.steps=1"]
    if options.steps is not None:
        shared.append(f"train.steps={options.steps}")
    records: dict[str, dict[int, Record]] = {arm: {} for arm in options.arms}
    began, longest = time.monotonic(), 0.0
    for seed in range(options.seeds):
        for arm in options.arms:
            folder = options.output / f"{arm.replace('/', '-every-')}-{seed}"
            settings = [*shared, *arm_settings(arm), f"train.seed={seed}", f"output={folder}"]
            found = finished(folder, settings)
            if found is None:
                start = time.monotonic()
                if start - began + longest > 60 * options.limit_minutes:
                    print(f"stopped before {arm}, seed {seed}: the same command goes on from there\n")
                    return records
                found = run(options.config, settings, folder)
                longest = max(longest, time.monotonic() - start)
            records[arm][seed] = found
    return records


# ---- statistics ------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> Interval:
    """Mean and half-width t s / sqrt(n) of the 95 % confidence interval; infinite for one value."""
    if len(values) < 2:
        return mean(values), math.inf
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def percent(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """100 (value / reference - 1), paired over the seeds that both have; None where there are none."""
    seeds = sorted(values.keys() & reference.keys())
    return interval([100 * (values[seed] / reference[seed] - 1) for seed in seeds]) if seeds else None


def column(runs: Mapping[int, Record], when: str, name: str) -> dict[int, float]:
    """One number of each seed."""
    return {seed: record[when][name] for seed, record in runs.items()}


def objectives(records: Records) -> list[str]:
    """The names of the losses, in the system's order."""
    return next((list(record["before"]) for runs in records.values() for record in runs.values()), [])


def changes(records: Records) -> dict[str, dict[str, Interval | None]]:
    """Arm, objective: held-out loss after training against that before it, in percent."""
    return {
        arm: {name: percent(column(runs, "after", name), column(runs, "before", name)) for name in objectives(records)}
        for arm, runs in records.items()
    }


def differences(records: Records) -> dict[str, dict[str, Interval | None]]:
    """Arm, objective: held-out loss after training against the plain sum's, in percent; without the sum itself."""
    reference = records.get(REFERENCE, {})
    return {
        arm: {
            name: percent(column(runs, "after", name), column(reference, "after", name)) for name in objectives(records)
        }
        for arm, runs in records.items()
        if arm != REFERENCE
    }


def losses(records: Records) -> dict[str, dict[str, Interval | None]]:
    """Arm, objective: held-out loss after training; "base": before it."""
    base = {seed: record for runs in records.values() for seed, record in runs.items()}
    rows = {"base": (base, "before")} | {arm: (runs, "after") for arm, runs in records.items()}
    return {
        arm: {name: interval(list(column(runs, when, name).values())) if runs else None for name in objectives(records)}
        for arm, (runs, when) in rows.items()
    }


def descriptions(records: Records) -> dict[str, dict[str, Interval | None]]:
    """Arm, quantity: its mean over seeds, without an interval; None where the arm does not log it."""
    described = {}
    for arm, runs in records.items():
        found = [
            record["means"] | {name: record[name] for name in ("images_per_second", "skipped")}
            for record in runs.values()
        ]
        described[arm] = {name: (mean(each[name] for each in found), math.inf) for name in (found[0] if found else {})}
    names = dict.fromkeys(name for row in described.values() for name in row)
    return {arm: {name: row.get(name) for name in names} for arm, row in described.items()}


# ---- tables and plot -------------------------------------------------------------------------------------------------


def cell(found: Interval | None, form: str) -> str:
    """mean ± half-width."""
    if found is None:
        return "-"
    centre, half = found
    return f"{centre:{form}} ± {half:{form.lstrip('+')}}" if math.isfinite(half) else f"{centre:{form}}"


def table(title: str, rows: Mapping[str, Mapping[str, Interval | None]], form: str) -> list[str]:
    """Markdown: a line for each arm, a column for each objective."""
    names = list(next(iter(rows.values()), {}))
    lines = [title, "", f"| {' | '.join(['rule', *names])} |", f"|{' --- |' * (len(names) + 1)}"]
    lines += [f"| {arm} | {' | '.join(cell(row[name], form) for name in names)} |" for arm, row in rows.items()]
    return [*lines, ""]


def report(records: Records) -> str:
    """All tables."""
    seeds = {arm: len(runs) for arm, runs in records.items()}
    lines = [f"Seeds: {', '.join(f'{arm} {count}' for arm, count in seeds.items())}; ± is 95 % confidence.", ""]
    lines += table("Held-out losses after training:", losses(records), ".5f")
    lines += table("Change of the held-out losses against the base, %, paired:", changes(records), "+.2f")
    if records.get(REFERENCE):
        title = f"Difference of the held-out losses to those of `{REFERENCE}`, %, paired:"
        lines += table(title, differences(records), "+.2f")
    return "\n".join([*lines, *table("Means over steps and seeds:", descriptions(records), ".4g")])


def plot(rows: Mapping[str, Mapping[str, Interval | None]], title: str, path: Path) -> None:
    """A panel for each objective, a line for each arm: a dot at the mean, a bar over the interval, zero marked."""
    arms, names = list(rows), list(next(iter(rows.values())))
    left, wide, gap, line, top, below, zoom = 130, 280, 20, 30, 70, 30, 2
    bottom = top + line * len(arms)
    size = (left + len(names) * (wide + gap), bottom + below)
    picture = Image.new("RGB", (size[0] * zoom, size[1] * zoom), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14 * zoom)

    def at(x: float, y: float) -> tuple[float, float]:
        return x * zoom, y * zoom

    def write(x: float, y: float, text: str, anchor: str = "mm") -> None:
        draw.text(at(x, y), text, fill="black", font=font, anchor=anchor)

    write(10, 18, title, "lm")
    for i, arm in enumerate(arms):
        write(left - 12, top + line * (i + 0.5), arm, "rm")
    for k, name in enumerate(names):
        start = left + k * (wide + gap)
        found = [(i, each) for i, arm in enumerate(arms) if (each := rows[arm][name]) is not None]
        to_x, ticks = axis((each for _, each in found), start, wide)
        write(start + wide / 2, top - 16, name)
        for tick in ticks:
            x = to_x(tick)
            draw.line([at(x, top), at(x, bottom)], fill="lightgrey" if tick else "black", width=zoom)
            write(x, bottom + 14, f"{tick:+g}" if tick else "0")
        for i, (centre, half) in found:
            y, x, reach = top + line * (i + 0.5), to_x(centre), half if math.isfinite(half) else 0.0
            draw.line([at(to_x(centre - reach), y), at(to_x(centre + reach), y)], fill="steelblue", width=3 * zoom)
            draw.ellipse([at(x - 5, y - 5), at(x + 5, y + 5)], fill="navy")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize(size, Image.Resampling.LANCZOS).save(path, optimize=True)


def axis(values: Iterable[Interval], left: float, width: float) -> tuple[Callable[[float], float], list[float]]:
    """(value to pixel, round tick values) over all intervals and zero."""
    edges = [0.0]
    for centre, half in values:
        half = half if math.isfinite(half) else 0.0
        edges += [centre - half, centre + half]
    span = max(max(edges) - min(edges), 1e-6)
    low, high = min(edges) - 0.05 * span, max(edges) + 0.05 * span
    unit = 10.0 ** math.floor(math.log10(span / 3))
    unit *= max(step for step in (1, 2, 5) if step * unit <= span / 3)
    ticks = [round(unit * i, 9) for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
    return lambda value: left + width * (value - low) / (high - low), ticks


def main() -> None:
    """Parse the command line, train what is not done, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "people_lora.py")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="RULE[/N]", help=f"default: {' '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the configuration's)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ...")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train.py, for all runs")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="begin no run that would end later")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "objectives.png")
    options = parser.parse_args()
    try:
        for arm in options.arms:
            arm_settings(arm)
    except ValueError as error:
        parser.error(str(error))
    jax.config.update("jax_compilation_cache_dir", str((options.output / "xla").absolute()))
    choose_cpu_kernels()
    try:
        records = study(options)
    except Interrupted as stopped:  # what is finished is kept
        print(stopped)
        raise SystemExit(stopped.exit_code) from None
    if not objectives(records):
        raise SystemExit("no run is finished: give --limit-minutes more")
    print(report(records))
    plot(changes(records), "Change of held-out losses, % (lower is better; bars: 95 % confidence)", options.plot)


if __name__ == "__main__":
    main()
