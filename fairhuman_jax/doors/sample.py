"""The command line of `sample.py`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from fairhuman_jax.data.folder import read_image, read_mask
from fairhuman_jax.diffusion import RULES, rule_of
from fairhuman_jax.doors.common import (
    USER_ERRORS,
    add_debug,
    choose_cpu_kernels,
    keep_compiled_programs,
    refuse,
    split_cpu,
)
from fairhuman_jax.systems.latent_diffusion import LatentDiffusion
from fairhuman_jax.systems.pipelines import open_system
from fairhuman_jax.systems.sampling import make_request
from fairhuman_jax.training.reporting import sheet
from fairhuman_jax.training.sharding import make_mesh, replicate, shard_rows
from fairhuman_jax.weights import load_loras, tokens_cut

Size = tuple[int, int]


def sample_door(arguments: Sequence[str] | None = None) -> None:
    """`sample.py [PROMPT ...] [--prompts FILE] [options]`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check(options)
        options.prompts += _read_prompts(options.file) if options.file else []
        if not options.prompts:
            raise ValueError("nothing to draw: give a prompt, or --prompts FILE")
        keep_compiled_programs()
        choose_cpu_kernels()
        written = _sample(options)
    except USER_ERRORS as error:
        refuse(parser, error, options.debug)
    print("\n".join(map(str, written)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Draws prompts; PNGs carry their recipe, several make a contact sheet as well."
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts", dest="file", type=Path, metavar="FILE", help="a text file, one prompt a line")
    parser.add_argument("--negative", default=None, help="what the picture should not be")
    parser.add_argument("--seed", type=_numbers, default=[0], metavar="N[,N...]", help="one image a prompt and seed")
    parser.add_argument("--number", type=int, default=1, help="images a prompt and seed; each next one adds 1 to it")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance; 1 leaves it out")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, metavar="R", help="arXiv 2305.08891, 0 to 1")
    parser.add_argument("--scheduler", choices=sorted(RULES), default=None, help="default: what the base asks for")
    parser.add_argument("--size", type=_size, default=None, metavar="N or HxW", help="pixels (default: the base's)")
    parser.add_argument("--long-prompt", action="store_true", help="encode long prompts in chunks, not cut")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--base", default="people", help="people (shipped), a diffusers folder, a checkpoint file or a hub id"
    )
    model.add_argument("--variant", default=None, help="files of the base to take, as in fp16")
    model.add_argument("--revision", default=None, help="branch, tag or commit of a hub id")
    model.add_argument("--tokenizer", default=None, help="folder of a tokenizer, for checkpoint files")
    model.add_argument("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="a LoRA; may be repeated")
    model.add_argument("--controlnet", action="append", default=[], metavar="PATH", help="may be repeated")
    model.add_argument("--adapter", action="append", default=[], metavar="PATH", help="a T2I-Adapter; may be repeated")
    model.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])

    pictures = parser.add_argument_group("pictures to draw from")
    pictures.add_argument(
        "--condition", action="append", default=[], type=Path, metavar="IMAGE", help="one a ControlNet, then adapter"
    )
    pictures.add_argument(
        "--control-scale", action="append", default=[], type=float, metavar="S", help="strength of each (default 1)"
    )
    pictures.add_argument("--init-image", type=Path, default=None, metavar="IMAGE", help="the picture to start from")
    pictures.add_argument("--strength", type=float, default=None, help="share of the steps it goes through, 0 to 1")
    pictures.add_argument("--mask", type=Path, default=None, metavar="IMAGE", help="white: draw anew")

    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--batch", type=int, default=16, help="images at once")
    machine.add_argument("--mesh", type=_mesh, default=1, metavar="N|all", help="devices that share each batch")
    machine.add_argument("--output", type=Path, default=Path("samples"), help="folder of the pictures")
    add_debug(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    for name in ("number", "steps", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: at least 1")
    wanted = len(options.controlnet) + len(options.adapter)
    if len(options.condition) != wanted:
        raise ValueError(f"{wanted} of --controlnet and --adapter, but {len(options.condition)} of --condition")
    if len(options.control_scale) > wanted:
        raise ValueError(f"{len(options.control_scale)} of --control-scale for {wanted} of --controlnet and --adapter")
    if options.init_image is None:
        for name in ("strength", "mask"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} needs --init-image")


@dataclass(frozen=True)
class Pictures:
    """What the options name, as uint8 arrays of the asked size."""

    size: Size
    image: np.ndarray | None
    mask: np.ndarray | None
    conditions: list[np.ndarray]


def _sample(options: argparse.Namespace) -> list[Path]:
    """Draws and writes; returns the files."""
    mesh = make_mesh(devices=_devices(options.mesh))
    system, params = open_system(
        options.base,
        controlnets=options.controlnet,
        adapters=options.adapter,
        dtype=options.dtype,
        **{name: value for name in ("variant", "revision", "tokenizer") if (value := vars(options)[name]) is not None},
    )
    pictures = _pictures(options, system)
    if not options.long_prompt:
        _warn_of_cuts(options.prompts, system)
    lora = load_loras([_path_and_weight(entry) for entry in options.lora], params) if options.lora else None
    jobs = [(p, seed + i) for p in options.prompts for seed in options.seed for i in range(options.number)]
    program = jax.jit(system.sample_images)
    options.output.mkdir(parents=True, exist_ok=True)
    width = min(options.batch, len(jobs))
    width += -width % mesh.size
    params, lora = replicate(mesh, (params, lora))
    images: list[np.ndarray] = []
    written: list[Path] = []
    with tqdm(total=len(jobs), desc="drawing", unit="image") as bar:
        for first in range(0, len(jobs), width):
            group = jobs[first : first + width]
            # The last group is filled up, so that one compiled program serves all.
            request = shard_rows(mesh, _request(options, system, pictures, group, width), width)
            drawn = np.asarray(program(params, request, jax.random.key(0), lora))[: len(group)]
            images.extend(drawn)
            for (prompt, seed), image in zip(group, drawn, strict=True):
                written.append(_write(options, system, pictures.size, prompt, seed, image))
            bar.update(len(group))
    if len(jobs) > 1:
        path = options.output / "sheet.png"
        sheet(np.stack(images), [prompt for prompt, _ in jobs]).save(path)
        written.append(path)
    return written


def _request(
    options: argparse.Namespace, system: LatentDiffusion, pictures: Pictures, group: list[tuple[str, int]], width: int
) -> Any:
    filled = group + [group[-1]] * (width - len(group))
    scales = options.control_scale + [1.0] * (len(options.condition) - len(options.control_scale))
    return make_request(
        system,
        [prompt for prompt, _ in filled],
        [seed for _, seed in filled],
        steps=options.steps,
        guidance=options.guidance,
        rescale=options.guidance_rescale,
        size=pictures.size,
        negative=options.negative,
        scheduler=options.scheduler,
        strength=1.0 if options.strength is None else options.strength,
        image=pictures.image,
        mask=pictures.mask,
        conditions=pictures.conditions,
        scales=scales,
        long_prompts=options.long_prompt,
    )


def _write(
    options: argparse.Namespace, system: LatentDiffusion, size: Size, prompt: str, seed: int, image: np.ndarray
) -> Path:
    """One PNG, named by prompt and seed, with its recipe as text chunk `parameters` (JSON)."""
    left_out = ("prompts", "file", "number", "batch", "mesh", "output", "debug", "seed", "size")
    recipe = {name: _plain(value) for name, value in vars(options).items() if name not in left_out}
    recipe |= {"prompt": prompt, "seed": seed, "height": size[0], "width": size[1]}
    recipe["scheduler"] = options.scheduler or rule_of(system.pipeline.schedule).name
    metadata = PngInfo()
    metadata.add_text("parameters", json.dumps(recipe))
    stem = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
    path = options.output / f"{stem}-{seed}.png"
    pixels = np.rint((image + 1.0) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=metadata)
    return path


def _pictures(options: argparse.Namespace, system: LatentDiffusion) -> Pictures:
    """Reads the pictures; without --size the first one gives it, rounded down to what the networks halve."""
    image = read_image(options.init_image) if options.init_image else None
    conditions = [read_image(path) for path in options.condition]
    given = [picture.shape[:2] for picture in (image, *conditions) if picture is not None]
    size = _checked_size(options.size, given[0] if given else None, system)
    mask = None
    if options.mask and image is not None:
        mask = read_mask(options.mask)
        if mask.shape[:2] != image.shape[:2]:
            raise ValueError(
                f"--mask {options.mask} is {mask.shape[0]}x{mask.shape[1]}, but --init-image is "
                f"{image.shape[0]}x{image.shape[1]}"
            )
        mask = _fitted(mask[..., 0], size, Image.Resampling.NEAREST)[..., None]
    return Pictures(
        size,
        None if image is None else _fitted(image, size),
        mask,
        [_fitted(condition, size) for condition in conditions],
    )


def _fitted(pixels: np.ndarray, size: Size, method: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """Resized, and cropped at the middle where the proportions differ."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), method))


def _checked_size(asked: Size | None, given: Size | None, system: LatentDiffusion) -> Size:
    """The asked size, that of the picture to draw from, or the base's own."""
    unet, factor = system.pipeline.unet, system.pipeline.vae.downscale
    if asked is not None:
        if asked[0] % factor or asked[1] % factor or min(asked) < factor:
            raise ValueError(f"--size {asked[0]}x{asked[1]}: both sides must be multiples of {factor}")
        return asked
    if given is not None:
        multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
        return max(given[0] // multiple, 1) * multiple, max(given[1] // multiple, 1) * multiple
    side = unet.sample_size or 64
    height, width = (side, side) if isinstance(side, int) else side
    return height * factor, width * factor


def _warn_of_cuts(prompts: Sequence[str], system: LatentDiffusion) -> None:
    for tokenizer in system.pipeline.tokenizers:
        for index, cut in tokens_cut(tokenizer, prompts).items():
            print(
                f"prompt {index + 1} is {cut} tokens too long for this model; its end is cut off (--long-prompt "
                f"keeps it): {prompts[index]!r}",
                file=sys.stderr,
            )


def _devices(mesh: int | None) -> list[Any]:
    """The first `mesh` devices, all of them for None; a CPU is split into as many as asked for."""
    if mesh is not None and mesh > 1:
        split_cpu(mesh)
    devices = jax.devices()
    if mesh is not None and mesh > len(devices):
        raise ValueError(f"--mesh {mesh}: there are {len(devices)} devices")
    return devices[:mesh]


def _path_and_weight(entry: str) -> tuple[str, float]:
    """PATH[:WEIGHT]; a path may hold colons itself."""
    path, _, weight = entry.rpartition(":")
    if path and re.fullmatch(r"[+-]?\d*\.?\d+", weight):
        return path, float(weight)
    return entry, 1.0


def _read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _plain(value: Any) -> Any:
    return (
        [_plain(item) for item in value]
        if isinstance(value, list)
        else str(value)
        if isinstance(value, Path)
        else value
    )


def _size(text: str) -> Size:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: write 64 or 64x96 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write 7 or 7,8,21")
    return [int(number) for number in text.split(",")]


def _mesh(text: str) -> int | None:
    if text != "all" and not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of devices, or all")
    return None if text == "all" else int(text)
