"""What the fair step costs over a plain LoRA step: FLOPs by the compiler and time, as Markdown tables.

    python benchmarks/fair_step.py                      # FLOPs and time, the shipped model's shapes
    python benchmarks/fair_step.py --rounds 0           # FLOPs only
    python benchmarks/fair_step.py --model sd15 --rounds 0 --no-compile     # lowered only: minutes less

Both steps are the trainer's own (training/step.py) on latents encoded beforehand. "plain" has the global objective
alone: one forward and one backward pass, as any LoRA trainer. "fair" has all three: one forward pass and three
cotangents pulled back together, the Gram matrix, the weights. Stacks are unrolled (scan=False), because XLA counts the
body of a loop once. "lowered" counts the program as JAX hands it over, "compiled" what is left after XLA's
optimisation; where both agree, nothing of the recomputation under remat was merged with the first computation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.config import load_config
from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.models.presets import SD15_TEXT, SD15_UNET, SD_VAE
from fairhuman_jax.systems.fairhuman import FairHuman, FairHumanConfig
from fairhuman_jax.training.sharding import make_mesh
from fairhuman_jax.training.state import OptimizerConfig, TrainState, init_state, make_optimizer
from fairhuman_jax.training.step import FairConfig, make_train_step
from fairhuman_jax.weights import Pipeline, expected_params

SD15_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MODELS = ("people", "sd15")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
REMATS = ("none", "full")


@dataclass(frozen=True, eq=False)
class PlainLora(FairHuman):
    """The same LoRA trained on the global objective alone."""

    def objectives(self, prediction, batch):
        return {"global": super().objectives(prediction, batch)["global"]}


def network_configs(model: str) -> tuple[dict, dict, dict, dict]:
    """UNet, text encoder, scheduler and autoencoder."""
    if model == "sd15":
        return SD15_UNET, SD15_TEXT, SD15_SCHEDULER, SD_VAE
    base, vae = (load_config(CONFIGS / f"people_{part}.py").system for part in ("base", "vae"))
    return base.unet, base.text_encoder, base.scheduler, vae.vae


def make_system(kind: type[FairHuman], model: str, rank: int, remat: str) -> FairHuman:
    """A system whose parameters are shapes only."""
    unet_config, text_config, scheduler, vae_config = network_configs(model)
    unet = UNet2DCondition.from_config(unet_config, scan=False, remat=remat)
    encoder = CLIPText.from_config(text_config, scan=False)
    vae = AutoencoderKL.from_config(vae_config)
    networks = {"unet": unet, "text_encoder": encoder, "vae": vae}
    params = {name: expected_params(network) for name, network in networks.items()}
    pipeline = Pipeline(unet, vae, (encoder,), (), NoiseSchedule.from_config(scheduler), params)
    return kind(pipeline=pipeline, config=FairHumanConfig(rank=rank, remat=remat))


def program(system: FairHuman, batch_size: int) -> tuple[Callable, tuple]:
    """The train step and the shapes of its arguments."""
    optimizer = make_optimizer(OptimizerConfig(), steps=100)
    step = make_train_step(system, optimizer, make_mesh(devices=jax.devices()[:1]), FairConfig(), clip_norm=1.0)

    def start(key: jax.Array) -> TrainState:
        return init_state(system.init(key)[0], optimizer, key, ema=False)

    state = jax.eval_shape(start, jax.random.key(0))
    return step, (state, system.pipeline.params, batch_shapes(system, batch_size))


def batch_shapes(system: FairHuman, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of encoded images with captions and masks."""
    unet, vae = system.pipeline.unet.to_config(), system.pipeline.vae
    side = unet["sample_size"]
    words = system.pipeline.text_encoders[0].to_config()["max_position_embeddings"]
    shapes = {
        "latent_mean": ((count, side, side, unet["in_channels"]), jnp.float16),
        "latent_logvar": ((count, side, side, unet["in_channels"]), jnp.float16),
        "input_ids": ((count, words), jnp.int32),
        "face_mask": ((count, side * vae.downscale, side * vae.downscale, 1), jnp.uint8),
        "hand_mask": ((count, side * vae.downscale, side * vae.downscale, 1), jnp.uint8),
    }
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


def flops(analysis: Any) -> float:
    """GFLOP of a cost analysis."""
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"] / 1e9


def main() -> None:
    """Parse the command line, lower, compile, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="people")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each kind, alternating; 0 for none")
    parser.add_argument("--no-compile", action="store_true", help="lowered figures only")
    options = parser.parse_args()

    kinds = {"plain": PlainLora, "fair": FairHuman}
    device = jax.devices()[0].device_kind
    print(f"{options.model}, batch {options.batch}, rank {options.rank}, {device}, jax {jax.__version__}\n")
    print("| remat | program | plain, GFLOP | fair, GFLOP | fair / plain |\n| --- | --- | --- | --- | --- |")
    compiled: dict[tuple[str, str], tuple] = {}
    for remat in REMATS:
        lowered = {}
        for name, kind in kinds.items():
            step, shapes = program(make_system(kind, options.model, options.rank, remat), options.batch)
            lowered[name] = step.lower(*shapes)
            if not options.no_compile:
                compiled[remat, name] = lowered[name].compile(), shapes
        counts = {"lowered": [flops(lowered[name].cost_analysis()) for name in kinds]}
        if not options.no_compile:
            counts["compiled"] = [flops(compiled[remat, name][0].cost_analysis()) for name in kinds]
        for stage, (plain, fair) in counts.items():
            print(f"| {remat} | {stage} | {plain:.2f} | {fair:.2f} | {fair / plain:.2f} |", flush=True)

    if options.rounds and compiled:
        print("\n| remat | plain, s | fair, s | fair / plain |\n| --- | --- | --- | --- |")
        for remat in REMATS:
            arguments = [(compiled[remat, name][0], random_arguments(compiled[remat, name][1])) for name in kinds]
            clocks = [seconds(step, values) for step, values in arguments]
            pairs = [[next(clock) for clock in clocks] for _ in range(options.rounds)]
            plain, fair = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(fair / plain for plain, fair in pairs)
            print(f"| {remat} | {plain:.3f} | {fair:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
