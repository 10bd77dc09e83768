"""The smallest network with the interface of a HigherHRNet, and HumanSD around it without a file."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import random_params, small_pipeline

from fairhuman_jax.systems.humansd.system import HumanSD, HumanSDConfig, with_pose_channels
from fairhuman_jax.weights import Pipeline

JOINTS = 3
THRESHOLD = 0.3  # between the quantiles of what it sees in decoded errors


class Spots(nn.Module):
    """Two convolutions: pictures [B, H, W, 3] -> [B, H / 4, W / 4, 2 J], [B, H / 2, W / 2, J]."""

    @staticmethod
    def normalise(pictures: jax.Array) -> jax.Array:
        return (pictures - 0.4) / 1.25

    @nn.compact
    def __call__(self, pictures: jax.Array, use_running_average: bool = True) -> tuple[jax.Array, jax.Array]:
        coarse = nn.Conv(2 * JOINTS, (4, 4), strides=4, padding="VALID", name="coarse")(pictures)
        return coarse, nn.Conv(JOINTS, (2, 2), strides=2, padding="VALID", name="fine")(pictures)


@functools.cache
def spots_variables() -> dict:
    rng = np.random.default_rng(11)

    def layer(side: int, features: int) -> dict:
        kernel = rng.normal(size=(side, side, 3, features)) / side
        kernel -= kernel.mean((0, 1, 2))  # sees edges and colours, nothing in flat grey
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(features)}

    return {"params": {"coarse": layer(4, 2 * JOINTS), "fine": layer(2, JOINTS)}}


def widened(pipeline: Pipeline) -> Pipeline:
    """With pose channels that matter."""
    pipeline = with_pose_channels(pipeline)
    return dataclasses.replace(pipeline, params=pipeline.params | {"unet": random_params(pipeline.unet, 9)})


def humansd(pipeline: Pipeline | None = None, *, loss: str = "plain", **config) -> HumanSD:
    """The system with `Spots` for a pose network where the loss asks for one."""
    system = HumanSDConfig(**{"heat_threshold": THRESHOLD} | config).attach(pipeline or widened(small_pipeline()))
    if loss == "plain":
        return system
    options = dataclasses.replace(system.config, loss=loss, pose_network="spots")
    return dataclasses.replace(system, config=options, pose_network=Spots(), pose_variables=spots_variables())
