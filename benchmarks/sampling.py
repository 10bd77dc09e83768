"""Pictures by a full-size pipeline, here and by diffusers with `torch.compile`, in turn in one run: for one GPU.

    python benchmarks/sampling.py                       # SDXL, 1024 px, 30 steps, guidance, bfloat16, batch 1 and 8
    python benchmarks/sampling.py --base FOLDER --pixels 512 --steps 20 --batch 4

From prompts to pixels: text encoders, denoiser with guidance (two rows a picture), autoencoder. Without --base a folder
of random weights is written first (6.5 GiB), which both sides load; each measures in a process of its own, one after
the other. Torch's denoiser and decoder are in channels-last order and compiled (`--compile` names the mode, "none"
leaves it out). "MFU" is our program's products and convolutions (`training/program_cost.py`) over what the device could
do in that time by its maker's dense bfloat16 rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from random_models import write_random_sdxl

from fairhuman_jax.commands import table

PROMPT = "a photo of a woman in a red shirt"
SIDES = ("ours", "torch")
PEAK = {"A100": 312e12, "H100": 989.5e12, "H200": 989.5e12, "B200": 2250e12}  # dense bfloat16 operations a second, SXM


def ours(options: argparse.Namespace, batch: int) -> tuple[Callable[[], Any], dict[str, float]]:
    """(what draws a batch and waits for it, what the program costs), as `sample.py` draws."""
    from fairhuman_jax.devices.kernels import choose_cpu_kernels

    choose_cpu_kernels(options.dtype)
    import jax

    from fairhuman_jax.bases.opening import open_system
    from fairhuman_jax.drawing.requests import draw_images, make_request
    from fairhuman_jax.training.program_cost import flops

    system, params = open_system(options.base, dtype=options.dtype)
    size = (options.pixels, options.pixels)
    request = make_request(
        system, [PROMPT] * batch, range(batch), steps=options.steps, guidance=options.guidance, size=size
    )
    program = jax.jit(partial(draw_images, system))
    key = jax.random.key(0)
    cost = {"flop": float(flops(program.trace(params, request, key).jaxpr))}
    kind = jax.devices()[0].device_kind
    peak = next((rate for name, rate in PEAK.items() if name in kind), None)
    if peak is not None:
        cost["peak"] = peak
    return lambda: jax.block_until_ready(program(params, request, key)), cost


def theirs(options: argparse.Namespace, batch: int) -> tuple[Callable[[], Any], dict[str, float]]:
    """The same by diffusers."""
    import torch
    from diffusers import DiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(options.base, torch_dtype=getattr(torch, options.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    if options.compile != "none":
        pipeline.unet = torch.compile(pipeline.unet, mode=options.compile, fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=options.compile, fullgraph=True)

    def call() -> Any:
        images = pipeline(
            [PROMPT] * batch,
            height=options.pixels,
            width=options.pixels,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            output_type="pt",
        ).images
        if device == "cuda":
            torch.cuda.synchronize()
        return images

    return call, {}


def serve(options: argparse.Namespace) -> None:
    """Prints a JSON line: the seconds of the first call and of `rounds` more, and what the program costs."""
    call, cost = (ours if options.side == "ours" else theirs)(options, options.batch[0])
    seconds = []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, **cost}))


def race(batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: a process a side."""
    command = [sys.executable, __file__, "--base", options.base, "--batch", str(batch), "--compile", options.compile]
    for name in ("pixels", "steps", "guidance", "rounds", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    found = {}
    for side in SIDES:
        done = subprocess.run([*command, "--side", side], stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    middle = {side: statistics.median(row["seconds"][1:]) for side, row in found.items()}
    cost = found["ours"]
    return {
        "batch": batch,
        "ours (s)": middle["ours"],
        "torch (s)": middle["torch"],
        "torch / ours": middle["torch"] / middle["ours"],
        "TFLOP": cost["flop"] / 1e12,
        "MFU": cost["flop"] / cost["peak"] / middle["ours"] if "peak" in cost else None,
        "first call, ours (s)": cost["seconds"][0],
        "first call, torch (s)": found["torch"]["seconds"][0],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a diffusers folder (default: SDXL with random weights)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", default="max-autotune-no-cudagraphs", help="torch.compile's mode, or none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the folder of random weights is written")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        if options.base is None:
            options.base = scratch
            write_random_sdxl(Path(scratch))
        rows = [race(batch, options) for batch in options.batch]
    print(table(rows))


if __name__ == "__main__":
    main()
