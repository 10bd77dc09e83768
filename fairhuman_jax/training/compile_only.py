"""The train step of a configuration compiled for TPUs or GPUs that are not there: memory, arithmetic, communication.

Parameters, state and batch are shapes; the compiler is the TPU's own (libtpu), and so are its refusals, or XLA's for
GPUs (JAX's CUDA plugin), which refuses nothing. Nothing is read but configs, nothing is computed, and one host compiles
for thousands of chips, since all run one program.
"""

from __future__ import annotations

import dataclasses
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion, numbered
from fairhuman_jax.bases.opening import open_pipeline
from fairhuman_jax.commands import table
from fairhuman_jax.contract import Batch, System
from fairhuman_jax.data.keypoint_transforms import PEOPLE
from fairhuman_jax.data.shards import MANIFEST, ShardedDataset
from fairhuman_jax.devices.sharding import BATCH_SPEC, WHOLE, leaf_specs, make_mesh, named
from fairhuman_jax.devices.topologies import compiler_options, memory_of, memory_setting, topology_devices
from fairhuman_jax.keypoints.poses import JOINTS
from fairhuman_jax.models import CLIPVision
from fairhuman_jax.systems.facediffuser.scene_model import SceneModelConfig
from fairhuman_jax.systems.facediffuser.subject_model import SubjectModelConfig
from fairhuman_jax.systems.facediffuser.subjects import SubjectDiffusion
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.humansd.system import HumanSDConfig
from fairhuman_jax.training.combining import init_fair
from fairhuman_jax.training.program_cost import Traffic, collectives, flops
from fairhuman_jax.training.run_config import RunConfig
from fairhuman_jax.training.state import TrainState, init_state, make_optimizer
from fairhuman_jax.training.step import step_of_run
from fairhuman_jax.weights.shapes import image_encoder_config
from fairhuman_jax.weights.shipped import or_shipped

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
    `encoded` has latents and text embeddings in any case, so that the step holds the denoiser alone.
    Errors, one line each: no compiler for it; a topology that does not exist; a batch that does not divide over it; a
    model whose shapes are not known.
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
    system = abstract_system(config.system)
    optimizer = make_optimizer(config.optimizer, train.steps)
    step = step_of_run(config, system, optimizer, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = system.pipeline.params if isinstance(system, LatentDiffusion) else {}
    trainable, frozen = jax.eval_shape(lambda key, params: _with_params(system, params).init(key), key, params)
    batch = batch_shapes(system, config, encoded=encoded)
    local = {name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.items()}
    local["position"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    count = len(jax.eval_shape(partial(_objectives, system), trainable, frozen, local, key))

    def start(trainable: PyTree, key: jax.Array) -> TrainState:
        fair = init_fair(config.fair, count)
        return init_state(trainable, optimizer, key, ema=train.ema_decay is not None, fair=fair)

    state = jax.eval_shape(start, trainable, key)
    specs = leaf_specs(mesh, frozen) if train.shard_frozen else jax.tree.map(lambda _: WHOLE, frozen)
    return step, (
        jax.tree.map(_placed, state, named(mesh, leaf_specs(mesh, state))),
        jax.tree.map(_placed, frozen, named(mesh, specs)),
        jax.tree.map(lambda leaf: _placed(leaf, NamedSharding(mesh, BATCH_SPEC)), batch),
    )


def abstract_system(config: Any) -> System:
    """The system of a configuration; the base of a latent diffusion model has shapes for parameters.

    Its `vae` is not looked for: another autoencoder for the same base differs in numbers alone. A subject model that
    goes on from another one is read.
    """
    goes_on = isinstance(config, SubjectModelConfig) and config.image_encoder is None
    if goes_on or not isinstance(config, FairHumanConfig | HumanSDConfig | SceneModelConfig | SubjectModelConfig):
        return config.build()
    runtime = {"remat": config.remat, "attention": config.attention}
    stored = config.dtype if isinstance(config, FairHumanConfig) else "float32"  # as `build` opens it
    pipeline = open_pipeline(config.base, shapes_only=True, dtype=stored, **runtime)
    if not isinstance(config, SubjectModelConfig):
        return config.attach(pipeline)
    encoder: Any = config.image_encoder
    if isinstance(encoder, str):
        encoder = image_encoder_config(or_shipped(encoder, "people_identity"))
    return config.attach(pipeline, CLIPVision.from_config(encoder, **runtime), {})


def batch_shapes(system: System, config: RunConfig, *, encoded: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one global batch as the trainer's loader makes them; `encoded`: see `compile_only`."""
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
    if isinstance(system, LatentDiffusion):
        stored = _stored(config.data.folder)
        if system.controlnets or system.adapters or system.pipeline.reads_pose:
            shapes["conditioning_image"] = ((*pixels, 3), jnp.uint8)
        if encoded or config.data.cache_latents or "latent_mean" in stored:
            del shapes["image"]
            latents = ((count, *system.latent_shape(side, side)), jnp.float16)
            shapes |= {"latent_mean": latents, "latent_logvar": latents}
        ids = {
            numbered("input_ids", i): ((count, encoder.to_config()["max_position_embeddings"]), jnp.int32)
            for i, encoder in enumerate(system.pipeline.text_encoders)
        }
        if isinstance(system, SubjectDiffusion):  # whose text is encoded with its subjects, so never beforehand
            shapes["subject_positions"] = ((count, system.slots), jnp.int32)
            shapes["subject_valid"] = ((count, system.slots), jnp.bool_)
        elif encoded or "texts" in stored:
            tokens = {name: jax.ShapeDtypeStruct(*shape) for name, shape in ids.items()}
            hidden, pooled = jax.eval_shape(system.encode_text, system.pipeline.params, tokens)
            ids = {"text_hidden": (hidden.shape, jnp.float16), "text_pooled": (pooled.shape, jnp.float16)}
        shapes |= ids
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _stored(folder: str | None) -> frozenset[str]:
    """Names in a record of a folder of shards; none of other data, and none where it is not at hand."""
    if folder is None or not (Path(folder) / MANIFEST).is_file():
        return frozenset()
    return frozenset(ShardedDataset(folder)[0])


def _with_params(system: System, params: PyTree) -> System:
    """The system with parameters that are traced, as `init` looks at their shapes."""
    if not isinstance(system, LatentDiffusion):
        return system
    pipeline = dataclasses.replace(system.pipeline, params=params)
    return dataclasses.replace(system, pipeline=pipeline)  # pyright: ignore[reportReturnType]


def _objectives(system: System, trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> PyTree:
    return system.objectives(system.predict(trainable, frozen, batch, key), batch)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
