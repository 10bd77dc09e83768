"""Whether a HumanSD model of the people world puts people where skeletons say: key points found on what it draws.

    python -m fairhuman_jax.annotate fetch
    python train.py configs/people_humansd.py
    python benchmarks/humansd_poses.py runs/people_humansd/export --sheet humansd.png

First the held-out denoising error of the model given each picture's own skeleton, another's and none, at the same times
and with the same noise. Then held-out people with at least --joints visible joints are drawn twice from the same
caption and noise: given their own skeleton, and the next one's. MediaPipe's networks (annotate) look for people on both
pictures; OKS of the best one found to the person's exact joints, 0 where nobody is found. "black" is the same without a
skeleton. Intervals are 95 %, of the mean over people.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from objectives import cell, interval
from PIL import Image

from fairhuman_jax.annotate.mediapipe import MediaPipePoses
from fairhuman_jax.bases.opening import open_system
from fairhuman_jax.commands import table
from fairhuman_jax.config import load_config
from fairhuman_jax.devices.kernels import choose_cpu_kernels
from fairhuman_jax.drawing.requests import draw_images, make_request
from fairhuman_jax.evaluate.keypoint_metrics import oks, visible_area
from fairhuman_jax.keypoints.drawing import draw_poses
from fairhuman_jax.keypoints.poses import make_pose
from fairhuman_jax.systems.humansd.system import HumanSDConfig
from fairhuman_jax.training.datasets import held_out_batches, open_data

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "people_humansd.py"
BATCH = 32
THRESHOLD, SHOWN, COLUMNS = 0.2, 128, 8  # least score of a detection; pixels and number of pictures in a row of a sheet


def people(count: int, joints: int) -> list[dict[str, Any]]:
    """Held-out samples with key points and skeletons."""
    data = dataclasses.replace(load_config(CONFIG).data, keypoints=True)
    _, held_out = open_data(data)
    samples: list[Any] = [held_out[index] for index in range(len(held_out))]
    seen = [sample for sample in samples if (sample["keypoints"]["coco17"][0, :, 2] > 0).sum() >= joints]
    return seen[:count]


def skeleton(sample: dict[str, Any]) -> np.ndarray:
    """Everybody's skeleton on black, as training draws it."""
    height, width = sample["image"].shape[:2]
    return draw_poses([make_pose(person) for person in sample["keypoints"]["coco17"]], (height, width))


def draw(model: str, samples: list[dict[str, Any]], skeletons: list[np.ndarray], steps: int, guidance: float) -> Any:
    """uint8 pictures [N, H, W, 3] of the samples' captions with the given skeletons; seeds are their places."""
    system, params = open_system(model)
    captions, size = [sample["caption"] for sample in samples], skeletons[0].shape[:2]
    request = make_request(
        system,
        captions,
        range(len(samples)),
        steps=steps,
        guidance=guidance,
        size=(size[0], size[1]),
        pose=skeletons[0],
        pose_latent="mode",
    )
    request = dataclasses.replace(request, pose=jnp.asarray(np.stack(skeletons), jnp.float32) / 255.0)
    images = jax.jit(partial(draw_images, system))(params, request, jax.random.key(0))
    return np.rint((np.asarray(images) + 1.0) * 127.5).astype(np.uint8)


def similarities(pictures: np.ndarray, samples: list[dict[str, Any]]) -> np.ndarray:
    """OKS [N] of the best person found on each picture."""
    detector, found = MediaPipePoses(threshold=THRESHOLD), []
    for picture, sample in zip(pictures, samples, strict=True):
        truth = sample["keypoints"]["coco17"][0]
        scores = [oks(truth, pose.keypoints, visible_area(truth)) for pose in detector.detect(picture)]
        found.append(max(scores, default=0.0))
    return np.array(found)


def held_out_errors(
    system: Any, config: Path, leaf: str, given: Mapping[str, Callable[[dict[str, Any]], np.ndarray]]
) -> dict[str, float]:
    """Held-out denoising error, mean over samples at evenly spread times, by what takes the place of a batch's `leaf`.

    Times and noise are the same for all of `given`, functions of the batch by name; the samples are those of `config`.
    """
    data = load_config(config).data
    trainable, frozen = system.init(jax.random.key(0))
    batches = held_out_batches(open_data(data)[1], system, data, BATCH)

    @jax.jit
    def error(batch: dict[str, Any]) -> jax.Array:
        prediction = system.predict(trainable, frozen, batch, jax.random.key(1))
        return system.objectives(prediction, batch)["denoising"]

    return {name: float(np.mean([error(b | {leaf: of(b)}) for b in batches])) for name, of in given.items()}


def errors(model: str) -> dict[str, float]:
    """`held_out_errors` of a HumanSD by the skeletons that it is given."""
    leaf = "conditioning_image"
    given = {
        "own": lambda batch: batch[leaf],
        "wrong": lambda batch: np.roll(batch[leaf], 1, axis=0),
        "black": lambda batch: 0 * batch[leaf],
    }
    return held_out_errors(HumanSDConfig(base=model).build(), CONFIG, leaf, given)


def mean_and_interval(values: np.ndarray) -> str:
    """Mean with the half width of its 95 % interval by Student's t."""
    return cell(interval(values.tolist()), ".3f")


def enlarged(picture: np.ndarray) -> np.ndarray:
    """uint8 [SHOWN, SHOWN, 3]."""
    return np.asarray(Image.fromarray(picture).resize((SHOWN, SHOWN)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a HumanSD pipeline")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--joints", type=int, default=6, help="least number of visible joints of a person")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="a picture: skeletons, own, the next one's, black, the truth")
    options = parser.parse_args()
    choose_cpu_kernels()

    found_errors = errors(options.model)
    print("held-out denoising error: " + ", ".join(f"{name} {value:.5f}" for name, value in found_errors.items()))
    samples = people(options.count, options.joints)
    own = [skeleton(sample) for sample in samples]
    given = {"own": own, "wrong": own[1:] + own[:1], "black": [np.zeros_like(own[0])] * len(own)}
    drawn = {
        name: draw(options.model, samples, skeletons, options.steps, options.guidance)
        for name, skeletons in given.items()
    }
    drawn["the truth"] = np.stack([sample["image"] for sample in samples])
    found = {name: similarities(pictures, samples) for name, pictures in drawn.items()}
    figures = [
        {"skeleton": name, "OKS": mean_and_interval(values), "somebody found": f"{(values > 0).mean():.2f}"}
        for name, values in found.items()
    ]
    print(f"{len(samples)} people\n" + table(figures))
    print(f"own - wrong, paired: {mean_and_interval(found['own'] - found['wrong'])}")
    if options.sheet:
        shown = [np.stack(own), *drawn.values()]
        rows = [np.concatenate([enlarged(picture) for picture in pictures[:COLUMNS]], axis=1) for pictures in shown]
        Image.fromarray(np.concatenate(rows)).save(options.sheet)


if __name__ == "__main__":
    main()
