"""Load time and peak memory of a full-size SDXL folder, float16 on disk, against diffusers and transformers.

    python benchmarks/loading.py                        # writes 6.5 GiB of random weights first
    python benchmarks/loading.py --only text_encoder    # a part of it

Each side loads all networks in a process of its own, in turn, `--rounds` times; both read a warm page cache after the
first round, whose times are left out. "private" is the largest anonymous memory seen (sampled every 5 ms), that is
without the pages of mapped files, which the system may drop; "peak" is the kernel's high-water mark with them. On a
CPU torch's parameters are views of the mapped file, read when they are first used; "copied" reads them into memory of
their own, as ours are, whose axes are in another order than the file's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from random_models import SDXL_PARTS, library_and_class, write_random_model

SIDES = ("ours", "torch, mapped", "torch, copied")


def load(side: str, folder: Path, parts: list[str]) -> object:
    """All networks of the folder, as they are stored."""
    if side == "ours":
        import jax

        from fairhuman_jax.weights import load_model

        return jax.block_until_ready([load_model(folder, part)[1] for part in parts])
    import diffusers
    import torch
    import transformers

    kept = []
    for part in parts:
        library, name = library_and_class(SDXL_PARTS[part])
        network = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        kept.append(network.from_pretrained(folder / part, torch_dtype=torch.float16))
        if side == "torch, copied":
            for parameter in kept[-1].parameters():
                parameter.data = parameter.data.clone()
    return kept


def status(name: str) -> float:
    """A figure of this process in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**20
    raise ValueError(f"no {name} in /proc/self/status")


def measure(side: str, folder: Path, parts: list[str]) -> dict[str, float]:
    """Seconds, and GiB above what the imports took."""
    load(side, folder, [])
    before, largest, done = status("RssAnon"), 0.0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.005):
            largest = max(largest, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    kept = load(side, folder, parts)
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    del kept
    return {"seconds": seconds, "private": largest - before, "peak": status("VmHWM")}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(SDXL_PARTS), action="append", help="networks to load (default: all)")
    parser.add_argument("--scratch", type=Path, default=None, help="where the folder is written")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.only or list(SDXL_PARTS)
    if options.side:
        print(json.dumps(measure(options.side, options.folder, parts)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for part in parts:
            write_random_model(SDXL_PARTS[part], Path(scratch) / part)
        size = sum(path.stat().st_size for path in Path(scratch).rglob("*.safetensors")) / 2**30
        command = [sys.executable, __file__, "--folder", scratch]
        command += [flag for part in parts for flag in ("--only", part)]
        for _ in range(options.rounds + 1):
            for side in SIDES:
                done = subprocess.run([*command, "--side", side], capture_output=True, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{size:.2f} GiB on disk; medians of {options.rounds}\n\n| | load (s) | private (GiB) | peak (GiB) |")
    print("| --- | --- | --- | --- |")
    middle = {s: {k: statistics.median(r[k] for r in runs[1:]) for k in runs[0]} for s, runs in found.items()}
    for side, row in middle.items():
        print(f"| {side} | {row['seconds']:.2f} | {row['private']:.2f} | {row['peak']:.2f} |")
    ratios = [middle["ours"][key] / middle["torch, copied"][key] for key in ("seconds", "private", "peak")]
    print("| ours / copied | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
