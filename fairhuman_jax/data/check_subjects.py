"""Look through a folder of subjects before training on it: faults, labels, how many people a picture has, captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fairhuman_jax.data.check import (
    SHEET,
    TILE,
    Finding,
    Report,
    Task,
    bars,
    duplicates,
    inspected,
    judge_captions,
    judge_image,
)
from fairhuman_jax.data.pictures import BadSample
from fairhuman_jax.data.preview import overlay
from fairhuman_jax.data.subject_folder import SPLITS, Segment, SubjectDataset, read_subjects
from fairhuman_jax.data.subject_transforms import SubjectConfig, SubjectTransform

SMALL = 0.01  # share of the picture below which an object shows little
PERSON = "person"


@dataclass
class SubjectFinding(Finding):
    """What one sample is, with the label of each of its segments."""

    labels: list[str] = field(default_factory=list)


def check_subjects(folder: str | os.PathLike[str], resolution: int = 512, workers: int | None = None) -> Report:
    """Read every file of the ids in the folder's lists, as check.check_folder does for its kind of folder.

    Problems: lines that are no ids, files missing or unreadable, segments that do not fit map, picture or caption,
    empty captions. Notes: samples of two lists for training and tests, no person, several persons of one word, a
    person below 1 % of the picture, long captions, the same image twice, small pictures. Raises: FileNotFoundError,
    ValueError as SubjectDataset does.
    """
    root = Path(folder)
    lists = [SubjectDataset(root, split) for split in SPLITS if (root / SPLITS[split]).is_file()]
    places = {data.line(i): (data, i) for data in lists for i in range(len(data))}
    tasks = [Task(name, data.files(i), ()) for name, (data, i) in places.items()]
    findings = inspected(inspect, tasks, resolution, workers)
    problems = [line.removeprefix(f"{root}{os.sep}") for data in lists for line in data.bad_lines()]
    problems += [f"{f.line}: {text}" for f in findings for text in f.problems]
    notes = [f"{f.line}: {text}" for f in findings for text in f.notes] + duplicates(findings)
    names = {data.metadata.name: {data.line(i) for i in range(len(data))} for data in lists}
    both = names.get(SPLITS["train"], set()) & names.get(SPLITS["test"], set())
    notes += [f"{len(both)} ids are listed for training and for tests"] if both else []
    figures = (_lists(names), _counts(findings), _labels(findings))
    return Report(root, resolution, list(findings), problems, notes, (), figures)


def inspect(task: Task, resolution: int) -> SubjectFinding:
    """The files of one sample, up to the first fault."""
    finding = SubjectFinding(task.line)
    try:
        sample = read_subjects(task.files)
    except BadSample as error:
        finding.problems.append(str(error))
        return finding
    segments: tuple[Segment, ...] = sample["segments"]
    finding.labels = [segment.label for segment in segments]
    judge_captions(finding, [sample["caption"]])
    judge_image(finding, sample["image"], resolution)
    people = [segment for segment in segments if segment.label == PERSON]
    if not people:
        finding.notes.append("no person")
    if len({segment.end for segment in people}) < len(people):
        finding.notes.append("several persons of one word; the largest is used")
    for segment in people:
        share = float(np.mean(sample["segment_map"] == segment.id))
        if share < SMALL:
            finding.notes.append(f"segment {segment.id}: a person of {100 * share:.2f} % of the picture")
    return finding


def subject_sheet(folder: str | os.PathLike[str], count: int = SHEET, tile: int = TILE) -> Image.Image:
    """Picture of `count` samples spread over the folder: people tinted and cut out, captions. Raises: BadSample."""
    data = SubjectDataset(folder)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int))
    transform, rng = (
        SubjectTransform(tile, subjects=SubjectConfig(object_resolution=tile).plain()),
        np.random.default_rng(0),
    )
    parts = [transform(data[int(index)], rng) for index in chosen]
    batch = {name: np.stack([part[name] for part in parts]) for name in ("image", "object_masks", "object_pixels")}
    return overlay(batch, [part["caption"][:160] for part in parts], columns=2)


def _lists(names: dict[str, set[str]]) -> str:
    return bars("lists:", [(name, len(ids)) for name, ids in names.items()])


def _counts(findings: Iterable[SubjectFinding]) -> str:
    counts = Counter(finding.labels.count(PERSON) for finding in findings if not finding.problems)
    return bars("persons a picture:", [(str(number), counts[number]) for number in sorted(counts)])


def _labels(findings: Iterable[SubjectFinding], most: int = 12) -> str:
    labels = Counter(label for finding in findings for label in finding.labels)
    return bars("labels of segments:", labels.most_common(most))
