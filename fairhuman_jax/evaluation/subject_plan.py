"""Which pictures a subject model is measured on: people, prompts and seeds, a line of JSON for each picture.

Source: FastComposer (arXiv 2305.10431), section 5.1: 15 people x 40 prompts x 4 pictures of one person (2400), and 105
pairs x 21 prompts x 4 of two (8820).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fairhuman_jax.evaluation.folders import list_pictures
from fairhuman_jax.weights import MARKER
from fairhuman_jax.weights.files import replacing

INSTANCES, SEED = 4, 42
NOUN = "{noun}"
# CelebA's identities of the published protocol.
MEN = (1, 181, 268, 1854, 2782, 3785)
WOMEN = (612, 667, 1603, 2088, 2464, 2880, 2929, 2937, 4153)
NOUNS = {f"{number:06d}": noun for noun, group in (("man", MEN), ("woman", WOMEN)) for number in group}


@dataclass(frozen=True)
class PlannedPicture:
    """A picture to draw: its file name, its prompt with a marker for each of `references` (paths), and its seed."""

    image: str
    prompt: str
    seed: int
    references: tuple[str, ...]


def find_subjects(folder: Path) -> dict[str, Path]:
    """People by name: the first picture of each folder in `folder`. Errors: no such folder; none with a picture."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of people, a folder of pictures for each")
    found = {path.name: list_pictures(path)[0] for path in sorted(folder.iterdir()) if path.is_dir()}
    if not found:
        raise ValueError(f"{folder} holds no people: make a folder of pictures for each")
    return found


def plan_pictures(
    subjects: Mapping[str, Path],
    prompts: Sequence[str],
    people: int = 1,
    instances: int = INSTANCES,
    seed: int = SEED,
    nouns: Mapping[str, str] = NOUNS,
) -> list[PlannedPicture]:
    """Every group of `people` of the subjects (each once, in the order of names) x prompt x instance.

    Prompts have a marker for each of them; "{noun}", where it stands, becomes the person's noun, in the same order
    ("person" where `nouns` has none). Instance i has seed + i, whatever the people and the prompt; names are
    subject_GGGG_prompt_PPPP_instance_IIII.png. Errors: fewer subjects than people; another number of markers.
    """
    if not 1 <= people <= len(subjects):
        raise ValueError(f"groups of {people} of {len(subjects)} people; needs at least one group")
    for prompt in prompts:
        if prompt.count(MARKER) != people:
            raise ValueError(f"{prompt!r} has {prompt.count(MARKER)} of {MARKER}; needs {people}, after each noun")
    planned = []
    for g, group in enumerate(itertools.combinations(subjects, people)):
        for p, prompt in enumerate(prompts):
            for name in group:
                prompt = prompt.replace(NOUN, nouns.get(name, "person"), 1)
            planned += [
                PlannedPicture(
                    f"subject_{g:04d}_prompt_{p:04d}_instance_{i:04d}.png",
                    prompt,
                    seed + i,
                    tuple(str(subjects[name]) for name in group),
                )
                for i in range(instances)
            ]
    return planned


def write_plan(path: Path, planned: Sequence[PlannedPicture]) -> None:
    """A line of JSON for each picture, whole or not at all."""
    with replacing(path) as file:
        file.writelines((json.dumps(asdict(row), ensure_ascii=False) + "\n").encode() for row in planned)


def read_plan(path: Path) -> list[PlannedPicture]:
    """What `write_plan` wrote. Errors, naming the line: no such file; rows that are something else; two of one name."""
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
