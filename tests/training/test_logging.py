from __future__ import annotations

import io
import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.commands import table
from fairhuman_jax.training.logging import RunLogger, drop_from, read_metrics


def test_records_are_one_json_object_a_line_and_flushed(tmp_path):
    stream = io.StringIO()
    with RunLogger(tmp_path, 3, images_per_step=8, stream=stream) as logger:
        logger.log(0, {"loss/global": 0.5, "weight": np.float32(2), "skipped": 1, "gone": float("nan")})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text.endswith("\n")
        record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        speed = record.pop("images_per_second")
        assert record == {"step": 0, "loss/global": 0.5, "weight": 2.0, "skipped": 1.0, "gone": None} and speed > 0
        logger.text("a line of text")
        logger.log(2, {"loss/global": 0.25})
    shown = stream.getvalue()
    assert "a line of text\n" in shown and "loss/global 0.25" in shown and "img/s" in shown and "3/3" in shown
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 2]
    logger.close()
    logger.log(3, {"loss": 1.0})


def test_resume_drops_lines_at_and_after_the_step(tmp_path):
    with RunLogger(tmp_path, 5, tensorboard=False, stream=io.StringIO()) as logger:
        for step in range(5):
            logger.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    stream = io.StringIO()
    with RunLogger(tmp_path, 5, start_step=3, tensorboard=False, stream=stream) as logger:
        logger.log(3, {"loss": 30.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert "3/5" in stream.getvalue() and "4/5" in stream.getvalue()
    assert drop_from(tmp_path / "metrics.jsonl", 1) == 3 and drop_from(tmp_path / "none.jsonl", 0) == 0


def test_held_out_losses_have_lines_of_their_own(tmp_path):
    stream = io.StringIO()
    with RunLogger(tmp_path, 5, bar_keys=("loss",), stream=stream) as logger:
        logger.log(3, {"loss": 1.0})
        logger.validation(4, {"global": 0.5, "face": float("nan")})
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {
        "step": 4,
        "validation/global": 0.5,
        "validation/face": None,
    }
    assert "step 4: held-out global 0.50000, face nan\n" in stream.getvalue()
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert b"validation/global" in events.read_bytes()


def test_a_full_disk_is_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLogger(tmp_path, 5, tensorboard=False, stream=io.StringIO()) as logger:
        logger.log(0, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=r"metrics.jsonl: cannot be written \(File too large\)"):
                logger.log(1, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")][:1] == [0]


def test_tensorboard_holds_scalars_and_images(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with RunLogger(tmp_path, 2, stream=io.StringIO()) as logger:
        logger.log(0, {"loss": 0.125})
        path = logger.image(0, "samples", picture)
        with pytest.raises(TypeError, match=r"samples: needs uint8 \[H, W, 3\], found float64 \[2, 2\]"):
            logger.image(0, "samples", np.zeros((2, 2)))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    data = events.read_bytes()
    assert b"loss" in data and b"samples" in data and b"\x89PNG" in data


def test_device_values_are_refused(tmp_path):
    refusal = pytest.raises(TypeError, match="loss: needs a Python number")
    with RunLogger(tmp_path, 1, tensorboard=False, stream=io.StringIO()) as logger, refusal:
        logger.log(0, {"loss": jnp.float32(1.0)})


def test_disabled_logger_writes_nothing(tmp_path):
    with RunLogger(tmp_path / "out", 1, enabled=False) as logger:
        logger.log(0, {"loss": 1.0})
        logger.text("x")
        assert logger.image(0, "a", np.zeros((2, 2, 3), np.uint8)) is None
    assert not (tmp_path / "out").exists()


def test_bar_shows_the_chosen_keys(tmp_path):
    stream = io.StringIO()
    with RunLogger(tmp_path, 1, bar_keys=("b",), tensorboard=False, stream=stream) as logger:
        logger.log(0, {"a": 1.0, "b": 2.0})
    assert "b 2" in stream.getvalue() and "a 1" not in stream.getvalue()


def test_table_is_aligned():
    rows = [{"method": "mpd", "loss": 0.123456, "steps": 100}, {"method": "linear sum", "steps": 5}]
    assert table(rows).splitlines() == [
        "method        loss  steps",
        "----------  ------  -----",
        "mpd         0.1235    100",
        "linear sum       -      5",
    ]
    assert table([], ["a", "b"]).splitlines() == ["a  b", "-  -"]
    assert table(rows, ["steps"]).splitlines()[2] == "  100"
