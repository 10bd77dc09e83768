"""Drawing people from reference pictures: Face-diffuser (two models fused per pixel) and FastComposer (one alone)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from fairhuman_jax.contract import Job
from fairhuman_jax.data.object_augmentation import squared
from fairhuman_jax.devices.programs import KeptProgram
from fairhuman_jax.diffusion import BASELINES, FusionMaps
from fairhuman_jax.drawing.options import BaseModel, Opened, Options, Request, Sampling
from fairhuman_jax.drawing.pictures import checked_size, pixels_of
from fairhuman_jax.drawing.pipeline import BatchPipeline, Prepared, mesh_of
from fairhuman_jax.drawing.plans import read_plan
from fairhuman_jax.fields import Choice, Form, Metavar, OptionError, Unrecorded
from fairhuman_jax.systems.facediffuser.fusion import (
    FaceDiffuser,
    StagedRequest,
    draw_delayed,
    draw_staged,
    draw_with_maps,
    make_staged_request,
    open_staged,
)
from fairhuman_jax.weights import MARKER

SCHEDULER = "pndm"  # the published sampler
FUSION = ("beta", "stages", "baseline", "soft_mask", "gains", "per_channel", "save_maps")  # options of fused steps
SHOWN_STEPS = 8  # fused steps that a picture of maps shows
SHOWN = 64  # pixels a side of a shown map
SLOTS = 4  # references a prompt for which the program has room, if no prompt has more


def _two(kind: type, text: str) -> tuple[Any, Any]:
    """Two numbers, as in "15,30". Raises: ValueError for another text."""
    try:
        first, second = map(kind, text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: write two numbers, as in 15,30") from None
    return first, second


@dataclass(frozen=True, kw_only=True)
class SceneModels(Opened):
    """The second model of the fusion."""

    TITLE: ClassVar[str] = "scene model"

    scene: Annotated[str | None, "scene model; --base is then the subject model", Metavar("BASE")] = None


@dataclass(frozen=True, kw_only=True)
class SubjectOptions(Options):
    """People from pictures; prompts mark the words of people, as in "a man <|image|> and a woman <|image|>"."""

    TITLE: ClassVar[str] = f'people from pictures: "a man {MARKER} and a woman {MARKER}"'

    reference: Annotated[
        tuple[str, ...], "picture of a person; one for each marker, in their order", Metavar("[NAME=]IMAGE")
    ] = ()
    plan: Annotated[
        Path | None, "many pictures, as `fairhuman_jax.evaluate plan` writes", Metavar("FILE"), Unrecorded()
    ] = None
    delayed: Annotated[bool, "draw with the subject model alone, as FastComposer does"] = False
    alpha: Annotated[float | None, "fraction of the steps before the subjects come in (default 0.3)"] = None
    beta: Annotated[float | None, "fraction of the steps before the subject model draws alone (default 0.6)"] = None
    stages: Annotated[
        tuple[int, int] | None, "step numbers instead of alpha and beta", Form(partial(_two, int), "START,FINAL")
    ] = None
    subject_guidance: Annotated[float | None, "guidance scale of the subject model (default: --guidance)"] = None
    baseline: Annotated[str | None, "prediction that the subject model is guided from", Choice(tuple(BASELINES))] = None
    soft_mask: Annotated[float | None, "temperature at which the fusion blends the models", Metavar("T")] = None
    gains: Annotated[
        tuple[float, float] | None, "gains of both models in the fusion", Form(partial(_two, float), "SCENE,SUBJECT")
    ] = None
    per_channel: Annotated[bool, "fuse each channel of the latents by its own mask"] = False
    save_maps: Annotated[bool, "write masks and saliency maps of the fused steps as pictures"] = False


@dataclass(frozen=True, kw_only=True)
class FaceDiffuserOptions(SubjectOptions, SceneModels, BaseModel, Sampling, Request):
    """Options of drawing people from reference pictures."""

    def check(self) -> None:
        """Holds the stages against each other, and references against files. Raises: OptionError."""
        if self.plan and (self.reference or self.prompt or self.prompts):
            raise OptionError(
                "plan", "{plan} has prompts, seeds and references of its own; leave out those of the command line"
            )
        if self.stages and (self.alpha is not None or self.beta is not None):
            raise OptionError("stages", "{stages} (step numbers), {alpha} and {beta} (fractions): give one of the two")
        if self.delayed and (name := next((n for n in FUSION if getattr(self, n) not in (None, False)), None)):
            raise OptionError(name, f"{{{name}}} is of the fusion, which {{delayed}} turns off")
        for path in map(reference_path, self.reference):
            if not path.is_file():
                raise OptionError("reference", f"{{reference}} {path}: no such file")


def reference_path(entry: str) -> Path:
    """The path in [NAME=]IMAGE; a path may hold equal signs itself if it is a file as it stands."""
    path = Path(entry)
    return path if path.is_file() or "=" not in entry else Path(entry.split("=", 1)[1])


class FaceDiffuserPipeline(BatchPipeline):
    """Pictures of the people on reference pictures, by two models in stages or by one alone."""

    name: ClassVar[str] = "facediffuser"
    Options: ClassVar[type[Options]] = FaceDiffuserOptions

    def __init__(self, options: Any, mesh: Mesh, system: FaceDiffuser, params: Any) -> None:
        super().__init__(options, mesh, params)
        self.system = system
        # The request says how the fusion works, so one program of each kind serves all options.
        drawers = {"delayed": draw_delayed, "staged": draw_staged, "maps": draw_with_maps}
        self._programs = {kind: KeptProgram(partial(_drawn, drawer, system)) for kind, drawer in drawers.items()}

    @classmethod
    def jobs(cls, options: Any) -> list[Job]:
        """One job a prompt and seed with its references, or those of the plan.

        Raises: OptionError for a prompt whose markers are not as many as its references; a plan that cannot be read;
        neither references nor a plan; neither a scene model nor `delayed`, or both.
        """
        options = options.resolved()
        if not options.reference and not options.plan:
            raise OptionError("reference", "{system} facediffuser needs {reference} for each marker, or {plan}")
        if options.delayed == (options.scene is not None):
            raise OptionError(
                "scene", "{system} facediffuser needs {scene} with the scene model, or {delayed} to draw without one"
            )
        if options.plan:
            jobs = _planned(options)
        else:
            paths = tuple(map(reference_path, options.reference))
            jobs = [job._replace(references=paths) for job in super().jobs(options)]
        for job in jobs:
            if (count := job.prompt.count(MARKER)) != len(job.references):
                raise OptionError(
                    "reference", f"{job.prompt!r} has {count} of {MARKER} for {len(job.references)} of {{reference}}"
                )
        return jobs

    @classmethod
    def open(cls, options: Any) -> FaceDiffuserPipeline:
        """Reads the subject model and, unless it draws alone, the scene model.

        Raises: OptionError when there are fewer devices than `mesh`; ValueError and OSError for models that cannot be
        read or differ in denoiser or text encoder.
        """
        mesh = mesh_of(options)
        system, params = open_staged(options.base, options.scene, dtype=options.dtype, slots=SLOTS)
        return cls(options, mesh, system, params)

    def prepare(self, jobs: Sequence[Job]) -> Prepared:
        """See `BatchPipeline.prepare`.

        Raises: ValueError for prompts that the model cannot follow; OptionError where no step is fused.
        """
        options = jobs[0].options
        side = self.system.image_encoder.config["image_size"]
        paths = {path for job in jobs for path in job.references}
        references = {path: squared(pixels_of(path), side) for path in sorted(paths)}
        size = checked_size(options.size, None, self.system)
        system = dataclasses.replace(self.system, slots=max(SLOTS, *(len(job.references) for job in jobs)))
        request = partial(_request, system, references, size)
        for job in {job.prompt: job for job in jobs}.values():  # refuses what does not fit before anything is drawn
            asked = request([job])
            if asked.stages and asked.stages[1] <= asked.stages[0]:
                raise OptionError(
                    "save_maps", f"{{save_maps}}: no step is fused between rows {asked.stages[0]} and {asked.stages[1]}"
                )
        kind = "delayed" if options.delayed else "maps" if options.save_maps else "staged"
        extras = _map_pictures if options.save_maps else None
        return Prepared(size, options.scheduler or SCHEDULER, request, self._programs[kind], extras)


def _request(
    system: FaceDiffuser, references: Mapping[Path, np.ndarray], size: tuple[int, int], jobs: Sequence[Job]
) -> StagedRequest:
    options = jobs[0].options
    names = ("alpha", "beta", "baseline", "gains")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.stages:
        given |= dict(zip(("start_merge_step", "final_step"), options.stages, strict=True))
    return make_staged_request(
        system,
        [job.prompt for job in jobs],
        [job.seed for job in jobs],
        references=[[references[path] for path in job.references] for job in jobs],
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


def _drawn(drawer: Callable[..., Any], system: FaceDiffuser, params: Any, request: Any, key: jax.Array, _: Any) -> Any:
    """A drawing function with the arguments of a pipeline's program; no LoRA is read."""
    return drawer(system, params, request, key)


