"""Shorter forms of captions say nothing that the caption does not."""

from __future__ import annotations

import pytest

from fairhuman_jax.data.people import PeopleDataset
from fairhuman_jax.data.people.paraphrase import FULL_SHARE, paraphrases


def test_forms_of_one_caption():
    caption = (
        "an upper body photo of a slim old woman with long grey hair wearing a striped red t-shirt and blue jeans, "
        "showing a fist and an open hand, smiling, dark background"
    )
    assert paraphrases(caption)[FULL_SHARE:] == (
        "a slim old woman with long grey hair wearing a striped red t-shirt and blue jeans, "
        "showing a fist and an open hand, smiling, dark background",
        "a woman in a striped red t-shirt and blue jeans showing a fist and an open hand",
        "an upper body photo of a woman in a striped red t-shirt and blue jeans, dark background",
        "a slim old woman with long grey hair, showing a fist and an open hand, dark background",
    )


def test_every_drawn_caption_has_forms_made_of_its_own_words():
    people = PeopleDataset(32, 60, seed=3)
    for i in range(60):
        caption = people[i]["caption"]
        said = set(caption.replace(",", "").split()) | {"a", "in"}
        forms = paraphrases(caption)
        assert forms[0] == caption and len(set(forms)) >= 4
        for form in forms:
            assert set(form.replace(",", "").split()) <= said
            assert "  " not in form and ", ," not in form


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="not a caption of the people world: 'a cat'"):
        paraphrases("a cat")
