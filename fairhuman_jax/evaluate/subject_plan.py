"""Which pictures a subject model is measured on: people, prompts and seeds, a line of JSON for each picture.

Source: FastComposer (arXiv 2305.10431), section 5.1: 15 people x 40 prompts x 4 pictures of one person (2400), and 105
pairs x 21 prompts x 4 of two (8820).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fairhuman_jax.drawing.plans import PlannedPicture
from fairhuman_jax.evaluate.folders import list_pictures
from fairhuman_jax.files import replacing
from fairhuman_jax.weights import MARKER

INSTANCES, SEED = 4, 42
NOUN = "{noun}"
# CelebA's identities of the published protocol.
MEN = (1, 181, 268, 1854, 2782, 3785)
WOMEN = (612, 667, 1603, 2088, 2464, 2880, 2929, 2937, 4153)
NOUNS = {f"{number:06d}": noun for noun, group in (("man", MEN), ("woman", WOMEN)) for number in group}


def find_subjects(folder: Path) -> dict[str, Path]:
    """People by name: the first picture of each folder in `folder`.

    Raises: FileNotFoundError, ValueError for no such folder; none with a picture.
    """
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
    subject_GGGG_prompt_PPPP_instance_IIII.png. Raises: ValueError for fewer subjects than people; another number of
    markers.
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
