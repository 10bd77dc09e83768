"""A run that is killed or stopped at any step and resumed ends as one that was never touched, bit for bit."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import replace

import pytest
from tiny_runs import DenseConfig, assert_same_state, ended, final_state, start, wait_for_steps, write_config

from fairhuman_jax.config import load_config
from fairhuman_jax.training.logging import read_metrics
from fairhuman_jax.training.loop import train

STEPS, EVERY = 60, 5
RHYTHM = {"steps": STEPS, "checkpoint_every": EVERY, "validate_every": 7}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its configuration file, its result."""
    config = write_config(tmp_path_factory.mktemp("whole"))
    changes = [f"train.{name}={value}" for name, value in RHYTHM.items()]
    return config, train(load_config(config, changes))


def without_speed(output):
    return [record | {"images_per_second": 0} for record in read_metrics(output / "metrics.jsonl")]


def test_killed_and_stopped_and_resumed_equals_uninterrupted(whole, tmp_path):
    config, run = write_config(tmp_path), tmp_path / "run"
    process = start(config, devices=8, **RHYTHM)
    target = random.randint(EVERY + 1, STEPS // 3)
    wait_for_steps(process, run, target, checkpoint=True)
    process.kill()
    code, log = ended(process, config)
    assert code == -signal.SIGKILL, log
    assert not (run / "checkpoints" / str(STEPS)).exists()

    process = start(config, "--auto-resume", devices=8, **RHYTHM)
    wait_for_steps(process, run, random.randint(STEPS // 3 + 2, STEPS // 2))
    process.send_signal(signal.SIGTERM)
    code, log = ended(process, config)
    assert code == 143, log
    line = log.strip().splitlines()[-1]
    assert line.startswith("train.py: stopped by SIGTERM after step ") and line.endswith("--resume"), log
    stopped = int(line.split("after step ")[1].split(";")[0])
    assert stopped < STEPS and len(final_state(run, stopped)) > 5
    assert [record["step"] for record in without_speed(run) if "skipped" in record] == list(range(stopped))

    changes = [f"train.{name}={value}" for name, value in RHYTHM.items()]
    result = train(load_config(config, changes), resume=True)
    reference, expected = whole
    assert_same_state(final_state(run, STEPS), final_state(reference.parent / "run", STEPS))
    assert result.after == expected.after and result.before == expected.before and result.weights == expected.weights
    assert without_speed(run) == without_speed(reference.parent / "run")
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == STEPS


def test_held_out_losses_are_logged_on_the_way(whole):
    config, result = whole
    records = read_metrics(config.parent / "run/metrics.jsonl")
    validations = [record for record in records if "validation/face" in record]
    assert [record["step"] for record in validations] == list(range(7, STEPS, 7))
    assert result.before["face"] > validations[0]["validation/face"] > validations[-1]["validation/face"]
    assert sum("loss/face" in record for record in records) == STEPS


def test_a_run_without_finite_gradients_ends(tmp_path):
    config = load_config(write_config(tmp_path))
    with pytest.raises(ValueError, match=r"nothing is learnt: no gradient of steps 0 to 2 was finite"):
        train(replace(config, system=DenseConfig(broken=True)))


def test_ctrl_c_spares_loader_processes(tmp_path):
    """A terminal sends SIGINT to the whole group; the loader's processes must not die of it before the checkpoint."""
    config, run = write_config(tmp_path), tmp_path / "run"
    process = start(config, "--set", "data.workers=1", steps=5000, profile="1,2")
    wait_for_steps(process, run, 5)
    process.send_group(signal.SIGINT)
    code, log = ended(process, config)
    assert code == 130 and "stopped by SIGINT after step" in log and "Traceback" not in log, log
    assert any((run / "checkpoints").glob("[0-9]*"))
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
