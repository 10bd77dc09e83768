"""A folder in FastComposer's layout: pictures of coloured rectangles, each an entity of the caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTION = "a man and a woman with a dog"
# id, label, end of the words in CAPTION, rows and columns as shares of the picture, colour
ENTITIES: tuple[Any, ...] = (
    (7, "person", 17, (0.25, 0.875), (0.5, 0.75), (250, 10, 10)),
    (3, "person", 5, (0.125, 0.875), (0.25, 0.5), (10, 250, 10)),
    (300, "dog", 28, (0.5, 1.0), (0.0, 0.25), (10, 10, 250)),
)
SIZES = ((48, 64), (64, 48), (56, 56))  # height, width of pictures 0, 1, 2, then again


def scene(height: int, width: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """A picture of ENTITIES on grey stripes, its segment map, and the segments as the json has them."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[:, ::2] = 90
    ids, segments = np.zeros((height, width), np.int32), []
    for number, label, end, rows, columns, colour in ENTITIES:
        (y0, y1), (x0, x1) = (
            [round(share * side) for share in span] for span, side in ((rows, height), (columns, width))
        )
        image[y0:y1, x0:x1], ids[y0:y1, x0:x1] = colour, number
        segments.append({"id": number, "bbox": [x0, y0, x1, y1], "end": end, "coco_label": label})
    return image, ids, segments


def write_subjects(root: Path, count: int = 3, test: int = 1) -> Path:
    """`count` samples in two shards, the last `test` of them in the list for tests; pictures are lossless in all but
    name."""
    names = [f"{i % 2:05d}{99 - i:04d}" for i in range(count)]
    for i, name in enumerate(names):
        image, ids, segments = scene(*SIZES[i % 3])
        stem = root / name[:5] / name
        stem.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(stem.with_suffix(".jpg"), format="PNG")
        np.save(stem.with_suffix(".npy"), ids)
        stem.with_suffix(".json").write_text(json.dumps({"caption": CAPTION, "segments": segments, "other": [1]}))
    for file, part in (("", names), ("_train", names[: count - test]), ("_test", names[count - test :])):
        (root / f"image_ids{file}.txt").write_text("".join(f"{name}\n" for name in part))
    return root


def change(path: Path, **values: Any) -> None:
    """Replaces keys of a json file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
