"""What a detector of people is asked for, whichever networks are behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from fairhuman_jax.annotate.boxes import LEAST_SCORE
from fairhuman_jax.keypoints.poses import Pose


class PoseDetector(Protocol):
    """Finds people on a picture uint8 [H, W, 3] of any size.

    `annotate.mediapipe.MediaPipePoses` and `annotate.bottom_up.BottomUpPoses` are such. Raises: ValueError for what is
    no such picture.
    """

    def detect(self, picture: np.ndarray) -> list[Pose]:
        """Everybody found, in pixels of the picture, pixel centres at +.5; an empty list for nobody."""
        ...


def open_detector(network: str | Path | None, threshold: float = LEAST_SCORE, compat: bool = False) -> PoseDetector:
    """MediaPipe's networks, whose detections score at least `threshold`, or the HigherHRNet that `network` names.

    compat: HigherHRNet's pictures and positions as HumanSD has them. Raises: as either.
    """
    # Each has requirements of its own, and one of them is enough.
    if network is None:
        from fairhuman_jax.annotate.mediapipe import MediaPipePoses

        return MediaPipePoses(threshold=threshold)
    from fairhuman_jax.annotate.bottom_up import BottomUpPoses

    return BottomUpPoses(network, compat="reference" if compat else None)
