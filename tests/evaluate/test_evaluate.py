"""`python -m fairhuman_jax.evaluate`: what it prints and writes, and what it answers to bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.evaluate.__main__ import main
from fairhuman_jax.evaluate.folders import captions_for, list_pictures, paired_people
from fairhuman_jax.keypoints.poses import make_pose
from fairhuman_jax.keypoints.readers import write_poses

pytest.importorskip("pycocotools")


def points(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(20, 200, (17, 2)), np.full(17, 0.9)]).astype(np.float32)


def write_pose_folder(folder, people, size=(256, 256)):
    folder.mkdir()
    for name, seeds in people.items():
        write_poses(folder / f"{name}.npz", [make_pose(points(seed)) for seed in seeds], size)
    return folder


def coco_rows(people, ids):
    return [
        {"image_id": ids[name], "category_id": 1, "keypoints": points(seed).ravel().tolist(), "score": 0.5}
        for name, seeds in people.items()
        for seed in seeds
    ]


PEOPLE = {"a": [1], "b": [2, 3], "c": []}


def refused(capsys, *arguments) -> str:
    """The one line with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def pictures(folder, count, size=20):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def test_pose(tmp_path, capsys):
    truth = write_pose_folder(tmp_path / "true", PEOPLE)
    found = write_pose_folder(tmp_path / "found", {"a": [1], "b": [2], "c": [9]})
    main(["pose", str(found), str(truth), "--json", str(tmp_path / "out" / "pose.json")])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("AP(M)", "oks", "cap_reference", "count_error"))
    written = json.loads((tmp_path / "out" / "pose.json").read_text())
    assert written["pictures"] == 3 and written["people"] == {"true": 3.0, "found": 3.0, "count_error": 2 / 3}
    assert written["oks"]["AR"] == pytest.approx(2 / 3) and written["oks"]["AP(M)"] is None


def test_pose_from_coco_files(tmp_path):
    """Annotations of many pictures; results leave out pictures with nobody."""
    ids = {"a": 7, "b": 5, "c": 6}
    images = [{"id": number, "file_name": f"x/{name}.jpg"} for name, number in ids.items()]
    (tmp_path / "true.json").write_text(json.dumps({"images": images, "annotations": coco_rows(PEOPLE, ids)}))
    plain = [{"id": number} for number in ids.values()]
    (tmp_path / "ids.json").write_text(json.dumps({"images": plain, "annotations": coco_rows(PEOPLE, ids)}))
    (tmp_path / "found.json").write_text(json.dumps(coco_rows({"b": [2]}, ids)))
    found, truth = paired_people(write_pose_folder(tmp_path / "found", PEOPLE), tmp_path / "true.json")
    assert [len(people) for people in found] == [len(people) for people in truth] == [1, 2, 0]
    found, truth = paired_people(tmp_path / "found.json", tmp_path / "ids.json")
    assert [len(people) for people in found] == [1, 0, 0] and [len(people) for people in truth] == [2, 0, 1]
    np.testing.assert_allclose(found[0][0].keypoints, points(2), atol=1e-5)


def test_pose_refusals(tmp_path, capsys):
    truth = write_pose_folder(tmp_path / "true", PEOPLE)
    fewer = write_pose_folder(tmp_path / "fewer", {"a": [1], "d": [2]})
    assert "fewer has 2 pictures" in (line := refused(capsys, "pose", fewer, truth)) and "b, c, d" in line
    (tmp_path / "empty").mkdir()
    assert "empty holds no key points" in refused(capsys, "pose", tmp_path / "empty", truth)
    assert "nowhere does not exist" in refused(capsys, "pose", truth, tmp_path / "nowhere")
    larger = write_pose_folder(tmp_path / "larger", PEOPLE, (512, 512))
    assert "found on 512x512 pixels, true ones on 256x256" in refused(capsys, "pose", larger, truth)
    broken = points(1) * np.nan
    np.savez(fewer / "a.npz", keypoints=broken[None], score=np.ones(1))
    assert "a.npz: person 1: key points" in refused(capsys, "pose", fewer, truth)
    (tmp_path / "found.json").write_text('[{"keypoints": [1, 2], "image_id": 3, "score": 1}]')
    assert "found.json is not COCO's key points: 2 numbers" in refused(capsys, "pose", tmp_path / "found.json", truth)
    (tmp_path / "found.json").write_text('{"people": []}')
    assert "not COCO's key points: no 'images'" in refused(capsys, "pose", tmp_path / "found.json", truth)


def test_distances_refuse_before_they_compute(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path / "cache"))
    three, one = pictures(tmp_path / "three", 3), pictures(tmp_path / "one", 1)
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures" in refused(capsys, "fid", three, tmp_path / "empty")
    assert "nowhere: no such folder of pictures" in refused(capsys, "kid", tmp_path / "nowhere", three)
    assert "one holds one picture" in refused(capsys, "fid", three, one)
    assert "KID: 100 subsets of 4; choose at least 1 of 2 to 3" in refused(capsys, "kid", three, three, "--size", 4)
    assert "fetch it once with: python -m fairhuman_jax.evaluate fetch" in refused(capsys, "fid", three, three)


def test_captions(tmp_path):
    paths = list_pictures(pictures(tmp_path / "p", 2))
    forms = {
        "a.txt": "one\n two words \n\n",
        "a.json": json.dumps({"0.png": "one", "1": "two words", "2.png": "more"}),
        "a.jsonl": '{"image": "x/1.jpg", "text_english": ["two words"]}\n\n{"image": "0", "text_english": "one"}\n',
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert captions_for(paths, tmp_path / name) == ["one", "two words"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "one\n", "a.txt has 1 captions for 2 pictures"),
        ("a.json", '{"0.png": "one", "1.png": 3}', r"no caption for 1 of 2 pictures \(1\.png\)"),
        ("a.jsonl", '{"image": "0.png"}', "a.jsonl, line 1: needs an object with image and text_english"),
        ("a.csv", "one", "captions are read from .txt, .json and .jsonl"),
    ],
)
def test_bad_captions(tmp_path, name, text, message):
    paths = list_pictures(pictures(tmp_path / "p", 2))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        captions_for(paths, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="expected captions"):
        captions_for(paths, tmp_path / "none.txt")
