"""Pipelines in programs: pictures, recipes that draw again, progress that stops, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models
from PIL import Image

import fairhuman_jax
from fairhuman_jax.doors import sample_door
from fairhuman_jax.drawing.options import make_options
from fairhuman_jax.drawing.recipes import options_in, read_recipe
from fairhuman_jax.drawing.text import TextOptions
from fairhuman_jax.fields import OptionError
from fairhuman_jax.weights import save_pipeline

SMALL = {"steps": 2, "size": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(tiny_models.tiny_pipeline(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(base):
    return fairhuman_jax.open_pipeline(base, **SMALL)


def test_a_call_gives_a_picture_with_its_recipe(pipeline):
    picture = pipeline("a person waves", seed=3)
    assert isinstance(picture, Image.Image) and picture.size == (16, 16)
    recipe = json.loads(picture.info["parameters"])
    assert (recipe["system"], recipe["prompt"], recipe["seed"], recipe["steps"]) == ("text", "a person waves", 3, 2)
    several = pipeline(["a person", "two hands"], seed=(3, 4), guidance=2.0)
    assert [json.loads(p.info["parameters"])["seed"] for p in several] == [3, 4, 3, 4]
    assert isinstance(pipeline(["a person"]), list)


def test_a_picture_in_memory_is_drawn_from_as_its_file(pipeline, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = pipeline("a", init_image=str(tmp_path / "photo.png"), mask=tmp_path / "mask.png", strength=0.5)
    memory = pipeline("a", init_image=photo, mask=mask, strength=0.5)
    arrays = pipeline("a", init_image=np.asarray(photo), mask=Image.fromarray(mask), strength=0.5)
    np.testing.assert_array_equal(files, memory)
    np.testing.assert_array_equal(files, arrays)


def test_jobs_are_drawn_in_batches_that_progress_counts_and_stops(pipeline):
    heard = []

    def progress(state, done, total):
        heard.append((state, done, total))
        return done < 4

    options = make_options(TextOptions, {"prompt": "a hand", "number": 7, "batch": 2}, onto=pipeline.options)
    drawn = list(pipeline.draw(pipeline.jobs(options), progress))
    assert [drawing.job.seed for drawing in drawn] == [0, 1, 2, 3]
    assert heard[0][0] in ("compiling", "drawing") and heard[1:] == [("drawing", 2, 7), ("drawing", 4, 7)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "other"}, "base is fixed once a pipeline is open"),
        ({"lora": "x"}, "lora is fixed once a pipeline is open"),
        ({"stepz": 1}, "did you mean steps"),
        ({"size": 17}, "size 17x17: both sides must be multiples of 2"),
    ],
)
def test_what_a_call_cannot_draw_is_refused(pipeline, options, message):
    with pytest.raises(OptionError, match=message):
        pipeline("a hand", **options)


def test_an_unknown_system_is_refused():
    with pytest.raises(ValueError, match="system 'gan' is not known; known: text, humansd"):
        fairhuman_jax.open_pipeline(system="gan")


def test_a_recipe_says_its_options(pipeline, tmp_path):
    picture = pipeline("a hand", seed=2, guidance=3.0, negative="a face")
    picture.save(tmp_path / "hand.png", pnginfo=_text(picture))
    values = options_in(read_recipe(tmp_path / "hand.png"), TextOptions)
    options = make_options(TextOptions, values)
    assert (options.prompt, options.seed, options.size) == (("a hand",), (2,), (16, 16))
    assert (options.guidance, options.negative, options.base) == (3.0, "a face", pipeline.options.base)
    again = pipeline("a hand", **{k: v for k, v in values.items() if k in ("seed", "guidance", "negative")})
    np.testing.assert_array_equal(picture, again)


def _text(picture):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", picture.info["parameters"])
    return info


def test_the_door_draws_a_recipe_again_bit_for_bit(base, tmp_path):
    options = ["--base", base, "--steps", "3", "--size", "16", "--guidance", "2.5", "--scheduler", "euler_ancestral"]
    sample_door(["a person", "two hands", "--number", "3", *options, "--output", str(tmp_path / "first")])
    wanted = tmp_path / "first/two-hands-1.png"
    sample_door(["--like", str(wanted), "--output", str(tmp_path / "again")])
    (drawn,) = (tmp_path / "again").iterdir()
    assert drawn.name == wanted.name
    np.testing.assert_array_equal(Image.open(wanted), Image.open(drawn))
    sample_door(["--like", str(wanted), "--steps", "2", "--output", str(tmp_path / "again")])
    assert (tmp_path / "again/two-hands-1-2.png").is_file(), "another recipe, so another file"


@pytest.mark.parametrize("kind", ["missing", "text", "plain"])
def test_a_picture_without_a_recipe_is_refused(kind, tmp_path, capsys):
    path = tmp_path / "some.png"
    if kind == "text":
        path.write_text("no picture")
    elif kind == "plain":
        Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(SystemExit) as stop:
        sample_door(["--like", str(path)])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith(f"sample.py: --like {path}: ")
