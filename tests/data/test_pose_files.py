"""Laion-Human and Human-Art as published: mapping files, npz poses with their pickles, parquet lists; and what is wrong
with them."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_people import COCO

from fairhuman_jax.data import BadSample, make_loader
from fairhuman_jax.data.keypoint_transforms import PoseTransform
from fairhuman_jax.data.pose_files import MappingDataset, read_url_list

HIGH, WIDE = 36, 48


def people(count: int, seed: int = 0) -> np.ndarray:
    """Joints of some people all over the picture, float32 [count, 17, 3]."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((0, 0, 0.1), (WIDE - 1, HIGH - 1, 1), (count, 17, 3))
    return points.astype(np.float32)


def write_poses(path: Path, joints: np.ndarray) -> None:
    """As HumanSD's estimator writes them: one array of dicts, which numpy pickles."""
    rows = [{"keypoints": p, "score": np.float32(p[:, 2].mean()), "area": np.float32(1.0)} for p in joints]
    array = np.empty(len(rows), object)
    array[:] = rows
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, array)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HIGH, WIDE, 3), np.uint8))


def write(root: Path, count: int = 3, file: str = "mapping_file_training.json", sub: str = "") -> Path:
    """A mapping file as of Human-Art with pictures in two styles; sample i shows i people. The ids do not sort."""
    mapping = {}
    for i in range(count):
        style = ("real_human/dance", "2D_virtual_human/sketch")[i % 2]
        image, poses = f"images/{style}/{i:03d}.png", f"pose/{style}/{i:03d}.npz"
        (root / sub / image).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root / sub / image)
        write_poses(root / sub / poses, people(i, i))
        mapping[f"{'zxya'[i % 4]}{i}"] = {"img_path": image, "prompt": f"a dance, {i} people", "pose_path": poses}
    (root / file).write_text(json.dumps(mapping))
    return root / file


def change(file: Path, **entries) -> Path:
    """Replaces or adds entries of a mapping file; None deletes."""
    mapping = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in mapping.items() if value is not None}))
    return file


def test_samples_are_images_captions_and_joints_in_the_files_order(tmp_path):
    data = MappingDataset(write(tmp_path), on_error="stop")
    assert len(data) == 3 and [data.line(i) for i in range(3)] == ["z0", "x1", "y2"] and data.bad == 0
    for i in range(3):
        sample = data[i]
        assert sample.keys() == {"image", "caption", "keypoints"}
        np.testing.assert_array_equal(sample["image"], np.asarray(picture(i)))
        assert sample["caption"] == f"a dance, {i} people"
        points = sample["keypoints"]["coco17"]
        assert points.shape == (i, 17, 3) and points.dtype == np.float32
        np.testing.assert_allclose(points, people(i, i) + np.float32([0.5, 0.5, 0]), rtol=1e-6)
        assert data.size(i) == (HIGH, WIDE)
    assert [data.style(i) for i in range(3)] == ["dance", "sketch", "dance"]
    with pytest.raises(IndexError, match="sample 3 of 3"):
        data[3]
    copy = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(copy[1]["image"], data[1]["image"])
    assert "samples=3" in repr(copy) and data.digest(1) != data.digest(2) and len(data.files(0)) == 2


def test_paths_start_from_the_files_folder_or_one_above(tmp_path):
    """Published files give paths from their own folder or from that of all data sets."""
    inner = tmp_path / "HumanArt"
    inner.mkdir()
    file = write(tmp_path)
    moved = inner / file.name
    file.rename(moved)
    assert MappingDataset(moved).root == tmp_path and MappingDataset(moved)[0]["image"].shape == (HIGH, WIDE, 3)
    write(tmp_path, sub="elsewhere")
    assert MappingDataset(file, base=tmp_path / "elsewhere").root == tmp_path / "elsewhere"


