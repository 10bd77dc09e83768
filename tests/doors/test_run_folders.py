"""Folders of runs: drawn with, resumed without a configuration file, and what cannot be read of them."""

from __future__ import annotations

import json

import tiny_models
from PIL import Image
from test_doors import CONFIG, refused

from fairhuman_jax.doors import sample_door, train_door
from fairhuman_jax.weights import save_pipeline


def test_a_run_is_drawn_with_and_resumed_by_its_folder(tmp_path, capsys, monkeypatch):
    base, config = tmp_path / "base", tmp_path / "config.py"
    save_pipeline(tiny_models.tiny_pipeline(), base)
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path / "cache"))
    config.write_text(CONFIG.format(base=base, output=tmp_path / "run"))
    run = str(tmp_path / "run")
    train_door([str(config)])
    sample_door(["a person", "--run", run, "--steps", "2", "--size", "16", "--output", str(tmp_path / "drawn")])
    recipe = json.loads(Image.open(tmp_path / "drawn/a-person-0.png").info["parameters"])
    assert recipe["system"] == "text" and recipe["lora"] == [f"{run}/export"]
    capsys.readouterr()

    train_door(["--resume", run, "--set", "train.steps=3"])
    assert "trained:" in capsys.readouterr().out
    changed = ["--set", "data.resolution=32", "--set", "system.trainable.rank=4"]
    line = refused(capsys, train_door, ["--resume", run, *changed])
    assert "data.resolution is 32, but the run has 16" in line and "system.trainable.rank is 4" in line
    assert "leave out" in refused(capsys, train_door, [str(config), "--resume", run])
    assert "no folder of a run" in refused(capsys, train_door, ["--resume", str(tmp_path)])
    assert "no folder of a run" in refused(capsys, sample_door, ["a", "--run", str(tmp_path)])
    (tmp_path / "run/config.json").write_text('{"type": "RunConfig", "output": "", "system": {"type": "Gan"}}')
    assert "unknown class 'Gan'" in refused(capsys, train_door, ["--resume", run])
    (tmp_path / "run/config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(capsys, train_door, ["--resume", run])
