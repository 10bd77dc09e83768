"""Training of a bottom-up pose network: heat maps of joints, and tags that say whose joints they are.

Sources: Newell et al. 2017 (associative embedding), section 3.2; Cheng et al. 2020 (HigherHRNet), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fairhuman_jax.contract import Batch, Parts, PreviewConfig, System, SystemConfig
from fairhuman_jax.models import HigherHRNet, stage_mean
from fairhuman_jax.weights import expected_params, save_model

PyTree = Any
Size = tuple[int, ...]  # (height, width)
MOMENTUM_STEPS = 20.0  # batches that the running moments of batch norms remember
LAST_DEVIATION = 1e-3  # of the initial kernels that make heat maps and tags


@dataclass(frozen=True)
class PoseNetworkConfig(SystemConfig):
    """Training of a bottom-up pose network from scratch."""

    network: Annotated[Mapping[str, Any], "config of the HigherHRNet"] = field(default_factory=dict)
    sigma: Annotated[float, "deviation of the target Gaussians, in cells of either heat map"] = 1.0
    tag_weight: Annotated[float, "weight of the grouping loss beside the mean squared error of the heat maps"] = 1e-3
    dtype: Annotated[str, "dtype of the computation"] = "float32"

    def build(self, shapes: bool = False) -> PoseNetwork:
        """The network, not yet initialised. Raises: ValueError for config keys that are not known."""
        return PoseNetwork(HigherHRNet.from_config(dict(self.network), dtype=jnp.dtype(self.dtype)), self)


@dataclass(frozen=True, eq=False)
class PoseNetwork(System):
    """Trainable: the network's parameters. Frozen: nothing. One objective: pose.

    A batch has `image` uint8 [B, H, W, 3] and `keypoints` float32 [B, P, J, 3]: (x, y, confidence) of P people at
    most, pixel centres at +.5, and confidence 0 for joints that are not seen. In training batch norms take the moments
    of the batch, on each device those of its part; the running ones, which an export stores, are the statistics.
    """

    network: HigherHRNet
    config: PoseNetworkConfig

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Random parameters: kernels normal with variance 2 / fan-in, those of the last layers small, so that a network
        starts from empty heat maps; norms that change nothing."""
        return random_params(self.network, key), {}

    def init_statistics(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """{"moments": means and variances of every batch norm, "steps": the number of batches in them}."""
        shapes = expected_params(self.network)["batch_stats"]
        return {"moments": jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes), "steps": jnp.float32(0.0)}

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """{"coarse": heat maps and tags [B, H/4, W/4, 2 J], "fine": heat maps [B, H/2, W/2, J], "moments"}."""
        (coarse, fine), changed = self.network.apply(
            {"params": trainable}, self._pixels(batch["image"]), use_running_average=False, mutable=["batch_stats"]
        )
        return {"coarse": coarse, "fine": fine, "moments": jax.lax.stop_gradient(changed["batch_stats"])}

    def update_statistics(self, statistics: PyTree, prediction: PyTree) -> PyTree:
        """m + (new - m) / n over the first batches, later m + (new - m) / MOMENTUM_STEPS."""
        steps = statistics["steps"] + 1.0
        share = 1.0 / jnp.minimum(steps, MOMENTUM_STEPS)
        moments = jax.tree.map(lambda m, new: m + share * (new - m), statistics["moments"], prediction["moments"])
        return {"moments": moments, "steps": steps}

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Mean squared errors of both heat maps, and `tag_weight` times the grouping loss."""
        keypoints, picture = batch["keypoints"], batch["image"].shape[1:3]
        heat, tags = jnp.split(prediction["coarse"], 2, axis=-1)
        errors = [
            jnp.mean(jnp.square(found - gaussians(keypoints, picture, found.shape[1:3], self.config.sigma)))
            for found in (heat, prediction["fine"])
        ]
        return {"pose": sum(errors) + self.config.tag_weight * tag_loss(tags, keypoints, picture)}

    def sample(self, trainable: PyTree, frozen: PyTree, request: jax.Array, key: jax.Array) -> jax.Array:
        """The pictures [N, H, W, 3] uint8 in `request` at half brightness, red where a joint is found, in [-1, 1]."""
        prediction = self.predict(trainable, frozen, {"image": request}, key)
        heat = jnp.max(stage_mean(prediction["coarse"], prediction["fine"]), axis=-1, keepdims=True)
        heat = jnp.clip(heat, 0.0, 1.0).repeat(2, axis=1).repeat(2, axis=2)
        red = jnp.asarray([1.0, 0.0, 0.0])
        return 2.0 * ((1.0 - heat) * 0.5 * request / 255.0 + heat * red) - 1.0

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[jax.Array, list[str]]:
        """The first held-out images, in which joints are to be found."""
        images = held_out["image"][:16]
        return jnp.asarray(images), [""] * len(images)

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes a folder that `load_pose_network` reads, in float16, and returns it."""
        variables = {"params": parts.trainable, "batch_stats": parts.statistics["moments"]}
        save_model(self.network, variables, folder, dtype="float16")
        return folder

    def _pixels(self, image: jax.Array) -> jax.Array:
        """uint8 -> float32 as the network wants it."""
        return self.network.normalise(image.astype(jnp.float32) / 255.0)


