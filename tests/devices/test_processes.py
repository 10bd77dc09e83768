"""Two processes as one run: the same numbers, one stop for both, and an end when a peer is missing or dies."""

from __future__ import annotations

import random
import re
import signal

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_state, ended, final_state, free_port, start, wait_for_steps, write_config

from fairhuman_jax.devices import processes as distributed
from fairhuman_jax.devices.sharding import BATCH_SPEC, WHOLE, make_mesh, named
from fairhuman_jax.training.logging import read_metrics

STEPS = 40


def start_pair(config, *options, timeout: int = 60, **settings):
    """Two processes of one device each; their logs are log0 and log1."""
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--timeout", str(timeout)]
    return [
        start(config, *options, *together, "--process", str(index), log=f"log{index}", **settings) for index in (0, 1)
    ]


def test_two_processes_stopped_and_resumed_as_one_equal_one(tmp_path):
    """Trainables are split over both processes; the signal goes to one of them, and both stop at the same step."""
    pair, single = (write_config(tmp_path / name) for name in ("pair", "single"))
    settings = {"steps": STEPS, "fsdp": 2, "shard_frozen": True, "validate_every": 1}
    code, log = ended(start(single, devices=2, **settings), single)
    assert code == 0, log

    processes = start_pair(pair, **settings)
    wait_for_steps(processes[0], tmp_path / "pair/run", random.randint(6, STEPS))
    processes[1].send_signal(signal.SIGTERM)
    ends = [ended(process, pair, f"log{index}") for index, process in enumerate(processes)]
    assert [code for code, _ in ends] == [143, 143], ends
    assert "--resume" in ends[0][1] and "--resume" not in ends[1][1] and "step/s" not in ends[1][1]
    (found,) = re.findall(r"stopped by SIGTERM after step (\d+)", ends[0][1])
    stopped = int(found)
    assert [path.name for path in (tmp_path / "pair/run/checkpoints").iterdir()] == [str(stopped)]

    code, log = ended(start(pair, "--resume", devices=2, **settings), pair)
    assert code == 0, log
    runs = [tmp_path / name / "run" for name in ("pair", "single")]
    assert_same_state(*(final_state(run, STEPS) for run in runs))
    assert len({(run / "before.json").read_text() for run in runs}) == 1
    records = [read_metrics(run / "metrics.jsonl") for run in runs]
    for ours, theirs in zip(*records, strict=True):
        assert ours | {"images_per_second": 0} == theirs | {"images_per_second": 0}


def test_two_processes_end_as_one_and_write_once(tmp_path):
    config = write_config(tmp_path)
    ends = [ended(p, config, f"log{i}") for i, p in enumerate(start_pair(config, preview_every=2, steps=3))]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "mean weight" in ends[0][1] and "mean weight" not in ends[1][1]
    run = tmp_path / "run"
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]
    assert len(list((run / "tensorboard").iterdir())) == 1 and len(list((run / "images").iterdir())) == 3
    exported, state = np.load(run / "export/dense.npz"), final_state(run, 3)
    np.testing.assert_array_equal(exported["kernel"], state["['ema']['params']['kernel']"])


def test_a_peer_that_never_comes_ends_the_wait_with_one_line(tmp_path):
    config = write_config(tmp_path)
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", "0", "--timeout", "3"]
    code, log = ended(start(config, *together), config)
    assert code == 1 and log.strip().splitlines()[-1] == (
        "train.py: not all processes of this run came together within 3 s (--timeout)"
    )
    assert not (tmp_path / "run").exists()


def test_a_peer_that_dies_ends_the_other(tmp_path):
    config = write_config(tmp_path)
    processes = start_pair(config, timeout=10, steps=100_000)
    wait_for_steps(processes[0], tmp_path / "run", 2)
    processes[1].kill()
    code, log = ended(processes[0], config, "log0", timeout=60)
    assert code not in (0, -signal.SIGKILL), log[-2000:]
    assert "mean weight" not in log


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"])
def test_one_of_many_does_not_run_alone(monkeypatch, name):
    for other in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(other, raising=False)
    distributed.refuse_one_of_many()
    monkeypatch.setenv(name, "a,b,c,d" if name.startswith("TPU") else "4")
    with pytest.raises(ValueError, match=rf"this is one of 4 processes \({name}\): --distributed joins them"):
        distributed.refuse_one_of_many()


def test_put_and_fetch_keep_every_value():
    mesh = make_mesh(2)
    tree = {"kernel": np.arange(48.0).reshape(8, 6), "key": jax.random.key(3), "step": np.int32(4)}
    specs = {"kernel": BATCH_SPEC, "key": WHOLE, "step": WHOLE}
    placed = distributed.put(tree, named(mesh, specs))
    assert placed["kernel"].sharding.spec == BATCH_SPEC and len(placed["step"].sharding.device_set) == 8
    back = distributed.fetch({name: placed[name] for name in ("kernel", "step")})
    np.testing.assert_array_equal(back["kernel"], tree["kernel"])
    assert isinstance(back["kernel"], np.ndarray) and back["step"] == 4
