"""Marks for tests that need a compiler of machines that are not there, and code run with flags of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from fairhuman_jax.devices.topologies import has_cuda_plugin

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(not has_cuda_plugin(), reason="JAX's CUDA plugin is not installed")


def printed_on_cpu(code: str, flags: str = "") -> list[str]:
    """The words that `code` prints in a process of its own, on a CPU under these XLA_FLAGS alone."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()
