"""The comparison of combination rules: its statistics, its tables and plot, and that finished runs are kept."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import write_config

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "objectives.py"


@pytest.fixture(scope="module")
def objectives():
    spec = importlib.util.spec_from_file_location("benchmark_objectives", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(before, after, rate=10.0):
    return {
        "before": {"global": before, "hand": 2 * before},
        "after": {"global": after, "hand": before},
        "means": {"weight/global": 3.0, "weight/hand": rate},
        "images_per_second": rate,
        "skipped": 0,
    }


# Two arms that share seeds 0 and 1; the third seed of one is ahead.
RECORDS = {
    "sum": {0: record(1.0, 0.9), 1: record(2.0, 1.6), 2: record(4.0, 3.0)},
    "mpd/4": {0: record(1.0, 0.81), 1: record(2.0, 1.28, 30.0)},
    "cagrad": {},
}


def test_interval_is_students(objectives):
    """Tabulated quantiles: 12.7062 for two values, 2.7764 for five."""
    assert objectives.interval([1.0, 3.0]) == pytest.approx((2.0, 12.7062047 * math.sqrt(2) / math.sqrt(2)))
    centre, half = objectives.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert centre == 3.0 and half == pytest.approx(2.7764451 * math.sqrt(2.5) / math.sqrt(5))
    assert objectives.interval([7.0]) == (7.0, math.inf)


def test_differences_are_paired_over_common_seeds(objectives):
    centre, half = objectives.percent({0: 0.81, 1: 1.28, 5: 100.0}, {0: 0.9, 1: 1.6, 2: 3.0})
    assert centre == pytest.approx(-15.0) and half == pytest.approx(12.7062047 * 5.0)
    assert objectives.percent({0: 1.0}, {1: 1.0}) is None
    # Seeds that differ by a common factor leave no spread.
    assert objectives.percent({0: 1.1, 1: 11.0}, {0: 1.0, 1: 10.0}) == pytest.approx((10.0, 0.0))


def test_report_holds_base_changes_and_differences(objectives):
    changes, differences = objectives.changes(RECORDS), objectives.differences(RECORDS)
    assert changes["sum"]["global"][0] == pytest.approx(-(10 + 20 + 25) / 3)
    assert changes["mpd/4"]["hand"] == pytest.approx((-50.0, 0.0)) and changes["cagrad"]["hand"] is None
    assert set(differences) == {"mpd/4", "cagrad"} and differences["mpd/4"]["global"][0] == pytest.approx(-15.0)
    lines = objectives.report(RECORDS).splitlines()
    assert "Seeds: sum 3, mpd/4 2, cagrad 0; ± is 95 % confidence." in lines
    assert next(line for line in lines if line.startswith("| base |")).startswith("| base | 2.33333 ± ")
    assert "| mpd/4 | -15.00 ± 63.53 | +0.00 ± 0.00 |" in lines
    assert "| mpd/4 | 3 | 20 | 20 | 0 |" in lines and "| cagrad | - | - | - | - |" in lines


def test_means_skip_what_a_step_did_not_log(objectives):
    logged = [
        {"step": 0, "loss/face": 9.0, "weight/face": 1.0, "cosine/global_face": 0.5},
        {"step": 1, "loss/face": 9.0, "weight/face": 2.0},
        {"step": 2, "loss/face": 9.0, "weight/face": None},
    ]
    assert objectives.means(logged) == {"weight/face": 1.5, "cosine/global_face": 0.5}


def test_plot_marks_every_interval(objectives, tmp_path):
    objectives.plot(objectives.changes(RECORDS), "change, %", tmp_path / "new" / "plot.png")
    picture = Image.open(tmp_path / "new" / "plot.png").convert("RGB")
    dots = [i for i, pixel in enumerate(picture.get_flattened_data()) if pixel == (0, 0, 128)]
    columns = {i % picture.width // 300 for i in dots}
    assert len(columns) >= 2 and picture.height == 70 + 3 * 30 + 30
    to_x, ticks = objectives.axis([(-30.0, 5.0), (-4.0, math.inf)], 100.0, 200.0)
    assert ticks == [-30, -20, -10, 0] and to_x(0) > to_x(-35) >= 100 and to_x(0) <= 300


@pytest.mark.parametrize(("arm", "message"), [("fairness", "no rule 'fairness'; known: mpd"), ("mpd/0", "as in mpd/4")])
def test_an_unknown_arm_is_one_clear_line(objectives, arm, message):
    with pytest.raises(ValueError, match=message):
        objectives.arm_settings(arm)


def test_an_arm_sets_rule_and_refresh(objectives):
    assert objectives.arm_settings("mpd/16") == ["fair.method=mpd", "fair.refresh_every=16"]
    assert objectives.arm_settings("pcgrad") == ["fair.method=pcgrad", "fair.refresh_every=1"]


def test_finished_runs_are_kept_and_the_limit_is_kept_to(objectives, tmp_path):
    options = argparse.Namespace(
        config=write_config(tmp_path), arms=["sum", "mpd/2"], seeds=1, steps=2, set=[], limit_minutes=math.inf,
        output=tmp_path / "study",
    )  # fmt: skip
    records = objectives.study(options)
    assert records["sum"][0]["before"] == records["mpd/2"][0]["before"]
    assert records["sum"][0]["after"] != records["mpd/2"][0]["after"]
    assert records["mpd/2"][0]["means"].keys() >= {"weight/face", "norm/face", "cosine/global_face"}
    options.seeds, options.limit_minutes = 2, 0.0
    (tmp_path / "study" / "mpd-every-2-0" / "result.json").unlink()
    again = objectives.study(options)
    assert again == {"sum": records["sum"], "mpd/2": {}}
    options.steps = 3
    assert objectives.study(options) == {"sum": {}, "mpd/2": {}}
