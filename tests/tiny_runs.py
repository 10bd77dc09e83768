"""Runs of a second or two: one dense layer with two objectives, trained through the door in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tiny_models import SIZE, write_folder

from fairhuman_jax.contract import System, SystemConfig, sample_keys
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PIXELS, WIDTH = 3 * SIZE**2, 96  # a kernel of 768 x 96 elements is large enough to be split over fsdp
CODE = "from fairhuman_jax.doors import train_door; train_door()"


@dataclass(frozen=True)
class DenseConfig(SystemConfig):
    """`broken`: no loss is finite."""

    broken: bool = False

    def build(self, shapes: bool = False) -> Dense:
        return Dense(self)


@dataclass(frozen=True)
class Dense(System):
    """Predicts noise, and the share of faces, from a flattened picture."""

    config: DenseConfig
    layer = nn.Dense(WIDTH)

    def init(self, key):
        return self.layer.init(key, jnp.zeros((1, PIXELS))), {"scale": jnp.float32(0.5)}

    def predict(self, trainable, frozen, batch, key):
        flat = frozen["scale"] * batch["image"].reshape(-1, PIXELS) / 255.0
        noise = jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(sample_keys(key, batch))
        return {"features": self.layer.apply(trainable, flat), "noise": noise}

    def objectives(self, prediction, batch):
        features, share = prediction["features"], batch["face_mask"].mean(axis=(1, 2))
        whole = jnp.mean(jnp.square(features - 0.1 * prediction["noise"]))
        return {"global": whole * (jnp.nan if self.config.broken else 1.0), "face": jnp.mean((features - share) ** 2)}

    def sample(self, trainable, frozen, request, key):
        noise = jax.random.normal(key, (len(request), SIZE, SIZE, 3))
        return jnp.tanh(noise + self.layer.apply(trainable, request).mean())

    def preview(self, config, held_out):
        return jnp.ones((2, PIXELS)), ["", ""]

    def export(self, parts, folder, held_out):
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "dense.npz", **parts.trainable["params"])
        return folder


def run_config(data: str, output: str) -> RunConfig:
    """Random crops and flips, noise, a decaying rate and a moving average: all that a resumed run must find again."""
    return RunConfig(
        system=DenseConfig(),
        output=output,
        data=DataConfig(folder=data, resolution=SIZE, crop="random", flip=0.5, held_out=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=5),
        train=TrainConfig(steps=3, batch_size=8, ema_decay=0.9, checkpoint_every=0),
    )


def write_config(folder: Path) -> Path:
    """A configuration file for the door, with a folder of pictures beside it; the run goes to folder/run."""
    data, path = write_folder(folder / "data"), folder / "config.py"
    call = f"run_config({str(data)!r}, {str(folder / 'run')!r})"
    text = f"from tiny_runs import run_config\n\n\ndef config():\n    return {call}\n"
    path.write_text(text)
    return path


class Process(subprocess.Popen):
    """A process that leads a group."""

    def send_group(self, signum: int) -> None:
        """The signal to the process and its children, as a terminal sends it."""
        os.killpg(self.pid, signum)


def start(config: Path, *options: str, devices: int = 1, log: str = "log", **settings) -> Process:
    """The training door in a process of its own; `settings` are fields of TrainConfig. Its output goes to `log`."""
    tests = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    fields = [part for name, value in settings.items() for part in ("--set", f"train.{name}={value}")]
    with (config.parent / log).open("w") as file:
        command = [sys.executable, "-c", CODE, str(config), *options, *fields]
        return Process(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def ended(process: subprocess.Popen, config: Path, log: str = "log", timeout: float = 240.0) -> tuple[int, str]:
    """Exit code and output of a process, killed where it takes longer than `timeout` seconds."""
    try:
        code = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, (config.parent / log).read_text()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_steps(process: subprocess.Popen, output: Path, steps: int, *, checkpoint: bool = False) -> None:
    """Returns once `steps` steps are logged (and a checkpoint is complete), or the process has ended."""
    metrics = output / "metrics.jsonl"
    while process.poll() is None:
        logged = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        # A finished save has its step for a name.
        if logged >= steps and (not checkpoint or any((output / "checkpoints").glob("[0-9]*[0-9]"))):
            return
        time.sleep(0.005)


def final_state(output: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path."""
    folder, reader = (output / "checkpoints" / str(step) / "state").absolute(), ocp.PyTreeCheckpointer()
    host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree)
    state = reader.restore(folder, restore_args=host)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def assert_same_state(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Equal bit for bit."""
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
