"""Command line of the people world: `python -m fairhuman_jax.data.people {sheet,subjects,export} --help`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from fairhuman_jax.commands import add_command, run_commands
from fairhuman_jax.data.export import export_folder
from fairhuman_jax.data.people.conditions import CONDITIONS
from fairhuman_jax.data.people.dataset import PeopleDataset
from fairhuman_jax.data.people.sheet import contact_sheet
from fairhuman_jax.data.people.subjects import PeopleScenes, PeopleSubjects, PeopleViews
from fairhuman_jax.data.preview import OBJECT_COLOURS, overlay, tint

BACKDROP = 160  # grey behind reference views
# An option that may stand alone.
CONDITIONING: dict[str, Any] = {"nargs": "?", "const": "fairhuman", "choices": tuple(CONDITIONS)}


def sheet(arguments: argparse.Namespace) -> None:
    """Write a contact sheet of samples beside their masks and skeletons, or beside their control images."""
    people = PeopleDataset(
        arguments.size,
        arguments.count,
        arguments.seed,
        start=arguments.start,
        framing=arguments.framing,
        conditioning=arguments.conditioning,
    )
    samples = [people[i] for i in range(len(people))]
    tile = max(arguments.size, arguments.tile)
    if arguments.conditioning:
        batch = {name: np.stack([sample[name] for sample in samples]) for name in ("image", "conditioning_image")}
        picture = overlay(batch, columns=arguments.columns, tile=tile)
    else:
        picture = contact_sheet(samples, arguments.columns, tile)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.out)
    print(f"{arguments.out}: {arguments.count} samples of {arguments.size} px, seed {arguments.seed}")


def _add_sheet(commands) -> None:
    parser = add_command(commands, sheet)
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--size", type=int, default=128, help="pixels of a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first index")
    parser.add_argument("--columns", type=int, default=4, help="samples in a row")
    parser.add_argument("--tile", type=int, default=192, help="pixels a sample is enlarged to")
    parser.add_argument("--framing", default=None, help="force one framing, for example 'portrait'")
    parser.add_argument("--conditioning", **CONDITIONING, help="show the control images alone, of this style")


def subjects(arguments: argparse.Namespace) -> None:
    """Write a sheet of scenes, each beside its masks and the reference views of the people that it shows."""
    scenes = PeopleScenes(arguments.size, arguments.count, arguments.seed, arguments.identities, arguments.pairs)
    views = PeopleViews(arguments.size, scenes.identities, arguments.seed, arguments.references)
    people = PeopleSubjects(scenes, views, arguments.references)
    samples = [people[i] for i in range(len(people))]
    images = np.stack([sample["image"] for sample in samples])
    ids = np.stack([sample["segment_map"] for sample in samples])[..., None]
    shown = np.full((len(samples), 2 * arguments.references, *images.shape[1:]), 255, np.uint8)
    for row, sample in zip(shown, samples, strict=True):
        for k, (picture, mask) in enumerate(view for each in sample["references"] for view in each):
            row[k] = np.where(mask[..., None] > 0, picture, BACKDROP)
    tinted = tint(tint(images, ids == 1, OBJECT_COLOURS[0]), ids == 2, OBJECT_COLOURS[1])
    batch = {"image": images, "conditioning_image": tinted, "object_pixels": shown}
    sheet = overlay(batch, [sample["caption"] for sample in samples], arguments.columns, arguments.tile)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out)
    print(f"{arguments.out}: {arguments.count} scenes of {scenes.identities} people, seed {arguments.seed}")


def _add_subjects(commands) -> None:
    parser = add_command(commands, subjects)
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--count", type=int, default=8, help="scenes")
    parser.add_argument("--identities", type=int, default=None, help="people in them (default: as many as scenes)")
    parser.add_argument("--references", type=int, default=3, help="views of each person")
    parser.add_argument("--pairs", type=float, default=0.5, help="share of scenes with two people")
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=1, help="scenes in a row")
    parser.add_argument("--tile", type=int, default=128, help="pixels a picture is shown with")


def export(arguments: argparse.Namespace) -> None:
    """Write samples as a metadata.jsonl folder: pictures, captions, face and hand masks, control images if wanted."""
    people = PeopleDataset(arguments.size, arguments.count, arguments.seed, conditioning=arguments.conditioning)
    path = export_folder(people, arguments.folder, report=_progress)
    print(f"{path}: {arguments.count} samples of {arguments.size} px, seed {arguments.seed}")


def _progress(done: int, count: int) -> None:
    if done % 100 == 0:
        print(f"{done} of {count}", flush=True)


def _add_export(commands) -> None:
    parser = add_command(commands, export)
    parser.add_argument("folder", type=Path, help="empty or new folder")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", type=int, default=128, help="pixels of a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--conditioning", **CONDITIONING, help="draw control images of this style")


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; `arguments` default to the command line's. Exit codes: 0, 2 (cannot run)."""
    run_commands("python -m fairhuman_jax.data.people", __doc__, (_add_sheet, _add_subjects, _add_export), arguments)


if __name__ == "__main__":
    main()
