"""What the trainer needs of a system (docs/design.md, section 3); nothing in the trainer knows which one runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from PIL import Image

PyTree = Any
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn while training: the same prompts, seeds and settings each time. Without prompts, none."""

    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 30
    guidance: float = 3.0


class System(Protocol):
    """A frozen record with four members for training and sampling, and three for the doors."""

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """The trees (trainable, frozen)."""
        ...

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """A tree of floating arrays: all that the objectives need."""
        ...

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """K named scalar losses, each a mean over the batch, in a fixed order."""
        ...

    def sample(self, trainable: PyTree, frozen: PyTree, request: Any, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] for a request of one shape."""
        ...

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions -> the integer arrays that a batch carries for them."""
        ...

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[Any, list[str]] | None:
        """A request for `sample` and a title for each of its images; None where there is nothing to draw."""
        ...

    def export(self, trainable: PyTree, frozen: PyTree, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes what was trained in the format that other programs read; returns the file or folder.

        `held_out` is a batch for statistics that such a format stores.
        """
        ...


class SystemConfig(Protocol):
    """A configuration that builds a system; reads files, so errors about them come from here."""

    def build(self) -> System: ...


def sample_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """One key a sample, by its `position` in the global batch: how a batch is split changes no random number."""
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(batch["position"])


def check_fixed(config: Any, fixed: dict[str, Any]) -> None:
    """What compat="reference" fixes must be at that value or at its default. Errors: an option that is at a third."""
    defaults = {option.name: option.default for option in fields(config)}
    for name, value in fixed.items():
        if getattr(config, name) not in (value, defaults[name]):
            raise ValueError(f"compat='reference' fixes {name} = {value!r}, but it is {getattr(config, name)!r}")


# ---- what draws ------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One picture to draw.

    options: the record that the request was made with. name: the file's name where a plan gives one. references: the
    pictures of the people that the prompt marks.
    """

    prompt: str
    seed: int
    options: Any
    name: str = ""
    references: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Drawing:
    """A drawn picture.

    image: uint8 [H, W, 3]. recipe: JSON values that draw it again. label: the model that drew it, where several draw
    the same job. extras: further pictures by name, uint8 [h, w] or [h, w, 3], such as maps of a fusion.
    """

    job: Job
    image: np.ndarray
    recipe: dict[str, Any]
    label: str = ""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)


class Progress(Protocol):
    """Hears of a pipeline's work: "compiling" or "drawing", with the number of pictures done and of all.

    An answer of False ends the work; None and True let it go on.
    """

    def __call__(self, state: str, done: int, total: int) -> bool | None: ...


class Pipeline(Protocol):
    """What draws: models that are open, and the functions from options to pictures.

    A class of pipelines says its `name` and the record of its `Options`, from which come its command line, a picture's
    recipe and a form.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    options: Any

    @classmethod
    def open(cls, options: Any) -> Pipeline:
        """Reads the models that the options name.

        Raises: OptionError, ValueError and OSError for models that cannot be read or do not fit together.
        """
        ...

    @classmethod
    def jobs(cls, options: Any) -> Sequence[Job]:
        """The pictures that the options request; reads no model.

        Raises: OptionError for a request that cannot be drawn.
        """
        ...

    def draw(self, jobs: Sequence[Job], progress: Progress | None = None) -> Iterator[Drawing]:
        """Draws the jobs in their order, once for each model that draws.

        Raises: OptionError and ValueError for what does not fit the models, before anything is drawn.
        """
        ...

    def sheet(self, drawings: Sequence[Drawing]) -> Image.Image | None:
        """A contact sheet of the drawings; None where one picture needs none."""
        ...
