from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.data import BadSample, FolderDataset
from fairhuman_jax.data.pictures import read_image, read_mask


def write(root: Path, lines: list[dict | str], files: dict[str, np.ndarray]) -> Path:
    for name, pixels in files.items():
        Image.fromarray(pixels).save(root / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    return root


def photo(seed: int, height: int = 12, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_reads_image_caption_masks_and_condition(tmp_path):
    grey = np.zeros((12, 20), np.uint8)
    grey[2:5, 3:9] = 128
    grey[8:, :] = 127
    line = {
        "text_english": "two hands, ä 手",
        "image": "a.png",
        "mask_face": "f.png",
        "mask_hand": "h.png",
        "conditioning_image": "c.png",
    }
    files = {"a.png": photo(0), "f.png": grey, "h.png": np.repeat(grey[..., None], 3, -1), "c.png": photo(1)}
    data = FolderDataset(write(tmp_path, [line, ""], files))
    sample = data[0]
    assert len(data) == 1 and data.bad == 0 and data.missing == {}
    np.testing.assert_array_equal(sample["image"], photo(0))
    np.testing.assert_array_equal(sample["conditioning_image"], photo(1))
    for name in ("face_mask", "hand_mask"):
        assert sample[name].shape == (12, 20, 1) and sample[name].dtype == np.uint8
        np.testing.assert_array_equal(sample[name][..., 0], grey == 128)
    assert sample["caption"] == "two hands, ä 手"
    with pytest.raises(IndexError, match="sample 1 of 1"):
        data[1]


def test_masks_are_absent_or_empty(tmp_path):
    files = {"a.png": photo(0), "m.png": np.full((12, 20), 255, np.uint8)}
    lines = [
        {"text_english": "x", "image": "a.png", "mask_hand": "m.png"},
        {"text_english": ["y", "z"], "image": "a.png"},
        {"text_english": "w", "image": "a.png", "mask_hand": None},
    ]
    data = FolderDataset(write(tmp_path, lines, files))
    assert [data[i]["hand_mask"].sum() for i in range(3)] == [240, 0, 0]
    assert all("face_mask" not in data[i] and "conditioning_image" not in data[i] for i in range(3))
    assert data.missing == {"mask_hand": 2}
    assert data[1]["caption"] == "y" and data[1]["captions"] == ("y", "z")


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    base = photo(3)
    grey = base[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    alpha = np.full((12, 20, 1), 255, np.uint8)
    alpha[:6] = 0
    Image.fromarray(np.concatenate([base, alpha], -1)).save(tmp_path / "rgba.png")
    colours = (base // 128 * 255).astype(np.uint8)
    Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(base).save(tmp_path / "turned.png", exif=exif)

    for name in ("grey.png", "sixteen.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat(grey[..., None], 3, -1))
    laid = read_image(tmp_path / "rgba.png")
    assert (laid[:6] == 255).all()
    np.testing.assert_array_equal(laid[6:], base[6:])
    assert read_mask(tmp_path / "rgba.png")[:6].sum() == 0
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), colours)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(base, -1))


def broken_folder(root: Path) -> Path:
    lines: list[dict | str] = [
        {"text_english": "good 0", "image": "a.png"},
        {"text_english": "no file", "image": "gone.png"},
        "{not json",
        {"text_english": "cut off", "image": "cut.jpg"},
        {"image": "a.png"},
        {"text_english": "good 5", "image": "b.png"},
        {"text_english": "not a picture", "image": "metadata.jsonl"},
    ]
    write(root, lines, {"a.png": photo(0), "b.png": photo(1), "whole.jpg": photo(2, 200, 200)})
    (root / "cut.jpg").write_bytes((root / "whole.jpg").read_bytes()[:4000])
    return root


def test_bad_samples_are_replaced_and_counted(tmp_path):
    data = FolderDataset(broken_folder(tmp_path))
    assert len(data) == 5 and data.bad == 2
    captions = [data[i]["caption"] for i in range(5)]
    assert captions == ["good 0", "good 5", "good 5", "good 5", "good 0"]
    assert data.bad == 5
    data[1]
    assert data.bad == 5
    lines = "\n".join(data.bad_lines())
    for number, words in ((2, "gone.png: no such file"), (3, "bad JSON"), (4, "cut.jpg: damaged picture")):
        assert f"metadata.jsonl:{number}: " in lines and words in lines
    assert "metadata.jsonl:5: 'text_english' must be a string" in lines
    assert "metadata.jsonl:7: " in lines and "not a picture file" in lines


def test_copy_in_another_process_shares_the_count(tmp_path):
    data = FolderDataset(broken_folder(tmp_path))
    copy = pickle.loads(pickle.dumps(data))
    copy[1]
    del copy
    assert data.bad == 4


def test_stop_raises_at_the_first_bad_sample(tmp_path):
    with pytest.raises(BadSample, match=r"metadata.jsonl:3: bad JSON"):
        FolderDataset(broken_folder(tmp_path), on_error="stop")
    lines = [{"text_english": "no file", "image": "gone.png"}, {"text_english": "g", "image": "a.png"}]
    data = FolderDataset(write(tmp_path, lines, {}), on_error="stop")
    with pytest.raises(BadSample, match=r"metadata.jsonl:1: .*gone.png: no such file"):
        data[0]
    assert data[1]["caption"] == "g"


def test_all_samples_bad_is_an_error_and_not_a_loop(tmp_path):
    data = FolderDataset(write(tmp_path, [{"text_english": "a", "image": "x.png"}] * 3, {}))
    with pytest.raises(BadSample, match="none of its 3 samples"):
        data[0]


def test_columns_are_checked_by_name(tmp_path):
    root = write(tmp_path, [{"text": "a", "photo": "a.png", "hands": "a.png"}], {"a.png": photo(0)})
    with pytest.raises(ValueError, match=r"no key 'image' \(image_column\); keys found: hands, photo, text"):
        FolderDataset(root)
    with pytest.raises(ValueError, match=r"no key 'hand' \(hand_mask_column\)"):
        FolderDataset(root, image_column="photo", caption_column="text", hand_mask_column="hand")
    data = FolderDataset(root, image_column="photo", caption_column="text", hand_mask_column="hands")
    assert set(data[0]) == {"image", "caption", "hand_mask"}
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        FolderDataset(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="'skip' or 'stop'"):
        FolderDataset(root, on_error="ignore")


def test_masks_of_another_size_fit_only_in_shape(tmp_path):
    half = np.zeros((6, 10), np.uint8)
    half[:, 5:] = 255
    files = {"a.png": photo(0), "half.png": half, "tall.png": half.T.copy()}
    lines = [
        {"text_english": "fits", "image": "a.png", "mask_face": "half.png"},
        {"text_english": "does not", "image": "a.png", "mask_face": "tall.png"},
    ]
    data = FolderDataset(write(tmp_path, lines, files))
    assert data[0]["face_mask"].shape == (12, 20, 1)
    assert data[0]["face_mask"][:, :9].sum() == 0 and data[0]["face_mask"][:, 11:].all()
    assert data[1]["caption"] == "fits"
    assert "tall.png: 6x10 pixels do not fit a.png (20x12)" in data.bad_lines()[0]
