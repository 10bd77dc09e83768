"""The train step of a configuration compiled for TPUs or GPUs that are not there: memory, arithmetic, communication.

Parameters, state and batch are shapes; the compiler is the TPU's own (libtpu), and so are its refusals, or XLA's for
GPUs (JAX's CUDA plugin), which refuses nothing. Nothing is read but configs, nothing is computed, and one host compiles
for thousands of chips, since all run one program.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fairhuman_jax.commands import table
from fairhuman_jax.contract import Batch, Parts, Phase, Shapes, System
from fairhuman_jax.data.keypoint_transforms import PEOPLE
from fairhuman_jax.data.shards import MANIFEST, ShardedDataset
from fairhuman_jax.devices.sharding import BATCH_SPEC, WHOLE, leaf_specs, make_mesh, named
from fairhuman_jax.devices.topologies import compiler_options, memory_of, memory_setting, topology_devices
from fairhuman_jax.keypoints.poses import JOINTS
from fairhuman_jax.training.combining import init_fair
from fairhuman_jax.training.program_cost import Traffic, collectives, flops
from fairhuman_jax.training.run_config import RunConfig
from fairhuman_jax.training.state import TrainState, init_state
from fairhuman_jax.training.step import optimizers_of, step_of_run

PyTree = Any
GIB = 2**30
_REFUSAL = re.compile(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)")


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One chip's share of a compiled train step; sizes in bytes, `hbm` what programs may use of a chip's memory.

    Of a program that does not fit TPUs the compiler gives `needed` alone, in its own words; `flops` counts products and
    convolutions (training.program_cost), `seconds` is the time of lowering and compiling.
    """

    topology: str
    chips: int
    kind: str
    mesh: tuple[int, int]
    samples: float
    hbm: int | None
    flops: int
    seconds: float
    needed: str | None = None
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    peak: int = 0
    code: int = 0
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.needed is None


def compile_only(config: RunConfig, topology: str, *, encoded: bool = False) -> str:
    """What the train step of `config` needs on each chip of "v5p:4x4x4", "h100:8" or the like, as a table.

    The batch is the global `train.batch_size`, of pictures and captions or encoded as the run would have them;
    `encoded` has latents and text embeddings in any case, so that the step holds the denoiser alone. Raises:
    ValueError, one line each: no compiler for it; a topology that does not exist; a batch that does not divide over it;
    a model whose shapes are not known.
    """
    return describe_report(compile_step(config, topology, encoded=encoded))


def compile_step(config: RunConfig, topology: str, *, encoded: bool = False) -> StepReport:
    """The figures of `compile_only`."""
    devices = topology_devices(topology)
    train = config.train
    mesh = make_mesh(train.fsdp, devices)
    share = len(devices) * train.accumulate
    if train.batch_size % share:
        micro = f" x {train.accumulate} micro-batches" if train.accumulate > 1 else ""
        raise ValueError(
            f"train.batch_size={train.batch_size} does not divide over the {len(devices)} chips of {topology}{micro}; "
            f"make it a multiple of {share}"
        )
    step, arguments = abstract_step(config, mesh, encoded=encoded)
    began = time.monotonic()
    traced = step.trace(*arguments)
    report = StepReport(
        topology=topology,
        chips=len(devices),
        kind=devices[0].device_kind,
        mesh=(mesh.shape["data"], mesh.shape["fsdp"]),
        samples=train.batch_size / len(devices),
        hbm=memory_of(devices[0].device_kind),
        flops=flops(traced.jaxpr),
        seconds=0.0,
    )
    try:
        compiled = traced.lower().compile(compiler_options(devices[0].platform))
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSAL.search(str(error))
        if refused is None:
            raise
        return dataclasses.replace(report, needed=f"{refused[1]}iB", seconds=time.monotonic() - began)
    memory = compiled.memory_analysis()
    fits = report.hbm is None or memory.peak_memory_in_bytes <= report.hbm
    return dataclasses.replace(
        report,
        needed=None if fits else f"{memory.peak_memory_in_bytes / GIB:.2f}GiB",
        seconds=time.monotonic() - began,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        code=memory.generated_code_size_in_bytes,
        traffic=collectives(compiled.as_text()),
    )


