"""The part of `sample.py` that draws people from reference pictures: Face-diffuser and FastComposer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from fairhuman_jax.data.object_augmentation import squared
from fairhuman_jax.data.pictures import read_image
from fairhuman_jax.diffusion import BASELINES, FusionMaps
from fairhuman_jax.drawing.pictures import checked_size
from fairhuman_jax.drawing.pipeline import Job, Model
from fairhuman_jax.drawing.plans import read_plan
from fairhuman_jax.systems.facediffuser.fusion import (
    FaceDiffuser,
    StagedRequest,
    draw_delayed,
    make_staged_request,
    open_staged,
)
from fairhuman_jax.weights import MARKER

SCHEDULER = "pndm"  # the published one
FUSION = ("beta", "stages", "baseline", "soft_mask", "gains", "per_channel", "save_maps")  # what --delayed leaves out
OWN = ("reference", "plan", "scene", "delayed", "alpha", "subject_guidance", *FUSION)
SHOWN_ROWS = 8  # of stage 2, in pictures of maps
SHOWN = 64  # pixels a side of a map
OTHERS = ("lora", "controlnet", "adapter", "condition", "init_image", "mask", "pose", "pose_of", "long_prompt")


def add_subject_options(parser: argparse.ArgumentParser) -> None:
    """The options of --system facediffuser."""
    group = parser.add_argument_group(
        "people from pictures: --system facediffuser",
        f'Prompts mark the words of people, as in "a man {MARKER} and a woman {MARKER}".',
    )
    group.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="[NAME=]IMAGE",
        help="the picture of a person; one for each marker, in their order",
    )
    group.add_argument(
        "--plan", type=Path, default=None, metavar="FILE", help="many pictures: `python -m fairhuman_jax.evaluate plan`"
    )
    group.add_argument("--scene", default=None, metavar="BASE", help="the scene model; --base is the subject model")
    group.add_argument("--delayed", action="store_true", help="the subject model alone, as FastComposer draws")
    group.add_argument("--alpha", type=float, default=None, help="share of steps before subjects come in (default 0.3)")
    group.add_argument("--beta", type=float, default=None, help="share before the subject model is alone (default 0.6)")
    group.add_argument(
        "--stages", type=_two(int), default=None, metavar="START,FINAL", help="the last rows of both stages, not shares"
    )
    group.add_argument("--subject-guidance", type=float, default=None, metavar="G", help="default: --guidance")
    group.add_argument("--baseline", choices=BASELINES, default=None, help="what the subject model is guided from")
    group.add_argument("--soft-mask", type=float, default=None, metavar="T", help="blend, at this temperature")
    group.add_argument(
        "--gains", type=_two(float), default=None, metavar="SCENE,SUBJECT", help="of either model in the fusion"
    )
    group.add_argument("--per-channel", action="store_true", help="a mask for each channel of the latents")
    group.add_argument("--save-maps", action="store_true", help="masks and saliency of the fused steps as pictures")


def _two(kind: type) -> Callable[[str], tuple[Any, Any]]:
    """The type of an option that takes two numbers, as in 15,30."""

    def read(text: str) -> tuple[Any, Any]:
        try:
            first, second = map(kind, text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write two numbers, as in 15,30") from None
        return first, second

    return read


def check_subject_options(options: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    chosen = options.system == "facediffuser"
    given = [name for name in OWN if getattr(options, name) not in (None, False, [])]
    if not chosen:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} needs --system facediffuser")
        return
    if other := next((name for name in OTHERS if getattr(options, name)), None):
        raise ValueError(f"--system facediffuser draws from references; it takes no --{other.replace('_', '-')}")
    if options.plan and (options.reference or options.prompts or options.file):
        raise ValueError("--plan has prompts, seeds and references of its own; leave out those of the command line")
    if not options.reference and not options.plan:
        raise ValueError("--system facediffuser needs --reference, one for each marker of the prompt, or --plan")
    if options.delayed == (options.scene is not None):
        raise ValueError("--system facediffuser needs --scene with the scene model, or --delayed to draw without one")
    if options.stages and (options.alpha is not None or options.beta is not None):
        raise ValueError("--stages says in rows what --alpha and --beta say as shares: give one of the two")
    if options.delayed and (fused := [name for name in FUSION if name in given]):
        raise ValueError(f"--{fused[0].replace('_', '-')} is of the fusion, which --delayed leaves out")
    for path in map(reference_path, options.reference):
        if not path.is_file():
            raise FileNotFoundError(f"--reference {path}: no such file")


def reference_path(entry: str) -> Path:
    """[NAME=]IMAGE; a path may hold equal signs itself if it is a file as it stands."""
    path = Path(entry)
    return path if path.is_file() or "=" not in entry else Path(entry.split("=", 1)[1])


def subject_jobs(options: argparse.Namespace, jobs: Sequence[Job]) -> list[Job]:
    """The jobs with their references; with --plan those of the plan whose picture is not there yet.

    Errors: a number of references that is not that of a prompt's markers; what is wrong with a plan.
    """
    if not options.plan:
        paths = tuple(map(reference_path, options.reference))
        return [_checked(job._replace(references=paths)) for job in jobs]
    planned = read_plan(options.plan)
    if other := next((row.image for row in planned if not row.image.endswith(".png")), None):
        raise ValueError(f"{options.plan}: {other!r} is no name of a .png file, which is what is drawn")
    wanted = [Job(row.prompt, row.seed, row.image, tuple(map(Path, row.references))) for row in planned]
    left = [_checked(job) for job in wanted if not (options.output / job.name).is_file()]
    if len(left) < len(wanted):
        print(f"{len(wanted) - len(left)} of {len(wanted)} pictures are in {options.output} already", file=sys.stderr)
    return left


def _checked(job: Job) -> Job:
    if job.prompt.count(MARKER) != len(job.references):
        raise ValueError(
            f"{job.prompt!r} has {job.prompt.count(MARKER)} of {MARKER} for {len(job.references)} of --reference"
        )
    return job


def subject_model(options: argparse.Namespace, jobs: Sequence[Job]) -> Model:
    """What draws the jobs. Errors: pictures or models that cannot be read; prompts that the model cannot follow."""
    pictures = {path: read_image(path) for path in sorted({path for job in jobs for path in job.references})}
    slots = max(4, *(len(job.references) for job in jobs))
    system, params = open_staged(options.base, options.scene, dtype=options.dtype, slots=slots)
    side = system.image_encoder.config["image_size"]
    references = {path: squared(picture, side) for path, picture in pictures.items()}
    size = checked_size(options.size, None, system)
    request = partial(_request, options, system, references, size)
    for job in {job.prompt: job for job in jobs}.values():  # refuses what does not fit before anything is drawn
        asked = request([job])
        if asked.stages and asked.stages[1] <= asked.stages[0]:
            raise ValueError(f"--save-maps: no step is fused between rows {asked.stages[0]} and {asked.stages[1]}")
    program, keep = _program(options, system)
    return Model("", params, size, options.scheduler or SCHEDULER, request, program, keep=keep)


def _program(options: argparse.Namespace, system: FaceDiffuser) -> tuple[Any, Any]:
    """(the function that is compiled, what writes its maps or None)."""
    if options.delayed:
        return lambda params, request, key, _: draw_delayed(system, params, request, key), None
    if options.save_maps:
        return lambda params, request, key, _: system.sample_with_maps(params, request, key), write_maps
    return lambda params, request, key, _: system.sample_staged(params, request, key), None


def _request(
    options: argparse.Namespace,
    system: FaceDiffuser,
    references: Mapping[Path, np.ndarray],
    size: tuple[int, int],
    group: Sequence[Job],
) -> StagedRequest:
    names = ("alpha", "beta", "baseline", "gains")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.stages:
        given |= dict(zip(("start_merge_step", "final_step"), options.stages, strict=True))
    return make_staged_request(
        system,
        [job.prompt for job in group],
        [job.seed for job in group],
        references=[[references[path] for path in job.references] for job in group],
        steps=options.steps,
        guidance=options.guidance,
        size=size,
        subject_guidance=options.subject_guidance,
        negative=options.negative,
        scheduler=options.scheduler,
        temperature=options.soft_mask,
        per_channel=options.per_channel,
        constant_stages=options.save_maps,
        **given,
    )


def write_maps(maps: FusionMaps, index: int, picture: Path) -> Path:
    """Maps of one picture beside it: columns are rows of stage 2; mask, saliency of scene and of subject model below
    each other, the saliencies from black, their least, to white, their largest value."""
    stacks = [np.asarray(jax.device_get(stack[:, index]), np.float32) for stack in maps]
    count = len(stacks[0])
    chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN_ROWS)).astype(int))
    rows = []
    for stack in stacks:
        low, high = stack.min(), stack.max()
        pixels = np.rint(255.0 * (stack - low) / max(high - low, 1e-12)).astype(np.uint8)
        tiles = [Image.fromarray(pixels[row]).resize((SHOWN, SHOWN), Image.Resampling.NEAREST) for row in chosen]
        rows.append(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
    path = picture.with_name(f"{picture.stem}-maps.png")
    Image.fromarray(np.concatenate(rows)).save(path)
    return path
