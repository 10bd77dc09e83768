"""Shards of encoded samples: what was written comes back, what was finished survives, what is stale is not served."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fairhuman_jax.data.loader import make_loader
from fairhuman_jax.data.shards import MANIFEST, ShardedDataset, ShardWriter

EMPTY = {"text_hidden": np.full((3, 4), -1, np.float16), "text_pooled": np.full(5, -1, np.float16)}


def record(number: int, shape: tuple[int, int, int] = (4, 4, 2), captions: int = 1, text: bool = True) -> dict:
    rng = np.random.default_rng(number)
    arrays = {name: rng.normal(size=shape).astype(np.float16) for name in ("latent_mean", "latent_logvar")}
    size = (8 * shape[0], 8 * shape[1])
    arrays |= {name: rng.integers(0, 2, (*size, 1), np.uint8) for name in ("face_mask", "hand_mask")}
    arrays["conditioning_image"] = rng.integers(0, 256, (*size, 3), np.uint8)
    arrays["time_ids"] = np.asarray([number, 0, 0, 0, *size], np.float32)
    if text:
        arrays["text_hidden"] = np.full((captions, 3, 4), number, np.float16) + np.arange(captions)[:, None, None] / 8
        arrays["text_pooled"] = np.full((captions, 5), number, np.float16)
    return arrays | {"captions": tuple(f"caption {number} {i} ä 手" for i in range(captions))}


def names(count: int) -> list[str | None]:
    return [f"key{i:03d}" for i in range(count)]


def write(folder: Path, keys: list[str | None], **options) -> list[str]:
    with ShardWriter(folder, keys, EMPTY, **options) as writer:
        for key in writer.missing:
            writer.write(key, record(int(key[3:]), **({"captions": 2} if key == "key001" else {})))
    return writer.missing


def served(folder: Path) -> list[int]:
    data = ShardedDataset(folder)
    return [int(data[i]["time_ids"][0]) for i in range(len(data))]


def ids(captions: list[str]) -> dict[str, np.ndarray]:
    return {"input_ids": np.asarray([[len(text)] for text in captions])}


def arrays_only(sample: dict, rng: np.random.Generator) -> dict:
    return {name: value for name, value in sample.items() if isinstance(value, np.ndarray)}


def test_records_come_back_as_they_were_in_the_order_of_the_keys(tmp_path):
    keys = names(7)[::-1]
    assert write(tmp_path, keys, shard_bytes=20_000) == keys
    assert len(list(tmp_path.glob("shard-*.array_record"))) > 1
    data = pickle.loads(pickle.dumps(ShardedDataset(tmp_path)))
    assert len(data) == 7 and data.absent == 0 and data.shapes == [(4, 4, 2)] * 7
    for index, number in enumerate(range(6, -1, -1)):
        sample, expected = data[index], record(number, captions=2 if number == 1 else 1)
        assert sample["captions"] == expected["captions"] and sample["caption"] == expected["captions"][0]
        for name in expected.keys() - {"captions", "text_hidden", "text_pooled"}:
            assert sample[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(sample[name], expected[name])
        for i, text in enumerate(sample["texts"]):
            np.testing.assert_array_equal(text["text_hidden"], expected["text_hidden"][i])
            np.testing.assert_array_equal(text["text_pooled"], expected["text_pooled"][i])
        np.testing.assert_array_equal(sample["empty_text"]["text_hidden"], EMPTY["text_hidden"])
    with pytest.raises(IndexError, match="sample 7 of 7"):
        data[7]


def test_only_what_is_new_is_written_and_what_is_gone_is_not_served(tmp_path):
    write(tmp_path, names(5))
    assert write(tmp_path, names(5)) == []
    changed = ["key000", "key007", "key002", None, "key002", "key004"]
    assert write(tmp_path, changed) == ["key007"]
    assert served(tmp_path) == [0, 7, 2, 2, 4]
    assert write(tmp_path, names(5)) == []
    assert served(tmp_path) == [0, 1, 2, 3, 4]


def test_a_killed_writer_leaves_a_readable_folder_and_goes_on(tmp_path):
    folder = tmp_path / "shards"
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_shards import *
with ShardWriter({str(folder)!r}, names(12), EMPTY, shard_bytes=10_000) as writer:
    for key in writer.missing:
        writer.write(key, record(int(key[3:])))
        if key == "key007":
            print("now", flush=True)
            time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = served(folder)
    assert 0 < len(finished) <= 8 and finished == list(range(len(finished)))
    assert ShardedDataset(folder).absent == 12 - len(finished)
    assert write(folder, names(12)) == names(12)[len(finished) :]
    assert served(folder) == list(range(12)) and not list(folder.glob("*.part"))


def test_an_interrupted_writer_keeps_its_last_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, names(5)) as writer:
        writer.write("key000", record(0, text=False))
        raise KeyboardInterrupt
    assert served(tmp_path) == [0]


def test_a_full_disk_is_one_line_and_harms_no_finished_shard(tmp_path):
    """The limit of a file's size stands for the end of the disk: both fail in the library's write."""
    write(tmp_path, names(3))
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_shards import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write(Path({str(tmp_path)!r}), names(400))
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == f"{tmp_path}: cannot write shards (write() failed: File too large); " + (
        "those finished before are whole\n"
    )
    assert served(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_are_dropped_for_each_step_with_cached_text(tmp_path, workers):
    with ShardWriter(tmp_path, names(4), EMPTY) as writer:
        for key in writer.missing:
            writer.write(key, record(int(key[3:]), captions=2))
    data = ShardedDataset(tmp_path)
    with make_loader(data, arrays_only, ids, 4, 0, shuffle=False, workers=workers, caption_dropout=0.4) as loader:
        batches = [next(loader) for _ in range(40)]
    assert all("input_ids" not in batch and batch["text_hidden"].shape == (4, 3, 4) for batch in batches)
    hidden = np.stack([batch["text_hidden"][:, 0, 0] for batch in batches]).astype(float)
    pooled = np.stack([batch["text_pooled"][:, 0] for batch in batches]).astype(float)
    dropped = hidden == -1
    np.testing.assert_array_equal(dropped, pooled == -1)
    assert 0.25 < dropped.mean() < 0.55 and dropped.any(0).all() and not dropped.all(0).any()
    for number in range(4):
        assert set(hidden[~dropped[:, number], number]) == {number, number + 0.125}


def test_without_embeddings_captions_are_tokenized(tmp_path):
    with ShardWriter(tmp_path, names(2)) as writer:
        for key in writer.missing:
            writer.write(key, record(int(key[3:]), text=False))
    with make_loader(ShardedDataset(tmp_path), arrays_only, ids, 2, 0) as loader:
        batch = next(loader)
    assert batch["input_ids"].tolist() == [[len("caption 0 0 ä 手")]] * 2 and "text_hidden" not in batch


def test_damaged_shards_and_foreign_folders_are_refused_in_one_line(tmp_path):
    folder = tmp_path / "shards"
    write(folder, names(3))
    (shard,) = folder.glob("*.array_record")
    content = shard.read_bytes()
    for length in (0, 1000, len(content) - 70_000):
        shard.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"shard-00000\.array_record: damaged or cut short .* encode again"):
            ShardedDataset(folder)
    shard.write_bytes(content[:2000] + bytes(64) + content[2064:])  # within the first record
    with pytest.raises(ValueError, match="damaged"):
        data = ShardedDataset(folder)
        for index in range(3):
            data[index]
    (folder / MANIFEST).write_text('{"format": "another", "keys": []}')
    with pytest.raises(ValueError, match="format 'another'; this version reads"):
        ShardedDataset(folder)
    with pytest.raises(FileNotFoundError, match="not found"):
        ShardedDataset(tmp_path)
    with pytest.raises(FileExistsError, match=f"holds files but no {MANIFEST}"):
        ShardWriter(tmp_path, names(1))
    with ShardWriter(tmp_path / "begun", names(2)), pytest.raises(ValueError, match="none of its 2 samples is encoded"):
        ShardedDataset(tmp_path / "begun")
