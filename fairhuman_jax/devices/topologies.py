"""Accelerators that programs are compiled for and that need not be at hand: TPU slices and NVIDIA GPUs by name.

A TPU slice is described by libtpu itself. XLA compiles for a GPU from what the driver would say of it; those facts
(SXM boards) are those of XLA's own descriptions, openxla/xla xla/backends/gpu/target_config/specs/.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

TPU_FORMS = "v5e:4x4 or v6e:8x8 (two sides), v4:2x2x1, v5p:4x4x4 or tpu7x:2x2x1 (three sides)"
# GiB that programs may use, by device kind: what the compiler of libtpu 0.0.51 says when it refuses one.
TPU_MEMORY = {
    "TPU v2": 7.48,
    "TPU v3": 15.48,
    "TPU v4": 30.75,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.73,
    "TPU v6 lite": 31.24,
    "TPU7x": 94.74,
}
# No chip is touched: another process may hold them, no metadata server need be asked, and no worker is named.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # of this host; the topology compiled for is another matter
}
_GPU_NAME = re.compile(r"(?:([1-9]\d*)x)?([1-9]\d*)")


@dataclass(frozen=True)
class Gpu:
    """What XLA asks of a GPU: its memory in bytes, bytes a second to it, compute capability, clock in GHz,
    multiprocessors with their float32 lanes, and bytes of level-2 cache and of shared memory (a multiprocessor's, and
    the most a block may have).
    """

    kind: str
    memory: int
    bandwidth: int
    capability: str
    cores: int
    lanes: int
    clock: float
    cache: int
    shared: tuple[int, int]

    def description(self) -> str:
        """The text of XLA's `GpuTargetConfigProto`."""
        major, minor = self.capability.split(".")
        per_core, per_block = self.shared
        return f"""
            platform_name: "CUDA" device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
            gpu_device_info {{
                cuda_compute_capability {{ major: {major} minor: {minor} }}
                device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache}
                core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
                shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
                shared_memory_per_block: 49152
                threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
                block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
                registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
        """


A100 = partial(Gpu, capability="8.0", cores=108, lanes=64, clock=1.41, cache=41_943_040, shared=(167_936, 166_912))
HOPPER = partial(Gpu, capability="9.0", cores=132, lanes=128, clock=1.98, cache=52_428_800, shared=(233_472, 232_448))
GPUS = {
    "a100-40gb": A100("NVIDIA A100-SXM4-40GB", 42_331_013_120, 1_555_200_000_000),
    "a100-80gb": A100("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000),
    "h100": HOPPER("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": HOPPER("NVIDIA H200", 151_397_597_184, 4_800_000_000_000),
    "b200": Gpu(
        "NVIDIA B200", 191_514_411_008, 7_672_320_000_000, "10.0", 148, 128, 1.965, 132_644_864, (233_472, 232_448)
    ),
}
JAX_SHARE, GPU_SHARE = 0.75, 0.95  # of a GPU's memory: what JAX takes by itself, and what it can be given
GPU_FORMS = f"h100:8 or, on two hosts, h100:2x8 (GPUs: {', '.join(GPUS)})"


def topology_devices(topology: str) -> list[Any]:
    """The devices of "v5p:4x4x4", "h100:8" and the like, which can be compiled for and nothing else.

    They join no backend: where none is chosen yet, JAX is told to take the CPU, so that no accelerator of this machine
    is touched. Raises: ValueError, one line each: libtpu or JAX's CUDA plugin is missing; a topology that does not
    exist.
    """
    if not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")
    name, _, size = topology.partition(":")
    return _gpus(topology, GPUS[name], size) if name in GPUS else _tpus(topology)


def has_cuda_plugin() -> bool:
    """Whether programs for GPUs can be compiled here."""
    return importlib.util.find_spec("jax_cuda12_plugin") is not None


def memory_of(kind: str) -> int | None:
    """Bytes of a device's memory that programs may use; None of a kind that is not known.

    Of a GPU's, 95 %: the rest is left to the driver and the libraries, whose scratch space no compiler knows.
    """
    if kind in TPU_MEMORY:
        return round(TPU_MEMORY[kind] * 2**30)
    return next((int(GPU_SHARE * gpu.memory) for gpu in GPUS.values() if gpu.kind == kind), None)


def memory_setting(kind: str, peak: int) -> str:
    """What has to be set for a program to get `peak` bytes: JAX takes 75 % of a GPU's memory where nothing is said."""
    usable = memory_of(kind)
    enough = usable is None or kind in TPU_MEMORY or peak <= JAX_SHARE / GPU_SHARE * usable
    return "" if enough else f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}"


def compiler_options(platform: str) -> dict[str, Any]:
    """What the compiler has to be told where no device is at hand.

    Nothing measures which of XLA's own kernels for a product is fast, and of those for an A100 some fail (XLA of jax
    0.10); so products are left to cuBLAS.
    """
    return {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else {}


def _tpus(topology: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for TPUs needs libtpu: pip install 'fairhuman_jax[tpu-aot]'")
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}  # else two devices a chip
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{topology!r} is no TPU topology ({reason}); write it as {TPU_FORMS}, or as {GPU_FORMS}"
        ) from error


def _gpus(topology: str, gpu: Gpu, size: str) -> list[Any]:
    found = _GPU_NAME.fullmatch(size)
    if found is None:
        raise ValueError(f"{topology!r} names no number of GPUs; write it as {GPU_FORMS}")
    if not has_cuda_plugin():
        raise ValueError("compiling for GPUs needs JAX's CUDA plugin: pip install 'fairhuman_jax[cuda]'")
    from jax.experimental import topologies

    shape = f"1x{found[1] or 1}x{found[2]}"
    try:
        described = topologies.get_topology_desc(platform="cuda", target_config=gpu.description(), topology=shape)
    except NotImplementedError as error:
        raise ValueError(
            "JAX has started, found no GPU and dropped its CUDA plugin, which compiling for GPUs needs: set "
            "JAX_PLATFORMS=cpu before"
        ) from error
    return list(described.devices)
