"""Pipelines: from options to pictures, batch by batch, by one compiled program for each shape of request."""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from fairhuman_jax.contract import Drawing, Job, Progress
from fairhuman_jax.data.preview import overlay
from fairhuman_jax.devices.sharding import make_mesh, replicate, shard_rows
from fairhuman_jax.drawing.options import Options, Size, fixed_fields, make_options, prompts_of, seeds_of
from fairhuman_jax.drawing.recipes import CHUNK, recipe_of
from fairhuman_jax.fields import OptionError

PyTree = Any
SHEET = 256  # pictures that a contact sheet shows, the first ones


class DrawingWarning(UserWarning):
    """Something about a request that its author should know and that does not stop it."""


class PipelineBase:
    """What all pipelines share: calls from programs, jobs of prompts and seeds, contact sheets."""

    name: ClassVar[str]
    Options: ClassVar[type[Options]]
    options: Any

    @classmethod
    def jobs(cls, options: Any) -> list[Job]:
        """One job a prompt and seed. Raises: OptionError when there is no prompt."""
        options = options.resolved()
        return [Job(prompt, seed, options) for prompt in prompts_of(options) for seed in seeds_of(options)]

    @abstractmethod
    def draw(self, jobs: Sequence[Job], progress: Progress | None = None) -> Iterator[Drawing]:
        """See `contract.Pipeline`."""

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> Image.Image | list[Image.Image]:
        """The picture of a prompt, or a list where prompts or seeds are several.

        options: fields of `Options`, as in seed=3, steps=30, size=(64, 96); the others are those that the pipeline was
        opened with. A picture's recipe is its `info["parameters"]`.
        Raises: OptionError for an unknown option, a wrong value, or an option that is fixed once models are open.
        """
        if fixed := next((name for name in fixed_fields(self.Options) if name in options), None):
            raise OptionError(fixed, f"{{{fixed}}} is fixed once a pipeline is open; open another one")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        record = make_options(self.Options, {"prompt": prompts, **options}, onto=self.options)
        drawn = [_image(drawing) for drawing in self.draw(self.jobs(record))]
        return drawn[0] if isinstance(prompt, str) and len(drawn) == 1 else drawn

    def sheet(self, drawings: Sequence[Drawing]) -> Image.Image | None:
        """The first `SHEET` pictures with their prompts; None for a single one."""
        if len(drawings) < 2:
            return None
        shown = drawings[:SHEET]
        return overlay({"image": np.stack([drawing.image for drawing in shown])}, [d.job.prompt for d in shown])


def _image(drawing: Drawing) -> Image.Image:
    image = Image.fromarray(drawing.image)
    image.info[CHUNK] = json.dumps(drawing.recipe)
    return image


@dataclass(frozen=True)
class Prepared:
    """What draws the jobs of one record of options.

    `program(params, request(jobs), key, lora)` gives images [N, H, W, 3] in [-1, 1], or with `extras` a pair (images,
    more): `extras(more, i)` are the further pictures of image i. size: (height, width); scheduler: the sampler's name.
    """

    size: Size
    scheduler: str
    request: Callable[[Sequence[Job]], PyTree]
    program: Callable[[PyTree, PyTree, jax.Array, PyTree], PyTree]
    extras: Callable[[PyTree, int], Mapping[str, np.ndarray]] | None = None


class BatchPipeline(PipelineBase):
    """A pipeline whose programs draw a batch of jobs at once; parameters lie whole on every device of the mesh."""

    def __init__(self, options: Any, mesh: Mesh, params: PyTree, lora: PyTree = None) -> None:
        self.options, self.mesh = options, mesh
        self.params, self.lora = replicate(mesh, (params, lora))
        self._compiled: set[Any] = set()

    @abstractmethod
    def prepare(self, jobs: Sequence[Job]) -> Prepared:
        """Reads what the jobs' record of options names, the same for all of them.

        Raises: OptionError, ValueError and OSError for pictures that cannot be read or do not fit the models.
        """

    def draw(self, jobs: Sequence[Job], progress: Progress | None = None) -> Iterator[Drawing]:
        """Draws the jobs in batches of `options.batch`; jobs of another record of options begin another batch."""
        runs = [list(run) for _, run in itertools.groupby(jobs, key=lambda job: id(job.options))]
        done = 0
        for run, prepared in [(run, self.prepare(run)) for run in runs]:
            width = min(run[0].options.batch, len(run))
            width += -width % self.mesh.size
            for first in range(0, len(run), width):
                group = run[first : first + width]
                # The last batch is filled up, so that one compiled program serves all.
                request = shard_rows(self.mesh, prepared.request(group + [group[-1]] * (width - len(group))), width)
                if progress and progress(self._state(prepared, request), done, len(jobs)) is False:
                    return
                drawn = prepared.program(self.params, request, jax.random.key(0), self.lora)
                images, more = drawn if prepared.extras else (drawn, None)
                pixels = np.rint((np.asarray(images)[: len(group)] + 1.0) * 127.5).astype(np.uint8)
                for i, job in enumerate(group):
                    place = {"scheduler": prepared.scheduler, "batch": width, "place": i}
                    extras = prepared.extras(more, i) if prepared.extras else {}
                    yield Drawing(job, pixels[i], recipe_of(self.name, job, prepared.size, **place), extras=extras)
                done += len(group)
        if progress:
            progress("drawing", done, len(jobs))

    def _state(self, prepared: Prepared, request: PyTree) -> str:
        """ "compiling" for a program's first request of a shape."""
        leaves, structure = jax.tree.flatten(request)
        shape = (id(prepared.program), structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        known = shape in self._compiled
        self._compiled.add(shape)
        return "drawing" if known else "compiling"


def mesh_of(options: Any) -> Mesh:
    """A mesh of the first `options.mesh` devices, of all for None. Raises: OptionError when there are fewer."""
    devices = jax.devices()
    if options.mesh is not None and options.mesh > len(devices):
        raise OptionError("mesh", f"{{mesh}} {options.mesh}: there are {len(devices)} devices")
    return make_mesh(devices=devices[: options.mesh])
