"""Plans: many pictures to draw, with their prompts, seeds and references, one JSON object a line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PlannedPicture:
    """A picture to draw: its file name, its prompt with a marker for each of `references` (paths), and its seed."""

    image: str
    prompt: str
    seed: int
    references: tuple[str, ...]


def read_plan(path: Path) -> list[PlannedPicture]:
    """What `write_plan` wrote.

    Raises: FileNotFoundError, ValueError, naming the line: no such file; rows that are something else; two of one name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; write it with: python -m fairhuman_jax.evaluate plan")
    planned = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            picture = PlannedPicture(
                str(row["image"]), str(row["prompt"]), int(row["seed"]), tuple(map(str, row["references"]))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needs an object with image, prompt, seed, references") from error
        if Path(picture.image).name != picture.image or not picture.image:
            raise ValueError(f"{path}, line {number}: image {picture.image!r} is no file name")
        planned.append(picture)
    if not planned:
        raise ValueError(f"{path} plans no picture")
    name, times = Counter(row.image for row in planned).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: {name} stands on {times} lines")
    return planned
