"""Poses from heat maps and tags: peaks, grouping by associative embedding, sub-pixel positions, missing joints.

Arrays are [h, w, joints]. Positions on a heat map and on a network's input count pixels from their centres, which is
what the unbiased data processing (UDP) of HigherHRNet asks for; poses that are handed out have pixel centres at +.5.
Source: mmpose 0.29.0, core/post_processing/group.py and core/evaluation; Newell et al. 2017 (grouping), Huang et al.
2020 (UDP), Zhang et al. 2020 (DARK).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from scipy.ndimage import correlate1d, maximum_filter
from scipy.optimize import linear_sum_assignment

from fairhuman_jax.keypoints.poses import JOINTS, MIRROR, Pose, make_pose, rescale, resize_image
from fairhuman_jax.models.higher_hrnet import stage_mean
from fairhuman_jax.resizing import resize_aligned
from fairhuman_jax.weights.mmpose import load_pose_network

Network = Callable[[np.ndarray], tuple[Any, Any]]
Compat = Literal["reference", "reference_cpu"]
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)  # ImageNet's
JOINT_ORDER = (0, 1, 2, 3, 4, 5, 6, 11, 12, 7, 8, 9, 10, 13, 14, 15, 16)  # in which people are put together
WINDOW = 5  # a peak is the largest value of 5 x 5
LEAST_HEAT, MOST_HEAT = 1e-3, 50.0  # what heat is clipped to before its logarithm
FARTHEST_SHIFT = 2.0  # pixels from a peak to its sub-pixel position
MOST_ELONGATED = 8.0  # long side of a picture / short side


@dataclass(frozen=True)
class BottomUpSettings:
    """short_side, multiple: size of the network's input, as HigherHRNet is trained; flip: also look at the mirrored
    picture, and take the mean; people: candidates for each joint; least_heat: of a candidate; tag_distance: from the
    mean tag of a person to one of its joints; refine: look for missing joints."""

    short_side: int = 512
    multiple: int = 64
    flip: bool = True
    people: int = 30
    least_heat: float = 0.1
    tag_distance: float = 1.0
    refine: bool = True


SHIPPED_SETTINGS = {"people": BottomUpSettings(short_side=64)}


def estimate_poses(
    image: np.ndarray,
    network: Network,
    settings: BottomUpSettings = BottomUpSettings(),
    compat: Compat | None = None,
) -> list[Pose]:
    """Everybody on a picture uint8 [H, W, 3] (RGB), most certain first; key points in its pixels, centres at +.5.

    network: normalised pictures float32 [B, h, w, 3] -> (y0 [B, h/4, w/4, 34], y1 [B, h/2, w/2, 17]), B = 2 with
    `settings.flip`; a jitted one compiles once for each size of pictures. score: mean heat of the 17 joints before
    missing ones are looked for. compat "reference": as published, the network sees BGR and positions count from pixel
    centres; "reference_cpu": also nothing is refined, in effect, as the original does on a CPU. Raises: ValueError on
    what is no such picture, and on pictures more than 8 times as long as wide. Source: HumanSD, with mmpose 0.29.0.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"picture {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")
    height, width = image.shape[:2]
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise ValueError(f"picture of {height}x{width} (height x width): too narrow to look for people; cut it")
    shrinks = min(height, width) > settings.short_side
    small = resize_image(image, settings.short_side, settings.multiple) if shrinks else image
    pixels, extent = network_input(small[..., ::-1] if compat else small, settings)
    batch = np.stack([pixels, pixels[:, ::-1]]) if settings.flip else pixels[None]
    heat, tags = read_maps(*network(batch))
    people, scores = parse_maps(heat, tags, settings, compat)
    step = np.array(extent) / np.maximum((heat.shape[1] - 1, heat.shape[0] - 1), 1)
    people[..., :2] = people[..., :2] * step + 0.5
    people[people[..., 2] == 0] = 0
    order = np.argsort(-scores, kind="stable")
    poses = rescale([make_pose(people[i], float(scores[i])) for i in order], small.shape[:2], (height, width))
    return [make_pose(pose.keypoints - (0.5, 0.5, 0), pose.score) for pose in poses] if compat else poses


