"""Torch checkpoints without torch: every dtype and layout, what else a checkpoint holds, and what is refused."""

from __future__ import annotations

import argparse
import collections
import pathlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fairhuman_jax.weights.pickles import LazyTensor, TorchPickle, load_pickle
from fairhuman_jax.weights.tensors import open_tensors
from fairhuman_jax.weights.unpickling import Inert

torch = pytest.importorskip("torch")

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
ZIP, LEGACY = True, False


def save(value, path, container=ZIP):
    torch.save(value, path, _use_new_zipfile_serialization=container)
    return path


def as_numpy(tensor):
    tensor = tensor.detach()
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.fixture
def tensors():
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    views = {
        "view": base[1:4, 2:7],
        "transposed": base.T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": base[:, :1].expand(6, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
        "buffer": torch.nn.parameter.Buffer(base[2]),
        "uint16": torch.tensor([1, 65535], dtype=torch.int32).to(torch.uint16),
    }
    return {name: (10 * base).to(getattr(torch, name)) for name in DTYPES} | views


@pytest.mark.parametrize("container", [ZIP, LEGACY])
def test_tensors_of_every_kind(tensors, tmp_path, container):
    path = save(collections.OrderedDict(tensors), tmp_path / "x.pt", container)
    files = open_tensors(path)
    assert files.label == str(path)
    assert set(files.names()) == set(tensors)
    for name, tensor in tensors.items():
        expected, found = as_numpy(tensor), files.read(name)
        assert files.shape(name) == found.shape == expected.shape, name
        assert files.dtype(name) == found.dtype, name
        assert found.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(found.astype(expected.dtype), expected, err_msg=name)


def test_tensors_inside_a_pickle_of_python(tensors, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"G": {"a": tensors["view"], "b": tensors["float16"]}}, protocol=4))
    files = TorchPickle(path)
    assert files.names() == ("G.a", "G.b")
    np.testing.assert_array_equal(files.read("G.a"), tensors["view"])
    np.testing.assert_array_equal(files.read("G.b"), tensors["float16"])


