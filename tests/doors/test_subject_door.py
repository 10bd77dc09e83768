"""`sample.py --system facediffuser`: files, recipe, maps, and what it refuses in one line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import random_params
from tiny_people import face_diffuser

from fairhuman_jax.doors import sample_door
from fairhuman_jax.drawing.plans import PlannedPicture
from fairhuman_jax.evaluate.subject_plan import write_plan
from fairhuman_jax.systems.facediffuser.fusion import SCENE
from fairhuman_jax.weights import MARKER, SubjectPipeline, save_pipeline, save_subject_model

PAIR = f"a person {MARKER} two face{MARKER}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A subject model, a scene model and one told by another text encoder, and pictures of two people."""
    folder = tmp_path_factory.mktemp("facediffuser")
    system, params = face_diffuser()
    shared = {name: params[name] for name in ("vae", "text_encoder")}
    own = {name: params[name] for name in ("unet", "image_encoder", "postfuse")} | shared
    save_subject_model(SubjectPipeline(system.pipeline, system.image_encoder, system.postfuse, own), folder / "subject")
    scene = dataclasses.replace(system.pipeline, params=shared | {"unet": params[SCENE]})
    save_pipeline(scene, folder / "scene")
    other = random_params(system.pipeline.text_encoders[0], 99)
    save_pipeline(dataclasses.replace(scene, params=scene.params | {"text_encoder": other}), folder / "strange")
    rng = np.random.default_rng(1)
    for name, size in (("one", (20, 12, 3)), ("two", (12, 16, 3))):
        Image.fromarray(rng.integers(0, 256, size).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def options(models, *more: str) -> list[str]:
    given = [f"--reference=man={models / 'one.png'}", f"--reference={models / 'two.png'}"]
    return [PAIR, "--system", "facediffuser", "--base", str(models / "subject"), "--size", "16", *given, *more]


def test_two_people_are_drawn_with_recipe_and_maps(models, tmp_path):
    common = ["--scene", str(models / "scene"), "--steps", "4", "--alpha", "0.25", "--beta", "0.75"]
    sample_door(options(models, *common, "--seed", "0,1", "--output", str(tmp_path / "a")))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["a-person-image-two-face-image-0.png", "a-person-image-two-face-image-1.png", "sheet.png"]
    first = Image.open(tmp_path / "a" / names[0])
    recipe = json.loads(first.info["parameters"])
    assert (recipe["scheduler"], recipe["steps"], recipe["alpha"], recipe["system"]) == (
        "pndm",
        4,
        0.25,
        "facediffuser",
    )
    assert recipe["reference"][0].startswith("man=") and recipe["scene"].endswith("scene")

    sample_door(options(models, *common, "--seed", "1", "--save-maps", "--output", str(tmp_path / "b")))
    again = np.asarray(Image.open(tmp_path / "b" / names[1]), int)
    assert np.abs(again - np.asarray(Image.open(tmp_path / "a" / names[1]), int)).max() <= 1
    maps = Image.open(tmp_path / "b" / names[1].replace(".png", "-maps.png"))
    assert maps.size == (2 * 64, 3 * 64)  # two fused rows; mask and two saliencies

    rows = ["--stages", "1,3", "--seed", "1", "--output", str(tmp_path / "d")]
    sample_door(options(models, "--scene", str(models / "scene"), "--steps", "4", *rows))
    same = np.asarray(Image.open(tmp_path / "d" / names[1]), int)
    assert np.abs(same - again).max() <= 1

    sample_door(options(models, "--delayed", "--steps", "4", "--output", str(tmp_path / "c")))
    alone = np.asarray(Image.open(tmp_path / "c" / names[0]), int)
    assert np.abs(alone - np.asarray(first, int)).max() > 2


def test_a_plan_names_its_pictures_and_is_taken_up_where_it_stopped(models, tmp_path, capsys):
    one, two = (str(models / f"{name}.png") for name in ("one", "two"))
    rows = [
        PlannedPicture("a.png", PAIR, 3, (one, two)),
        PlannedPicture("b.png", f"a face{MARKER}", 3, (two,)),
        PlannedPicture("c.png", f"a face{MARKER}", 3, (one,)),
    ]
    write_plan(tmp_path / "plan.jsonl", rows)
    common = ["--system", "facediffuser", "--base", str(models / "subject"), "--scene", str(models / "scene")]
    common += ["--size", "16", "--steps", "4", "--plan", str(tmp_path / "plan.jsonl"), "--output", str(tmp_path / "d")]
    common += ["--subject-guidance", "500"]  # or a random network would hardly show who it is told of
    sample_door([*common, "--batch", "2"])
    drawn = {row.image: np.asarray(Image.open(tmp_path / "d" / row.image), int) for row in rows}
    assert json.loads(Image.open(tmp_path / "d" / "b.png").info["parameters"])["reference"] == [two]
    assert np.abs(drawn["b.png"] - drawn["c.png"]).max() > 2, "another person"
    (tmp_path / "d" / "b.png").unlink()
    sample_door(common)
    assert np.abs(drawn["b.png"] - np.asarray(Image.open(tmp_path / "d" / "b.png"), int)).max() <= 1
    assert "2 of 3 pictures are in" in capsys.readouterr().err
    write_plan(tmp_path / "plan.jsonl", [PlannedPicture("a.jpg", PAIR, 3, (one, two))])
    with pytest.raises(SystemExit):
        sample_door(common)
    assert "'a.jpg' is no name of a .png file" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda given, _: [*given, "--plan", "plan.jsonl"], "--plan has prompts, seeds and references of its own"),
        (lambda given, _: given[:-1], "has 2 of <|image|> for 1 of --reference"),
        (lambda given, _: ["two hands", *given[1:]], "has 0 of <|image|> for 2 of --reference"),
        (lambda given, _: [f"a per{MARKER}son face{MARKER}", *given[1:]], "stands inside a word"),
        (
            lambda given, _: [f"a a a a face{MARKER} face{MARKER}", *given[1:]],
            "word of its subject number 1 is cut off",
        ),
        (lambda given, _: [*given, "--guidance", "1"], "staged drawing needs more than 1"),
        (lambda given, _: [*given, "--alpha", "0.9", "--beta", "0.1", "--save-maps"], "no step is fused"),
        (lambda given, _: [*given, "--stages", "2,1", "--save-maps"], "no step is fused between rows 2 and 1"),
        (lambda given, _: [*given, "--stages", "1,2", "--alpha", "0"], "give one of the two"),
        (lambda given, _: [*given, "--stages", "1"], "write two numbers, as in 15,30"),
        (lambda given, _: [*given[:1], *given[3:], "--delayed", "--gains", "1,2"], "--gains is of the fusion"),
        (lambda given, _: [*given, "--lora", "x"], "it takes no --lora"),
        (lambda given, _: [*given, "--delayed"], "needs --scene with the scene model, or --delayed"),
        (lambda given, folder: [*given[:-1], f"--reference={folder / 'none.png'}"], "none.png: no such file"),
        (lambda given, folder: [*given[:-1], f"--reference={folder / 'subject/model_index.json'}"], "model_index.json"),
        (
            lambda given, folder: [part.replace(str(folder / "scene"), str(folder / "strange")) for part in given],
            "its text encoder is not that of the subject model",
        ),
        (
            lambda given, _: ["auto" if part == "facediffuser" else part for part in given],
            "needs --system facediffuser",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(models, capsys, tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)
    prompt, *rest = options(models)
    given = [prompt, "--scene", str(models / "scene"), *rest]
    with pytest.raises(SystemExit) as stop:
        sample_door(change(given, models))
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "samples").exists()
