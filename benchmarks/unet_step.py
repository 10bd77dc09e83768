"""One call of a full-size UNet, batch 2, against torch diffusers on the same machine, in turn in one run.

    python benchmarks/unet_step.py                      # SD 1.5 and SDXL at 512 px, float32 and bfloat16
    python benchmarks/unet_step.py --models SD15_UNET --dtypes float32 --pixels 512
    python benchmarks/unet_step.py --models SDXL_UNET --dtypes bfloat16 --unrolled      # ours with scan=False

Each side runs in a process of its own, one after the other and twice, so that neither runs beside the other and only
one model is in memory (SDXL in float32: 11 GiB). Weights are random. The ratio is torch's median time over ours: above
1, ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from fairhuman_jax.models import presets

BATCH, TOKENS = 2, 77
PASSES = 2


def inputs(config: dict[str, Any], pixels: int) -> dict[str, np.ndarray]:
    """Random inputs, NHWC."""
    rng = np.random.default_rng(0)
    side = pixels // 8
    found = {
        "latents": rng.standard_normal((BATCH, side, side, config["in_channels"]), np.float32),
        "timesteps": np.full((BATCH,), 481, np.int32),
        "text": rng.standard_normal((BATCH, TOKENS, config["cross_attention_dim"]), np.float32),
    }
    if config.get("addition_embed_type"):
        found["text_embeds"] = rng.standard_normal((BATCH, 1280), np.float32)
        found["time_ids"] = np.full((BATCH, 6), float(pixels), np.float32)
    return found


def ours(config: dict[str, Any], given: dict[str, np.ndarray], dtype: str, **runtime: Any) -> Any:
    """A call of this package's network, compiled as `sample.py` compiles it; runtime: attention, scan."""
    from fairhuman_jax.devices.kernels import choose_cpu_kernels

    choose_cpu_kernels(dtype)
    import jax
    import jax.numpy as jnp

    from fairhuman_jax.models import UNet2DCondition
    from fairhuman_jax.weights import expected_params

    network = UNet2DCondition.from_config(config, dtype=jnp.dtype(dtype), **runtime)
    key = jax.random.key(0)
    params = jax.tree.map(
        lambda leaf: 0.02 * jax.random.normal(key, leaf.shape, jnp.dtype(dtype)), expected_params(network)
    )
    added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given} or None
    program = jax.jit(lambda p, *arguments: network.apply({"params": p}, *arguments))
    arguments = jax.device_put((given["latents"], given["timesteps"], given["text"], added))
    return lambda: jax.block_until_ready(program(params, *arguments))


def theirs(config: dict[str, Any], given: dict[str, np.ndarray], dtype: str) -> Any:
    """A call of diffusers' network, as it comes (eager), with its default attention."""
    import torch
    from diffusers import UNet2DConditionModel

    kind = getattr(torch, dtype)
    with torch.device("cpu"):
        torch.set_default_dtype(kind)
        network = UNet2DConditionModel.from_config(config).eval()
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    latents = tensors["latents"].permute(0, 3, 1, 2).contiguous().to(kind)
    added = {name: tensors[name].to(kind) for name in ("text_embeds", "time_ids") if name in tensors} or None

    def call() -> Any:
        with torch.no_grad():
            return network(latents, tensors["timesteps"], tensors["text"].to(kind), added_cond_kwargs=added)

    return call


def serve(options: argparse.Namespace) -> None:
    """Prints the seconds of the first call and of `rounds` more."""
    config = getattr(presets, options.models[0])
    given = inputs(config, options.pixels)
    dtype = options.dtypes[0]
    if options.side == "ours":
        call = ours(config, given, dtype, attention=options.attention, scan=not options.unrolled)
    else:
        call = theirs(config, given, dtype)
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)


def race(model: str, dtype: str, options: argparse.Namespace) -> dict[str, str]:
    """One row: each side in a process of its own, in turn, `PASSES` times; first calls (compilation) apart."""
    command = [sys.executable, __file__, "--models", model, "--dtypes", dtype, "--pixels", str(options.pixels)]
    command += ["--attention", options.attention, "--rounds", str(options.rounds)]
    command += ["--unrolled"] if options.unrolled else []
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(PASSES):
        for side, times in seconds.items():
            done = subprocess.run([*command, "--side", side], stdout=subprocess.PIPE, text=True, check=True)
            start, *rest = map(float, done.stdout.split())
            first.setdefault(side, start)
            times += rest
    middle = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "model": model,
        "dtype": dtype,
        "ours (s)": f"{middle['ours']:.2f}",
        "torch (s)": f"{middle['torch']:.2f}",
        "torch / ours": f"{middle['torch'] / middle['ours']:.2f}",
        "first call, ours (s)": f"{first['ours']:.1f}",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SD15_UNET", "SDXL_UNET"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--unrolled", action="store_true", help="transformer stacks of ours unrolled, not scanned")
    parser.add_argument("--side", choices=["ours", "torch"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    rows = [race(model, dtype, options) for model in options.models for dtype in options.dtypes]
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    print("\n".join("| " + " | ".join(row.values()) + " |" for row in rows))


if __name__ == "__main__":
    main()