def describe_report(report: StepReport) -> str:
    """A report as a heading and an aligned table."""
    data, fsdp = report.mesh
    hbm = "" if report.hbm is None else f" of {report.hbm / GIB:.2f} GiB"
    rows = []
    if report.needed is not None:
        rows.append(("memory", f"does not fit: {report.needed} needed{hbm}"))
    else:
        sizes = ("arguments", "outputs", "temporaries", "code")
        rows += [(name, f"{getattr(report, name) / GIB:.2f} GiB") for name in sizes]
        setting = f", with {advice}" if (advice := memory_setting(report.kind, report.peak)) else ""
        rows.append(("peak", f"{report.peak / GIB:.2f}{hbm or ' GiB'}: fits{setting}"))
    rows.append(("products and convolutions", f"{report.flops / 1e12:.3g} TFLOP a step"))
    for kind, traffic in report.traffic.items():
        rows.append((kind, f"{traffic.count} a step, {traffic.bytes / 2**20:.3g} MiB of results"))
    rows.append(("compiled in", f"{report.seconds:.0f} s"))
    heading = (
        f"{report.topology}: {report.chips} chips ({report.kind}), mesh data {data} x fsdp {fsdp}, "
        f"{report.samples:g} samples a chip"
    )
    return f"{heading}\n{table([{'on each chip': name, '': value} for name, value in rows])}"


# ---- shapes ----------------------------------------------------------------------------------------------------------


def abstract_step(
    config: RunConfig, mesh: jax.sharding.Mesh, *, encoded: bool = False
) -> tuple[Any, tuple[PyTree, PyTree, PyTree]]:
    """The trainer's step for `mesh` and the shapes of its arguments, placed as the trainer places them."""
    train = config.train
    system = config.system.build(shapes=True)
    optimizers = optimizers_of(config, system)
    step = step_of_run(config, system, optimizers, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = system.opened
    trainable, frozen = jax.eval_shape(lambda key, params: system.with_opened(params).init(key), key, params)
    statistics = jax.eval_shape(system.init_statistics, trainable, frozen)
    batch = batch_shapes(system, config, encoded=encoded)
    local = {name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.items()}
    local["position"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    parts = Parts(trainable, statistics, frozen)
    counts = {phase.name: len(_objectives(phase, parts, local, key)) for phase in system.phases}

    def start(trainable: PyTree, statistics: PyTree, key: jax.Array) -> TrainState:
        fair = {phase: init_fair(config.fair, count) for phase, count in counts.items()}
        ema, phases = train.ema_decay is not None, system.phases
        return init_state(trainable, optimizers, key, ema=ema, fair=fair, phases=phases, statistics=statistics)

    state = jax.eval_shape(start, trainable, statistics, key)
    specs = leaf_specs(mesh, frozen) if train.shard_frozen else jax.tree.map(lambda _: WHOLE, frozen)
    return step, (
        jax.tree.map(_placed, state, named(mesh, leaf_specs(mesh, state))),
        jax.tree.map(_placed, frozen, named(mesh, specs)),
        jax.tree.map(lambda leaf: _placed(leaf, NamedSharding(mesh, BATCH_SPEC)), batch),
    )


def batch_shapes(system: System, config: RunConfig, *, encoded: bool = False) -> Shapes:
    """The arrays of one global batch as the trainer's loader makes them; `encoded`: see `compile_only`."""
    stored = _stored(config.data.folder)
    latents = encoded or config.data.cache_latents or "latent_mean" in stored
    return system.reads(offered_shapes(config), latents=latents, text=encoded or "texts" in stored)


def offered_shapes(config: RunConfig) -> Shapes:
    """The arrays of one global batch that the data has for any system."""
    count, side = config.train.batch_size, config.data.resolution
    pixels = (count, side, side)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((*pixels, 3), jnp.uint8),
        "face_mask": ((*pixels, 1), jnp.uint8),
        "hand_mask": ((*pixels, 1), jnp.uint8),
        "time_ids": ((count, 6), jnp.float32),
    }
    if subjects := config.data.subjects:
        objects, shown = (count, subjects.max_objects), subjects.object_resolution
        del shapes["face_mask"], shapes["hand_mask"]
        shapes["object_pixels"] = ((*objects, shown, shown, 3), jnp.uint8)
        shapes["object_masks"] = ((*objects, side, side), jnp.uint8)
        shapes["num_objects"] = ((count,), jnp.int32)
        if config.data.compat:
            del shapes["time_ids"]
    if config.data.keypoints:
        shapes["keypoints"] = ((count, PEOPLE, JOINTS, 3), jnp.float32)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _stored(folder: str | None) -> frozenset[str]:
    """Names in a record of a folder of shards; none of other data, and none where it is not at hand."""
    if folder is None or not (Path(folder) / MANIFEST).is_file():
        return frozenset()
    return frozenset(ShardedDataset(folder)[0])


def _objectives(phase: Phase, parts: Parts, batch: Shapes, key: Any) -> PyTree:
    def losses(parts: Parts, batch: Batch, key: jax.Array) -> PyTree:
        return phase.objectives(phase.predict(parts, batch, key)[0], batch)

    return jax.eval_shape(losses, parts, batch, key)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
