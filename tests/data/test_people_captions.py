"""Captions: grammar, vocabulary, and nothing that the picture does not show."""

from __future__ import annotations

import re

import pytest

from fairhuman_jax.data.people import PeoplePack, render, sample_spec
from fairhuman_jax.data.people.captions import HAND_ACTIONS, SEEN, SIGN_WORDS, Seen, caption

ALL = Seen(left_hand=1, right_hand=1, face=1, hair=1, top=1, bottom=1)
GRAMMAR = re.compile(
    r"an? ((full body|half body|upper body|close-up) photo|portrait) of an? "
    r"(bald )?(slim |heavyset )?(young |old )?"
    r"(wo)?man( with (short|buzzed|curly|long|bob) (dark brown|\w+) hair)?"
    r"( wearing an? (striped )?\w+ (t-shirt|shirt|sweater|tank top|dress)"
    r"( and ((\w+ )?(trousers|shorts|jeans)|a \w+ skirt))?)?"
    r", (standing|walking|sitting|waving|looking at the camera|with .*?|presenting with open hands|"
    r"showing .*?)"
    r"(, (smiling|laughing|frowning|surprised|sleepy|angry|kissing))?, \w+ background"
)


def specs(count):
    return (sample_spec(11, i) for i in range(count))


def test_vocabulary_and_grammar():
    words, seen = set(), set()
    for spec in specs(1200):
        text = caption(spec, ALL)
        assert GRAMMAR.fullmatch(text), text
        assert len(text.split()) <= 40
        words |= set(text.replace(",", "").split())
        seen.add(text)
    assert 70 <= len(words) <= 100, sorted(words)
    assert len(seen) > 1190


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_hidden_hand_is_never_named(side):
    other = {"left": "right", "right": "left"}[side]
    tried = 0
    for spec in specs(600):
        if spec["pose"]["gesture"] not in ("sign", "two signs"):
            continue
        tried += 1
        arms = spec["pose"]["arms"]
        text = caption(spec, Seen(1, 1, 1, 1, 1, 1))
        hidden = caption(
            spec, Seen(**{f"{side}_hand": SEEN * 0.99, f"{other}_hand": 1}, face=1, hair=1, top=1, bottom=1)
        )
        gone = caption(spec, Seen(0, 0, 1, 1, 1, 1))
        assert "showing" in text
        assert "showing" not in gone and "looking at the camera" in gone
        shape = arms[other]["shape"]
        named = list({w for w in SIGN_WORDS.values() if w in hidden})
        assert named in ([], [SIGN_WORDS.get(shape)]) and "both hands" not in hidden
    assert tried > 50


def test_unseen_head_and_clothes_are_not_described():
    spec = sample_spec(0, 0)
    text = caption(spec, Seen(1, 1, 0, 0, 0, 0))
    assert "hair" not in text and "wearing" not in text
    assert not {"young", "old", "bald"} & set(text.split())


def test_sitting_and_walking_need_a_frame_that_shows_them():
    for gesture, framings in {
        "walking": ["portrait", "close-up of a hand"],
        "sitting": ["portrait", "upper body"],
    }.items():
        spec = next(s for s in specs(2000) if s["pose"]["gesture"] == gesture)
        for framing in framings:
            changed = spec | {"camera": spec["camera"] | {"framing": framing}}
            assert "looking at the camera" in caption(changed, ALL)
        assert gesture in caption(spec | {"camera": spec["camera"] | {"framing": "full body"}}, ALL)


def test_rendered_captions_mention_hands_only_above_the_threshold():
    pack = PeoplePack.load()
    signs = (*SIGN_WORDS.values(), *HAND_ACTIONS.values())
    named, silent = 0, 0
    for spec in specs(150):
        sample = render(pack, spec, 64)
        largest = max(sample["hand_mask_left"].mean(), sample["hand_mask_right"].mean())
        spoken = any(sign in sample["caption"] for sign in signs)
        named, silent = named + spoken, silent + (largest < SEEN)
        assert not spoken or largest >= SEEN, sample["caption"]
    assert named > 50 and silent > 5
