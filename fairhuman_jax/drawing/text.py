"""Drawing from text, and from pictures beside it: image to image, inpainting, ControlNets and T2I-Adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from jax.sharding import Mesh

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import open_system
from fairhuman_jax.contract import Job
from fairhuman_jax.devices.programs import KeptProgram
from fairhuman_jax.diffusion import rule_of
from fairhuman_jax.drawing.options import BaseModel, Opened, Options, Picture, Request, Sampling, path_and_weight
from fairhuman_jax.drawing.pictures import Guides, read_guides
from fairhuman_jax.drawing.pipeline import BatchPipeline, DrawingWarning, Prepared, mesh_of
from fairhuman_jax.drawing.requests import SampleRequest, draw_images, make_request
from fairhuman_jax.fields import Metavar, OptionError
from fairhuman_jax.weights import load_loras, tokens_cut

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class AddedModels(Opened):
    """Models added to the base."""

    TITLE: ClassVar[str] = "models added to the base"

    lora: Annotated[tuple[str, ...], "LoRA file or folder; may be repeated", Metavar("PATH[:WEIGHT]")] = ()
    controlnet: Annotated[tuple[str, ...], "ControlNet; may be repeated", Metavar("PATH")] = ()
    adapter: Annotated[tuple[str, ...], "T2I-Adapter; may be repeated", Metavar("PATH")] = ()


@dataclass(frozen=True, kw_only=True)
class GuidePictures(Options):
    """Pictures that steer or begin a drawing."""

    TITLE: ClassVar[str] = "pictures to draw from"

    condition: Annotated[
        tuple[Picture, ...], "control image; one for each ControlNet, then adapter", Metavar("IMAGE")
    ] = ()
    control_scale: Annotated[
        tuple[float, ...], "strength of each ControlNet and adapter (default 1)", Metavar("S")
    ] = ()
    init_image: Annotated[Picture | None, "picture to start from", Metavar("IMAGE")] = None
    strength: Annotated[float | None, "fraction of the steps that it goes through (default 1)", Metavar("S")] = None
    mask: Annotated[Picture | None, "white where the picture is drawn anew", Metavar("IMAGE")] = None


@dataclass(frozen=True, kw_only=True)
class TextOptions(GuidePictures, AddedModels, BaseModel, Sampling, Request):
    """Options of drawing from text."""

    TITLE: ClassVar[str] = "text"

    long_prompt: Annotated[bool, "encode prompts above 77 tokens in chunks instead of truncating them"] = False

    def check(self) -> None:
        """Holds pictures against the models that read them. Raises: OptionError."""
        nets = len(self.controlnet) + len(self.adapter)
        self.check_conditions(nets)
        if len(self.control_scale) > nets:
            raise OptionError(
                "control_scale",
                f"{len(self.control_scale)} of {{control_scale}} for {nets} of {{controlnet}} and {{adapter}}",
            )
        for name in ("strength", "mask"):
            if self.init_image is None and getattr(self, name) is not None:
                raise OptionError(name, f"{{{name}}} needs {{init_image}}")

    def check_conditions(self, nets: int) -> None:
        """One control image for each network. Raises: OptionError."""
        if len(self.condition) != nets:
            raise OptionError(
                "condition", f"{nets} of {{controlnet}} and {{adapter}}, but {len(self.condition)} of {{condition}}"
            )

    @property
    def scales(self) -> tuple[float, ...]:
        """The strength of each ControlNet, then of each adapter."""
        nets = len(self.controlnet) + len(self.adapter)
        return self.control_scale + (1.0,) * (nets - len(self.control_scale))


class TextPipeline(BatchPipeline):
    """Text to image on a base with LoRAs, ControlNets and T2I-Adapters."""

    name: ClassVar[str] = "text"
    Options: ClassVar[type[Options]] = TextOptions

    def __init__(self, options: Any, mesh: Mesh, system: LatentDiffusion, params: PyTree, lora: PyTree = None) -> None:
        super().__init__(options, mesh, params, lora)
        self.system, self._program = system, KeptProgram(partial(draw_images, system))

    @classmethod
    def open(cls, options: Any) -> TextPipeline:
        """Reads base, ControlNets, adapters and LoRAs.

        Raises: OptionError when there are fewer devices than `mesh`; ValueError and OSError for models that cannot be
        read or do not fit the base.
        """
        mesh = mesh_of(options)
        system, params = open_networks(options, options.controlnet, options.adapter)
        lora = load_loras([path_and_weight(entry) for entry in options.lora], params) if options.lora else None
        return cls(options, mesh, system, params, lora)

    def prepare(self, jobs: Sequence[Job]) -> Prepared:
        """See `BatchPipeline.prepare`. Warns of prompts that the text encoders truncate."""
        options = jobs[0].options
        guides = self.guides(options)
        if not options.long_prompt:
            warn_of_truncation(self.system, [job.prompt for job in jobs])
        scheduler = options.scheduler or rule_of(self.system.pipeline.schedule).name
        return Prepared(guides.size, scheduler, partial(self.request, options, guides), self._program)

    def guides(self, options: Any) -> Guides:
        """The pictures that the options name."""
        return read_guides(self.system, options.size, options.init_image, options.mask, options.condition)

    def request(self, options: Any, guides: Guides, jobs: Sequence[Job], **more: Any) -> SampleRequest:
        """The sampler's request for some jobs."""
        return make_request(
            self.system,
            [job.prompt for job in jobs],
            [job.seed for job in jobs],
            steps=options.steps,
            guidance=options.guidance,
            rescale=options.guidance_rescale,
            size=guides.size,
            negative=options.negative,
            scheduler=options.scheduler,
            strength=1.0 if options.strength is None else options.strength,
            image=guides.image,
            mask=guides.mask,
            conditions=guides.conditions,
            scales=options.scales,
            long_prompts=options.long_prompt,
            **more,
        )


def open_networks(
    options: Any, controlnets: Sequence[str], adapters: Sequence[str]
) -> tuple[LatentDiffusion, dict[str, PyTree]]:
    """The base that the options name with ControlNets and adapters, and all parameters by network."""
    names = ("variant", "revision", "tokenizer")
    files = {name: value for name in names if (value := getattr(options, name)) is not None}
    return open_system(options.base, controlnets=controlnets, adapters=adapters, dtype=options.dtype, **files)


def warn_of_truncation(system: LatentDiffusion, prompts: Sequence[str]) -> None:
    """Warns of each prompt that is longer than the text encoders read."""
    prompts = list(dict.fromkeys(prompts))
    for tokenizer in system.base.text.tokenizers:
        for index, cut in tokens_cut(tokenizer, prompts).items():
            warnings.warn(
                f"prompt {index + 1} is {cut} tokens too long for this model; its end is left out "
                f"(long_prompt keeps it): {prompts[index]!r}",
                DrawingWarning,
                stacklevel=3,
            )
