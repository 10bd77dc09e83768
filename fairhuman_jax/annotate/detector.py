"""What a detector of people is asked for, whichever networks are behind it."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fairhuman_jax.annotate.poses import Pose


class PoseDetector(Protocol):
    """Finds people on a picture uint8 [H, W, 3] of any size. Detectors of faces and of hands will stand beside it.

    `annotate.mediapipe.MediaPipePoses` is one. Errors: ValueError for what is no such picture.
    """

    def detect(self, picture: np.ndarray) -> list[Pose]:
        """Everybody found, in pixels of the picture, pixel centres at +.5; an empty list for nobody."""
        ...

    def person_mask(self, picture: np.ndarray) -> np.ndarray:
        """Probability that a pixel shows a person, float32 [H, W, 1] in [0, 1]."""
        ...
