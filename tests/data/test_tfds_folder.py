"""The TFDS data set: the folder's samples again, bit for bit, and all of it without TensorFlow."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.data import BadSample, FolderDataset, JointTransform, make_loader
from fairhuman_jax.data.tfds_folder import INFO, TFDSDataset, build_tfds


def write(root: Path, *, every_layer: bool = True, captions: bool = False) -> Path:
    """Pictures of every kind: JPEG turned by 180 and 90 degrees, 16-bit, transparent; masks small, grey, none."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = 6
    noise = [rng.integers(0, 256, (24, 32, 4), np.uint8) for _ in range(6)]
    upside_down = Image.Exif()
    upside_down[274] = 3
    Image.fromarray(noise[0][..., :3]).save(root / "0.jpg", exif=upside_down)
    Image.fromarray(noise[1][..., :3]).save(root / "1.jpg", exif=exif)
    Image.fromarray(noise[2][..., 0].astype(np.uint16) * 257).save(root / "2.png")
    Image.fromarray(noise[3]).save(root / "3.png")
    Image.fromarray(noise[4][..., :3]).save(root / "4.png")
    Image.fromarray(noise[5][..., 0]).save(root / "grey.png")
    Image.fromarray(noise[5][:12, :16, :3]).save(root / "small.png")
    Image.fromarray(noise[5][..., :3].transpose(1, 0, 2).copy()).save(root / "high.jpg")
    lines = [
        {"image": "0.jpg", "mask_face": "grey.png", "mask_hand": "small.png", "conditioning_image": "4.png"},
        {"image": "1.jpg", "mask_face": "high.jpg", "mask_hand": None, "conditioning_image": "high.jpg"},
        {"image": "2.png", "mask_face": "grey.png", "mask_hand": "grey.png", "conditioning_image": "small.png"},
        {"image": "3.png", "mask_hand": "grey.png"},
        {"image": "4.png", "mask_face": "4.png"},
    ]
    for number, line in enumerate(lines):
        line["text_english"] = ["one", "two ä 手"] if captions and number % 2 else f"number {number} ä 手"
    if not every_layer:
        lines = [
            {name: line[name] for name in ("image", "text_english", "mask_hand") if name in line} for line in lines
        ]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


def lengths(captions: list[str]) -> dict[str, np.ndarray]:
    return {"input_ids": np.asarray([[len(text)] for text in captions])}


def assert_same_samples(first, second) -> None:
    assert len(first) == len(second)
    for index in range(len(first)):
        a, b = first[index], second[index]
        assert a.keys() - {"captions"} == b.keys() - {"captions"} and a["caption"] == b["caption"]
        assert a.get("captions", (a["caption"],)) == b.get("captions", (b["caption"],))
        for name in a.keys() - {"caption", "captions"}:
            assert a[name].dtype == b[name].dtype == np.uint8
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{index} {name}")
        assert first.size(index) == second.size(index) == a["image"].shape[:2]


@pytest.mark.parametrize("options", [{}, {"every_layer": False}, {"captions": True}], ids=str)
def test_samples_are_the_folders_bit_for_bit(tmp_path, options):
    folder = write(tmp_path / "folder", **options)
    built, bad = build_tfds(folder, tmp_path / "out")
    assert built == tmp_path / "out" / "fair_human" / "1.0.0" and bad == 0
    data = TFDSDataset(built)
    assert_same_samples(data, FolderDataset(folder))
    assert_same_samples(pickle.loads(pickle.dumps(data)), data)
    with pytest.raises(IndexError, match="sample 5 of 5"):
        data[5]


