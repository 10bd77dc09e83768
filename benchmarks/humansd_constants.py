"""What HumanSD's published weight is far from people: s E(17), for the autoencoder of any pipeline.

    python benchmarks/humansd_constants.py                                  # the shipped people model
    python benchmarks/humansd_constants.py stabilityai/stable-diffusion-2-1-base --size 512

The published loss encodes a picture that is the constant 17 but near joints, so its weight is mostly one constant a
latent channel: 1 + 0.1 c multiplies that channel's squared error, at all steps and everywhere. Printed are the mean c
over the picture, its spread between places (borders, attention) and that of the posterior sample.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.losses import heatmap_weight

JOINTS = 17


@dataclass(frozen=True)
class Constants:
    """Each a number a latent channel: mean of the weight, its spread over the picture, that of the posterior."""

    mean: np.ndarray
    over_picture: np.ndarray
    of_posterior: np.ndarray


def constants(system: LatentDiffusion, side: int) -> Constants:
    """The published weight where no joint is seen in a picture of `side` pixels."""
    height, width, channels = system.latent_shape(side, side)
    params, error = system.pipeline.params, jnp.zeros((1, height, width, channels))

    @partial(jax.jit, static_argnames="sample_posterior")
    def weight(key: jax.Array, sample_posterior: bool) -> jax.Array:
        return heatmap_weight(
            error,
            error,
            vae_decode=lambda _: jnp.zeros((1, side, side, 3)),
            vae_encode_moments=partial(system.encode_moments, params),
            pose_heatmap_fn=lambda _: jnp.zeros((1, side // 2, side // 2, JOINTS)),
            key=key,
            latent_scale=system.pipeline.vae.scaling_factor,
            sample_posterior=sample_posterior,
        )

    key = jax.random.key(0)
    mean = np.asarray(weight(key, False))
    noise = np.asarray(weight(key, True)) - mean
    axes = (0, 1, 2)
    return Constants(mean.mean(axes), mean.std(axes), noise.std(axes))


def main() -> None:
    """Reads the command line and prints a row a latent channel."""
    parser = argparse.ArgumentParser(description="The constants of HumanSD's published weight.")
    parser.add_argument("base", nargs="?", default="people", help="people (shipped), a folder, a file or a hub id")
    parser.add_argument("--size", type=int, default=None, help="pixels a side (default: the autoencoder's own)")
    options = parser.parse_args()
    system = LatentDiffusion(open_base(options.base))
    side = options.size or system.pipeline.vae.config["sample_size"]
    found = constants(system, side)
    print(f"{options.base}, {side} pixels, s = {system.pipeline.vae.scaling_factor}")
    print("channel  mean s E(17)  over the picture  of the sample  factor 1 + 0.1 c")
    for channel, row in enumerate(zip(found.mean, found.over_picture, found.of_posterior, strict=True)):
        print(f"{channel:7}  {row[0]:12.4f}  {row[1]:16.4f}  {row[2]:13.4f}  {1.0 + 0.1 * row[0]:16.4f}")


if __name__ == "__main__":
    main()
