"""Drawing skeletons: HumanSD, alone or beside ControlNets and T2I-Adapters that read the same people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image

from fairhuman_jax.annotate.detector import open_detector
from fairhuman_jax.contract import Drawing, Job, Progress
from fairhuman_jax.data.preview import overlay
from fairhuman_jax.diffusion import rule_of
from fairhuman_jax.drawing.files import stem
from fairhuman_jax.drawing.options import SIZE, Options, Picture, Size, filled
from fairhuman_jax.drawing.pictures import Guides, fitted, pixels_of, read_guides
from fairhuman_jax.drawing.pipeline import SHEET, Prepared
from fairhuman_jax.drawing.text import TextOptions, TextPipeline, warn_of_truncation
from fairhuman_jax.fields import Metavar, OptionError
from fairhuman_jax.keypoints.drawing import draw_poses
from fairhuman_jax.keypoints.poses import Pose, place_poses
from fairhuman_jax.keypoints.readers import read_poses
from fairhuman_jax.systems.humansd.system import REFERENCE_ADDED, REFERENCE_NEGATIVE, REFERENCE_SCHEDULER

KEY_POINTS = (".npz", ".json")
PUBLISHED = {"steps": 50, "guidance": 10.0, "negative": REFERENCE_NEGATIVE, "scheduler": REFERENCE_SCHEDULER}


@dataclass(frozen=True, kw_only=True)
class SkeletonOptions(Options):
    """Skeletons that people take their poses from."""

    TITLE: ClassVar[str] = "skeletons"

    pose: Annotated[Picture | None, "key points (.npz, .json), or a picture of a skeleton", Metavar("FILE")] = None
    pose_of: Annotated[Picture | None, "photograph whose people's poses are found", Metavar("PHOTO")] = None
    pose_network: Annotated[
        str | None,
        "HigherHRNet that finds them: mmpose checkpoint, folder or people",
        Metavar("PATH"),
    ] = None
    pose_size: Annotated[Size | None, "size of the picture that key points belong to", SIZE] = None
    compare_base: Annotated[
        str | None, "base on which each --controlnet and --adapter draws the same people", Metavar("BASE")
    ] = None
    compat: Annotated[
        Literal["reference"] | None, "HumanSD's published sampling: 49 of 50 steps, guidance 10, its prompt suffix"
    ] = None


@dataclass(frozen=True, kw_only=True)
class HumanSDOptions(SkeletonOptions, TextOptions):
    """Options of drawing skeletons."""

    def check(self) -> None:
        """Holds skeletons, and pictures and models beside them, against each other. Raises: OptionError."""
        pose, photo = self.pose is not None, self.pose_of is not None
        if pose and photo:
            raise OptionError("pose", "{pose} and {pose_of}: give one of the two")
        needs = {"pose_size": (pose, "{pose}"), "pose_network": (photo, "{pose_of}")}
        needs |= dict.fromkeys(("compat", "compare_base"), (pose or photo, "{pose} or {pose_of}"))
        for name, (given, wanted) in needs.items():
            if getattr(self, name) and not given:
                raise OptionError(name, f"{{{name}}} needs {wanted}")
        if self.compare_base and not (self.controlnet or self.adapter):
            raise OptionError("compare_base", "{compare_base} needs {controlnet} or {adapter}")
        super().check()

    def check_conditions(self, nets: int) -> None:
        """A comparison gives every network the skeleton. Raises: OptionError."""
        if self.compare_base is None:
            super().check_conditions(nets)
        elif self.condition:
            raise OptionError(
                "condition",
                f"{nets} of {{controlnet}} and {{adapter}}, which {{compare_base}} gives the pose, but "
                f"{len(self.condition)} of {{condition}}",
            )

    def resolved(self) -> HumanSDOptions:
        """The published settings with `compat`, otherwise those of every text pipeline."""
        return filled(self, **PUBLISHED) if self.compat else super().resolved()


@dataclass(frozen=True)
class Skeletons(Guides):
    """Guides with `pose`, the skeletons that HumanSD reads, and `openpose`, the same people as ControlNets read them.

    Both are uint8 [H, W, 3]; openpose is None where the skeleton came as a picture.
    """

    pose: np.ndarray | None = None
    openpose: np.ndarray | None = None


class HumanSDPipeline(TextPipeline):
    """Pictures of people in given poses, by a denoiser that reads the latents of their skeletons."""

    name: ClassVar[str] = "humansd"
    Options: ClassVar[type[Options]] = HumanSDOptions
    _read: tuple[Any, Skeletons] | None = None

    @classmethod
    def jobs(cls, options: Any) -> list[Job]:
        """One job a prompt and seed; under `compat` prompts end as published. Raises: OptionError without a pose."""
        if options.pose is None and options.pose_of is None:
            raise OptionError("system", "{system} humansd needs {pose} or {pose_of}")
        jobs = super().jobs(options)
        added = f", {REFERENCE_ADDED}" if options.compat else ""
        return [job if job.prompt.endswith(added) else job._replace(prompt=job.prompt + added) for job in jobs]

    @classmethod
    def open(cls, options: Any) -> HumanSDPipeline:
        """See `TextPipeline.open`; with `compare_base` ControlNets and adapters wait for that base.

        Raises: OptionError for a base that reads no pose.
        """
        if options.compare_base is None:
            pipeline = super().open(options)
        else:
            alone = dataclasses.replace(options, controlnet=(), adapter=(), control_scale=(), compare_base=None)
            pipeline = super().open(alone)
        if pipeline.system.base.denoiser.reads != "pose":
            base = pipeline.system.base
            raise OptionError(
                "base",
                f"{{base}} {options.base} is not HumanSD: its denoiser reads {base.denoiser.channels} channels, "
                f"HumanSD's reads {2 * base.codec.channels}; a pose picture is for HumanSD alone",
            )
        assert isinstance(pipeline, HumanSDPipeline)
        return pipeline

    def prepare(self, jobs: Sequence[Job]) -> Prepared:
        """See `TextPipeline.prepare`. Raises: OptionError for a comparison without key points."""
        options = jobs[0].options
        guides = self.guides(options)
        if options.compare_base and guides.openpose is None:
            raise OptionError(
                "compare_base", f"{{compare_base}} needs key points, but {{pose}} {options.pose} is a drawn skeleton"
            )
        if not options.long_prompt:
            warn_of_truncation(self.system, [job.prompt for job in jobs])
        own = dataclasses.replace(options, controlnet=(), adapter=(), control_scale=(), compare_base=None)
        more = {"pose": guides.pose, "pose_latent": "sample" if options.compat else "mode"}
        scheduler = options.scheduler or rule_of(self.system.pipeline.schedule).name
        return Prepared(guides.size, scheduler, partial(self.request, own, guides, **more), self._program)

    def guides(self, options: Any) -> Skeletons:
        """The pictures that the options name, and the skeletons, drawn or read; kept for the last options."""
        if self._read is None or self._read[0] is not options:
            self._read = options, self._skeletons(options)
        return self._read[1]

    def _skeletons(self, options: Any) -> Skeletons:
        drawn = None
        if options.pose is not None and not _holds_points(options.pose):
            drawn = pixels_of(options.pose)
        plain = read_guides(self.system, options.size, options.init_image, options.mask, options.condition, drawn)
        given = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        if drawn is not None:
            return Skeletons(**given, pose=fitted(drawn, plain.size, Image.Resampling.NEAREST))
        people, found_in = _people(options)
        placed = place_poses(people, plain.size, found_in, compat=options.compat)
        pose = draw_poses(placed, plain.size, compat=options.compat)
        return Skeletons(**given, pose=pose, openpose=draw_poses(placed, plain.size, "openpose"))

    def draw(self, jobs: Sequence[Job], progress: Progress | None = None) -> Iterator[Drawing]:
        """Draws the jobs, and with `compare_base` once more by each ControlNet and adapter on that base."""
        yield from super().draw(jobs, progress)
        if not jobs or jobs[0].options.compare_base is None:
            return
        for path, other in self._others(jobs[0].options):
            again = [job._replace(options=other) for job in jobs]
            for drawing in TextPipeline.open(other).draw(again, progress):
                yield dataclasses.replace(drawing, label=stem(path))

    def _others(self, options: Any) -> Iterator[tuple[str, TextOptions]]:
        """(path, options) of each ControlNet and adapter, with the same people in OpenPose's style."""
        openpose = self.guides(options).openpose
        kinds = [("controlnet", path) for path in options.controlnet] + [("adapter", path) for path in options.adapter]
        for (kind, path), scale in zip(kinds, options.scales, strict=True):
            given: dict[str, Any] = {kind: (path,), "condition": (openpose,), "control_scale": (scale,)}
            given |= {name: getattr(options, name) for name in ("steps", "guidance", "guidance_rescale", "negative")}
            given |= {name: getattr(options, name) for name in ("dtype", "mesh", "batch", "long_prompt")}
            scheduler = "ddim" if options.compat else options.scheduler
            size = openpose.shape[:2] if openpose is not None else options.size
            yield path, TextOptions(base=options.compare_base, scheduler=scheduler, size=size, **given)

    def sheet(self, drawings: Sequence[Drawing]) -> Image.Image | None:
        """A row a job where several models draw: skeleton, HumanSD, each ControlNet, each adapter."""
        labels = list(dict.fromkeys(drawing.label for drawing in drawings))
        if len(labels) < 2:
            return super().sheet(drawings)
        columns = [[drawing for drawing in drawings if drawing.label == label][:SHEET] for label in labels]
        skeleton = self.guides(columns[0][0].job.options).pose
        assert skeleton is not None, "a comparison has key points"
        rows = [[skeleton, *(drawing.image for drawing in row)] for row in zip(*columns, strict=True)]
        titles = [[drawing.job.prompt, "HumanSD", *labels[1:]] for drawing in columns[0]]
        pixels = np.stack([image for row in rows for image in row])
        return overlay({"image": pixels}, [title for row in titles for title in row], columns=1 + len(columns))


def _holds_points(picture: Picture) -> bool:
    return isinstance(picture, Path) and picture.suffix.lower() in KEY_POINTS


def _people(options: Any) -> tuple[list[Pose], Size | None]:
    """The people of a file of key points, or those that a detector finds on a photograph, and the size of the picture
    that their points belong to, if it is known."""
    if options.pose_of is None:
        found = read_poses(options.pose, options.pose_size)
        return list(found.poses), found.size or options.pose_size
    picture = pixels_of(options.pose_of)
    people = open_detector(options.pose_network, compat=bool(options.compat)).detect(picture)
    if not people:
        raise OptionError("pose_of", f"{{pose_of}} {options.pose_of}: nobody is found on it; give {{pose}}")
    return people, (picture.shape[0], picture.shape[1])
