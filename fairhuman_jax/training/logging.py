"""What a run says: one progress bar, `metrics.jsonl`, TensorBoard, W&B where asked for, and aligned tables.

Takes Python numbers only. Reading a value from a device waits for the device, so the loop decides when that
happens.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"
_WANDB_ID = "wandb_id"


class RunLogger:
    """Log of a run in `folder`: `metrics.jsonl`, TensorBoard; the bar goes to `stream` (None: stderr).

    Step k is the record of update k, counted from 0, and of what was measured before it. A run resumed after N updates
    passes `start_step=N`: lines at or after that step are dropped from `metrics.jsonl`, because they will be written
    again.
    `bar_keys` are the metrics shown beside the bar (None: the first six). `images_per_step` (the global
    batch) turns the time between two logs into `images_per_second`. `wandb` names a project of Weights & Biases that
    gets the same numbers and pictures, with `config`; the run keeps its place there when it is resumed.
    `enabled=False` makes every method a no-op: the other processes of a multi-host run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        total_steps: int,
        start_step: int = 0,
        images_per_step: int = 0,
        bar_keys: Sequence[str] | None = None,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.enabled = enabled
        self._images_per_step, self._bar_keys = images_per_step, bar_keys
        self._last_step, self._last_time = start_step - 1, time.monotonic()
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._wandb: Any = None
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_from(self.folder / METRICS, start_step)
        self._file = (self.folder / METRICS).open("a", encoding="utf-8")
        if tensorboard:
            self._board = _summary_writer()(str(self.folder / "tensorboard"), purge_step=start_step)
        if wandb is not None:
            self._wandb = _open_wandb(wandb, self.folder, config, new=start_step == 0)
        self._bar = tqdm(
            total=total_steps, initial=start_step, file=stream or sys.stderr, dynamic_ncols=True, unit="step"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step's numbers, adding `images_per_second`. Raises: TypeError on anything else."""
        if self._file is None:
            return
        values = {name: _number(name, value) for name, value in metrics.items()}
        now, steps = time.monotonic(), step - self._last_step
        if self._images_per_step and steps > 0:
            values["images_per_second"] = steps * self._images_per_step / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        self._write(step, values)
        self._show(step, values)

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record held-out losses after `step` updates as validation/NAME, and say them above the bar."""
        if self._file is None:
            return
        self._write(step, {f"validation/{name}": _number(name, loss) for name, loss in losses.items()})
        self.text(f"step {step}: held-out " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.folder / METRICS}: cannot be written ({error.strerror})") from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        names = list(values)[:6] if self._bar_keys is None else [name for name in self._bar_keys if name in values]
        if "images_per_second" in values and "images_per_second" not in names:
            names.append("images_per_second")
        shown = (f"{name.replace('images_per_second', 'img/s')} {values[name]:.4g}" for name in names)
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(max(step + 1 - self._bar.n, 0))

    def image(self, step: int, name: str, image: np.ndarray) -> Path | None:
        """Keep a picture uint8 [H, W, 3] as `images/<name>_<step>.png`, also for TensorBoard."""
        if self._file is None:
            return None
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise TypeError(f"{name}: needs uint8 [H, W, 3], found {image.dtype} {list(image.shape)}")
        path = self.folder / "images" / f"{name}_{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: wandb_package().Image(image)}, step=step)
        return path

    def text(self, line: str) -> None:
        """Print above the bar."""
        if self._file is not None:
            self._bar.write(line, file=self._bar.fp)

    def pause(self) -> None:
        """Restart the clock of `images_per_second`: call it after work that is not training."""
        self._last_time = time.monotonic()

    def close(self) -> None:
        """Flush and close everything; may be called again."""
        if self._file is None:
            return
        file, self._file = self._file, None
        self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        with contextlib.suppress(OSError):  # what was not written has been reported by the write
            file.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def wandb_package() -> Any:
    """The package `wandb`. Raises: ValueError for it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError("train.wandb: the package is missing; pip install wandb, or --set train.wandb=none") from error


def _summary_writer() -> type[SummaryWriter]:
    """tensorboardX's writer, without torch: tensorboardX imports torch where it is installed, to accept its tensors.

    While tensorboardX is imported for the first time, `sys.modules` says that there is no torch.
    """
    if "torch" in sys.modules or "tensorboardX" in sys.modules:
        from tensorboardX import SummaryWriter
    else:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
        try:
            from tensorboardX import SummaryWriter
        finally:
            del sys.modules["torch"]
    return SummaryWriter


def _open_wandb(project: str, folder: Path, config: Mapping[str, Any] | None, *, new: bool) -> Any:
    """A run of W&B whose id is kept in `folder`, so that a resumed run goes on in the same place."""
    path = folder / _WANDB_ID
    if new or not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    name, run_id = folder.name, path.read_text(encoding="utf-8")
    return wandb_package().init(
        project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=dict(config or {})
    )


def drop_from(path: str | os.PathLike[str], step: int) -> int:
    """Remove the lines of a metrics file whose step is >= `step`, and broken lines; returns how many went.

    The file is rewritten under a temporary name and moved into place.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) < step]
    if len(kept) < len(lines):
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
    return len(lines) - len(kept)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`; a value that was not finite is None."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for a line cut short by a crash."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, int, float, np.number)):
        return float(value)
    raise TypeError(f"{name}: needs a Python number, found {type(value).__name__}; fetch it from the device first")
