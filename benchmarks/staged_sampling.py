"""Time of sampling in stages against both denoisers at every step, in turn in one run.

    python benchmarks/staged_sampling.py                # 50 steps of PNDM, boundaries (15, 30), the shipped model

Both runs call the same two networks, of the shipped model's shape: in stages 31 times the scene model and 35 times the
subject model (a batch of 2 N each), at every step both 51 times. Boundaries are arguments of one compiled program.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from fairhuman_jax.bases.opening import open_system
from fairhuman_jax.commands import table
from fairhuman_jax.devices.kernels import choose_cpu_kernels
from fairhuman_jax.diffusion import pndm, staged_sample
from fairhuman_jax.drawing.requests import conditionings, make_request, seed_keys, unit_latents

EVERYWHERE = (-1, 1 << 20)  # no stage 1, no stage 3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="people")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--boundaries", type=int, nargs=2, default=(15, 30), metavar=("START", "FINAL"))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    choose_cpu_kernels()

    system, params = open_system(options.base)
    side = (system.pipeline.unet.sample_size or 64) * system.pipeline.vae.downscale
    prompts = ["a photo of a woman in a red shirt"] * options.images
    request = make_request(system, prompts, range(options.images), steps=options.steps, guidance=4.0, size=(side, side))
    other = jax.tree.map(lambda leaf: 0.99 * leaf, params["unet"])

    @jax.jit
    def draw(params, other, request, start, final):
        keys = seed_keys(jax.random.key(0), request.seeds)
        text, null = conditionings(system, params, request, keys)
        return staged_sample(
            partial(system.denoise, params),
            partial(system.denoise, params | {"unet": other}),
            unit_latents(system, request, keys),
            keys[:, 3],
            system.pipeline.schedule,
            options.steps,
            pndm(),
            null=null,
            text=text,
            augmented=dataclasses.replace(text, hidden=0.9 * text.hidden),
            start_merge_step=start,
            final_step=final,
        )

    seconds: dict[str, list[float]] = {"in stages": [], "both at every step": []}
    for round_ in range(options.rounds + 1):  # the first compiles
        for name, (start, final) in zip(seconds, (options.boundaries, EVERYWHERE), strict=True):
            began = time.perf_counter()
            draw(params, other, request, jnp.int32(start), jnp.int32(final)).block_until_ready()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(table([{"run": name, "seconds": f"{statistics.median(each):.2f}"} for name, each in seconds.items()]))
    print(f"in stages / at every step: {statistics.median(ratios):.2f}; programs compiled: {draw._cache_size()}")


if __name__ == "__main__":
    main()
