"""Orbax checkpoints: trainables, optimiser, average, key and step, with the data position; never the frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fairhuman_jax.training.state import TrainState


class Checkpointer:
    """Saves asynchronously into `folder/<step>`; a save that was cut off is never restored.

    A checkpoint holds the state (arrays), the position of the data iterator and the run's configuration (JSON).
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._begun = self.latest_step

    @property
    def latest_step(self) -> int | None:
        """The last complete checkpoint, or None."""
        return self._manager.latest_step()

    def newest(self) -> int:
        """The step to resume from. Raises: FileNotFoundError for there is none."""
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(f"no checkpoint to resume from in {self.folder}; start without --resume")
        return step

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: dict[str, Any]) -> None:
        """Begins a save; the arrays are copied before this returns, the files are written in the background.

        A step that is saved already, or being saved, is left alone. Raises: OSError: OSError where this save cannot
        begin or the one before it could not be finished.
        """
        if step == self._begun:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_storable(state)),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config),
        )
        with self._reported():
            self._manager.save(step, args=args, force=True)
        self._begun = step

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest checkpoint as (state, data position), placed like `state`, which gives the structure.

        Raises: FileNotFoundError, ValueError for no checkpoint, or one of another model or optimiser.
        """
        step = self.newest()
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint {self.folder / str(step)} does not fit this configuration ({first_line}); "
                "resume with the configuration it was saved under, and with the version of this package"
            ) from error
        stored = restored["state"]
        key = jax.random.wrap_key_data(stored["key"], impl=jax.random.key_impl(state.key))
        return TrainState(**(stored | {"key": key})), restored["data"]

    def wait(self) -> None:
        """Returns once the save in flight is complete. Raises: OSError: OSError where it could not be finished."""
        with self._reported():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in flight; errors as `wait`."""
        try:
            self.wait()
        finally:
            with self._reported():
                self._manager.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Whatever goes wrong with files, in whichever library, as one line. What was complete before stays so."""
        try:
            yield
        except Exception as error:
            done = self.latest_step
            kept = "there is no earlier one" if done is None else f"that of step {done} is complete"
            raise OSError(f"{self.folder}: a checkpoint could not be written ({error}); {kept}") from error


def has_checkpoint(output: str) -> bool:
    """Whether a run's folder holds a complete checkpoint."""
    return any(path.name.isdigit() for path in (Path(output) / "checkpoints").glob("*"))


def _storable(state: TrainState) -> dict[str, Any]:
    """The state as a plain dict of arrays; keys are stored as their data."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return fields | {"key": jax.random.key_data(state.key)}