def test_plain_tfds_reads_it_with_all_five_columns(tmp_path):
    import tensorflow_datasets as tfds

    folder = write(tmp_path / "folder")
    built, _ = build_tfds(folder, tmp_path / "out")
    plain, expected = tfds.builder_from_directory(built).as_data_source("train"), FolderDataset(folder)
    columns = {name: name for name in ("image", "conditioning_image")} | {
        "mask_face": "face_mask",
        "mask_hand": "hand_mask",
    }
    for row, sample in zip(plain, (expected[i] for i in range(5)), strict=True):
        assert set(row) == {"image", "conditioning_image", "text_english", "mask_hand", "mask_face"}
        assert row["text_english"].decode() == sample["caption"]
        for column, name in columns.items():
            scale = 255 if column.startswith("mask") else 1
            np.testing.assert_array_equal(row[column], sample[name] * np.uint8(scale))


def test_the_builder_takes_its_folder_from_manual_dir_too(tmp_path):
    """As `tfds build --manual_dir` hands it over: all columns are there, empty where the folder has none."""
    import tensorflow_datasets as tfds

    from fairhuman_jax.data.tfds_builder import FairHuman

    folder = write(tmp_path / "folder", every_layer=False)
    builder = FairHuman(data_dir=str(tmp_path / "out"), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(folder)))
    data, expected = TFDSDataset(builder.data_dir), FolderDataset(folder)
    for index in range(5):
        sample = data[index]
        assert not sample["face_mask"].any() and not sample["conditioning_image"].any()
        for name in ("image", "hand_mask"):
            np.testing.assert_array_equal(sample[name], expected[index][name])


def test_the_command_needs_no_tensorflow(tmp_path):
    folder = write(tmp_path / "folder")
    code = """
import sys
from fairhuman_jax.data.__main__ import main
from fairhuman_jax.data.tfds_folder import TFDSDataset
try:
    main(["tfds", sys.argv[1], sys.argv[2]])
except SystemExit as end:
    assert end.code == 0, end.code
print(len(TFDSDataset(sys.argv[2] + "/fair_human/1.0.0")[0]))
assert "tensorflow" not in sys.modules
"""
    run = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "1.0.0: written, 0 bad samples left out" in result.stdout and result.stdout.endswith("5\n")


def test_bad_samples_stop_the_building_or_are_left_out(tmp_path):
    folder = write(tmp_path / "folder")
    (folder / "2.png").unlink()
    with pytest.raises(BadSample, match=r"metadata\.jsonl:3: .*2\.png: no such file"):
        build_tfds(folder, tmp_path / "stopped")
    assert not list((tmp_path / "stopped").rglob(INFO))
    built, bad = build_tfds(folder, tmp_path / "skipped", on_error="skip")
    assert bad == 1 and [TFDSDataset(built)[i]["caption"][7] for i in range(4)] == list("0134")
    with pytest.raises(FileExistsError, match="exists; build into another folder"):
        build_tfds(folder, tmp_path / "skipped", on_error="skip")


def test_damaged_and_foreign_folders_are_refused_in_one_line(tmp_path):
    built, _ = build_tfds(write(tmp_path / "folder"), tmp_path / "out")
    (shard,) = built.glob("*.array_record*")
    content = shard.read_bytes()
    for length in (0, 1000, len(content) - 100):
        shard.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"1\.0\.0: its ArrayRecord files are damaged or cut short"):
            TFDSDataset(built)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"no 'validation'; it has .*image.*, train"):
        TFDSDataset(built, split="validation")
    with pytest.raises(FileNotFoundError, match=rf"{INFO}: not found"):
        TFDSDataset(tmp_path)


def test_batches_of_worker_processes_are_the_folders(tmp_path):
    folder = write(tmp_path / "folder")
    built, _ = build_tfds(folder, tmp_path / "out")
    transform = JointTransform((16, 24), "random", 0.5)
    with (
        make_loader(FolderDataset(folder), transform, lengths, 2, 0) as plain,
        make_loader(TFDSDataset(built), transform, lengths, 2, 0, workers=1) as processes,
    ):
        for _ in range(4):
            expected, batch = next(plain), next(processes)
            for name in expected:
                np.testing.assert_array_equal(batch[name], expected[name])
