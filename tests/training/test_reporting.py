from __future__ import annotations

import pytest

from fairhuman_jax.training.reporting import SkippedWatch, mean_weights


def test_a_run_that_learns_nothing_ends():
    watch = SkippedWatch(step=10, skipped=4, limit=3)
    for done, skipped in ((11, 5), (12, 6), (13, 6), (14, 7), (15, 8)):
        watch.note(done, skipped)
    with pytest.raises(ValueError, match=r"no gradient of steps 13 to 15 was finite; lower optimizer.learning_rate"):
        watch.note(16, 9)


def test_steps_that_were_not_logged_count_as_well():
    watch = SkippedWatch(step=0, skipped=0, limit=20)
    watch.note(1, 1)
    watch.note(11, 10)  # one of the ten was taken
    watch.note(21, 20)
    with pytest.raises(ValueError, match="steps 11 to 30"):
        watch.note(31, 30)


def test_mean_weights_leave_other_lines_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "weight/a": 1.0}\n{"step": 0, "validation/a": 9.0}\n{"step": 1, "weight/a": null}\n')
    assert mean_weights(path, ("a", "b")) == {"a": 1.0, "b": 0.0}
