"""Names of pictures: nothing is overwritten, every script keeps its letters."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.contract import Drawing, Job
from fairhuman_jax.drawing.files import free_path, left_to_draw, stem, write_drawing


def drawing(prompt: str = "two hands", value: int = 9, **recipe) -> Drawing:
    return Drawing(Job(prompt, 0, None), np.full((4, 4, 3), value, np.uint8), {"prompt": prompt, **recipe})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A woman, waving!", "a-woman-waving"),
        ("Женщина машет", "женщина-машет"),
        ("手を振る女性", "手を振る女性"),
        ("../../etc", "etc"),
        ("!!!", "image"),
        ("x" * 99, "x" * 60),
    ],
)
def test_names_keep_letters_of_every_script(text, name):
    assert stem(text, "image") == name


def test_a_picture_of_another_recipe_is_never_overwritten(tmp_path):
    (first,) = write_drawing(tmp_path, drawing(guidance=3.0))
    (again,) = write_drawing(tmp_path, drawing(guidance=3.0))
    (other,) = write_drawing(tmp_path, drawing(value=5, guidance=4.0))
    (third,) = write_drawing(tmp_path, drawing(value=6, guidance=5.0))
    assert [path.name for path in (first, again, other, third)] == [
        "two-hands-0.png",
        "two-hands-0.png",
        "two-hands-0-2.png",
        "two-hands-0-3.png",
    ]
    assert np.asarray(Image.open(first)).max() == 9
    assert json.loads(Image.open(other).info["parameters"])["guidance"] == 4.0


def test_a_file_that_is_no_picture_keeps_its_name(tmp_path):
    (tmp_path / "sheet.png").write_text("mine")
    assert free_path(tmp_path / "sheet.png").name == "sheet-2.png"
    assert free_path(tmp_path / "sheet.png", "{}").name == "sheet-2.png"


def test_pictures_of_a_plan_that_are_there_are_left_out(tmp_path):
    (tmp_path / "a.png").touch()
    jobs = [Job("p", 0, None, "a.png"), Job("p", 0, None, "b.png"), Job("p", 0, None)]
    assert left_to_draw(jobs, tmp_path) == jobs[1:]