def test_a_file_without_its_pictures_is_one_clear_line(tmp_path):
    file = tmp_path / "mapping.json"
    file.write_text(json.dumps({"a": {"img_path": "images/a.jpg", "prompt": "", "pose_path": "pose/a.npz"}}))
    with pytest.raises(FileNotFoundError, match=r"none of 1 of its images, as images/a.jpg, lies under .* or above"):
        MappingDataset(file)
    with pytest.raises(FileNotFoundError, match=r"nowhere.json: not found; a mapping file is one JSON object"):
        MappingDataset(tmp_path / "nowhere.json")
    for text, words in (
        ("{not json", "no JSON"),
        ("[1, 2]", "one JSON object, found a list"),
        ("{}", "no usable entry"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words) as error:
            MappingDataset(file)
        assert "\n" not in str(error.value) and str(file) in str(error.value)
    with pytest.raises(ValueError, match="'skip' or 'stop'"):
        MappingDataset(file, on_error="ignore")


BROKEN = {
    "x1": ({"img_path": "images/real_human/dance/000.png", "prompt": "no pose"}, "needs a string for 'pose_path'"),
    "list": ([1, 2], "needs an object with img_path, pose_path, prompt"),
    "number": ({"img_path": 3, "prompt": None, "pose_path": "p"}, "needs a string for 'img_path', 'prompt'"),
    "empty": ({}, "it has nothing"),
}


def test_entries_that_lack_something_are_counted_and_skipped(tmp_path):
    file = change(write(tmp_path), **{key: entry for key, (entry, _) in BROKEN.items()})
    data = MappingDataset(file)
    assert len(data) == 2 and data.bad == 4 and [data.line(i) for i in range(2)] == ["z0", "y2"]
    for key, (_, words) in BROKEN.items():
        (line,) = [line for line in data.bad_lines() if f"{file}:{key}: " in line]
        assert words in line
    with pytest.raises(BadSample, match=r"json:x1: needs a string for 'pose_path'; it has img_path, prompt"):
        MappingDataset(file, on_error="stop")
    blank = change(file, **dict.fromkeys(BROKEN), z0=json.loads(file.read_text())["z0"] | {"prompt": ""})
    assert MappingDataset(blank, on_error="stop")[0]["caption"] == ""


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damage(root: Path) -> dict[str, str]:
    """Makes samples 1 to 6 of a mapping file of eight unusable, each in another way; id -> what is said of it."""
    files = {i: next(root.glob(f"pose/*/*/{i:03d}.npz")) for i in range(8)}
    images = {i: next(root.glob(f"images/*/*/{i:03d}.png")) for i in range(8)}
    images[1].unlink()
    files[2].unlink()
    images[3].write_bytes(images[3].read_bytes()[:1500])
    files[4].write_bytes(b"no zip")
    trap = np.empty(1, object)
    trap[0] = Trap(root / "pwned")
    np.savez(files[5], trap)
    write_poses(files[6], np.zeros((1, 16, 3), np.float32))
    return {
        "x1": "001.png: no such file",
        "y2": "002.npz: no such file",
        "a3": "003.png: damaged picture",
        "z4": "no npz file",
        "x5": "not loaded",
        "y6": "person 1: key points [16, 3]",
    }


def test_unusable_samples_are_replaced_named_and_run_nothing(tmp_path):
    file = write(tmp_path, 8)
    said = damage(tmp_path)
    data = MappingDataset(file)
    assert [data[i]["caption"][9] for i in range(8)] == ["0", *"7777777"]
    assert data.bad == 6 and not (tmp_path / "pwned").exists()
    for key, words in said.items():
        (line,) = [line for line in data.bad_lines() if f"{file}:{key}: " in line]
        assert words in line, line
    strict = MappingDataset(file, on_error="stop")
    for i, key in enumerate(said, start=1):
        with pytest.raises(BadSample, match=rf"json:{key}: ") as error:
            strict[i]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["grey", "rgba", "sixteen", "palette", "turned"])
