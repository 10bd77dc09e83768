"""Captions that mark subjects: the flagged tokens, in the vocabularies of CLIP and of the people world; refusals."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from fairhuman_jax.data.subject_folder import MARKER as WRITTEN
from fairhuman_jax.weights import MARKER, load_tokenizer, tokenize, tokenize_subjects
from fairhuman_jax.weights.ldm.tokenizer import clip_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def people():
    return load_tokenizer(Path(str(resources.files("fairhuman_jax") / "assets" / "people-base" / "tokenizer")))


@pytest.fixture(params=["clip", "people"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_the_published_example(tokenizer):
    found = tokenize_subjects(tokenizer, ["a man <|image|> and a woman <|image|>"], 4)
    np.testing.assert_array_equal(found.ids, tokenize(tokenizer, ["a man and a woman"]))
    assert found.positions.tolist() == [[2, 5, 0, 0]]
    assert found.valid.tolist() == [[True, True, False, False]]
    assert found.counts.tolist() == [2]
    assert [array.dtype for array in found] == [np.int32, np.int32, bool, np.int32]


@pytest.mark.parametrize(
    ("caption", "words", "expected"),
    [
        ("a man<|image|>, smiling", "a man, smiling", ["man"]),
        ("A Man <|image|>'s hat", "a man's hat", ["man"]),
        ("a man<|image|> and a woman<|image|>", "a man and a woman", ["man", "woman"]),
        ("a man <|image|><|image|>  <|image|> and", "a man and", ["man"]),
        ("<|image|> a man", "a man", [None]),
        ("<|image|>a man <|image|>", "a man", [None, "man"]),
        ("a man <|image|>and", "a man and", ["man"]),
    ],
)
def test_flags_are_on_the_word_before_the_marker(tokenizer, caption, words, expected):
    found = tokenize_subjects(tokenizer, [caption], 3)
    np.testing.assert_array_equal(found.ids, tokenize(tokenizer, [words]))
    flagged = found.ids[0, found.positions[0, found.valid[0]]]
    wanted = [tokenizer.bos_token_id if word is None else tokenizer(word)["input_ids"][-2] for word in expected]
    assert flagged.tolist() == wanted
    assert not found.positions[~found.valid].any()


def test_a_word_of_several_tokens_is_flagged_at_its_last(tokenizer):
    pieces = tokenizer("zebraphone", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    found = tokenize_subjects(tokenizer, ["a zebraphone <|image|> sings"], 1)
    assert found.positions.tolist() == [[1 + len(pieces)]]
    assert found.ids[0, found.positions[0, 0]] == pieces[-1]


def test_rows_are_independent_of_each_other(clip):
    captions = ["a man <|image|>", "a very old woman <|image|> and a man <|image|>"]
    both = tokenize_subjects(clip, captions, 2)
    for row, caption in enumerate(captions):
        for together, alone in zip(both, tokenize_subjects(clip, [caption], 2), strict=True):
            np.testing.assert_array_equal(together[row], alone[0])


def long_caption(tokenizer, at: int) -> str:
    """Words of one token each, more than fit; the word at position `at` is marked."""
    return " ".join(["man"] * at + [MARKER] + ["woman"] * tokenizer.model_max_length)


def test_long_captions_keep_their_end_unless_as_published(tokenizer):
    limit = tokenizer.model_max_length
    caption = long_caption(tokenizer, limit - 2)
    found = tokenize_subjects(tokenizer, [caption], 1)
    np.testing.assert_array_equal(found.ids, tokenize(tokenizer, [caption.replace(MARKER, "")]))
    assert (found.ids[0, -1], found.positions[0, 0]) == (tokenizer.eos_token_id, limit - 2)
    published = tokenize_subjects(tokenizer, [long_caption(tokenizer, limit - 1)], 1, compat="reference")
    assert published.positions[0, 0] == limit - 1
    assert published.ids[0, -1] == tokenizer("man")["input_ids"][1]
    fits = " ".join(["man"] * (limit - 2)) + MARKER
    whole = tokenize_subjects(tokenizer, [fits], 1, compat="reference")
    np.testing.assert_array_equal(whole.ids, tokenize(tokenizer, [fits.removesuffix(MARKER)]))


def test_markers_that_cannot_be_meant_are_refused_in_one_line(tokenizer):
    limit = tokenizer.model_max_length
    for caption, options, message in (
        ("a wo<|image|>man", {}, r"'a wo<\|image\|>man'; it belongs behind the noun"),
        ("a wo<|image|>man", {"strict": False}, "inside a word"),
        ("a man<|image|>and a dog", {}, "inside a word"),
        ("a man", {}, r"'a man' has no <\|image\|>"),
        ("a man <|image|> and a woman <|image|>", {}, "marks 2 subjects; at most 1 have a place"),
        (long_caption(tokenizer, limit - 1), {}, "too long: the word of its subject number 1 is cut off"),
        (long_caption(tokenizer, limit), {"compat": "reference"}, "subject number 1 is cut off"),
        ("a man <|image|>", {"compat": "paper"}, "unknown compat 'paper'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            tokenize_subjects(tokenizer, [caption], 1, **options)
        assert "\n" not in str(caught.value)


def test_training_data_lose_subjects_instead(clip):
    captions = ["", "a man", "a man <|image|> and a woman <|image|>", f"a man <|image|> {long_caption(clip, 80)}"]
    found = tokenize_subjects(clip, captions, 1, strict=False)
    assert found.counts.tolist() == [0, 0, 1, 1]
    assert found.positions.tolist() == [[0], [0], [2], [2]]
    np.testing.assert_array_equal(found.ids[:2], tokenize(clip, captions[:2]))
    cut = tokenize_subjects(clip, captions[-1:], 2, strict=False)
    assert (cut.counts.tolist(), cut.valid.tolist()) == ([1], [[True, False]])


def test_the_marker_that_data_write_into_captions_is_the_one_that_is_looked_for():
    assert WRITTEN == MARKER
