"""Files of key points: HumanSD's npz and plain npz, COCO, OpenPose and MediaPipe json. No file's code is run.

Coordinates are taken as the file has them; those that are shares of the picture become pixels.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fairhuman_jax.keypoints.poses import (
    COCO17_IN_MEDIAPIPE33,
    COCO17_IN_OPENPOSE18,
    COCO17_IN_OPENPOSE25,
    JOINTS,
    Pose,
    Size,
    make_pose,
)
from fairhuman_jax.weights.unpickling import PlainUnpickler, RefusedPickle

LARGEST = 64 << 20  # bytes of a file of key points, or of an array in one; 30 people take 8 kB
SHARES = 4.0  # if no coordinate is larger, they are shares of the picture: nobody is four pixels tall
ARRAYS = ("numpy.", "_codecs.encode")  # all that a pickle of arrays in dicts asks for
SIZE_KEYS = (("height", "width"), ("canvas_height", "canvas_width"), ("image_height", "image_width"))
MEDIAPIPE_KEYS = ("pose_landmarks", "poseLandmarks", "landmarks", "landmark")
LAYOUTS = {3 * 18: COCO17_IN_OPENPOSE18, 3 * 25: COCO17_IN_OPENPOSE25}
EXPECTED = "COCO (annotations or results), OpenPose (18 or 25 points) or MediaPipe (33 points)"


@dataclass(frozen=True)
class PoseFile:
    """poses: everybody in the file, in its order; size: (height, width) of the picture they were found in, if known."""

    poses: tuple[Pose, ...]
    size: Size | None


def read_poses(path: str | os.PathLike[str], size: Size | None = None, image_id: int | str | None = None) -> PoseFile:
    """The people of a file of key points.

    .npz: HumanSD's (`arr_0`, dicts of keypoints [17, 3], score, area; read without running its pickle) or as
    `write_poses` writes it. .json: COCO annotations or results, OpenPose with 18 or 25 points, MediaPipe with 33.
    size: (height, width) of the picture, which coordinates in shares of it need if the file does not say it.
    image_id: which picture of a COCO file of several. Raises: FileNotFoundError, ValueError with one line.
    Source of the npz layout: HumanSD, scripts/pose2img.py.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file of key points")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size >> 20} MiB; a file of key points has less than 64")
    try:
        if path.suffix.lower() == ".npz":
            return _read_npz(path, size)
        if path.suffix.lower() == ".json":
            return _read_json(_parse_json(path), size, image_id)
    except RefusedPickle as error:
        raise ValueError(f"{path} {error}; not loaded: a file of key points holds arrays and numbers") from error
    except OSError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    raise ValueError(f"{path}: key points are read from .npz and .json files")


def write_poses(path: str | os.PathLike[str], poses: Sequence[Pose], size: Size | None = None) -> None:
    """Writes a plain npz: `keypoints` float32 [P, 17, 3], `score` and `area` float32 [P], `size` int64 [2] if known."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: poses are written to .npz files")
    arrays = {
        "keypoints": np.array([pose.keypoints for pose in poses], np.float32).reshape(-1, JOINTS, 3),
        "score": np.array([pose.score for pose in poses], np.float32),
        "area": np.array([pose.area for pose in poses], np.float32),
    }
    if size is not None:
        arrays["size"] = np.array(size, np.int64)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class _ArrayUnpickler(PlainUnpickler):
    """Arrays, dicts and numbers: what is not numpy's is refused, harmless or not."""

    def find_class(self, module: str, name: str) -> Any:
        if not f"{module}.{name}".startswith(ARRAYS):
            raise RefusedPickle(f"would build {module}.{name}")
        return super().find_class(module, name)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz, those of objects too, without running a pickle. Raises RefusedPickle, ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for info in archive.infolist():
                if info.file_size > LARGEST:
                    raise ValueError(f"{info.filename} unpacks to {info.file_size >> 20} MiB; key points need less")
                arrays[info.filename.removesuffix(".npy")] = _read_array(io.BytesIO(archive.read(info)))
            return arrays
    except (RefusedPickle, OSError):
        raise
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise ValueError(f"truncated or no npz file ({error!r:.120})") from error


