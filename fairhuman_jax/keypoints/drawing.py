"""Skeleton pictures of poses, in HumanSD's style and in that of ControlNet and T2I-Adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np

from fairhuman_jax.keypoints.poses import THRESHOLD, Pose, Size, to_openpose18
from fairhuman_jax.keypoints.skeletons import HUMANSD17, OPENPOSE18, draw_bodies


def draw_poses(
    poses: Iterable[Pose],
    canvas: Size,
    style: Literal["humansd", "openpose"] = "humansd",
    threshold: float = THRESHOLD,
    compat: Literal["reference"] | None = None,
) -> np.ndarray:
    """Skeletons on black, uint8 [H, W, 3] for canvas (H, W), of joints with confidence above `threshold`.

    humansd: HumanSD's 16 limbs of 10 pixels; openpose: 18 points and 17 limbs, for ControlNet and T2I-Adapter. Widths
    are those at a short side of 512 and grow with it; compat "reference": the same at any size, as published. Later
    people lie over earlier ones. Raises: ValueError on another style.
    """
    people = [pose.keypoints for pose in poses]
    scale = 1.0 if compat == "reference" else min(canvas) / HUMANSD17.side
    picture = np.zeros((*canvas, 3), np.uint8)
    if style == "humansd":
        return draw_bodies(picture, people, replace(HUMANSD17, threshold=threshold), scale)
    if style == "openpose":
        return draw_bodies(picture, [to_openpose18(points, threshold) for points in people], OPENPOSE18, scale)
    raise ValueError(f'no skeleton style {style!r}; there are "humansd" and "openpose"')