def random_params(network: HigherHRNet, key: jax.Array) -> PyTree:
    """See `PoseNetwork.init`. All kernels are parts of one draw: drawn one by one they compile for a minute."""
    shapes: dict[tuple[str, ...], Any] = flatten_dict(expected_params(network)["params"])
    ends = np.cumsum([shape.size if shape.ndim > 1 else 0 for shape in shapes.values()]).tolist()

    @jax.jit
    def draw(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        values, params = jax.random.normal(key, (ends[-1],)), {}
        for (path, shape), end in zip(shapes.items(), ends, strict=True):
            if shape.ndim == 1:
                params[path] = jnp.full(shape.shape, float(path[-1] == "scale"), jnp.float32)
            else:
                last = path[-2].startswith("final_layers")
                deviation = LAST_DEVIATION if last else math.sqrt(2.0 / math.prod(shape.shape[:-1]))
                params[path] = deviation * values[end - shape.size : end].reshape(shape.shape)
        return params

    return unflatten_dict(draw(key))


def to_cells(points: jax.Array, picture: Size, cells: Size) -> jax.Array:
    """Coordinates (x, y) [..., 2] in pixels, centres at +.5, as places in a heat map whose corner cells are the corner
    pixels, centres at whole numbers.

    Source: Huang et al. 2020 (UDP), section 4.1.
    """
    scale = [(small - 1) / (large - 1) for small, large in zip(cells[::-1], picture[::-1], strict=True)]
    return (points - 0.5) * jnp.asarray(scale, jnp.float32)


def gaussians(keypoints: jax.Array, picture: Size, cells: Size, sigma: float) -> jax.Array:
    """Heat maps float32 [B, *cells, J] of key points [B, P, J, 3]: exp(-d^2 / (2 sigma^2)), the highest of all people.

    d is the distance to the exact place, in cells. Joints of confidence 0 leave no trace.
    """
    at = to_cells(keypoints[..., :2], picture, cells)
    across, down = (
        jnp.exp(-0.5 * jnp.square((jnp.arange(size) - at[..., axis, None]) / sigma))
        for axis, size in ((0, cells[1]), (1, cells[0]))
    )
    across *= (keypoints[..., 2] > 0)[..., None]
    return jnp.moveaxis(jnp.max(down[..., :, None] * across[..., None, :], axis=1), 1, -1)


def tag_loss(tags: jax.Array, keypoints: jax.Array, picture: Size) -> jax.Array:
    """Grouping loss of tags [B, h, w, J] at key points [B, P, J, 3]: a person's tags agree, those of people differ.

    Mean over people of the variance of their tags, plus half the mean over pairs of exp(-(difference of means)^2);
    then the mean over pictures. Joints count where they are seen inside the picture.
    """
    height, width = tags.shape[1:3]
    at = jnp.round(to_cells(keypoints[..., :2], picture, (height, width))).astype(jnp.int32)
    x, y = at[..., 0], at[..., 1]
    seen = (keypoints[..., 2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    rows, joints = jnp.arange(len(tags))[:, None, None], jnp.arange(tags.shape[-1])
    found = tags[rows, jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1), joints].astype(jnp.float32)
    count = seen.sum(axis=-1)
    mean = jnp.sum(found * seen, axis=-1) / jnp.maximum(count, 1)
    spread = jnp.sum(jnp.square(found - mean[..., None]) * seen, axis=-1) / jnp.maximum(count, 1)
    present = count > 0
    people = present.sum(axis=-1)
    pull = spread.sum(axis=-1) / jnp.maximum(people, 1)
    both = present[:, :, None] & present[:, None, :] & ~jnp.eye(present.shape[1], dtype=bool)
    closeness = jnp.exp(-jnp.square(mean[:, :, None] - mean[:, None, :])) * both
    push = 0.5 * closeness.sum(axis=(1, 2)) / jnp.maximum(people * (people - 1), 1)
    return jnp.mean(pull + push)
