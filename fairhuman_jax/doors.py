"""The two command lines: `train.py` and `sample.py` (installed as fairhuman-train and fairhuman-sample)."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from platformdirs import user_cache_dir
from tqdm import tqdm

from fairhuman_jax.config import ConfigError, describe, load_config
from fairhuman_jax.systems.latent_diffusion import LatentDiffusion
from fairhuman_jax.systems.pipelines import open_pipeline
from fairhuman_jax.training.logging import table
from fairhuman_jax.training.loop import Result, sheet, train
from fairhuman_jax.weights import load_lora, tokens_cut

USER_ERRORS = (ConfigError, FileNotFoundError, ValueError, OSError)


def train_door(arguments: Sequence[str] | None = None) -> None:
    """`train.py [CONFIG] [--set key=value ...] [--resume] [--show]`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains what a configuration describes; without one, a fair LoRA on the shipped people model.",
    )
    parser.add_argument("config", nargs="?", default="configs/people_lora.py", help="a file of configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one field, as in train.steps=50"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this run")
    parser.add_argument("--show", action="store_true", help="print the configuration with its fields and stop")
    _add_debug(parser)
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        if options.show:
            print(describe(config))
            return
        _keep_compiled_programs()
        _make_every_core_a_device(config.train.batch_size // config.train.accumulate)
        result = train(config, resume=options.resume)
    except USER_ERRORS as error:
        _refuse(parser, error, options.debug)
    print(report(result))


def report(result: Result) -> str:
    """The closing table of a run and where its files are."""
    rows = []
    for name, before in result.before.items():
        after = result.after[name]
        row = {"held-out loss": name, "before": f"{before:.5f}", "after": f"{after:.5f}"}
        row["change"] = f"{100 * (after / before - 1):+.1f} %" if before else "-"
        if result.weights:
            row["mean weight"] = f"{result.weights[name]:.3f}"
        rows.append(row)
    lines = [table(rows), f"{result.images_per_second:.1f} images/s, {result.skipped} steps skipped"]
    return "\n".join([*lines, f"picture: {result.picture}", f"trained: {result.exported}"])


def sample_door(arguments: Sequence[str] | None = None) -> None:
    """`sample.py [PROMPT ...] [--prompts FILE] [options]`."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Draws prompts; PNGs carry their recipe, several make a contact sheet as well."
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts", dest="file", type=Path, metavar="FILE", help="a text file, one prompt a line")
    parser.add_argument("--base", default="people", help="a diffusers folder, or people (shipped)")
    parser.add_argument("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="a LoRA file or folder")
    parser.add_argument("--negative", default="", help="what the picture should not be")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; each next one adds 1")
    parser.add_argument("--number", type=int, default=1, help="images a prompt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", type=_size, default=None, metavar="N or HxW", help="pixels (default: the base's)")
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder of the pictures")
    _add_debug(parser)
    options = parser.parse_args(arguments)
    try:
        for name in ("number", "steps", "batch"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} {getattr(options, name)}: at least 1")
        options.prompts += _read_prompts(options.file) if options.file else []
        if not options.prompts:
            raise ValueError("nothing to draw: give a prompt, or --prompts FILE")
        _keep_compiled_programs()
        written = _sample(options)
    except USER_ERRORS as error:
        _refuse(parser, error, options.debug)
    print("\n".join(map(str, written)))


def _sample(options: argparse.Namespace) -> list[Path]:
    """Draws and writes; returns the files."""
    system = LatentDiffusion(open_pipeline(options.base, dtype=options.dtype))
    pipeline = system.pipeline
    size = _checked_size(options.size, system)
    for tokenizer in pipeline.tokenizers:
        for index, cut in tokens_cut(tokenizer, options.prompts).items():
            print(
                f"prompt {index + 1} is {cut} tokens too long for this model; its end is cut off: "
                f"{options.prompts[index]!r}",
                file=sys.stderr,
            )
    lora = _loras(options.lora, pipeline.params)
    jobs = [(prompt, options.seed + i) for prompt in options.prompts for i in range(options.number)]
    draw = jax.jit(system.sample_images)
    options.output.mkdir(parents=True, exist_ok=True)
    pictures: list[np.ndarray] = []
    written: list[Path] = []
    width = min(options.batch, len(jobs))
    with tqdm(total=len(jobs), desc="drawing", unit="image") as bar:
        for first in range(0, len(jobs), width):
            group = jobs[first : first + width]
            # The last group is filled up, so that one compiled program serves all.
            filled = group + [group[-1]] * (width - len(group))
            request = system.request(
                [prompt for prompt, _ in filled],
                [seed for _, seed in filled],
                steps=options.steps,
                guidance=options.guidance,
                size=size,
                negative=options.negative,
            )
            images = np.asarray(draw(pipeline.params, request, jax.random.key(0), lora))[: len(group)]
            pictures.extend(images)
            written += [
                _write(options, size, prompt, seed, image) for (prompt, seed), image in zip(group, images, strict=True)
            ]
            bar.update(len(group))
    if len(jobs) > 1:
        path = options.output / "sheet.png"
        sheet(np.stack(pictures), [prompt for prompt, _ in jobs]).save(path)
        written.append(path)
    return written


def _write(options: argparse.Namespace, size: tuple[int, int], prompt: str, seed: int, image: np.ndarray) -> Path:
    """One PNG, named by prompt and seed, with its recipe as text chunk `parameters` (JSON)."""
    recipe: dict[str, Any] = {
        "prompt": prompt,
        "negative": options.negative,
        "seed": seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "height": size[0],
        "width": size[1],
        "base": options.base,
        "lora": options.lora,
        "sampler": "ddim",
    }
    metadata = PngInfo()
    metadata.add_text("parameters", json.dumps(recipe))
    stem = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
    path = options.output / f"{stem}-{seed}.png"
    pixels = np.rint((image + 1.0) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=metadata)
    return path


def _read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _loras(entries: Sequence[str], params: dict[str, Any]) -> dict[str, Any] | None:
    """`PATH[:WEIGHT]` entries -> one LoRA tree by network; several are stacked along their rank."""
    merged: Any = None
    for entry in entries:
        path, _, weight = entry.rpartition(":")
        if not path or not _is_number(weight):
            path, weight = entry, "1"
        tree = load_lora(path, params["unet"])
        factors = {"down": 1.0, "up": float(weight)}
        tree = jax.tree_util.tree_map_with_path(lambda p, x, f=factors: x * f[p[-1].key], tree)
        merged = tree if merged is None else jax.tree_util.tree_map_with_path(_concatenate, merged, tree)
    return None if merged is None else {"unet": merged}


def _concatenate(path: tuple, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two low-rank updates as one of their summed rank: side by side in `down`, one above the other in `up`."""
    return np.concatenate([first, second], axis=-1 if path[-1].key == "down" else -2)


def _checked_size(size: tuple[int, int] | None, system: LatentDiffusion) -> tuple[int, int]:
    """The asked size, or the base's own; a multiple of what autoencoder and denoiser halve."""
    unet, factor = system.pipeline.unet, system.pipeline.vae.downscale
    if size is None:
        side = unet.to_config().get("sample_size") or 64
        return (side * factor, side * factor) if isinstance(side, int) else (side[0] * factor, side[1] * factor)
    if size[0] % factor or size[1] % factor or min(size) < factor:
        raise ValueError(f"--size {size[0]}x{size[1]}: both sides must be multiples of {factor}")
    return size


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: write 64 or 64x96 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d*\.?\d+", text) is not None


def _keep_compiled_programs() -> None:
    """A second start finds its compiled programs in the user's cache folder."""
    jax.config.update("jax_compilation_cache_dir", str(Path(user_cache_dir("fairhuman_jax")) / "xla"))


def _make_every_core_a_device(batch_size: int) -> None:
    """On a CPU, as many data-parallel devices as cores that divide the batch; other platforms are not touched.

    One CPU device runs most backward convolutions on one thread; two devices on two cores train 1.2 to 1.8 times as
    fast. An XLA_FLAGS that sets the number of devices is obeyed.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = os.cpu_count() or 1
        devices = max(n for n in range(1, cores + 1) if batch_size % n == 0 or n == 1)
        jax.config.update("jax_num_cpu_devices", devices)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show where an error came from")


def _refuse(parser: argparse.ArgumentParser, error: Exception, debug: bool) -> NoReturn:
    """One line that says what was wrong, and exit code 2."""
    if debug:
        raise error
    parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")