def test_every_kind_of_picture_is_upright_rgb_of_the_joints_size(tmp_path, kind):
    file = write(tmp_path)
    path = tmp_path / "images/real_human/dance/002.png"
    whole = np.asarray(picture(2))
    grey = whole[..., 0]
    if kind == "grey":
        expected = np.repeat(grey[..., None], 3, -1)
        Image.fromarray(grey).save(path)
    elif kind == "rgba":
        expected = np.where(np.arange(WIDE)[None, :, None] < 9, np.uint8(255), whole)
        alpha = np.where(np.arange(WIDE) < 9, 0, 255).astype(np.uint8) * np.ones((HIGH, 1), np.uint8)
        Image.fromarray(np.dstack([whole, alpha])).save(path)
    elif kind == "sixteen":
        expected = np.repeat(grey[..., None], 3, -1)
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "palette":
        expected = (whole // 128 * 255).astype(np.uint8)
        Image.fromarray(expected).convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    else:  # joints are those of the picture as it is shown
        expected, exif = whole, Image.Exif()
        exif[274] = 6
        Image.fromarray(np.rot90(whole)).save(path, exif=exif)
    data = MappingDataset(file, on_error="stop")
    sample = data[2]
    np.testing.assert_array_equal(sample["image"], expected)
    assert data.size(2) == (HIGH, WIDE)
    out = PoseTransform(32)(sample, np.random.default_rng(0))
    assert out["image"].shape == out["conditioning_image"].shape == (32, 32, 3)
    x, y, _ = out["keypoints"][0].T
    there = x >= 0
    assert (
        there.sum() > 8 and out["conditioning_image"][y[there].astype(int), x[there].astype(int)].any(-1).mean() > 0.8
    )


def test_nobody_thirty_people_and_joints_outside_make_batches(tmp_path):
    file = write(tmp_path, 4)
    for i, joints in enumerate([np.zeros((0, 17, 3)), people(30), people(1) + np.float32([500, 0, 0]), people(2)]):
        write_poses(next(tmp_path.glob(f"pose/*/*/{i:03d}.npz")), joints.astype(np.float32))
    data = MappingDataset(file, on_error="stop")
    assert [len(data[i]["keypoints"]["coco17"]) for i in range(4)] == [0, 30, 1, 2]

    def tokenize(captions):
        return {"input_ids": np.array([[len(caption)] for caption in captions], np.int32)}

    with make_loader(data, PoseTransform(32), tokenize, 4, seed=0, shuffle=False) as batches:
        batch = next(batches)
    assert batch["keypoints"].shape == (4, 10, 17, 3) and batch["keypoints"].dtype == np.float32
    there = batch["keypoints"][..., 2] > 0
    assert there.any(-1).sum(-1).tolist() == [0, 10, 0, 2]
    assert batch["conditioning_image"].any((1, 2, 3)).tolist() == [False, True, False, True]
    assert (batch["keypoints"][0] == np.array([-1, -1, 0])).all()


def test_a_published_crowd_is_drawn_as_by_the_demonstration(tmp_path):
    """Nine people of whom five are off the canvas, as in the published demo: the four others come."""
    file = write(tmp_path, 1)
    points = np.concatenate([COCO * 0.5, np.full((17, 1), 0.5, np.float32)], axis=1)
    crowd = [points + np.float32([x, 0, 0]) for x in (0, 600, 60, 700, 120, 800, 250, 900, 1000)]
    write_poses(next(tmp_path.glob("pose/*/*/000.npz")), np.array(crowd, np.float32))
    Image.new("RGB", (512, 512)).save(next(tmp_path.glob("images/*/*/000.png")))
    out = PoseTransform(512)(MappingDataset(file)[0], np.random.default_rng(0))
    assert (out["keypoints"][..., 2] > 0).any(-1).tolist() == [True] * 4 + [False] * 6
    np.testing.assert_allclose(out["keypoints"][1, 0], (60 + 128.5, 30.5, 0.5))


def test_url_lists(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"url": ["http://a/1.jpg", "http://b/2.jpg"], "key": ["000000007", "000000012"], "caption": ["x", "y"]}
    parquet.write_table(arrow.table(rows), tmp_path / "00000.parquet")
    assert read_url_list(tmp_path / "00000.parquet") == list(zip(rows["key"], rows["url"], strict=True))
    parquet.write_table(arrow.table({"url": rows["url"]}), tmp_path / "short.parquet")
    (tmp_path / "none.parquet").write_bytes(b"no parquet")
    for name in ("short", "none"):
        with pytest.raises(ValueError, match=rf"{name}.parquet: no parquet list with the columns key and url") as error:
            read_url_list(tmp_path / f"{name}.parquet")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="not found; a parquet list has"):
        read_url_list(tmp_path / "gone.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'fairhuman_jax\[parquet\]'"):
        read_url_list(tmp_path / "00000.parquet")
