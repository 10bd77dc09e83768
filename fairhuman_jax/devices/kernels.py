"""What all doors do: keep compiled programs, make the most of CPUs."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from platformdirs import user_cache_dir

CPU_DEVICES = "xla_force_host_platform_device_count"
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
YNNPACK_BFLOAT16 = ",".join(f"LIBRARY_FUSION_TYPE_{part}" for part in ("INDIVIDUAL_DOT", "DOT", "REDUCE"))
LEFT_OUT_PASSES = "xla_disable_hlo_passes"


def keep_compiled_programs() -> None:
    """A second start finds its compiled programs in the user's cache folder."""
    jax.config.update("jax_compilation_cache_dir", str(Path(user_cache_dir("fairhuman_jax")) / "xla"))


def choose_cpu_kernels(dtype: str = "float32") -> None:
    """What jax 0.10 leaves to YNNPACK on CPUs, by the dtype of the computation; before anything uses a device.

    XLA's own convolutions and products are faster at the sizes of a UNet (docs/benchmarks.md), except in bfloat16, for
    whose products it has no fast code (`models/products.py`). Where the CPU is split into several devices all is left
    to YNNPACK: programs of XLA's own kernels that run side by side in one process can damage each other's results
    (docs/porting_notes.md, 11). In bfloat16 nothing is moved out of loops either: what XLA moves there are float32
    copies of whole stacks of weights. An XLA_FLAGS that sets an option is obeyed; other versions of jaxlib are left
    alone, since one that does not know it would end the process.
    """
    if not version("jaxlib").startswith("0.10."):
        return
    flags, half = os.environ.get("XLA_FLAGS", ""), dtype == "bfloat16"
    split = CPU_DEVICES in flags or getattr(jax.config, "jax_num_cpu_devices", 1) > 1
    wanted = {} if split else {YNNPACK: YNNPACK_BFLOAT16 if half else ""}
    if half:
        wanted[LEFT_OUT_PASSES] = "while-loop-invariant-code-motion"
    added = [f"--{option}={value}" for option, value in wanted.items() if option not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()


def dtype_of(system: Any) -> str:
    """The dtype that a system's configuration computes in; one of somebody's own may not say."""
    return getattr(system, "dtype", "float32")


def split_cpu(devices: int) -> None:
    """Makes the CPU that many devices, before `choose_cpu_kernels`; an XLA_FLAGS that sets it is obeyed.

    Other platforms are not touched.
    """
    if CPU_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
