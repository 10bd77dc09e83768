"""Eight virtual CPU devices for the whole suite, set before jax starts its backend."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

_FLAG = "--xla_force_host_platform_device_count"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()


@pytest.fixture
def cudnn_to_trace(monkeypatch):
    """cuDNN's attention can be traced, as where cuDNN is installed."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """{name: (Portrait, picture)} of the public-domain portraits; for tests that may use the package index."""
    from fairhuman_jax.data.portraits import PORTRAITS, main

    folder = tmp_path_factory.mktemp("portraits")
    main([str(folder)])
    return {p.name: (p, np.array(Image.open(folder / "images" / f"{p.name}.png"))) for p in PORTRAITS}