class BottomUpPoses:
    """A `PoseDetector` of a HigherHRNet: everybody on a picture at once.

    network: a checkpoint of mmpose, a folder, or "people", which ships with the package and is shown pictures at 64
    pixels, as it was trained. settings: None for those of the network. compat: of `estimate_poses`. A program is
    compiled for each size of pictures. Raises: ValueError, as `load_pose_network` and `estimate_poses`.
    """

    def __init__(
        self, network: str | Path, settings: BottomUpSettings | None = None, compat: Compat | None = None
    ) -> None:
        module, variables = load_pose_network(network, dtype="float32")
        program = jax.jit(module.apply)
        self._network: Network = lambda pixels: program(variables, pixels)
        self.settings = settings or SHIPPED_SETTINGS.get(str(network), BottomUpSettings())
        self.compat: Compat | None = compat

    def detect(self, picture: np.ndarray) -> list[Pose]:
        """Everybody found, most certain first."""
        return estimate_poses(picture, self._network, self.settings, self.compat)


def network_input(image: np.ndarray, settings: BottomUpSettings) -> tuple[np.ndarray, tuple[float, float]]:
    """(picture float32 [h, w, 3], normalised; extent (x, y)): the input whose last pixel shows the point `extent`.

    The short side becomes `short_side`, the long one that of its proportions, up to a multiple of `multiple`; pixel
    centres of the corners fall upon each other (UDP), and what the picture does not fill on the right or below is
    black. Bilinear.
    """
    size = np.array(image.shape[:2])
    short = math.ceil(settings.short_side / settings.multiple) * settings.multiple
    height, width = (
        np.ceil(size * (short / size.min()) / settings.multiple - 1e-9).astype(int) * settings.multiple
    ).tolist()
    if size[0] <= size[1]:
        below = float(size[0] - 1)
        extent = ((width - 1) / (height - 1) * below, below)
    else:
        right = float(size[1] - 1)
        extent = (right, (height - 1) / (width - 1) * right)
    pixels = _bilinear(image.astype(np.float32), np.linspace(0, extent[1], height), 0)
    pixels = _bilinear(pixels, np.linspace(0, extent[0], width), 1)
    return ((pixels / 255 - MEAN) / STD).astype(np.float32), extent


