from __future__ import annotations

import json

import numpy as np
import pytest

from fairhuman_jax.data import FolderDataset, export_folder, overlay
from fairhuman_jax.data.preview import tint


class Drawn:
    """Three noise pictures with masks; the control image is optional."""

    def __init__(self, condition: bool) -> None:
        self.condition = condition

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        sample = {
            "image": rng.integers(0, 256, (18, 24, 3), np.uint8),
            "caption": f'line {index}: "quoted"\nand ü 手',
            "face_mask": rng.integers(0, 2, (18, 24, 1), np.uint8),
            "hand_mask": rng.integers(0, 2, (18, 24, 1), np.uint8),
        }
        if self.condition:
            sample["conditioning_image"] = rng.integers(0, 256, (18, 24, 3), np.uint8)
        return sample


@pytest.mark.parametrize("condition", [False, True])
def test_exported_folder_reads_back_the_same(tmp_path, condition):
    source, seen = Drawn(condition), []
    path = export_folder(source, tmp_path / "out", report=lambda done, count: seen.append((done, count)))
    data = FolderDataset(path.parent, on_error="stop")
    assert len(data) == 3 and data.missing == {} and seen == [(1, 3), (2, 3), (3, 3)]
    for index in range(3):
        expected, found = source[index], data[index]
        assert expected.keys() == found.keys() and expected["caption"] == found["caption"]
        for name in expected.keys() - {"caption"}:
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == np.uint8


def test_count_and_the_reference_layout(tmp_path):
    path = export_folder(Drawn(True), tmp_path, count=2)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    assert set(lines[0]) == {"text_english", "image", "conditioning_image", "mask_hand", "mask_face"}
    assert lines[1]["image"] == "images/000001.png" and lines[1]["mask_face"] == "masks_face/000001.png"
    with pytest.raises(FileExistsError, match=r"metadata\.jsonl: exists"):
        export_folder(Drawn(True), tmp_path)
    with pytest.raises(ValueError, match="holds 3 samples"):
        export_folder(Drawn(True), tmp_path / "more", count=4)


def test_metadata_is_written_last(tmp_path):
    class Failing(Drawn):
        def __getitem__(self, index: int) -> dict:
            if index == 2:
                raise RuntimeError("the renderer stopped")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="the renderer stopped"):
        export_folder(Failing(False), tmp_path)
    assert not (tmp_path / "metadata.jsonl").exists()
    export_folder(Drawn(False), tmp_path)
    assert len(FolderDataset(tmp_path, on_error="stop")) == 3


def test_people_export_through_the_command_line(tmp_path):
    from fairhuman_jax.data.people import PeopleDataset
    from fairhuman_jax.data.people.__main__ import main

    main(["export", str(tmp_path / "people"), "--count", "2", "--size", "48", "--seed", "3"])
    data, source = (
        FolderDataset(tmp_path / "people", on_error="stop"),
        PeopleDataset(size=48, length=2, seed=3),
    )
    assert len(data) == 2
    for index in range(2):
        for name in ("image", "face_mask", "hand_mask"):
            np.testing.assert_array_equal(data[index][name], source[index][name])
        assert data[index]["caption"] == source[index]["caption"]


def test_overlay_tints_regions_only():
    batch = {name: np.stack([Drawn(True)[i][name] for i in range(3)]) for name in Drawn(True)[0] if name != "caption"}
    image, mask = batch["image"][0], batch["face_mask"][0]
    tinted = tint(image, mask, (255, 0, 0))
    np.testing.assert_array_equal(tinted[mask[..., 0] == 0], image[mask[..., 0] == 0])
    inside = image[mask[..., 0] == 1].astype(float)
    np.testing.assert_allclose(tinted[mask[..., 0] == 1], 0.55 * inside + 0.45 * np.array([255, 0, 0]), atol=0.51)
    sheet = overlay(batch, ["short", "a much longer caption that has to be wrapped over several lines", ""], columns=2)
    width = 128 * 48 // 18
    assert sheet.width == 2 * width and sheet.height % 2 == 0 and sheet.height // 2 > 128
    assert overlay({"image": batch["image"]}).height == 128 + 5
    with pytest.raises(ValueError, match="1 captions for 3 images"):
        overlay(batch, ["one"])


def test_overlay_tints_objects_and_sets_their_pictures_beside():
    image = np.full((2, 32, 32, 3), 100, np.uint8)
    masks, pixels = np.zeros((2, 3, 32, 32), np.uint8), np.zeros((2, 3, 8, 8, 3), np.uint8)
    masks[0, 0, :8], masks[0, 1, 8:16] = 1, 1
    pixels[0, :2] = np.array([(10, 20, 30), (40, 50, 60)])[:, None, None]
    sheet = overlay({"image": image, "object_masks": masks, "object_pixels": pixels}, columns=1, tile=32)
    assert sheet.width == 3 * 32  # the batch has no third object
    shown = np.asarray(sheet)
    assert shown[4, 4].tolist() == [170, 55, 55] and shown[12, 4].tolist() == [55, 55, 170]
    assert shown[20, 4].tolist() == [100, 100, 100]
    assert shown[16, 48].tolist() == [10, 20, 30] and shown[16, 80].tolist() == [40, 50, 60]


def test_a_sheet_of_subjects_through_the_command_line(tmp_path, capsys):
    from PIL import Image

    from fairhuman_jax.data.people.__main__ import main

    options = ["--count", "2", "--references", "2", "--size", "24", "--tile", "64", "--pairs", "1"]
    main(["subjects", str(tmp_path / "new" / "sheet.png"), *options])
    assert "2 scenes of 2 people" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        shown = np.asarray(sheet).astype(int)
    assert shown.shape[1] == 6 * 64  # scene, masks, two views of two people
    tinted = shown[:64, 64:128] - shown[:64, :64]
    assert (tinted[..., 0] - tinted[..., 2] > 40).any() and (tinted[..., 2] - tinted[..., 0] > 40).any()
    assert all(np.ptp(shown[:64, 64 * k : 64 * k + 64]) > 50 for k in range(2, 6))
