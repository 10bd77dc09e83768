"""How well drawn people are those of reference pictures: cosines of face embeddings, FastComposer's protocol.

Source: FastComposer (arXiv 2305.10431), section 5.1, evaluation/single_object and multi_object of its repository.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairhuman_jax.annotate.faces import MediaPipeFaces
from fairhuman_jax.annotate.squares import Square, cut
from fairhuman_jax.packages import Package, cached_files, fetched_file

# A picture uint8 [H, W, 3] -> embeddings [N, D] of unit length of the faces on it, the largest first.
FaceEmbedder = Callable[[np.ndarray], np.ndarray]

PACKAGE = Package(
    "faceplugin-face-recognition-js",
    "0.0.1",
    "7ea06031d9a3f83753254fcff60506a07b81b46fc84d4ee024cd041f260ec1ba",
    index="npm",
)
MEMBER = "package/model/fr_feature.onnx"
SHA256 = "87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581"
FETCH = "python -m fairhuman_jax.evaluate fetch"
SIDE = 112
# Eyes, nose and ends of the mouth, (x, y) in pixels of the network's input, the person's right side first.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def identity_similarity(faces: np.ndarray, references: np.ndarray, empty: np.ndarray | None = None) -> float:
    """The least likeness in [0, 1] of the K people of `references` [K, D] to those among `faces` [N, D] they become.

    The K largest faces take part (the first of `faces`). Pairs are matched greedily: the largest cosine of all first,
    then the largest among those left. The result is the least of the matched cosines, and 0 if that is below 0 or if
    there is no face at all. A person without a face counts as 0; as published (`empty` [D], the embedding of a black
    picture) that person is matched with `empty`. Embeddings are of unit length. Raises: ValueError for other widths; no
    reference.
    """
    count = len(references)
    if not count:
        raise ValueError("identity: no reference")
    if not len(faces):
        return 0.0
    if faces.ndim != 2 or faces.shape[1:] != references.shape[1:]:
        raise ValueError(f"identity: faces are {list(faces.shape)}, references {list(references.shape)}; needs [N, D]")
    largest = faces[:count]
    if missing := count - len(largest):
        if empty is None:
            return 0.0
        largest = np.concatenate([largest, np.tile(empty, (missing, 1))])
    cosines = np.array(largest @ references.T, np.float64)
    matched = []
    for _ in range(count):
        face, person = np.unravel_index(np.argmax(cosines), cosines.shape)
        matched.append(cosines[face, person])
        cosines[face], cosines[:, person] = -np.inf, -np.inf
    return float(max(0.0, min(matched)))


def aligned_square(points: np.ndarray) -> Square:
    """The square of a picture that brings a face's points [5, 2] nearest to TEMPLATE: turned, moved and scaled.

    Least squares over similarity maps, as complex numbers: a = <t - mean t, p - mean p> / |t - mean t|^2.
    """
    template, seen = TEMPLATE @ (1, 1j), np.asarray(points, np.float64) @ (1, 1j)
    around = template - template.mean()
    map_ = np.vdot(around, seen - seen.mean()) / np.vdot(around, around)
    centre = map_ * (SIDE / 2 * (1 + 1j) - template.mean()) + seen.mean()
    return Square((centre.real, centre.imag), SIDE * abs(map_), float(np.angle(map_)))


class OpenFaceEmbedder:
    """The default `FaceEmbedder`: MediaPipe's faces, and an open face recognition network (MIT) that onnxruntime runs.

    Embeddings are of 512 numbers; `empty` is that of a black picture. Photographs of one person have cosines of .7 to
    .9, of two people below .15 (docs/benchmarks.md). Raises: ValueError for networks that were not fetched, or are
    other files; ValueError when the extra `evaluate` is not installed.
    """

    def __init__(self, folder: Path | None = None, threads: int = 0) -> None:
        try:
            runtime = importlib.import_module("onnxruntime")  # optional, and slow to import
        except ImportError as error:
            raise ValueError("identity needs onnxruntime: pip install 'fairhuman_jax[evaluate]'") from error
        path = fetched_file(PACKAGE, MEMBER, SHA256, FETCH, folder)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session: Any = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._faces = MediaPipeFaces(folder, threads=threads or None)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        crops = [cut(picture, aligned_square(face.points), SIDE, "black") for face in self._faces.detect(picture)]
        return np.stack([self._embedding(crop) for crop in crops]) if crops else np.empty((0, 512), np.float32)

    @property
    def empty(self) -> np.ndarray:
        """Of a black picture, float32 [512]."""
        return self._embedding(np.zeros((SIDE, SIDE, 3), np.float32))

    def _embedding(self, crop: np.ndarray) -> np.ndarray:
        """Of a face [112, 112, 3] in [0, 1]; the network reads blue first."""
        pixels = (255.0 * crop[..., ::-1] - 127.5) / 128.0
        found = self._session.run(None, {"input": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
        return found / np.linalg.norm(found)


def fetch_identity(folder: Path | None = None) -> Path:
    """The recognition network (4.9 MB) in `folder` (default: one of the cache), fetched if it is absent or damaged.

    Raises: as `packages.cached_files`.
    """
    return cached_files(PACKAGE, {MEMBER: SHA256}, folder)[MEMBER]


def reference_embeddings(embed: FaceEmbedder, pictures: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """The largest face of each reference picture, [K, D].

    Raises: ValueError for a picture, called by its name, without a face.
    """
    found = []
    for picture, name in zip(pictures, names, strict=True):
        faces = embed(picture)
        if not len(faces):
            raise ValueError(f"{name}: no face found on this reference picture")
        found.append(faces[0])
    return np.stack(found)
