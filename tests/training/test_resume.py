"""A run that is killed at any step and resumed ends as one that was never touched, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tiny_models import SIZE, write_folder

from fairhuman_jax.systems.autoencoder import AutoencoderConfig
from fairhuman_jax.training.config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.logging import read_metrics
from fairhuman_jax.training.loop import train
from fairhuman_jax.training.state import OptimizerConfig

STEPS, EVERY = 40, 5
VAE = {"block_out_channels": [4], "norm_num_groups": 2, "latent_channels": 2, "mid_block_add_attention": False}


def run_config(data: str, output: str) -> RunConfig:
    """An autoencoder on random crops and flips, with noise, a decaying rate and a moving average."""
    return RunConfig(
        system=AutoencoderConfig(vae=VAE),
        output=output,
        data=DataConfig(folder=data, resolution=SIZE, crop="random", flip=0.5, held_out=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=5),
        train=TrainConfig(steps=STEPS, batch_size=8, ema_decay=0.9, checkpoint_every=EVERY),
    )


def final_state(output: Path) -> dict:
    """Every array of the last checkpoint, by its path."""
    state = ocp.StandardCheckpointer().restore((output / "checkpoints" / str(STEPS) / "state").absolute())
    assert set(state) == {"step", "trainable", "opt_state", "ema", "key", "skipped"}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def killed_run(data: Path, output: Path, target: int) -> int:
    """Starts the run in a process of its own and kills it once step `target` is logged; the steps it had logged."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_resume as t; "
        f"t.train(t.run_config({str(data)!r}, {str(output)!r}))"
    )
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with (output.parent / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=log, stdout=log, env=environment)
    metrics, logged = output / "metrics.jsonl", 0
    # Saves are finished in the background, and a finished one has its number for a name: kill none before it has one.
    while process.poll() is None and (logged <= target or not any((output / "checkpoints").glob("[0-9]*"))):
        time.sleep(0.005)
        logged = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (output.parent / "log").read_text()[-2000:]
    return logged


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    data = write_folder(tmp_path / "data")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = train(run_config(str(data), str(whole)))
    assert result.skipped == 0 and result.exported.is_dir() and result.picture.is_file()

    logged = killed_run(data, cut, random.randint(2 * EVERY + 2, STEPS - 3 * EVERY))
    assert EVERY < logged < STEPS
    assert not (cut / "checkpoints" / str(STEPS)).exists()
    resumed = train(run_config(str(data), str(cut)), resume=True)

    found, expected = final_state(cut), final_state(whole)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=f"killed at {logged}: {path}")
    assert resumed.after == result.after and resumed.before == result.before
    records = [read_metrics(folder / "metrics.jsonl") for folder in (cut, whole)]
    for ours, theirs in zip(*records, strict=True):
        assert ours | {"images_per_second": 0} == theirs | {"images_per_second": 0}
    assert json.loads((cut / "config.json").read_text())["train"]["steps"] == STEPS
