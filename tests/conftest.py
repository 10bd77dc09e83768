"""Eight virtual CPU devices and the doors' CPU kernels for the whole suite; set before jax starts its backend."""

from __future__ import annotations

import os

from fairhuman_jax.doors.common import choose_cpu_kernels

_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
choose_cpu_kernels()  # runs in this process equal those through a door bit for bit
