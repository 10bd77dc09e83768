"""Checkpoints of mmpose: widths from the tensors, dialects, refusals in one line; folders keep running statistics."""

from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest

from fairhuman_jax.models import HigherHRNet, presets
from fairhuman_jax.weights import expected_params, save_model
from fairhuman_jax.weights.keys import leaves
from fairhuman_jax.weights.mmpose import load_mmpose, load_pose_network

torch = pytest.importorskip("torch")

TINY = {
    "joints": 2,
    "stem_channels": 4,
    "widths": [4, 6, 8],
    "bottlenecks": 2,
    "stage_modules": [1, 2],
    "blocks": 2,
    "head_blocks": 2,
}
MODULE = HigherHRNet.from_config(presets.HIGHER_HRNET_W48 | TINY)


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    names = {name: leaf.shape for leaf in leaves(expected_params(MODULE)) for name in leaf.names}
    drawn = {name: torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for name, shape in names.items()}
    return drawn | {"backbone.bn1.num_batches_tracked": torch.tensor(7)}


def save(value, path):
    torch.save(value, path)
    return path


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_network_follows_from_the_tensors(tensors, tmp_path, wrapped):
    path = save({"meta": {"epoch": 3}, "state_dict": tensors} if wrapped else tensors, tmp_path / "x.pth")
    module, variables = load_pose_network(path)
    assert module == MODULE
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected_params(MODULE))
    block = "backbone.stage3.1.branches.2.1"
    norm = variables["batch_stats"]["backbone"]["stage3.1"]["branches.2.1"]["bn2"]
    np.testing.assert_array_equal(norm["mean"], tensors[f"{block}.bn2.running_mean"])
    np.testing.assert_array_equal(norm["var"], tensors[f"{block}.bn2.running_var"])
    kernel = variables["params"]["keypoint_head"]["deconv_layers.0.0.0"]["transposed_kernel"]
    np.testing.assert_array_equal(kernel[0, 2], tensors["keypoint_head.deconv_layers.0.0.0.weight"][:, :, 3, 1])


def test_missing_and_unknown_tensors_are_named_in_one_line(tensors, tmp_path):
    changed = dict(tensors)
    del changed["backbone.bn2.running_var"]
    changed["mask_head.conv.weight"] = torch.zeros(1)
    changed["backbone.conv2.weight"] = torch.zeros(4, 5, 3, 3)
    with pytest.raises(ValueError) as caught:
        load_mmpose(save(changed, tmp_path / "x.pth"))
    message = str(caught.value)
    assert "1 missing (backbone.bn2.running_var)" in message
    assert "1 unknown (mask_head.conv.weight)" in message
    assert "1 of the wrong shape (backbone.conv2.weight [4, 5, 3, 3] for [4, 4, 3, 3])" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="HigherHRNet"):
        load_mmpose(save(tensors, tmp_path / "y.pth"), config=presets.HIGHER_HRNET_W48 | TINY | {"joints": 3})


def test_other_checkpoints_are_refused(tmp_path):
    path = save({"conv.weight": torch.zeros(2, 3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds no keypoint_head.final_layers.1.weight; expected a HigherHRNet"):
        load_pose_network(path)


def test_nothing_in_a_checkpoint_is_run(tensors, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    with pytest.raises(ValueError, match="would run"):
        load_mmpose(save({"state_dict": tensors, "meta": Trap()}, tmp_path / "x.pth"))
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"meta": Trap()}))
    with pytest.raises(ValueError, match="would run"):
        load_mmpose(tmp_path / "y.pth")
    assert not (tmp_path / "ran").exists()


def test_a_folder_keeps_parameters_and_statistics(tensors, tmp_path):
    module, variables = load_mmpose(save(tensors, tmp_path / "x.pth"))
    save_model(module, variables, tmp_path / "ours")
    again, read = load_pose_network(tmp_path / "ours")
    assert again == module
    assert jax.tree.all(jax.tree.map(np.array_equal, read, variables))
    half = load_pose_network(tmp_path / "ours", "bfloat16")
    assert half[0].dtype == jax.numpy.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half[1])} == {jax.numpy.dtype("bfloat16")}
    with pytest.raises(ValueError, match="not those of HigherHRNet"):
        save_model(module, variables["params"], tmp_path / "half")


def test_folders_of_other_networks_are_refused():
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pose_network("missing")
