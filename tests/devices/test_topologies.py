"""topologies: devices that programs are compiled for without being at hand, by name."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_cuda, needs_libtpu
from jax.sharding import PartitionSpec

from fairhuman_jax.devices import topologies as module
from fairhuman_jax.devices.sharding import AXES, make_mesh
from fairhuman_jax.devices.topologies import GPUS, memory_of, memory_setting, topology_devices
from fairhuman_jax.models.attention import attention

GIB = 2**30


def attention_for(topology: str, length: int, width: int = 64) -> str:
    """The traced program of attention inside a mesh of these devices."""
    mesh = make_mesh(devices=topology_devices(topology))
    split = PartitionSpec(AXES)
    x = jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16)
    local = jax.shard_map(lambda q: attention(q, q, q), mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return str(jax.make_jaxpr(local)(x))


@needs_libtpu
def test_attention_inside_a_mesh_of_tpus_takes_their_kernel():
    """Without a TPU at hand; and not the interpreter that stands in for it elsewhere."""
    program = attention_for("v5e:1x1", 1024)
    assert "pallas_call" in program
    assert "interpret=False" in program


@needs_cuda
@pytest.mark.parametrize("name", GPUS)
def test_attention_inside_a_mesh_of_gpus_takes_cudnns_kernel(name, cudnn_to_trace):
    assert "dot_product_attention_fwd" in attention_for(f"{name}:1", 96)
    assert "dot_product_attention_fwd" not in attention_for(f"{name}:1", 77)
    assert "dot_product_attention_fwd" not in attention_for(f"{name}:1", 96, 160)  # jax asks a GPU at hand for these


@needs_cuda
@pytest.mark.parametrize(("topology", "count", "hosts"), [("a100-80gb:1", 1, 1), ("h100:8", 8, 1), ("h200:2x4", 8, 2)])
def test_gpus_by_number_and_host(topology, count, hosts):
    devices = topology_devices(topology)
    assert len(devices) == count
    assert len({device.process_index for device in devices}) == hosts


@needs_cuda
@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_can_be_compiled_for(name):
    (device,) = topology_devices(f"{name}:1")
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=sharding)
    program = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile(module.compiler_options(device.platform))
    assert program.memory_analysis().argument_size_in_bytes == 2 * 1024**2


@pytest.mark.parametrize(
    "topology", ["h100", "h100:", "h100:0", "h100:2x0", "h100:2x2x2", "a100-80gb:-1", "b200:x8", "h100:00"]
)
def test_gpus_without_a_number_are_refused(topology):
    with pytest.raises(ValueError, match=rf"'{topology}' names no number of GPUs; write it as h100:8 or.*h100:2x8"):
        topology_devices(topology)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e-16", "v5e:3x3", "v9:2x2", "v5litepod:4x4", "v5e", "pod", "h100x8", "a100:1"])
def test_topologies_that_do_not_exist_are_refused(topology):
    with pytest.raises(
        ValueError, match=rf"'{topology}' is no TPU topology.*write it as v5e:4x4 or.*v5p:4x4x4.*or as h100:8.*b200"
    ) as error:
        topology_devices(topology)
    assert "\n" not in str(error.value)


@needs_libtpu
def test_v4_has_one_device_a_chip():
    assert len(topology_devices("v4:2x2x1")) == 4


@pytest.mark.parametrize(
    ("topology", "line"),
    [
        ("v5e:2x2", r"compiling for TPUs needs libtpu: pip install 'fairhuman_jax\[tpu-aot\]'"),
        ("h100:8", r"compiling for GPUs needs JAX's CUDA plugin: pip install 'fairhuman_jax\[cuda\]'"),
    ],
)
def test_without_the_compiler_one_line_says_what_to_install(topology, line, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=line):
        topology_devices(topology)


def test_what_must_be_set_for_a_program_to_get_its_memory():
    kind, whole = GPUS["h100"].kind, GPUS["h100"].memory
    assert memory_of(kind) == pytest.approx(0.95 * whole, abs=1)
    assert memory_setting(kind, int(0.74 * whole)) == ""
    assert memory_setting(kind, int(0.76 * whole)) == "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    assert memory_setting("TPU v5 lite", 15 * GIB) == ""
    assert memory_setting("a kind of its own", 10**12) == ""
    assert memory_of("a kind of its own") is None
