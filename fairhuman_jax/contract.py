"""The two promises of a system: what trains and what draws (docs/design.md, section 3).

The trainer and the command lines know nothing else of a system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from PIL import Image

MARKER = "<|image|>"  # in captions, behind the word of a person whose reference picture is given
PyTree = Any
Batch = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]


# ---- what trains -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn while training: the same prompts, seeds and settings each time."""

    prompts: Annotated[tuple[str, ...], "prompts of the previews; without prompts nothing is drawn"] = ()
    seed: Annotated[int, "seed of the first prompt; each next prompt adds 1"] = 0
    steps: Annotated[int, "number of sampling steps"] = 30
    guidance: Annotated[float, "guidance scale; 1 turns guidance off"] = 3.0


class Parts(NamedTuple):
    """The trees of a system: what trains, its running statistics, and what stays as it is."""

    trainable: PyTree
    statistics: PyTree
    frozen: PyTree


# Parts of a system -> named values, for a fixed set of held-out batches and a key.
Measure = Callable[[Parts], dict[str, float]]
MakeMeasure = Callable[[Sequence[Batch], jax.Array], Measure]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The base of phases: one player's share of a step, its prediction and the objectives by which it moves.

    name: in logs and checkpoints. trains: top-level names of the trainables that it moves, () for all. every: the phase
    runs at each step that this number divides, as lazy regularisation does. player: the name under which its optimiser
    state is kept; phases of one player share it.
    """

    name: str = "all"
    trains: tuple[str, ...] = ()
    every: int = 1
    player: str = "all"

    def predict(self, parts: Parts, batch: Batch, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(a tree of floating arrays: all that the objectives need, the new statistics)."""
        raise NotImplementedError

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """K named scalar losses, each a mean over the batch, in a fixed order; K > 1 switches the combiner on."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WholePhase(Phase):
    """The only phase of a system: it moves all trainables at every step."""

    system: System

    def predict(self, parts: Parts, batch: Batch, key: jax.Array) -> tuple[PyTree, PyTree]:
        """The system's prediction and its new statistics."""
        prediction = self.system.predict(parts.trainable, parts.frozen, batch, key)
        return prediction, self.system.update_statistics(parts.statistics, prediction)

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The system's objectives."""
        return self.system.objectives(prediction, batch)


class System:
    """The base of all systems that train, frozen dataclasses.

    A system of one player defines `predict` and `objectives`; one of several players overrides `phases` instead. Both
    define `init`, `sample` and `export`; the other members have defaults.
    """

    encodes: ClassVar[tuple[str, ...]] = ()  # of "image", "text": what frozen networks can encode once, before training
    measures: ClassVar[Mapping[str, MakeMeasure] | None] = None  # None: the mean of every objective on held-out batches

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in the order in which they run."""
        return (WholePhase(system=self),)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """The trees (trainable, frozen)."""
        raise NotImplementedError

    @property
    def opened(self) -> PyTree:
        """The parameters, or their shapes, that the system was opened with; `init` looks at them."""
        return {}

    def with_opened(self, params: PyTree) -> System:
        """The system with other parameters in place of `opened`."""
        return self

    def init_statistics(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """The running statistics at the first step; floating arrays, averaged over devices and micro-batches."""
        return {}

    def predict(self, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        """A tree of floating arrays: all that the objectives need."""
        raise NotImplementedError

    def update_statistics(self, statistics: PyTree, prediction: PyTree) -> PyTree:
        """The statistics after a step with this prediction."""
        return statistics

    def objectives(self, prediction: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """K named scalar losses, each a mean over the batch, in a fixed order."""
        raise NotImplementedError

    def sample(self, trainable: PyTree, frozen: PyTree, request: Any, key: jax.Array) -> jax.Array:
        """Images [N, H, W, 3] in [-1, 1] for a request of one shape."""
        raise NotImplementedError

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions -> the integer arrays that a batch carries for them; by default none."""
        return {}

    def reads(self, offered: Shapes, *, latents: bool = False, text: bool = False) -> Shapes:
        """The arrays of a batch out of those that the data offers, for a step that is compiled without data.

        latents, text: encoded latents and text embeddings stand in place of pictures and token ids.
        """
        return offered

    def preview(self, config: PreviewConfig, held_out: dict[str, np.ndarray]) -> tuple[Any, list[str]] | None:
        """A request for `sample` and a title for each of its images; None where there is nothing to draw."""
        return None

    def export(self, parts: Parts, folder: Path, held_out: dict[str, np.ndarray]) -> Path:
        """Writes what was trained in the format that other programs read; returns the file or folder.

        `held_out` is a batch for figures that such a format stores.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SystemConfig:
    """The base of all configurations of systems, frozen dataclasses."""

    def build(self, shapes: bool = False) -> Any:
        """The system. shapes: parameters of published models are shapes, so that their files need not be there.

        Raises: ValueError and OSError for files that cannot be read or do not fit together.
        """
        raise NotImplementedError

    def drawn_by(self, export: Path) -> dict[str, Any]:
        """Options with which `sample.py` draws what a run exported: `system`, `base` and so on.

        Raises: ValueError where nothing can be drawn with it.
        """
        raise ValueError(f"{type(self).__name__} trains nothing that draws pictures")


def sample_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """One key a sample, by its `position` in the global batch: how a batch is split changes no random number."""
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(batch["position"])


def check_fixed(config: Any, fixed: dict[str, Any]) -> None:
    """Holds what compat="reference" fixes at that value or its default. Raises: ValueError for a third value."""
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
