"""cached_people: drawn once, the samples of PeopleDataset, whole or not at all."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fairhuman_jax.data import cache
from fairhuman_jax.data.people import PeopleDataset
from fairhuman_jax.data.people.conditions import detected_points

ARGUMENTS = (24, 3, 5, 10)  # size, length, seed, start


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A cache folder with one finished set."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIRHUMAN_CACHE", str(folder))
        patch.setattr(cache, "CHUNK", 2)  # several chunks are drawn by processes, one is not
        cache.cached_people(*ARGUMENTS)
    return folder


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(root))


def test_samples_are_those_of_the_dataset():
    source = cache.cached_people(*ARGUMENTS)
    size, length, seed, start = ARGUMENTS
    drawn = PeopleDataset(size, length, seed, start=start)
    assert len(source) == len(drawn) == 3
    for index in range(length):
        sample, expected = source[index], drawn[index]
        assert sample["caption"] == expected["caption"]
        for name in ("image", "face_mask", "hand_mask"):
            assert sample[name].dtype == np.uint8
            np.testing.assert_array_equal(sample[name], expected[name])
    assert any(source[i]["face_mask"].any() for i in range(3))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[2]["image"], source[2]["image"])


def test_conditions_are_kept_in_a_folder_of_their_own(root):
    plain = cache.cached_people(*ARGUMENTS)
    source = pickle.loads(pickle.dumps(cache.cached_people(*ARGUMENTS, conditioning="fairhuman")))
    size, length, seed, start = ARGUMENTS
    drawn = PeopleDataset(size, length, seed, start=start, conditioning="fairhuman")
    for index in range(length):
        sample = source[index]
        np.testing.assert_array_equal(sample.pop("conditioning_image"), drawn[index]["conditioning_image"])
        assert sample.keys() == plain[index].keys()
        for name in ("image", "face_mask", "hand_mask"):
            np.testing.assert_array_equal(sample[name], plain[index][name])
    assert len(list(root.glob("people-24px-seed5-10+3-fairhuman-*"))) == 1


def test_framings_follow_their_shares_and_are_kept_in_a_folder_of_their_own(root):
    size, _, seed, start = ARGUMENTS
    shares = (("portrait", 3.0), ("full body", 0.0), ("close-up of a hand", 1.0))
    drawn = PeopleDataset(size, 400, seed, start=start, framings=shares)
    assert PeopleDataset(size, 400, seed, start=start, framings=((shares[0][0], 3), *shares[1:])).framings == shares
    names = [drawn.framing_of(start + index) for index in range(400)]
    assert set(names) == {"portrait", "close-up of a hand"} and 250 < names.count("portrait") < 350
    assert names[7:9] == [drawn.framing_of(start + 7), drawn.framing_of(start + 8)]
    source = cache.cached_people(size, 2, seed, start, framings=shares)
    assert source[0]["caption"] == drawn[0]["caption"] and ("portrait" in source[0]["caption"]) == (
        names[0] == "portrait"
    )
    assert len(list(root.glob("people-24px-seed5-10+2-mix*"))) == 1
    assert PeopleDataset(size, 4, seed).framing_of(3) is None
    for name, share, message in (
        ("knee", 1.0, "'knee' is not"),
        ("portrait", -1.0, "below 0"),
        ("portrait", 0, "least"),
    ):
        with pytest.raises(ValueError, match=message):
            PeopleDataset(size, 4, seed, framings=((name, share),))
    with pytest.raises(ValueError, match="exclude each other"):
        PeopleDataset(size, 4, seed, framing="portrait", framings=shares)


def test_joints_are_kept_in_a_folder_of_their_own(root):
    plain = cache.cached_people(*ARGUMENTS)
    source = pickle.loads(pickle.dumps(cache.cached_people(*ARGUMENTS, keypoints=True)))
    size, length, seed, start = ARGUMENTS
    drawn = PeopleDataset(size, length, seed, start=start)
    for index in range(length):
        sample = source[index]
        points = sample.pop("keypoints")["coco17"]
        assert points.shape == (1, 17, 3) and points.dtype == np.float32
        np.testing.assert_array_equal(points[0], detected_points(drawn[index], "coco17"))
        assert sample.keys() == plain[index].keys()
        np.testing.assert_array_equal(sample["image"], plain[index]["image"])
    assert len(list(root.glob("people-24px-seed5-10+3-keypoints-*"))) == 1


def test_a_second_opening_draws_nothing(root, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("drawn again")

    monkeypatch.setattr(cache, "_write", refuse)
    before = sorted(root.rglob("*"))
    assert len(cache.cached_people(*ARGUMENTS)) == 3
    assert sorted(root.rglob("*")) == before
    for other in ((24, 3, 6, 10), (24, 4, 5, 10), (24, 3, 5, 11), (32, 3, 5, 10), (24, 3, 5, 10, "humansd")):
        with pytest.raises(AssertionError, match="drawn again"):
            cache.cached_people(*other)


def test_a_changed_renderer_is_another_set(monkeypatch):
    monkeypatch.setattr(cache, "_renderer_digest", lambda: "0" * 12)
    monkeypatch.setattr(cache, "_write", lambda source, folder, rows: pytest.fail(folder.name))
    with pytest.raises(pytest.fail.Exception, match=r"people-24px-seed5-10\+3-000000000000"):
        cache.cached_people(*ARGUMENTS)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(blocked))
    with pytest.raises(OSError, match=r"people world: cannot keep 3 images in .*file .*set FAIRHUMAN_CACHE") as error:
        cache.cached_people(*ARGUMENTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    def stop(*arguments, **keywords):
        assert len(list(tmp_path.iterdir())) == 1  # the work has begun, under another name
        raise error

    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_render", stop)
    with pytest.raises((KeyboardInterrupt, OSError)) as raised:
        cache.cached_people(*ARGUMENTS)
    assert list(tmp_path.iterdir()) == []
    if raised.type is OSError:
        assert "No space left on device" in str(raised.value)


def test_losing_a_race_uses_the_folder_of_the_other_process(root, monkeypatch):
    finished = next(root.glob(f"people-24px-seed5-10+3-{'?' * 12}"))
    hidden = root / "hidden"
    finished.rename(hidden)

    def other_process_is_first(source, folder, rows):
        hidden.rename(folder)
        own = root / "own"
        own.mkdir()
        own.rename(folder)  # fails: the folder is there and not empty

    monkeypatch.setattr(cache, "_write", other_process_is_first)
    assert len(cache.cached_people(*ARGUMENTS)) == 3
    assert finished.is_dir()