def _read_array(file: io.BytesIO) -> np.ndarray:
    version = npy.read_magic(file)
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_column, dtype = header(file)
    if dtype.hasobject:
        array = _ArrayUnpickler(file).load()
        if not isinstance(array, np.ndarray):
            raise RefusedPickle(f"holds an object of type {type(array).__name__} where an array belongs")
        return array
    content = file.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array {list(shape)} of {dtype} in {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")


def _read_npz(path: Path, size: Size | None) -> PoseFile:
    arrays = read_arrays(path)
    if "arr_0" in arrays:
        people = arrays["arr_0"].ravel().tolist()  # without people it is an empty array of numbers
        return PoseFile(tuple(_published(person, number) for number, person in enumerate(people, 1)), size)
    if "keypoints" not in arrays:
        raise ValueError(
            f"holds {', '.join(arrays) or 'nothing'}; expected arr_0, or keypoints [P, {JOINTS}, 3] and score [P]"
        )
    points = arrays["keypoints"]
    if points.ndim != 3 or points.shape[1:] != (JOINTS, 3):
        raise ValueError(f"keypoints {list(points.shape)}; expected [P, {JOINTS}, 3]")
    numbers = {name: arrays.get(name, np.full(len(points), None)) for name in ("score", "area")}
    for name, values in numbers.items():
        if values.shape != (len(points),):
            raise ValueError(f"{name} {list(values.shape)} beside {len(points)} people; expected one each")
    if "size" in arrays and size is None:
        size = _checked_size(arrays["size"].tolist())
    rows = zip(points, numbers["score"], numbers["area"], strict=True)
    return PoseFile(tuple(_pose(*row, number) for number, row in enumerate(rows, 1)), size)


def _published(person: Any, number: int) -> Pose:
    if not isinstance(person, dict) or "keypoints" not in person or "score" not in person:
        found = f"keys {', '.join(map(str, person))}" if isinstance(person, dict) else type(person).__name__
        raise ValueError(f"person {number}: {found:.80}; expected a dict of keypoints [{JOINTS}, 3], score and area")
    return _pose(person["keypoints"], person["score"], person.get("area"), number)


def _pose(points: Any, score: Any, area: Any, number: int) -> Pose:
    try:
        return make_pose(points, score, area)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"person {number}: {error}") from error


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"not json ({error})") from error


def _read_json(content: Any, size: Size | None, image_id: int | str | None) -> PoseFile:
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict) and "people" in content[0]:
        content = content[0]  # as editors of OpenPose files write one frame
    if isinstance(content, dict) and "annotations" in content:
        return _coco(content["annotations"], content.get("images", []), size, image_id)
    if isinstance(content, list) and all(isinstance(row, dict) and "keypoints" in row for row in content):
        return _coco(content, [], size, image_id)
    size = size or _size_in(content)
    if isinstance(content, dict) and isinstance(content.get("people"), list):
        people = [_openpose(person, number) for number, person in enumerate(content["people"], 1)]
    else:
        people = [_mediapipe(person, number) for number, person in enumerate(_landmarks(content), 1)]
    return PoseFile(tuple(_in_pixels(points, size, number) for number, points in enumerate(people, 1)), size)


