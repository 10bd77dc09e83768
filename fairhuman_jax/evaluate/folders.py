"""What evaluations read: folders of pictures, captions for them, and key points of many pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairhuman_jax.data.pictures import read_image
from fairhuman_jax.files import read_json
from fairhuman_jax.keypoints.poses import JOINTS, Pose, make_pose
from fairhuman_jax.keypoints.readers import read_poses
from fairhuman_jax.weights import MARKER

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LISTED = 3  # names an error spells out


def list_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, by name. Raises: FileNotFoundError, ValueError for no such folder, none in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    return found


def read_pictures(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Each picture as uint8 [H, W, 3], one at a time.

    Raises: ValueError, as `data.folder.read_image`, naming the file.
    """
    return (read_image(path) for path in paths)


def captions_for(paths: Sequence[Path], file: Path) -> list[str]:
    """The caption of each picture: of a .txt file a line each in the order of names, of a .json file an object from
    picture names to captions, of a .jsonl file the `text_english` beside each `image` (FairHuman's metadata), or its
    `prompt` without the markers of subjects (evaluation.subject_plan).

    Raises: FileNotFoundError, ValueError for no such file; another format; as many lines as there are pictures wanted;
    pictures without a caption.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected captions in .txt, .json or .jsonl")
    if file.suffix == ".txt":
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if len(lines) != len(paths):
            raise ValueError(f"{file} has {len(lines)} captions for {len(paths)} pictures; needs a line each")
        return lines
    if file.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{file}: captions are read from .txt, .json and .jsonl files")
    named = _metadata_captions(file) if file.suffix == ".jsonl" else read_json(file)
    known = {Path(name).stem: caption for name, caption in named.items()}
    captions = [known.get(path.stem) for path in paths]
    missing = [path.name for path, caption in zip(paths, captions, strict=True) if not isinstance(caption, str)]
    if missing:
        raise ValueError(f"{file} has no caption for {len(missing)} of {len(paths)} pictures ({_some(missing)})")
    return [str(caption) for caption in captions]


def _metadata_captions(file: Path) -> dict[str, Any]:
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None:
                text = row["text_english"] if "text_english" in row else row["prompt"].replace(MARKER, "")
                found[row["image"]] = text[0] if isinstance(text, list) else text
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number}: needs an object with image and text_english, or image and prompt"
            ) from error
    return found


@dataclass(frozen=True)
class People:
    """Poses by picture. names: file names without ending, or the ids of COCO results; complete: a picture that is not
    there was not looked at, in place of one with nobody in it; sizes: (height, width) where a file says it."""

    poses: Mapping[str, tuple[Pose, ...]]
    complete: bool
    sizes: Mapping[str, tuple[int, int]]


def read_people(path: Path) -> People:
    """Key points of many pictures: a folder of `annotate.readers.read_poses` files (.npz, else .json), one a picture
    and of its name, or one COCO file of annotations or results.

    Raises: FileNotFoundError, ValueError for nothing there; those of `read_poses`; rows that are not COCO's.
    """
    if path.is_file():
        return _coco_people(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected a folder of key points, or a COCO file")
    files = sorted(path.glob("*.npz")) or sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"{path} holds no key points (.npz or .json, a file for each picture)")
    found = {file.stem: read_poses(file) for file in files}
    sizes = {name: people.size for name, people in found.items() if people.size is not None}
    return People({name: people.poses for name, people in found.items()}, True, sizes)


def _coco_people(path: Path) -> People:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    truth = isinstance(content, dict)
    try:
        images = content["images"] if truth else []
        names = {image["id"]: Path(image["file_name"]).stem for image in images if "file_name" in image}
        people: dict[str, list[Pose]] = {names.get(image["id"], str(image["id"])): [] for image in images}
        for row in content["annotations"] if truth else content:
            if "keypoints" in row:
                people.setdefault(names.get(row["image_id"], str(row["image_id"])), []).append(_coco_pose(row))
        sizes = {
            names.get(image["id"], str(image["id"])): (int(image["height"]), int(image["width"]))
            for image in images
            if "height" in image and "width" in image
        }
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error.args[0]!r}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not COCO's key points: {reason}") from error
    if not people:
        raise ValueError(f"{path} holds nobody and no pictures")
    return People({name: tuple(poses) for name, poses in people.items()}, bool(images), sizes)


def _coco_pose(row: dict[str, Any]) -> Pose:
    points = np.asarray(row["keypoints"], np.float32)
    if points.size != 3 * JOINTS:
        raise ValueError(f"{points.size} numbers in place of {3 * JOINTS} in the picture {row['image_id']}")
    points = points.reshape(JOINTS, 3)
    if "score" not in row:  # annotations: 1 is a hidden joint, 2 a visible one
        points[:, 2] = points[:, 2] > 0
    return make_pose(points, row.get("score"))


def paired_people(found: Path, truth: Path) -> tuple[list[tuple[Pose, ...]], list[tuple[Pose, ...]]]:
    """The people found and the true ones, picture by picture, by `read_people`.

    Raises: ValueError, FileNotFoundError for pictures on one side alone, unless COCO results leave out where nobody was
    found; pictures of another size.
    """
    seen, true = read_people(found), read_people(truth)
    absent, extra = (sorted(a.poses.keys() - b.poses.keys()) for a, b in ((true, seen), (seen, true)))
    if extra or (absent and seen.complete):
        raise ValueError(
            f"{found} has {len(seen.poses)} pictures, {truth} {len(true.poses)}; "
            f"not on both sides: {_some([*absent, *extra])}"
        )
    for name, size in seen.sizes.items():
        if true.sizes.get(name, size) != size:
            raise ValueError(
                f"{name}: key points found on {size[0]}x{size[1]} pixels, true ones on "
                f"{true.sizes[name][0]}x{true.sizes[name][1]}; bring them to one size"
            )
    names = sorted(true.poses)
    return [seen.poses.get(name, ()) for name in names], [true.poses[name] for name in names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
