"""Pose networks: checkpoints of mmpose's HigherHRNet, and folders of our own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fairhuman_jax.models import HigherHRNet, presets
from fairhuman_jax.weights.diffusers import params_from
from fairhuman_jax.weights.opening import load_model
from fairhuman_jax.weights.placement import Placement
from fairhuman_jax.weights.shipped import or_shipped
from fairhuman_jax.weights.tensors import Tensors, open_tensors

PyTree = Any
Variables = dict[str, PyTree]
EXPECTED = "expected a HigherHRNet of mmpose, with backbone.* and keypoint_head.*"


def load_pose_network(
    path: str | Path, dtype: jnp.dtype | str | None = None, *, host: bool = False, sharding: Placement = None
) -> tuple[HigherHRNet, Variables]:
    """A pose network and its variables {"params", "batch_stats"}, for `module.apply(variables, images)`.

    path: a folder that `save_model` wrote, a checkpoint of mmpose (see `load_mmpose`), or "people", which ships with
    the package and knows the people world at 64 pixels. dtype, host, sharding: as in `load_model`.
    Raises: ValueError, one line each, as `load_model` and `load_mmpose`; a folder with another network.
    """
    path = or_shipped(path, "people_pose")
    if Path(path).is_file():
        return load_mmpose(path, dtype, host=host, sharding=sharding)
    module, variables = load_model(path, dtype=dtype, host=host, sharding=sharding)
    if not isinstance(module, HigherHRNet):
        raise ValueError(f"{path} is a {type(module).__name__}, not a HigherHRNet")
    return module, variables


def load_mmpose(
    path: str | Path,
    dtype: jnp.dtype | str | None = None,
    *,
    config: dict[str, Any] | None = None,
    host: bool = False,
    sharding: Placement = None,
) -> tuple[HigherHRNet, Variables]:
    """Network and variables {"params", "batch_stats"} of a checkpoint of mmpose (.pth), read without running it.

    Tensors are `backbone.*` and `keypoint_head.*`, or the same under `state_dict`. config: as `HIGHER_HRNET_W48`; None
    takes widths and depths from the tensors, and the normalisation of pictures from that preset. Raises: ValueError,
    one line each: no such file; a pickle that would run something; no HigherHRNet; tensors missing, unknown or of the
    wrong shape, all of them in one. Source: mmpose 0.29.0, models/backbones/hrnet.py and
    models/heads/ae_higher_resolution_head.py.
    """
    tensors = open_tensors(Path(path))
    runtime = {} if dtype is None else {"dtype": jnp.dtype(dtype)}
    module = HigherHRNet.from_config(_config_of(tensors) if config is None else config, **runtime)
    return module, params_from(tensors, module, dtype, host=host, sharding=sharding)


def _config_of(tensors: Tensors) -> dict[str, Any]:
    """Widths and depths by the shapes and numbers of the tensors."""
    stages = _count(tensors, r"backbone\.stage(\d+)\.")
    last = f"backbone.stage{stages + 1}.0.branches"
    branches = range(_count(tensors, re.escape(last) + r"\.(\d+)\."))
    return presets.HIGHER_HRNET_W48 | {
        "joints": _width(tensors, "keypoint_head.final_layers.1.weight"),
        "stem_channels": _width(tensors, "backbone.conv1.weight"),
        "widths": [_width(tensors, f"{last}.{i}.0.conv1.weight") for i in branches],
        "bottlenecks": _count(tensors, r"backbone\.layer1\.(\d+)\."),
        "stage_modules": [_count(tensors, rf"backbone\.stage{i + 2}\.(\d+)\.") for i in range(stages)],
        "blocks": _count(tensors, re.escape(last) + r"\.0\.(\d+)\."),
        "head_blocks": _count(tensors, r"keypoint_head\.deconv_layers\.0\.([1-9]\d*)\.0\."),
    }


def _count(tensors: Tensors, pattern: str) -> int:
    """Number of different numbers where the pattern has its group."""
    found = (re.match(pattern, name) for name in tensors.names())
    return len({match[1] for match in found if match})


def _width(tensors: Tensors, name: str) -> int:
    """Output channels of a convolution."""
    if name not in tensors.names():
        raise ValueError(f"{tensors.label} holds no {name}; {EXPECTED}")
    return tensors.shape(name)[0]
