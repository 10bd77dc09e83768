"""The check of a data folder: each known fault is found once, and the figures are those of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.data.__main__ import main
from fairhuman_jax.data.check import check_folder, latent_cells
from fairhuman_jax.losses import latent_mask

SIDE = 64


def photo(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mask(rows: slice, columns: slice, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    grey = np.zeros((height, width), np.uint8)
    grey[rows, columns] = 255
    return grey


def write(root: Path, samples: list[dict]) -> Path:
    """Arrays become PNG files named by layer and number; everything else goes into the line as it is."""
    lines = []
    for number, sample in enumerate(samples):
        line = dict(sample)
        for name, value in sample.items():
            if isinstance(value, np.ndarray):
                line[name] = f"{name}_{number}.png"
                Image.fromarray(value).save(root / line[name])
        lines.append(json.dumps({"text_english": f"a person, number {number}"} | line))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def good(seed: int) -> dict:
    """A sample with a face of 16 x 16 pixels and a hand of 4 x 4 that no stride of 8 hits."""
    hand = mask(slice(33, 37), slice(33, 37))
    return {"image": photo(seed), "mask_face": mask(slice(8, 24), slice(8, 24)), "mask_hand": hand}


@pytest.fixture
def faulty(tmp_path):
    whole = slice(None)
    root = write(
        tmp_path,
        [
            good(0),
            {"image": "gone.png"},
            {"image": "cut.png"},
            good(1) | {"mask_face": mask(whole, whole)},
            good(2) | {"mask_hand": mask(slice(0), slice(0))},
            good(3) | {"mask_hand": mask(whole, slice(9), 64, 32)},
            good(4) | {"text_english": "  "},
            good(5) | {"text_english": "word " * 70},
            good(0),
            good(6) | {"mask_face": "nowhere.png", "mask_hand": None},
            {"image": photo(7, 40, 80)},
        ],
    )
    (root / "cut.png").write_bytes((root / "image_0.png").read_bytes()[:4000])
    with (root / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write("{no json\n")
    return root


def test_every_fault_is_reported_once_with_its_line(faulty):
    report = check_folder(faulty, resolution=SIDE, workers=0)
    expected = {
        12: "bad JSON",
        2: "gone.png: no such file",
        3: "cut.png: damaged picture",
        4: "mask_face_3.png: covers 100 % of the picture",
        6: "mask_hand_5.png: 32x64 pixels do not fit image_5.png (64x64)",
        7: "empty caption",
        10: "nowhere.png: no such file",
    }
    assert len(report.problems) == len(expected) and not report.clean
    for line, words in expected.items():
        assert sum(text.startswith(f"{line}: ") and words in text for text in report.problems) == 1, words
    notes = {
        "5: ": "mask_hand_4.png: no region",
        "8: ": "caption of 70 words",
        "11: ": "80x40 pixels, enlarged to 64",
        "lines 1, 9: ": "the same image",
    }
    for start, words in notes.items():
        assert sum(text.startswith(start) and words in text for text in report.notes) == 1, words


def test_figures_of_areas_and_sizes(tmp_path):
    root = write(tmp_path, [good(0), good(1), {"image": photo(2, 64, 128)}, good(3) | {"mask_face": None}])
    text = str(check_folder(root, resolution=SIDE, workers=0))
    assert "0 problems" in text and "4 samples" in text
    assert "face_mask: 2 of 4 samples (50 %)\n  percent of the picture: median 6.25" in text
    assert "hand_mask: 3 of 4 samples (75 %)\n  percent of the picture: median 0.39" in text
    # 4 x 4 pixels are a quarter of a cell, between the pixels that a stride reads
    assert "vanish from latents at 64: 3 with stride masks, 0 with area masks" in text
    assert "vanish from latents at 64: 0 with stride masks, 0 with area masks" in text
    rows = [line.split() for line in text.splitlines() if "#" in line]
    assert ["short", "side", "64", "-", "127", "4", "#" * 30] in rows
    assert ["bucket", "64x64", "3", "#" * 23] in rows


def test_a_region_outside_the_crop_is_counted_apart(tmp_path):
    sample = {"image": photo(0, 64, 128), "mask_face": mask(slice(8, 24), slice(0, 16), 64, 128)}
    text = str(check_folder(write(tmp_path, [sample]), resolution=SIDE, workers=0))
    assert "outside a central square crop: 1" in text and "at 64: 0 with stride" in text


@pytest.mark.parametrize("method", ["stride", "area"])
def test_latent_cells_are_those_of_the_losses(method):
    layer = (np.random.default_rng(0).random((40, 64, 1)) < 0.3).astype(np.uint8)
    expected = np.asarray(latent_mask(layer, 8, method))[..., 0] > 0
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(latent_cells(layer, method), expected)


def test_processes_find_the_same(tmp_path):
    root = write(tmp_path, [good(seed) for seed in range(20)] + [{"image": "gone.png"}])
    assert str(check_folder(root, SIDE, workers=2)) == str(check_folder(root, SIDE, workers=0))


def test_the_command_gives_its_verdict_and_a_picture(tmp_path, faulty, capsys):
    clean = tmp_path / "clean"
    clean.mkdir()
    write(clean, [good(0), good(1)])
    for folder, expected in ((clean, 0), (faulty, 1), (tmp_path / "none", 2)):
        with pytest.raises(SystemExit) as exit_code:
            main(["check", str(folder), "--resolution", "64", "--sheet", str(tmp_path / "sheet.png")])
        assert exit_code.value.code == expected
        output = capsys.readouterr()
    assert output.err.startswith("python -m fairhuman_jax.data: ") and output.err.count("\n") == 1
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = (pixels[..., 0] - pixels[..., 1:].max(-1)) > 60
    assert pixels.shape[1] > 2 * 192 and red.sum() > 500