def _bilinear(pixels: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Values at positions `at` of an axis; 0 beyond its ends."""
    last = pixels.shape[axis] - 1
    first = np.floor(at).astype(int)
    total = np.zeros(1, np.float32)
    for index, share in ((first, first + 1 - at), (first + 1, at - first)):
        share = np.where(index <= last, share, 0).astype(np.float32)
        total = total + pixels.take(np.minimum(index, last), axis) * np.expand_dims(share, tuple({0, 1, 2} - {axis}))
    return total


def read_maps(y0: Any, y1: Any) -> tuple[np.ndarray, np.ndarray]:
    """(heat float32 [h, w, 17], tags float32 [h, w, 17, B]) of a picture or, for B = 2, of it and its mirror image.

    y0: [B, h/2, w/2, 34], heat and tags; y1: [B, h, w, 17], heat. What is seen in the mirror is turned back, with left
    and right joints exchanged; heat is the mean of stages and of both pictures, tags stay apart.
    """
    heat, tags = np.array(stage_mean(y0, y1)), np.array(resize_aligned(y0[..., JOINTS:], y1.shape[1:3]))
    mirrored = list(MIRROR["coco17"])
    for maps in (heat, tags):
        maps[1:] = maps[1:, :, ::-1, mirrored]
    return heat.mean(axis=0), np.moveaxis(tags, 0, -1)


def parse_maps(
    heat: np.ndarray,
    tags: np.ndarray,
    settings: BottomUpSettings = BottomUpSettings(),
    compat: Compat | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(people float32 [P, 17, 3] (x, y, heat), scores float32 [P]) on heat maps [h, w, 17] with tags [h, w, 17, L].

    Raises: ValueError on maps that are not finite.
    """
    if not (np.isfinite(heat).all() and np.isfinite(tags).all()):
        raise ValueError("the pose network's maps are not finite; its weights or its input are damaged")
    people = group(find_peaks(heat, tags, settings), settings)
    scores = people[..., 2].mean(axis=1)
    logarithm = smooth_logarithm(heat)
    people = adjust(people, logarithm)
    if settings.refine:
        searched = logarithm if compat == "reference_cpu" else heat  # there both share their memory
        layers = [np.ascontiguousarray(np.moveaxis(maps, (0, 1), (-2, -1))) for maps in (searched, tags)]
        people = np.array([refine(person, *layers) for person in people]).reshape(people.shape)
    return people[..., :3], scores


def find_peaks(heat: np.ndarray, tags: np.ndarray, settings: BottomUpSettings) -> list[np.ndarray]:
    """Candidates of each joint, [N, 3 + L] (x, y, heat, tags), hottest first: at most `people`, above `least_heat`."""
    highest = maximum_filter(heat, (WINDOW, WINDOW, 1), mode="constant", cval=-np.inf)
    found = []
    for joint in range(heat.shape[2]):
        y, x = np.nonzero((heat[..., joint] == highest[..., joint]) & (heat[..., joint] > settings.least_heat))
        order = np.argsort(-heat[y, x, joint], kind="stable")[: settings.people]
        y, x = y[order], x[order]
        found.append(np.column_stack([x, y, heat[y, x, joint], tags[y, x, joint]]).astype(np.float32))
    return found


def group(candidates: list[np.ndarray], settings: BottomUpSettings) -> np.ndarray:
    """People float32 [P, 17, 3 + L] of candidates, rows of 0 for missing joints.

    Joint after joint, candidates are assigned to people at the least total of 100 round(d) - heat, d the distance of
    tags from the person's mean tags; those that are assigned to nobody, or farther than `tag_distance`, begin a person.
    """
    people: list[dict[int, np.ndarray]] = []
    for joint in JOINT_ORDER:
        rows = candidates[joint]
        assigned: dict[int, int] = {}
        if people and len(rows):
            known = people[: settings.people]
            means = np.array([np.mean([row[3:] for row in person.values()], axis=0) for person in known])
            distance = np.linalg.norm(rows[:, None, 3:] - means, axis=2)
            pairs = zip(*linear_sum_assignment(100 * np.round(distance) - rows[:, 2:3]), strict=True)
            assigned = {int(row): int(person) for row, person in pairs if distance[row, person] < settings.tag_distance}
        for number, row in enumerate(rows):
            if number in assigned:
                people[assigned[number]][joint] = row
            else:
                people.append({joint: row})
    grouped = np.zeros((len(people), len(candidates), candidates[0].shape[1]), np.float32)
    for number, person in enumerate(people):
        grouped[number, list(person)] = list(person.values())
    return grouped


def smooth_logarithm(heat: np.ndarray) -> np.ndarray:
    """Logarithm of heat maps [h, w, J] smoothed by (1, 2, 1) / 4 along both axes and clipped to [.001, 50]."""
    for axis in (0, 1):
        heat = correlate1d(heat, (0.25, 0.5, 0.25), axis=axis, mode="mirror")
    return np.log(np.clip(heat, LEAST_HEAT, MOST_HEAT))


def adjust(people: np.ndarray, logarithm: np.ndarray) -> np.ndarray:
    """People [P, 17, 3 + L] with each joint moved from its peak to the top of the parabola through the logarithm of
    heat around it: one Newton step. None is taken across the border, or of more than two pixels, as on a plateau."""
    person, joint = np.nonzero(people[..., 2] > 0)
    x, y = people[person, joint, :2].astype(int).T
    padded = np.pad(logarithm, ((1, 1), (1, 1), (0, 0)), mode="reflect").astype(np.float64)

    def at(right: int, down: int) -> np.ndarray:
        return padded[y + 1 + down, x + 1 + right, joint]

    middle = at(0, 0)
    slope = np.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)], axis=1) / 2
    across, along = at(1, 0) - 2 * middle + at(-1, 0), at(0, 1) - 2 * middle + at(0, -1)
    mixed = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * middle - at(-1, 0) - at(0, -1) + at(-1, -1)) / 2
    curvature = np.stack([across, mixed, mixed, along], axis=1).reshape(-1, 2, 2) + np.finfo(np.float32).eps * np.eye(2)
    steep = np.abs(np.linalg.det(curvature)) > 1e-12
    curvature[~steep] = np.eye(2)
    step = -np.linalg.solve(curvature, slope[..., None])[..., 0]
    step[~steep | (np.abs(step) > FARTHEST_SHIFT).any(axis=1)] = 0
    people = people.copy()
    people[person, joint, :2] += step
    return people


def refine(person: np.ndarray, heat: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """A person [17, 3 + L] with missing joints where heat [17, h, w] - round(d) is largest, d the distance of tags
    [17, L, h, w] from the person's mean tags; a quarter pixel towards the hotter neighbours, and only where there is
    heat at all."""
    known = person[:, 2] > 0
    mean = person[known, 3:].mean(axis=0)[:, None, None]
    person = person.copy()
    height, width = heat.shape[1:]
    for joint in np.flatnonzero(~known):
        layer = heat[joint]
        distance = np.sqrt(np.square(tags[joint] - mean).sum(axis=0))
        y, x = divmod(int(np.argmax(layer - np.round(distance))), width)
        if layer[y, x] > 0:
            right = layer[y, min(x + 1, width - 1)] > layer[y, max(x - 1, 0)]
            down = layer[min(y + 1, height - 1), x] > layer[max(y - 1, 0), x]
            person[joint, :3] = x + (0.25 if right else -0.25), y + (0.25 if down else -0.25), layer[y, x]
    return person