def _planned(options: Any) -> list[Job]:
    """The jobs of a plan. Raises: OptionError for a file that is not to be a PNG."""
    planned = read_plan(options.plan)
    if other := next((row.image for row in planned if not row.image.endswith(".png")), None):
        raise OptionError("plan", f"{options.plan}: {other!r} is no name of a .png file, which is what is drawn")
    return [Job(row.prompt, row.seed, options, row.image, tuple(map(Path, row.references))) for row in planned]


def _map_pictures(maps: FusionMaps, index: int) -> dict[str, np.ndarray]:
    """Maps of one picture: columns are steps of stage 2; mask, saliency of scene and of subject model below each
    other, the saliencies from black, their least, to white, their largest value."""
    stacks = [np.asarray(jax.device_get(stack[:, index]), np.float32) for stack in maps]
    count = len(stacks[0])
    chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN_STEPS)).astype(int))
    rows = []
    for stack in stacks:
        low, high = stack.min(), stack.max()
        pixels = np.rint(255.0 * (stack - low) / max(high - low, 1e-12)).astype(np.uint8)
        tiles = [Image.fromarray(pixels[row]).resize((SHOWN, SHOWN), Image.Resampling.NEAREST) for row in chosen]
        rows.append(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
    return {"maps": np.concatenate(rows)}
