"""Records of options: values that programs and command lines write, and what records refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairhuman_jax.drawing.options import fixed_fields, make_options, path_and_weight, prompts_of, read_size, seeds_of
from fairhuman_jax.drawing.text import TextOptions
from fairhuman_jax.fields import OptionError
from fairhuman_jax.systems.facediffuser.pipeline import FaceDiffuserOptions
from fairhuman_jax.systems.humansd.pipeline import HumanSDOptions


def test_programs_may_write_one_value_for_a_tuple_and_text_for_a_size():
    options = make_options(TextOptions, {"prompt": "a hand", "seed": 3, "size": "16x24", "lora": ["a", "b:0.5"]})
    assert (options.prompt, options.seed, options.size, options.lora) == (("a hand",), (3,), (16, 24), ("a", "b:0.5"))
    assert make_options(TextOptions, {"size": 32}).size == (32, 32)
    assert make_options(TextOptions, {"init_image": "photo.png"}).init_image == Path("photo.png")
    changed = make_options(TextOptions, {"steps": 5}, onto=options)
    assert changed.steps == 5 and changed.seed == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "stepz is no option here; did you mean steps?"),
        ({"steps": 0}, "steps 0: at least 1"),
        ({"guidance": float("nan")}, "guidance nan: it must be a finite number"),
        ({"guidance_rescale": 2.0}, "guidance_rescale 2.0: 0 to 1"),
        ({"scheduler": "fastest"}, "scheduler 'fastest': known: ddim"),
        ({"mask": "m.png"}, "mask needs init_image"),
        ({"controlnet": "net"}, "1 of controlnet and adapter, but 0 of condition"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(values, message):
    with pytest.raises(OptionError) as error:
        make_options(TextOptions, values)
    assert str(error.value).startswith(message)


def test_defaults_that_depend_on_other_fields_are_filled_in():
    plain = HumanSDOptions(pose=Path("p.npz")).resolved()
    published = HumanSDOptions(pose=Path("p.npz"), compat="reference", guidance=3.0).resolved()
    assert (plain.steps, plain.guidance, plain.scheduler) == (40, 4.0, None)
    assert (published.steps, published.guidance, published.scheduler) == (50, 3.0, "ddim_humansd")


def test_prompts_and_seeds_multiply(tmp_path):
    (tmp_path / "prompts.txt").write_text("two\n\n three \n", encoding="utf-8")
    options = TextOptions(prompt=("one",), prompts=tmp_path / "prompts.txt", seed=(5, 9), number=2)
    assert prompts_of(options) == ["one", "two", "three"]
    assert seeds_of(options) == [5, 6, 9, 10]
    with pytest.raises(OptionError, match="nothing to draw"):
        prompts_of(TextOptions())


def test_options_that_name_models_are_fixed_once_open():
    assert set(fixed_fields(TextOptions)) == {
        *("base", "variant", "revision", "tokenizer", "dtype", "mesh"),
        *("lora", "controlnet", "adapter"),
    }
    assert {"scene", "base"} <= set(fixed_fields(FaceDiffuserOptions))


@pytest.mark.parametrize(
    ("entry", "parts"), [("a.safetensors", 1.0), ("a.safetensors:0.5", 0.5), ("c:/a.safetensors", 1.0), ("a:-1", -1.0)]
)
def test_a_lora_may_have_a_weight(entry, parts):
    assert path_and_weight(entry)[1] == parts


def test_sizes_are_height_and_width():
    assert read_size("64") == (64, 64) and read_size("64x96") == (64, 96)
    with pytest.raises(ValueError, match="write 64 or 64x96"):
        read_size("64x")