def test_foreign_byte_order(tensors, tmp_path):
    """A checkpoint as a big-endian machine writes it: the marker, and every item reversed."""
    held = {name: tensors[name].clone() for name in ("float32", "bfloat16", "int64", "complex64", "bool")}
    path = save(held, tmp_path / "little.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        sizes = {str(i): tensor.element_size() for i, tensor in enumerate(held.values())}
        sizes[str(list(held).index("complex64"))] //= 2
        for info in old.infolist():
            data, key = old.read(info), info.filename.rsplit("/data/")[-1]
            if info.filename.endswith("byteorder"):
                data = b"big"
            elif key in sizes:
                data = np.frombuffer(data, f"u{sizes[key]}").byteswap().tobytes()
            new.writestr(info.filename, data)
    files = TorchPickle(tmp_path / "big.pt")
    for name, tensor in held.items():
        expected = as_numpy(tensor)
        np.testing.assert_array_equal(files.read(name).astype(expected.dtype), expected, err_msg=name)


@pytest.mark.parametrize("container", [ZIP, LEGACY])
def test_what_lightning_leaves_beside_the_weights(tensors, tmp_path, container):
    value = {
        "state_dict": {"a": tensors["view"]},
        "optimizer_states": [{"state": {0: {"exp_avg": tensors["float32"]}}}],
        "epoch": 3,
        "hyper_parameters": argparse.Namespace(lr=0.5, folder=pathlib.PurePosixPath("/data")),
        "array": np.arange(6.0).reshape(2, 3).T,
        "objects": np.array([{"a": 1}, None], dtype=object),
        "scalar": np.float32(2.5),
        "shape": torch.Size([6, 8]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "kinds": {int, float},
        "counts": collections.defaultdict(list, a=[1]),
        "raw": bytearray(b"ab"),
    }
    path = save(value, tmp_path / "x.ckpt", container)
    files = TorchPickle(path)
    assert files.names() == ("a",)
    assert files.metadata["epoch"] == "3"
    loaded = load_pickle(path)
    np.testing.assert_array_equal(loaded["array"], value["array"])
    assert loaded["objects"].tolist() == [{"a": 1}, None]
    assert loaded["scalar"] == 2.5 and loaded["shape"] == (6, 8) and loaded["dtype"] == np.float16
    assert loaded["device"] == "cpu" and loaded["counts"] == {"a": [1]} and loaded["raw"] == b"ab"
    options = loaded["hyper_parameters"]
    assert isinstance(options, Inert) and options.state["lr"] == 0.5
    assert isinstance(loaded["optimizer_states"][0]["state"][0]["exp_avg"], LazyTensor)


def test_objects_of_a_known_other_program(tensors, tmp_path):
    class Recipe:
        def __reduce__(self):
            return argparse.ArgumentParser, ("prog",)  # stands for a constructor that the caller knows

    path = save({"model": Recipe(), "x": tensors["int32"]}, tmp_path / "x.pt")
    assert load_pickle(path, {"argparse.ArgumentParser": lambda name: name.upper()})["model"] == "PROG"


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("container", [ZIP, LEGACY])
@pytest.mark.parametrize(
    "call",
    [
        (__import__("os").system, "touch {}"),
        (eval, "open('{}', 'w')"),
        (getattr, "a", "upper"),
        (subprocess.Popen, ["touch", "{}"]),
        (__import__("builtins").open, "{}", "w"),
    ],
    ids=["os.system", "eval", "getattr", "Popen", "open"],
)
def test_code_is_refused_by_name_and_not_run(tmp_path, call, container):
    trace = tmp_path / "trace"
    function, *arguments = call
    arguments = [
        item.format(trace) if isinstance(item, str) else [part.format(trace) for part in item] for item in arguments
    ]
    path = save(
        {"state_dict": {"a": torch.ones(2)}, "evil": Call(function, *arguments)}, tmp_path / "x.ckpt", container
    )
    with pytest.raises(
        ValueError, match=r"x\.ckpt would run \w+\.\w+; not loaded\. Get the model as \.safetensors"
    ) as error:
        open_tensors(path)
    assert function.__name__ in str(error.value) and "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__defaults__'\n(I1\ntstb.",
            "would change an object of type function",
        ),
        (b"c__builtin__\nbytes\n(I9000000000000\ntR.", "would make bytes of 9000000000000"),
        (b"c_codecs\nencode\n(S'a'\nS'hex'\ntR.", "would run _codecs.encode to 'hex'"),
        (b"S'0'\nQ.", "refers to something outside itself"),
        (b"\x82\x01.", "uses the extension code 1"),
        (b"cnumpy\ndtype\n(S'V8'\ntR.", "holds arrays of type 'V8'"),
        (b"ctyping\nAny.system\n(S'x'\ntR.", "holds no tensors"),
    ],
)
def test_tricks_below_the_level_of_calls(tmp_path, code, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + code)
    with pytest.raises(ValueError, match="x.pkl " + message):
        TorchPickle(path)


def test_strides_outside_the_storage_are_refused(tmp_path):
    path = save({"a": torch.ones(4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info).replace(b"K\x04\x85", b"K\x40\x85"))
    assert load_pickle(path)["a"].shape == (4,)
    with pytest.raises(ValueError, match=r"y\.pt holds a tensor \[64\] that is larger than its storage of 16 bytes"):
        load_pickle(tmp_path / "y.pt")


@pytest.mark.parametrize("container", [ZIP, LEGACY])
@pytest.mark.parametrize("cut", [30, 300, -20])
def test_truncated_checkpoints(tensors, tmp_path, container, cut):
    path = save(tensors, tmp_path / "x.pt", container)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"x\.pt is truncated or no checkpoint of torch") as error:
        open_tensors(path)
    assert "\n" not in str(error.value)


def test_float8_is_refused_by_name(tmp_path):
    path = save({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="tensors of type float8_e4m3fn, which are not read"):
        open_tensors(path)


def test_torch_is_not_imported(tensors, tmp_path):
    for container in (ZIP, LEGACY):
        save({name: tensors[name] for name in ("float32", "bfloat16")}, tmp_path / f"{container}.pt", container)
    code = """
import sys
from pathlib import Path
from fairhuman_jax.weights.tensors import open_tensors
for path in sys.argv[1:]:
    tensors = open_tensors(Path(path))
    assert [tensors.read(name).shape for name in tensors.names()] == [(6, 8)] * 2
assert "torch" not in sys.modules
"""
    paths = [str(path) for path in tmp_path.glob("*.pt")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and len(paths) == 2, done.stderr
