"""People with reference views: the same person in other clothes, exact masks, two people named and kept apart."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from fairhuman_jax.data import cache
from fairhuman_jax.data.people import PeoplePack, render
from fairhuman_jax.data.people.captions import Seen, noun_ends, pair_captions, without_looks
from fairhuman_jax.data.people.render import draw, identity_vector
from fairhuman_jax.data.people.subjects import PAIR_GESTURES, PeopleScenes, PeopleSubjects, PeopleViews
from fairhuman_jax.data.subject_folder import MARKER
from fairhuman_jax.data.subject_transforms import SubjectConfig, SubjectTransform, bounds
from fairhuman_jax.weights import load_tokenizer

SIZE, COUNT, SEED, VIEWS = 48, 16, 3, 2
TOKENIZER = Path(cache.__file__).parents[1] / "assets" / "people-base" / "tokenizer"
ALL = Seen(1, 1, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def scenes():
    """Sixteen scenes of eight people, about half of them pairs."""
    return PeopleScenes(SIZE, COUNT, SEED, identities=8, pairs=0.5)


@pytest.fixture(scope="module")
def samples(scenes):
    data = PeopleSubjects(scenes, PeopleViews(40, 8, SEED, VIEWS), VIEWS)
    return [data[i] for i in range(COUNT)]


def test_references_are_the_same_person_in_another_picture(scenes):
    """Equal identity vectors; no clothes, pose, expression, light or camera in common."""
    views = PeopleViews(40, 8, SEED, 4)
    changed = []
    for i in range(COUNT):
        for person, spec in zip(scenes.people(i), scenes.specs(i), strict=True):
            own = [views.spec(4 * person + v) for v in range(4)]
            for view in own:
                np.testing.assert_array_equal(identity_vector(view["identity"]), identity_vector(spec["identity"]))
                assert view["identity_key"] == [SEED, person] and view["camera"]["framing"] in (
                    "portrait",
                    "upper body",
                )
            drawn = [spec, *own]
            for name in ("pose", "light", "camera"):
                assert len({repr(one[name]) for one in drawn}) == len(drawn)
            changed += [repr(view["outfit"]) != repr(spec["outfit"]) for view in own]
    assert np.mean(changed) > 0.98
    vectors = {identity_vector(views.spec(4 * k)["identity"]).tobytes() for k in range(8)}
    assert len(vectors) == 8


def test_every_person_has_the_views_of_its_number(scenes, samples):
    views = PeopleViews(40, 8, SEED, VIEWS)
    for i, sample in enumerate(samples):
        assert tuple(sample["people"][sample["people"] >= 0]) == scenes.people(i)
        assert len(sample["references"]) == len(sample["segments"]) == len(scenes.people(i))
        for person, references in zip(scenes.people(i), sample["references"], strict=True):
            for v, (picture, mask) in enumerate(references):
                expected = views[VIEWS * person + v]
                np.testing.assert_array_equal(picture, expected["image"])
                np.testing.assert_array_equal(mask, expected["person_mask"][..., 0])
                assert picture.shape == (40, 40, 3) and 0.15 < mask.mean() < 0.95


def test_masks_of_one_person_are_those_of_the_part_map(scenes, samples):
    for i, sample in enumerate(samples):
        if len(scenes.people(i)) == 1:
            alone = render(PeoplePack.load(), scenes.specs(i)[0], SIZE)
            np.testing.assert_array_equal(sample["segment_map"] > 0, alone["part_map"][..., 0] > 0)
            np.testing.assert_array_equal(sample["image"], alone["image"])


def occupied(spec: dict) -> np.ndarray:
    """Which of the four samples of each pixel show the person or what it sits on: bool [S, S, 4]."""
    places = np.zeros((2 * SIZE, 2 * SIZE), bool)
    places.ravel()[draw(PeoplePack.load(), spec, SIZE, 2).fragments.pixel] = True
    return places.reshape(SIZE, 2, SIZE, 2).swapaxes(1, 2).reshape(SIZE, SIZE, 4)


def test_two_people_are_drawn_as_each_alone_wherever_they_share_no_pixel(scenes, samples):
    shared, pairs = 0, 0
    for i, sample in enumerate(samples):
        specs, ids = scenes.specs(i), sample["segment_map"]
        if len(specs) == 1:
            continue
        pairs += 1
        assert set(np.unique(ids)) == {0, 1, 2}
        there = [occupied(spec).any(-1) for spec in specs]
        shared += int((there[0] & there[1]).sum())
        for k, spec in enumerate(specs):
            alone, own = render(PeoplePack.load(), spec, SIZE), ~there[1 - k]
            np.testing.assert_array_equal((ids == k + 1)[own], alone["person_mask"][own, 0] > 0)
            np.testing.assert_array_equal(sample["image"][own], alone["image"][own])
        left, right = (np.flatnonzero((ids == k).any(0)).mean() for k in (1, 2))
        assert left < SIZE / 2 < right and min((ids == 1).mean(), (ids == 2).mean()) > 0.1
    assert pairs >= 4 and shared > 0


def test_the_hidden_person_is_the_one_behind():
    """A pixel is the front person's from two of its four samples on, else the other's if two of it are left to see."""
    scenes, whole, changed = PeopleScenes(SIZE, 8, SEED, pairs=1.0), 0, 0
    for i in range(8):
        specs = scenes.specs(i)
        samples, images = [occupied(spec) for spec in specs], []
        for front in (0, 1):
            near, far = samples[front], samples[1 - front] & ~samples[front]
            image, ids, _ = scenes._pair(specs, front)
            left = np.where(far.sum(-1) >= 2, 2 - front, 0)
            np.testing.assert_array_equal(ids, np.where(near.sum(-1) >= 2, front + 1, left))
            alone, filled = render(PeoplePack.load(), specs[front], SIZE), near.all(-1)
            np.testing.assert_array_equal(image[filled], alone["image"][filled])
            changed += int((left != np.where(samples[1 - front].sum(-1) >= 2, 2 - front, 0)).sum())
            images.append(image)
        both = (samples[0] & samples[1]).any(-1)
        np.testing.assert_array_equal(images[0][~both], images[1][~both])
        whole += int((samples[0] & samples[1]).all(-1).sum())
    assert whole > 0 and changed > 0


def test_captions_name_everybody_and_ends_close_the_nouns(scenes, samples):
    for i, sample in enumerate(samples):
        ends = [segment.end for segment in sample["segments"]]
        nouns = [spec["identity"]["sex"] for spec in scenes.specs(i)]
        assert [sample["caption"][:end].split()[-1] for end in ends] == nouns
        assert ends == sorted(set(ends)) and [segment.id for segment in sample["segments"]] == [1, 2][: len(ends)]
        for segment in sample["segments"]:
            assert segment.box == bounds(sample["segment_map"] == segment.id) and segment.label == "person"
    assert noun_ends("a woman and a man, human mankind") == (7, 17)


def test_every_word_of_a_caption_is_one_token_of_the_shipped_tokenizer():
    tokenizer = load_tokenizer(TOKENIZER)
    pairs = PeopleScenes(SIZE, 150, SEED, pairs=1.0)
    for i in range(150):
        for caption in pair_captions(pairs.specs(i), [ALL, ALL]):
            words = caption.replace(",", " ,").replace("-", " - ").split()
            assert len(tokenizer(caption)["input_ids"]) == len(words) + 2 <= 75, caption


def test_pair_captions_say_less_and_less():
    specs = PeopleScenes(SIZE, 4, SEED, pairs=1.0).specs(0)
    for spec, sex, colour in zip(specs, ("woman", "man"), ("red", "blue"), strict=True):
        spec["identity"] |= {"sex": sex, "age": 0.1, "weight": 0.5, "hair_style": "short", "hair_colour": "black"}
        spec["outfit"] |= {"top": "shirt", "top_colour": colour, "striped": False}
    specs[0]["background"] = specs[0]["background"] | {"colour": "pink"}
    assert pair_captions(specs, [ALL, dataclasses.replace(ALL, hair=0.0)]) == (
        "an upper body photo of a young woman with short black hair wearing a red shirt and a young man wearing a blue "
        "shirt, pink background",
        "a young woman with short black hair and a young man, pink background",
        "a photo of a woman in a red shirt and a man in a blue shirt, pink background",
        "a woman and a man, pink background",
    )


def test_people_of_the_last_samples_are_in_no_other():
    """Neighbours share people, so held-out samples show strangers, pairs included, but for one group."""
    scenes = PeopleScenes(SIZE, 400, SEED, identities=100, pairs=0.5)
    people = [scenes.people(i) for i in range(400)]
    assert {len(group) for group in people} == {1, 2}
    assert 150 < sum(len(group) == 2 for group in people) < 250
    assert all(len(set(group)) == len(group) and i * 100 // 400 in group for i, group in enumerate(people))
    train, held_out = ({k for group in part for k in group} for part in (people[:384], people[384:]))
    assert train == set(range(96)) and held_out == {96, 97, 98, 99}
    assert {len(PeopleScenes(SIZE, 9, SEED).people(i)) for i in range(9)} == {1}
    odd = PeopleScenes(SIZE, 9, SEED, pairs=1.0)
    assert all(len(set(odd.people(i))) == 2 and max(odd.people(i)) < 9 for i in range(9))
    first = [people[i][0] == i // 4 for i in range(400) if len(people[i]) == 2]
    assert 0.4 < np.mean(first) < 0.6  # left or right


def test_nobody_of_two_reaches_out():
    scenes = PeopleScenes(SIZE, 30, SEED, pairs=1.0)
    specs = [spec for i in range(30) for spec in scenes.specs(i)]
    assert {spec["pose"]["gesture"] for spec in specs} == set(PAIR_GESTURES)
    for one, other in zip(specs[::2], specs[1::2], strict=True):
        assert one["background"] == other["background"] and one["light"] == other["light"]
        assert one["outfit"] != other["outfit"] and one["camera"]["elevation"] == other["camera"]["elevation"]


def test_samples_are_functions_of_seed_and_index(scenes, samples):
    again = PeopleSubjects(scenes, PeopleViews(40, 8, SEED, VIEWS), VIEWS)[5]
    assert pickle.dumps(again) == pickle.dumps(samples[5])
    other = PeopleScenes(SIZE, COUNT, SEED + 1, identities=8, pairs=0.5)[5]
    assert not np.array_equal(other["image"], again["image"])


def test_the_transform_takes_them(samples):
    config = SubjectConfig(max_objects=2, object_resolution=24, appear_prob=1.0, uncondition_prob=0.0)
    for sample in samples[:8]:
        out = SubjectTransform(32, flip=1.0, subjects=config)(sample, np.random.default_rng(0))
        count = len(sample["segments"])
        assert out["num_objects"] == count == out["caption"].count(MARKER)
        words = [part.split()[-1] for part in out["caption"].split(MARKER)[:count]]
        assert set(words) <= {"man", "woman"}
        assert out["object_masks"][:count].any((1, 2)).all() and out["object_masks"].sum(0).max() == 1


def test_cached_sets_are_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path))
    data = pickle.loads(pickle.dumps(cache.cached_subjects(24, 4, 1, 16, identities=2, pairs=0.5, count=2)))
    drawn = PeopleSubjects(PeopleScenes(24, 4, 1, 2, 0.5), PeopleViews(16, 2, 1, 2), 2)
    assert len(data) == len(drawn) == 4
    for i in range(4):
        one, other = data[i], drawn[i]
        assert (
            one.keys() == other.keys() and one["segments"] == other["segments"] and one["caption"] == other["caption"]
        )
        for name in ("image", "segment_map", "people"):
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype
        for first, second in zip(one["references"], other["references"], strict=True):
            for left, right in zip(first, second, strict=True):
                np.testing.assert_array_equal(left[0], right[0])
                np.testing.assert_array_equal(left[1], right[1])
    names = sorted(folder.name.rsplit("-", 1)[0] for folder in tmp_path.iterdir())
    assert names == ["scenes-24px-seed1-4-2people-pairs0.5", "views-16px-seed1-2peoplex2"]
    monkeypatch.setattr(cache, "_write", lambda *arguments: pytest.fail("drawn again"))
    assert len(cache.cached_subjects(24, 4, 1, 16, identities=2, pairs=0.5, count=2)) == 4


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"5 identities in 4 samples: use 1 ... the number of samples"):
        PeopleScenes(SIZE, 4, SEED, identities=5)
    with pytest.raises(ValueError, match="0 identities in 0 samples"):
        PeopleScenes(SIZE, 0, SEED)
    with pytest.raises(ValueError, match=r"pairs = 0.5 needs 2 identities"):
        PeopleScenes(SIZE, 4, SEED, identities=1, pairs=0.5)
    with pytest.raises(ValueError, match="references = 0: use 1 or more"):
        PeopleViews(SIZE, 4, SEED, 0)
    with pytest.raises(IndexError, match="index 4 outside a set of 4 samples"):
        PeopleScenes(SIZE, 4, SEED)[4]
    with pytest.raises(IndexError, match="index 8 outside a set of 8 pictures"):
        PeopleViews(SIZE, 4, SEED, 2)[8]


def test_looks_are_left_to_the_references_and_the_rest_of_a_caption_stays(scenes, samples):
    told = "a portrait of an old slim woman with long black hair wearing a teal dress and a bald man, pink background"
    assert without_looks(told) == "a portrait of a woman wearing a teal dress and a man, pink background"
    assert without_looks("a slim young man with short dark brown hair, laughing") == "a man, laughing"
    views = PeopleViews(40, 8, SEED, VIEWS)
    for whole, bare in zip(samples, PeopleSubjects(scenes, views, VIEWS, looks=False), strict=True):
        assert not re.search(r"\b(hair|young|old|slim|heavyset|bald)\b", bare["caption"])
        nouns = [[each["caption"][: segment.end].split()[-1] for segment in each["segments"]] for each in (whole, bare)]
        assert nouns[0] == nouns[1] and set(nouns[1]) <= {"man", "woman"}
        assert bare["caption"].split(",")[1:] == whole["caption"].split(",")[1:]
