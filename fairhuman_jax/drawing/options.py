"""Options of drawing, in groups that systems put together; a field's sentence is its help text.

A group that derives from `Opened` names models: its options are fixed once a pipeline is open.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from PIL import Image

from fairhuman_jax.diffusion import RULES
from fairhuman_jax.fields import Choice, Form, Metavar, OptionError, Range, Unrecorded, check_fields, fields_of

Record = TypeVar("Record", bound="Options")
Size = tuple[int, int]
Picture = Path | Image.Image | np.ndarray  # a file, or a picture in memory: uint8 [H, W, 3]


def read_size(text: str) -> Size:
    """Pixels as (height, width) of "64" or "64x96". Raises: ValueError for another text."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise ValueError(f"{text!r}: write 64 or 64x96 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def read_devices(text: str) -> int | None:
    """A number of devices, None for "all". Raises: ValueError for another text."""
    if text != "all" and not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f"{text!r}: write a number of devices, or all")
    return None if text == "all" else int(text)


SIZE = Form(read_size, "N|HxW")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all records of options; values are checked when a record is made. `TITLE` heads a group in help."""

    TITLE: ClassVar[str] = "options"

    def __post_init__(self) -> None:
        check_fields(self)
        self.check()

    def check(self) -> None:
        """Holds fields against each other. Raises: OptionError."""

    def resolved(self: Record) -> Record:
        """The record with each default that depends on other fields filled in."""
        return self


@dataclass(frozen=True, kw_only=True)
class Opened(Options):
    """The base of groups of options that name models; they are fixed once a pipeline is open."""


@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """What to draw, and how many pictures of it."""

    TITLE: ClassVar[str] = "what to draw"

    prompt: Annotated[tuple[str, ...], "text of a picture"] = ()
    prompts: Annotated[Path | None, "text file with one prompt a line", Metavar("FILE"), Unrecorded()] = None
    negative: Annotated[str | None, "what the picture should not show", Metavar("TEXT")] = None
    seed: Annotated[tuple[int, ...], "seeds; each draws every prompt once", Metavar("N[,N...]")] = (0,)
    number: Annotated[int, "pictures a prompt and seed; each next one adds 1 to the seed", Range(1), Unrecorded()] = 1
    size: Annotated[Size | None, "height and width in pixels (default: the base's own)", SIZE] = None
    batch: Annotated[int, "pictures drawn at once", Range(1)] = 16


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How the sampler runs."""

    TITLE: ClassVar[str] = "sampling"

    steps: Annotated[int | None, "number of sampling steps (default 40)", Range(1)] = None
    guidance: Annotated[float | None, "guidance scale; 1 turns guidance off (default 4)"] = None
    guidance_rescale: Annotated[float, "rescale of guided predictions (arXiv 2305.08891)", Range(0, 1)] = 0.0
    scheduler: Annotated[str | None, "sampler; default: the base's own", Choice(tuple(sorted(RULES)))] = None

    def resolved(self: Record) -> Record:
        """40 steps at guidance scale 4 unless the record says otherwise."""
        return filled(self, steps=40, guidance=4.0)


@dataclass(frozen=True, kw_only=True)
class BaseModel(Opened):
    """The base, its files, and the devices that it lies on."""

    TITLE: ClassVar[str] = "base model"

    base: Annotated[str, "people (shipped), a diffusers folder, a checkpoint file or a hub id"] = "people"
    variant: Annotated[str | None, "variant of the base's weight files, as in fp16"] = None
    revision: Annotated[str | None, "branch, tag or commit of a hub id"] = None
    tokenizer: Annotated[str | None, "folder of a tokenizer, for checkpoint files", Metavar("FOLDER")] = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], "number format of weights and computation"] = "float32"
    mesh: Annotated[int | None, "devices that share each batch", Form(read_devices, "N|all")] = 1


def filled(options: Record, **defaults: Any) -> Record:
    """The record with `defaults` in place of fields that are None."""
    return dataclasses.replace(options, **{k: v for k, v in defaults.items() if getattr(options, k) is None})


def make_options(cls: type[Record], values: dict[str, Any], onto: Record | None = None) -> Record:
    """A record of `values` as programs write them: "64x96" or 64 for a size, one value for a tuple of one.

    onto: the record whose other fields are kept. Raises: OptionError for an unknown name or a value out of range.
    """
    fields = {field.name: field for field in fields_of(cls)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(name, list(fields), n=1)
            meant = f"; did you mean {{{close[0]}}}?" if close else f"; known: {', '.join(fields)}"
            raise OptionError(name, f"{{{name}}} is no option here{meant}")
        field = fields[name]
        if field.form is SIZE and value is not None and not isinstance(value, tuple):
            value = SIZE.read(str(value))
        elif field.repeated and not isinstance(value, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        given[name] = Path(value) if field.kind is Path and isinstance(value, str) else value
    return cls(**given) if onto is None else dataclasses.replace(onto, **given)


def fixed_fields(cls: type[Options]) -> list[str]:
    """Names of the options that say what is opened."""
    return [field.name for field in fields_of(cls) if Opened in field.owner.__bases__]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises: OptionError when there is no such file."""
    if not path.is_file():
        raise OptionError("prompts", f"{{prompts}} {path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prompts_of(options: Request) -> list[str]:
    """The record's prompts and those of its file. Raises: OptionError when there is none."""
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    if not prompts:
        raise OptionError("prompt", "nothing to draw: give a prompt, or {prompts} FILE")
    return prompts


def seeds_of(options: Request) -> list[int]:
    """`number` seeds from each given one on."""
    return [seed + i for seed in options.seed for i in range(options.number)]


def path_and_weight(entry: str) -> tuple[str, float]:
    """The parts of PATH[:WEIGHT]; a path may hold colons itself."""
    path, _, weight = entry.rpartition(":")
    if path and re.fullmatch(r"[+-]?\d*\.?\d+", weight):
        return path, float(weight)
    return entry, 1.0
