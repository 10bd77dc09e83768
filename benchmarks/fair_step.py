"""What the fair step costs over a plain step: arithmetic by two counts and time, as Markdown tables.

    python benchmarks/fair_step.py                                          # the shipped model's shapes, LoRA
    python benchmarks/fair_step.py --model sdxl-small --trainable lora controlnet
    python benchmarks/fair_step.py --model sdxl --trainable lora controlnet --batch 1 --program-only    # full size

Both steps are the trainer's own (training/step.py) on latents encoded beforehand. "plain" has the global objective
alone: one forward and one backward pass, as any trainer. "fair" has all three, in each of the three ways to pull their
gradients back (FairConfig.gradients). "every 8" is the mean of one fair step and seven that use its weights again.

Counts: "program" is of the products and convolutions of the program as written, loops times their trips
(training.program_cost). "lowered" is XLA's for the same program before its optimisation, all operations, with stacks
unrolled, because XLA counts the body of a loop once; "compiled" is XLA's after optimisation, where it merges some of
what rematerialisation asks it to compute again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.config import load_config
from fairhuman_jax.devices.kernels import choose_cpu_kernels
from fairhuman_jax.devices.sharding import make_mesh
from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition, presets
from fairhuman_jax.systems.fairhuman.system import FairHuman, FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable, ControlNetTrainable, LoraTrainable
from fairhuman_jax.training.combining import GRADIENTS, FairConfig, init_fair
from fairhuman_jax.training.program_cost import flops
from fairhuman_jax.training.state import OptimizerConfig, TrainState, init_state, make_optimizer
from fairhuman_jax.training.step import make_train_step
from fairhuman_jax.weights import Pipeline
from fairhuman_jax.weights.shapes import PUBLISHED, model_shapes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
REMATS = ("none", "full")
REUSES = 7
# SDXL's blocks and depths at a tenth of its width, for pictures of 256 px.
SMALL = {"block_out_channels": [32, 64, 128], "attention_head_dim": [1, 2, 4], "sample_size": 32}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
SMALL_TIME = {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 6 * 32 + 32}


@dataclass(frozen=True, eq=False)
class Plain(FairHuman):
    """The same network trained on the global objective alone."""

    def objectives(self, prediction, batch):
        return {"global": super().objectives(prediction, batch)["global"]}


def network_configs(model: str) -> dict[str, dict[str, Any]]:
    """Configs by name, as the folders of a pipeline hold them."""
    if model == "people":
        base, vae = (load_config(CONFIGS / f"people_{part}.py").system for part in ("base", "vae"))
        return {"unet": base.unet, "vae": vae.vae, "text_encoder": base.text_encoder, "scheduler": base.scheduler}
    if model == "sd15":
        return PUBLISHED["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    sdxl = PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"]
    if model == "sdxl":
        return sdxl
    return sdxl | {
        "unet": presets.SDXL_UNET | SMALL | SMALL_TIME | {"cross_attention_dim": 64},
        "text_encoder": presets.SDXL_TEXT | SMALL_TEXT,
        "text_encoder_2": presets.SDXL_TEXT_2 | SMALL_TEXT | {"projection_dim": 32},
    }


MODELS = ("people", "sd15", "sdxl-small", "sdxl")


def make_pipeline(model: str, remat: str, scan: bool) -> Pipeline:
    """A pipeline whose parameters are shapes: bfloat16 for the full-size SDXL, else float32."""
    configs = network_configs(model)
    dtype = jnp.bfloat16 if model == "sdxl" else jnp.float32
    unet = UNet2DCondition.from_config(configs["unet"], scan=scan, remat=remat, dtype=dtype)
    vae = AutoencoderKL.from_config(configs["vae"], dtype=dtype)
    encoders = {
        name: CLIPText.from_config(configs[name], scan=scan, dtype=dtype) for name in configs if "encoder" in name
    }
    networks = {"unet": unet, "vae": vae, **encoders}
    params = {name: model_shapes(network, dtype) for name, network in networks.items()}
    schedule = NoiseSchedule.from_config(configs["scheduler"])
    return Pipeline(unet, vae, tuple(encoders.values()), (), schedule, params)


def make_system(kind: type[FairHuman], pipeline: Pipeline, trainable: str, rank: int) -> FairHuman:
    """The system of one of the three trainables around a pipeline of shapes."""
    trained = {
        "lora": LoraTrainable(rank=rank),
        "controlnet": ControlNetTrainable(),
        "adapter": AdapterTrainable(),
    }[trainable]
    return FairHumanConfig(trainable=trained, remat=pipeline.unet.remat).attach(pipeline, kind)


def program(system: FairHuman, fair: FairConfig, batch_size: int) -> tuple[Any, tuple]:
    """The train step and the shapes of its arguments."""
    optimizer = make_optimizer(OptimizerConfig(), steps=100)
    step = make_train_step(system, optimizer, make_mesh(devices=jax.devices()[:1]), fair, clip_norm=1.0)

    def start(key: jax.Array, params: Any) -> TrainState:
        trainable, _ = replace(system, pipeline=replace(system.pipeline, params=params)).init(key)
        count = 1 if isinstance(system, Plain) else 3
        return init_state(trainable, optimizer, key, ema=False, fair=init_fair(fair, count))

    params = system.pipeline.params
    state = jax.eval_shape(start, jax.random.key(0), params)
    return step, (state, params, batch_shapes(system, batch_size))


def batch_shapes(system: FairHuman, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of encoded images with captions, masks and condition images."""
    unet, vae = system.pipeline.unet.to_config(), system.pipeline.vae
    side = unet["sample_size"]
    pixels = side * vae.downscale
    shapes = {
        "latent_mean": ((count, side, side, unet["in_channels"]), jnp.float16),
        "latent_logvar": ((count, side, side, unet["in_channels"]), jnp.float16),
        "conditioning_image": ((count, pixels, pixels, 3), jnp.uint8),
        "face_mask": ((count, pixels, pixels, 1), jnp.uint8),
        "hand_mask": ((count, pixels, pixels, 1), jnp.uint8),
        "time_ids": ((count, 6), jnp.float32),
    }
    for encoder, name in zip(system.pipeline.text_encoders, ("input_ids", "input_ids_2"), strict=False):
        shapes[name] = ((count, encoder.to_config()["max_position_embeddings"]), jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def random_arguments(shapes: tuple) -> tuple:
    """Arrays of those shapes: small random floats, ones for integers, a key."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def seconds(step: Callable, arguments: tuple) -> Iterator[float]:
    """Wall-clock time of one step after another, endlessly; the first, unreported one warms up."""
    state, frozen, batch = arguments
    state, _ = step(state, frozen, batch)
    while True:
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        yield time.perf_counter() - began


def xla_flops(stage: Any) -> float:
    """FLOPs by XLA's analysis of a lowered or compiled program."""
    analysis = stage.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


@dataclass(frozen=True)
class Variant:
    """One train step: a kind of system, a way to pull back, with or without a fresh solution."""

    kind: type[FairHuman]
    gradients: str = "stacked"
    refresh: bool = True


def variants(modes: list[str]) -> dict[str, Variant]:
    """The steps that a table compares, by name."""
    fair = {mode: Variant(FairHuman, mode) for mode in modes}
    return {"plain": Variant(Plain), **fair, "reuse": Variant(FairHuman, refresh=False)}


def measure(options: argparse.Namespace, trainable: str, remat: str) -> dict[str, dict[str, float]]:
    """{count or "seconds": {variant: value}} of one trainable and one policy."""
    found: dict[str, dict[str, float]] = {}
    clocks = {}
    for name, variant in variants(options.gradients).items():

        def traced(scan: bool, variant: Variant = variant) -> tuple[Any, tuple]:
            pipeline = make_pipeline(options.model, remat, scan)
            system = make_system(variant.kind, pipeline, trainable, options.rank)
            step, shapes = program(system, FairConfig(gradients=variant.gradients), options.batch)
            return step.trace(*shapes, refresh=variant.refresh), shapes

        found.setdefault("program", {})[name] = flops(traced(scan=True)[0].jaxpr)
        if options.program_only:
            continue
        stage, shapes = traced(scan=False)
        lowered = stage.lower()
        found.setdefault("lowered", {})[name] = xla_flops(lowered)
        if options.compile or options.rounds:
            compiled = lowered.compile()
            found.setdefault("compiled", {})[name] = xla_flops(compiled)
            if options.rounds:
                clocks[name] = seconds(compiled, random_arguments(shapes))
    if clocks:
        rounds = [{name: next(clock) for name, clock in clocks.items()} for _ in range(options.rounds)]
        found["seconds"] = {name: statistics.median(each[name] for each in rounds) for name in clocks}
    return found


def rows(found: dict[str, dict[str, float]], modes: list[str], label: str) -> Iterator[str]:
    """The lines of a table: a count or time of the plain step, and every mode's ratio to it."""
    for measure_name, values in found.items():
        plain = values["plain"]
        shown = f"{plain:.3f} s" if measure_name == "seconds" else f"{plain / 1e9:,.1f} GFLOP"
        cells = [label, measure_name, shown]
        cells += [f"{values[mode] / plain:.2f}" for mode in modes] + [f"{values['reuse'] / plain:.2f}"]
        cells += [f"{(values[mode] + REUSES * values['reuse']) / (REUSES + 1) / plain:.2f}" for mode in modes]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Parse the command line, count, compile, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="people")
    parser.add_argument("--trainable", nargs="+", choices=["lora", "controlnet", "adapter"], default=["lora"])
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=list(GRADIENTS))
    parser.add_argument("--remat", nargs="+", choices=REMATS, default=list(REMATS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=0, help="timed steps of each kind, in turn")
    parser.add_argument("--compile", action="store_true", help="count after XLA's optimisation too")
    parser.add_argument("--program-only", action="store_true", help="count the program as written alone: quick")
    options = parser.parse_args()
    choose_cpu_kernels()

    device = jax.devices()[0].device_kind
    print(f"{options.model}, batch {options.batch}, rank {options.rank}, {device}, jax {jax.__version__}\n")
    modes = options.gradients
    heads = ["trainable, remat", "count", "plain", *modes, "reuse", *(f"{mode}, every 8" for mode in modes)]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for trainable in options.trainable:
        for remat in options.remat:
            for line in rows(measure(options, trainable, remat), modes, f"{trainable}, {remat}"):
                print(line, flush=True)


if __name__ == "__main__":
    main()
