"""What one step of HumanSD costs by parts, here and as published: matrix products and convolutions of the programs.

    python benchmarks/humansd_cost.py                    # Stable Diffusion 2.1 and HigherHRNet-W48 at 512 pixels
    python benchmarks/humansd_cost.py --batch 8 --remat full

Programs are traced, neither compiled nor run, so no weights are needed. The published step encodes picture, skeleton
and joint counts, decodes the clean latents (for a log that is not written) and the error, and runs the pose network.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.contract import Parts, WholePhase
from fairhuman_jax.models import HigherHRNet, presets
from fairhuman_jax.systems.humansd.system import HumanSD, HumanSDConfig
from fairhuman_jax.training.objectives import linearise
from fairhuman_jax.training.program_cost import flops
from fairhuman_jax.weights.shapes import model_shapes

BASE = "stabilityai/stable-diffusion-2-1-base"
ENCODE, DECODE, POSE, TEXT = "autoencoder, encode", "autoencoder, decode", "pose network", "text encoder"
# How often a step runs each network: the reference loss, the intent loss (and the fair one), the published program.
RUNS = {ENCODE: (3, 2, 3), DECODE: (1, 1, 2), POSE: (1, 1, 1), TEXT: (1, 1, 1)}


def system_of_shapes(remat: str, loss: str) -> HumanSD:
    """HumanSD at full size with shapes for parameters."""
    base = open_base(BASE, shapes=True, remat=remat)
    system = HumanSDConfig(pose_latent="sample", remat=remat).attach(base)
    network = HigherHRNet.from_config(presets.HIGHER_HRNET_W48)
    config = dataclasses.replace(system.config, loss=loss, pose_network="shapes")
    variables = model_shapes(network, jnp.float32)
    return dataclasses.replace(system, config=config, pose_network=network, pose_variables=variables)


def batch_of_shapes(system: HumanSD, count: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
    """One batch as the loader makes it."""
    tokens = system.pipeline.text_encoders[0].to_config()["max_position_embeddings"]
    picture = jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)
    return {
        "image": picture,
        "conditioning_image": picture,
        "input_ids": jax.ShapeDtypeStruct((count, tokens), jnp.int32),
        "position": jax.ShapeDtypeStruct((count,), jnp.int32),
    }


def cost(function: Callable[..., Any], *shapes: Any) -> int:
    """Floating-point operations of a function of arrays of these shapes."""
    return flops(jax.make_jaxpr(function)(*shapes))


def parts(system: HumanSD, count: int, side: int) -> dict[str, int]:
    """The cost of one run of each network on a batch."""
    params = system.pipeline.params | {"pose_network": system.pose_variables}
    pictures = jax.ShapeDtypeStruct((count, side, side, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((count, *system.latent_shape(side, side)), jnp.float32)
    ids = {"input_ids": batch_of_shapes(system, count, side)["input_ids"]}
    return {
        ENCODE: cost(system.encode_moments, params, pictures),
        DECODE: cost(system.decode_unscaled, params, latents),
        POSE: cost(system.heatmaps, params, pictures),
        TEXT: cost(system.encode_text, params, ids),
    }


def step(system: HumanSD, count: int, side: int) -> int:
    """The cost of losses and gradient of one batch as the trainer computes them."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = system.pipeline.params
    frozen = {name: leaves for name, leaves in params.items() if name != "unet"}
    frozen["pose_network"] = system.pose_variables

    def gradient(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return linearise(WholePhase(system=system), Parts(trainable, {}, frozen), batch, key).pull_all()

    return cost(gradient, {"unet": params["unet"]}, frozen, batch_of_shapes(system, count, side), key)


def rows(remat: str, count: int, side: int) -> list[tuple[str, list[float]]]:
    """(part, TFLOP of one run, and in a step of the reference loss, the intent loss and the published program)."""
    system = system_of_shapes(remat, "reference")
    each = parts(system, count, side)
    denoiser = step(system, count, side) - sum(RUNS[name][0] * run for name, run in each.items())
    table: list[tuple[str, list[float]]] = [
        (name, [run, *(run * times for times in RUNS[name])]) for name, run in each.items()
    ]
    table.append(("denoiser, forward and backward", [denoiser] * 4))
    table.append(("step", [math.nan, *(sum(row[column] for _, row in table) for column in (1, 2, 3))]))
    return [(name, [value / 1e12 for value in values]) for name, values in table]


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description="Cost of one step of HumanSD by parts.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--remat", default="none", choices=["none", "full", "attention"])
    options = parser.parse_args()
    print(f"{BASE}, {options.size} pixels, batch {options.batch}, remat {options.remat}; TFLOP")
    print(f"{'':32}{'one run':>10}{'reference':>11}{'intent':>10}{'published':>11}")
    for name, (run, reference, intent, published) in rows(options.remat, options.batch, options.size):
        alone = "" if math.isnan(run) else f"{run:.3f}"
        print(f"{name:32}{alone:>10}{reference:11.3f}{intent:10.3f}{published:11.3f}")


if __name__ == "__main__":
    main()
