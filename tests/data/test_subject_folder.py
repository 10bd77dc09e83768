"""FFHQ in FastComposer's layout: lists, samples, and what is said of files that cannot be used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_subjects import CAPTION, SIZES, change, scene, write_subjects

from fairhuman_jax.data import BadSample
from fairhuman_jax.data.subject_folder import Segment, SubjectDataset


@pytest.fixture
def root(tmp_path):
    return write_subjects(tmp_path, 4)


def stem(root: Path, index: int) -> Path:
    name = (root / "image_ids.txt").read_text().split()[index]
    return root / name[:5] / name


def test_samples_are_pictures_captions_maps_and_segments_in_the_lists_order(root):
    data = SubjectDataset(root, on_error="stop")
    assert [data.line(i) for i in range(len(data))] == ["000000099", "000010098", "000000097"] and data.bad == 0
    for i in range(3):
        image, ids, _ = scene(*SIZES[i])
        sample = data[i]
        assert sample.keys() == {"image", "caption", "segment_map", "segments"} and sample["caption"] == CAPTION
        np.testing.assert_array_equal(sample["image"], image)
        np.testing.assert_array_equal(sample["segment_map"], ids)
        assert sample["segment_map"].dtype == np.int32 and data.size(i) == SIZES[i] and data.captions(i) == (CAPTION,)
    assert sample["segments"][0] == Segment(id=7, box=(28, 14, 42, 49), end=17, label="person")
    copy = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(copy[1]["image"], data[1]["image"])
    assert "samples=3" in repr(copy) and data.digest(0) != data.digest(2) and len(data.files(0)) == 3


def test_boxes_are_columns_before_rows(root):
    """(x0, y0, x1, y1): the named part of the map holds the id, and all of it."""
    for sample in (SubjectDataset(root)[0], SubjectDataset(root)[1]):
        for segment in sample["segments"]:
            x0, y0, x1, y1 = segment.box
            assert (sample["segment_map"][y0:y1, x0:x1] == segment.id).all()
            assert (sample["segment_map"] == segment.id).sum() == (x1 - x0) * (y1 - y0)
            words = sample["caption"][: segment.end]
            assert words.endswith({7: "woman", 3: "a man", 300: "dog"}[segment.id])


def test_splits_are_the_three_lists(root):
    assert [len(SubjectDataset(root, split)) for split in ("train", "test", "all")] == [3, 1, 4]
    assert SubjectDataset(root, "test").line(0) == "000010096"
    with pytest.raises(ValueError, match=r"split = 'val': use train, test, all"):
        SubjectDataset(root, "val")
    (root / "image_ids_test.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"image_ids_test.txt: not found; a folder of subjects lists an id a line"
    ):
        SubjectDataset(root, "test")
    with pytest.raises(ValueError, match="'skip' or 'stop'"):
        SubjectDataset(root, on_error="ignore")


def test_lines_that_are_no_ids_are_named(root):
    (root / "image_ids_train.txt").write_text("000000099\n\n../../etc/passwd\r\n  000010098  \n1234\nabcdefghi\n")
    data = SubjectDataset(root)
    assert [data.line(i) for i in range(len(data))] == ["000000099", "000010098"] and data.bad == 3
    for number, word in ((3, "'../../etc/passwd'"), (5, "'1234'"), (6, "'abcdefghi'")):
        assert sum(
            f"train.txt:{number}: an id has at least 5 digits" in line and word in line for line in data.bad_lines()
        )
    with pytest.raises(BadSample, match=r"image_ids_train.txt:3: an id has"):
        SubjectDataset(root, on_error="stop")
    (root / "image_ids_train.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match=r"image_ids_train.txt: no usable id \(1 bad\)"):
        SubjectDataset(root)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def entry(**values) -> dict:
    return {"segments": [{"id": 7, "bbox": [32, 12, 48, 42], "end": 17, "coco_label": "person"} | values]}


def cut(path: Path, size: int = 70) -> None:
    path.write_bytes(path.read_bytes()[:size])


def trapped(path: Path) -> None:
    array = np.empty(1, object)
    array[0] = Trap(path.parent / "pwned")
    np.save(path, array)


FAULTS = {
    "no json": (lambda s: s.with_suffix(".json").unlink(), ".json: no such file"),
    "no jpg": (lambda s: s.with_suffix(".jpg").unlink(), ".jpg: no such file"),
    "no npy": (lambda s: s.with_suffix(".npy").unlink(), ".npy: no such file"),
    "cut json": (lambda s: cut(s.with_suffix(".json")), ".json: bad JSON"),
    "deep json": (lambda s: s.with_suffix(".json").write_text("[" * 100_000), ".json: bad JSON"),
    "cut jpg": (lambda s: cut(s.with_suffix(".jpg"), 100), ".jpg: damaged picture"),
    "cut npy": (lambda s: cut(s.with_suffix(".npy"), 200), ".npy: no whole npy file of numbers"),
    "empty npy": (lambda s: cut(s.with_suffix(".npy"), 0), ".npy: no whole npy file of numbers"),
    "pickled npy": (lambda s: trapped(s.with_suffix(".npy")), ".npy: no whole npy file of numbers"),
    "float npy": (
        lambda s: np.save(s.with_suffix(".npy"), np.zeros((48, 64))),
        "a segment map is integers [H, W], found float64 [48, 64]",
    ),
    "other size": (
        lambda s: np.save(s.with_suffix(".npy"), np.zeros((64, 48), int)),
        "48x64 values, the picture has 64x48 pixels",
    ),
    "list": (lambda s: s.with_suffix(".json").write_text("[1]"), "needs an object with a string 'caption' and a list"),
    "no caption": (lambda s: change(s.with_suffix(".json"), caption=None), "needs an object with a string 'caption'"),
    "no segments": (lambda s: change(s.with_suffix(".json"), segments={}), "and a list 'segments'"),
    "marker": (lambda s: change(s.with_suffix(".json"), caption="a man <|image|>"), "the caption holds <|image|>"),
    "no object": (lambda s: change(s.with_suffix(".json"), segments=[3]), "segment 1: needs an object with id"),
    "id in words": (lambda s: change(s.with_suffix(".json"), **entry(id="7")), "needs whole numbers id, end, four"),
    "half a pixel": (lambda s: change(s.with_suffix(".json"), **entry(bbox=[1, 2, 3, 4.5])), "needs whole numbers"),
    "three numbers": (lambda s: change(s.with_suffix(".json"), **entry(bbox=[1, 2, 3])), "end, four of bbox"),
    "no label": (lambda s: change(s.with_suffix(".json"), **entry(coco_label=0)), "a string coco_label"),
    "unknown id": (
        lambda s: change(s.with_suffix(".json"), **entry(id=8)),
        "id 8 is not in the segment map; there: 0, 3,",
    ),
    "box outside": (
        lambda s: change(s.with_suffix(".json"), **entry(bbox=[32, 12, 65, 42])),
        "segment 1: bbox [32, 12, 65, 42] is no x0, y0, x1, y1 inside 64x48 pixels",
    ),
    "empty box": (lambda s: change(s.with_suffix(".json"), **entry(bbox=[32, 12, 32, 42])), "is no x0, y0, x1, y1"),
    "end outside": (
        lambda s: change(s.with_suffix(".json"), **entry(end=29)),
        "end 29 closes no word of a caption of 28",
    ),
    "end before": (lambda s: change(s.with_suffix(".json"), **entry(end=0)), "end 0 closes no word"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sample_that_cannot_be_used_is_one_line_and_skipped_or_stops(root, fault):
    spoil, words = FAULTS[fault]
    spoil(stem(root, 0))
    data = SubjectDataset(root)
    np.testing.assert_array_equal(data[0]["image"], data[1]["image"])
    (line,) = data.bad_lines()
    assert words in line and "image_ids_train.txt:000000099: " in line
    with pytest.raises(BadSample) as error:
        SubjectDataset(root, on_error="stop")[0]
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(root.rglob("pwned"))


def test_a_race_in_the_interpreters_parser_is_tried_again(root, monkeypatch):
    """SystemError: AST constructor recursion depth mismatch, which Python 3.11 raises now and then among threads."""
    read, calls = np.lib.format.open_memmap, []

    def once(path, mode):
        calls.append(path)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=66, after=62)")
        return read(path, mode=mode)

    monkeypatch.setattr(np.lib.format, "open_memmap", once)
    assert SubjectDataset(root, on_error="stop")[0]["segment_map"].shape == SIZES[0] and len(calls) == 2


def test_numbers_may_be_written_as_floats_and_samples_may_be_empty(root):
    change(stem(root, 0).with_suffix(".json"), **entry(bbox=[32.0, 12.0, 48.0, 42.0], end=17.0))
    assert SubjectDataset(root, on_error="stop")[0]["segments"] == (Segment(7, (32, 12, 48, 42), 17, "person"),)
    change(stem(root, 0).with_suffix(".json"), segments=[], caption="")
    assert SubjectDataset(root, on_error="stop")[0]["segments"] == ()


@pytest.mark.parametrize("kind", ["grey", "rgba", "sixteen", "turned"])
def test_every_kind_of_picture_is_upright_rgb_of_the_maps_size(root, kind):
    """Box and map are those of the picture as it is shown."""
    path, (whole, _, _) = stem(root, 0).with_suffix(".jpg"), scene(*SIZES[0])
    grey, exif = whole[..., 0], Image.Exif()
    if kind == "grey":
        Image.fromarray(grey).save(path, format="PNG")
    elif kind == "rgba":
        Image.fromarray(np.dstack([whole, np.full_like(grey, 255)])).save(path, format="PNG")
    elif kind == "sixteen":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path, format="PNG")
    else:
        exif[274] = 6
        Image.fromarray(np.rot90(whole)).save(path, format="PNG", exif=exif)
    expected = whole if kind in ("rgba", "turned") else np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(SubjectDataset(root, on_error="stop")[0]["image"], expected)


def test_other_keys_of_the_record_do_not_matter(root):
    record = json.loads(stem(root, 0).with_suffix(".json").read_text())
    record["segments"][0] |= {"score": 0.5, "start": 12}
    stem(root, 0).with_suffix(".json").write_text("\ufeff" + json.dumps(record), encoding="utf-8")
    assert len(SubjectDataset(root, on_error="stop")[0]["segments"]) == 3
