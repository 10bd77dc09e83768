"""The check of a folder of subjects: each known fault once, and the figures of its lists, people and labels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_subjects import change, write_subjects

from fairhuman_jax.data.__main__ import main
from fairhuman_jax.data.check_subjects import check_subjects


@pytest.fixture
def root(tmp_path):
    return write_subjects(tmp_path, 8, test=2)


def stem(root, index: int):
    name = (root / "image_ids.txt").read_text().split()[index]
    return root / name[:5] / name


def test_every_fault_is_reported_once_with_its_id(root):
    names = [stem(root, i).name for i in range(8)]
    stem(root, 0).with_suffix(".jpg").unlink()
    change(stem(root, 1).with_suffix(".json"), caption=" " * 40)
    change(stem(root, 2).with_suffix(".json"), caption="word " * 70, segments=[])
    np.save(stem(root, 3).with_suffix(".npy"), np.zeros((9, 9), int))
    change(stem(root, 6).with_suffix(".json"), caption="two people and a dog", segments=small())
    ids = np.load(stem(root, 6).with_suffix(".npy"))
    ids[ids == 7] = 0
    ids[12, 32] = 7
    np.save(stem(root, 6).with_suffix(".npy"), ids)
    with (root / "image_ids_train.txt").open("a") as file:
        file.write(f"nonsense\n{names[7]}\n999990000\n")
    report = check_subjects(root, resolution=50, workers=0)
    expected = {
        f"{names[0]}: ": ".jpg: no such file",
        f"{names[1]}: ": "closes no word of a caption",
        f"{names[3]}: ": "9x9 values, the picture has",
        "999990000: ": ".json: no such file",
        "image_ids_train.txt:7: ": "an id has at least 5 digits",
    }
    assert len(report.problems) == len(expected) and not report.clean
    for start, words in expected.items():
        assert sum(text.startswith(start) and words in text for text in report.problems) == 1, words
    notes = {
        f"{names[2]}: caption of 70 words": "cut after about 60",
        f"{names[2]}: no person": "",
        f"{names[6]}: several persons of one word": "the largest is used",
        f"{names[6]}: segment 7: a person of 0.03 %": "",
        f"{names[7]}: 48x64 pixels, enlarged to 50": "",
        "1 ids are listed": "for training and for tests",
    }
    for start, words in notes.items():
        assert sum(text.startswith(start) and words in text for text in report.notes) == 1, start


def small() -> list[dict]:
    """Two persons of one word in a picture of 64 x 48, the second in one pixel."""
    entries = [{"id": 3, "bbox": [16, 6, 32, 42]}, {"id": 7, "bbox": [32, 12, 33, 13]}]
    return [entry | {"end": 10, "coco_label": "person"} for entry in entries]


def test_figures_are_those_of_lists_people_and_labels(root):
    change(stem(root, 5).with_suffix(".json"), segments=[])
    text = str(check_subjects(root, resolution=48, workers=0))
    assert "8 samples" in text and "0 problems" in text
    rows = [line.split()[:2] for line in text.splitlines() if line.endswith("#")]
    for row in (
        ["image_ids_train.txt", "6"],
        ["image_ids_test.txt", "2"],
        ["image_ids.txt", "8"],
        ["0", "1"],
        ["2", "7"],
        ["person", "14"],
        ["dog", "7"],
    ):
        assert row in rows, row
    assert [row for row in rows if row[0] == "short"] == [["short", "side"]]


def test_the_command_tells_the_folders_apart(root, tmp_path, capsys):
    for faulty, expected in ((False, 0), (True, 1)):
        if faulty:
            stem(root, 7).with_suffix(".npy").unlink()
        with pytest.raises(SystemExit) as exit_code:
            main(["check", str(root), "--resolution", "48", "--workers", "0", "--sheet", str(tmp_path / "sheet.png")])
        assert exit_code.value.code == expected
        output = capsys.readouterr().out
        assert "persons a picture:" in output and "labels of segments:" in output
    with Image.open(tmp_path / "sheet.png") as picture:
        # Two samples a row, each with the cut-outs of its two people beside it.
        assert picture.width == 2 * 3 * 192
