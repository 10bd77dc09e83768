"""Safetensors files: byte compatibility with the safetensors library, all-or-nothing writes, broken files."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from fairhuman_jax.files import read_json, replacing, write_json
from fairhuman_jax.weights.safetensors_io import TensorFiles, write_tensors


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "a": np.float32(7.0),
        "empty": np.zeros((0, 2), np.float32),
    }


def write(path, tensors, dtype=np.float32, read=None):
    shapes = {name: np.shape(array) for name, array in tensors.items()}
    write_tensors(path, shapes, np.dtype(dtype), read or tensors.__getitem__, {"rank": "4"})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_written_files_are_what_the_library_reads(tmp_path, tensors, dtype):
    write(tmp_path / "x.safetensors", tensors | {"b.weight": tensors["b.weight"].T}, dtype)
    loaded = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(loaded["b.weight"], tensors["b.weight"].T.astype(dtype))
    assert loaded["b.weight"].dtype == dtype
    assert set(loaded) == set(tensors)
    files = TensorFiles([tmp_path / "x.safetensors"])
    assert files.metadata == {"format": "pt", "rank": "4"}
    assert files.shape("b.weight") == (4, 3)
    np.testing.assert_array_equal(files.read("b.weight"), loaded["b.weight"])


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    write(path, tensors)
    before = path.read_bytes()

    def full_disk(name):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"x\.safetensors \(No space left on device\); nothing was replaced"):
        write(path, tensors, read=full_disk)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_values_too_large_for_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"w does not fit into float16: its largest magnitude is 7e\+04"):
        write(tmp_path / "x.safetensors", {"w": np.array([1.0, -7e4], np.float32)}, np.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [4, 40, -3])
def test_truncated_file_is_named_in_one_line(tmp_path, tensors, cut):
    path = tmp_path / "x.safetensors"
    write(path, tensors)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated or not a safetensors file") as error:
        TensorFiles([path])
    assert "\n" not in str(error.value)


def test_json_errors_name_the_file(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"key": [1, None]})
    assert read_json(tmp_path / "deep" / "a.json") == {"key": [1, None]}
    (tmp_path / "b.json").write_text('{"key": ')
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"c\.json must hold a JSON object, found list"):
        read_json(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match=r"d\.json does not exist"):
        read_json(tmp_path / "d.json")


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not write"), replacing(tmp_path / "file" / "x.json") as file:
        file.write(b"x")