def _coco(rows: Any, images: Any, size: Size | None, image_id: int | str | None) -> PoseFile:
    rows = [row for row in _list_of_dicts(rows, "annotations") if "keypoints" in row]
    ids = list(dict.fromkeys(row.get("image_id") for row in rows))
    if image_id is None and len(ids) > 1:
        shown = ", ".join(map(str, ids[:4]))
        raise ValueError(f"people of {len(ids)} pictures (image_id {shown}, ...); say which one")
    chosen = [row for row in rows if image_id is None or str(row.get("image_id")) == str(image_id)]
    if image_id is not None and ids and not chosen:
        raise ValueError(f"nobody in the picture with image_id {image_id}; there are {', '.join(map(str, ids[:4]))}")
    wanted = ids[0] if image_id is None and ids else image_id
    entry = next((row for row in _list_of_dicts(images, "images") if str(row.get("id")) == str(wanted)), None)
    people = []
    for number, row in enumerate(chosen, 1):
        points = _triples(row["keypoints"], (3 * JOINTS,), number)
        if "score" not in row:  # annotations: 1 is a hidden joint, 2 a visible one
            points[:, 2] = points[:, 2] > 0
        people.append(_pose(points, row.get("score"), None, number))
    return PoseFile(tuple(people), size or _size_in(entry))


def _openpose(person: Any, number: int) -> np.ndarray:
    points = person.get("pose_keypoints_2d") if isinstance(person, dict) else None
    if points is None:
        raise ValueError(f"person {number} has no pose_keypoints_2d; expected OpenPose's 18 or 25 points")
    points = _triples(points, tuple(LAYOUTS), number)
    return points[list(LAYOUTS[points.size])]


def _landmarks(content: Any) -> list[Any]:
    """The people of a MediaPipe result, each a list of points, in any of the shapes in which results are saved."""
    for key in MEDIAPIPE_KEYS:
        while isinstance(content, dict) and key in content:
            content = content[key]
    if content in ([], None):
        return []
    if not isinstance(content, list):
        raise ValueError(f"no key points of a known layout; expected {EXPECTED}")
    return [content] if _is_point(content[0]) else [points for person in content for points in _landmarks(person)]


def _is_point(value: Any) -> bool:
    """Whether {x, y, ...} or [x, y, ...]."""
    return "x" in value if isinstance(value, dict) else isinstance(value, list) and value != [] and _is_number(value[0])


def _mediapipe(person: Any, number: int) -> np.ndarray:
    """Points {x, y, visibility} or [x, y, z, visibility] -> [17, 3]."""
    try:
        rows = [
            (row["x"], row["y"], row.get("visibility", 1.0)) if isinstance(row, dict) else (row[0], row[1], row[3])
            for row in person
        ]
        points = np.array(rows, np.float64).reshape(-1, 3)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"person {number}: no points of x, y, z and visibility ({error!r:.60})") from error
    if len(points) != 33:
        raise ValueError(f"person {number} has {len(points)} points; expected {EXPECTED}")
    return points[list(COCO17_IN_MEDIAPIPE33)]


def _in_pixels(points: np.ndarray, size: Size | None, number: int) -> Pose:
    """The pose of points that are pixels or, if none is larger than 4, shares of the picture."""
    known = points[points[:, 2] > 0, :2]
    if len(known) and np.all(np.abs(known) <= SHARES):
        if size is None:
            raise ValueError(f"person {number} is given in shares of a picture whose size is not in the file; give it")
        points = points * np.array((size[1], size[0], 1))
    return _pose(points, None, None, number)


def _triples(values: Any, sizes: tuple[int, ...], number: int) -> np.ndarray:
    if not isinstance(values, list) or len(values) not in sizes or not all(map(_is_number, values)):
        count = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        expected = " or ".join(str(size) for size in sizes)
        raise ValueError(f"person {number}: {count} in place of {expected} numbers (x, y, confidence of each point)")
    return np.array(values, np.float64).reshape(-1, 3)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _list_of_dicts(rows: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name} are not a list of objects")
    return rows


def _size_in(content: Any) -> Size | None:
    if isinstance(content, dict):
        for keys in SIZE_KEYS:
            if all(key in content for key in keys):
                return _checked_size([content[key] for key in keys])
    return None


def _checked_size(values: Any) -> Size:
    if not isinstance(values, list) or len(values) != 2 or not all(_is_number(value) and value > 0 for value in values):
        raise ValueError(f"size {values!r:.40}; expected height and width in pixels")
    return int(values[0]), int(values[1])
