"""The command line of `sample.py`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from fairhuman_jax.diffusion import RULES, rule_of
from fairhuman_jax.doors.common import (
    USER_ERRORS,
    add_debug,
    choose_cpu_kernels,
    keep_compiled_programs,
    refuse,
    split_cpu,
)
from fairhuman_jax.doors.pictures import Pictures, Size, read_pictures
from fairhuman_jax.systems.humansd import REFERENCE_ADDED, REFERENCE_NEGATIVE, REFERENCE_SCHEDULER
from fairhuman_jax.systems.latent_diffusion import LatentDiffusion
from fairhuman_jax.systems.pipelines import open_system
from fairhuman_jax.systems.sampling import make_request
from fairhuman_jax.training.reporting import sheet
from fairhuman_jax.training.sharding import make_mesh, replicate, shard_rows
from fairhuman_jax.weights import load_loras, tokens_cut

PUBLISHED = {"steps": 50, "guidance": 10.0, "negative": REFERENCE_NEGATIVE, "scheduler": REFERENCE_SCHEDULER}


def sample_door(arguments: Sequence[str] | None = None) -> None:
    """`sample.py [PROMPT ...] [--prompts FILE] [options]`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check(options)
        options.prompts += _read_prompts(options.file) if options.file else []
        _fill_in(options)
        if not options.prompts:
            raise ValueError("nothing to draw: give a prompt, or --prompts FILE")
        keep_compiled_programs()
        choose_cpu_kernels(options.dtype)
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
    parser.add_argument("--steps", type=int, default=None, help="default 40")
    parser.add_argument(
        "--guidance", type=float, default=None, help="classifier-free guidance, 1 leaves it out (default 4)"
    )
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

    skeleton = parser.add_argument_group("skeletons: HumanSD")
    skeleton.add_argument(
        "--system", choices=["auto", "humansd"], default="auto", help="what --base is (auto: as its channels say)"
    )
    skeleton.add_argument(
        "--pose", type=Path, default=None, metavar="FILE", help="key points (.npz, .json), or a picture of a skeleton"
    )
    skeleton.add_argument("--pose-of", type=Path, default=None, metavar="PHOTO", help="the pose of those on a picture")
    skeleton.add_argument(
        "--pose-size", type=_size, default=None, metavar="N or HxW", help="of the picture that key points belong to"
    )
    skeleton.add_argument(
        "--compare-base", default=None, metavar="BASE", help="draw each --controlnet and --adapter beside it, on BASE"
    )
    skeleton.add_argument(
        "--compat", choices=["reference"], default=None, help="the published run: 49 of 50 steps, guidance 10, prompts"
    )

    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--batch", type=int, default=16, help="images at once")
    machine.add_argument("--mesh", type=_mesh, default=1, metavar="N|all", help="devices that share each batch")
    machine.add_argument("--output", type=Path, default=Path("samples"), help="folder of the pictures")
    add_debug(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    for name in ("number", "steps", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    _check_pose(options)
    nets = len(options.controlnet) + len(options.adapter)
    if len(options.condition) != (0 if options.compare_base else nets):
        where = ", which --compare-base gives the pose" if options.compare_base else ""
        raise ValueError(f"{nets} of --controlnet and --adapter{where}, but {len(options.condition)} of --condition")
    if len(options.control_scale) > nets:
        raise ValueError(f"{len(options.control_scale)} of --control-scale for {nets} of --controlnet and --adapter")
    options.control_scale += [1.0] * (nets - len(options.control_scale))
    if options.init_image is None:
        for name in ("strength", "mask"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} needs --init-image")


def _check_pose(options: argparse.Namespace) -> None:
    posed = options.pose or options.pose_of
    if options.pose and options.pose_of:
        raise ValueError("--pose and --pose-of: give one of the two")
    for name, needs in (("pose_size", options.pose), ("compat", posed), ("compare_base", posed)):
        if getattr(options, name) and not needs:
            raise ValueError(f"--{name.replace('_', '-')} needs --pose" + (" or --pose-of" if needs is posed else ""))
    if options.system == "humansd" and not posed:
        raise ValueError("--system humansd needs --pose or --pose-of")
    if options.compare_base and not (options.controlnet or options.adapter):
        raise ValueError("--compare-base needs --controlnet or --adapter")


def _fill_in(options: argparse.Namespace) -> None:
    """Defaults, which the published run has of its own."""
    defaults = {"steps": 40, "guidance": 4.0}
    if options.compat:
        defaults = PUBLISHED
        options.prompts = [f"{prompt}, {REFERENCE_ADDED}" for prompt in options.prompts]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _sample(options: argparse.Namespace) -> list[Path]:
    """Draws and writes; returns the files."""
    mesh = make_mesh(devices=_devices(options.mesh))
    beside = bool(options.compare_base)
    system, params = _open(options, options.base, *([], []) if beside else (options.controlnet, options.adapter))
    if (options.system == "humansd" or beside) and not system.pipeline.reads_pose:
        raise ValueError(
            f"--base {options.base} is not HumanSD: its denoiser reads {system.pipeline.unet.in_channels} channels, "
            f"HumanSD's reads {2 * system.pipeline.vae.config['latent_channels']}"
        )
    pictures = read_pictures(options, system)
    if beside and pictures.openpose is None:
        raise ValueError(f"--compare-base needs key points, but --pose {options.pose} is a drawn skeleton")
    if not options.long_prompt:
        _warn_of_cuts(options.prompts, system)
    lora = load_loras([_path_and_weight(entry) for entry in options.lora], params) if options.lora else None
    jobs = [(p, seed + i) for p in options.prompts for seed in options.seed for i in range(options.number)]
    options.output.mkdir(parents=True, exist_ok=True)
    scales = [] if beside else options.control_scale
    images, written = _draw(options, mesh, Model("", system, params, pictures, scales, options.scheduler, lora), jobs)
    columns = [images]
    for other in _others(options, pictures) if beside else ():
        drawn, files = _draw(options, mesh, other, jobs)
        columns, written = [*columns, drawn], [*written, *files]
    if beside or len(jobs) > 1:
        path = options.output / "sheet.png"
        _sheet(options, columns, jobs, pictures).save(path)
        written.append(path)
    return written


@dataclass(frozen=True)
class Model:
    """What draws: networks, their parameters, the pictures that they read; `name` tells files of several apart."""

    name: str
    system: LatentDiffusion
    params: Any
    pictures: Pictures
    scales: list[float]
    scheduler: str | None
    lora: Any = None


def _open(
    options: argparse.Namespace, base: str, controlnets: Sequence[str], adapters: Sequence[str]
) -> tuple[LatentDiffusion, Any]:
    """`open_system` with what the options say of files; --variant and so on are the main base's alone."""
    of_base = ("variant", "revision", "tokenizer") if base == options.base else ()
    files = {name: value for name in of_base if (value := vars(options)[name]) is not None}
    return open_system(base, controlnets=controlnets, adapters=adapters, dtype=options.dtype, **files)


def _others(options: argparse.Namespace, pictures: Pictures) -> Iterator[Model]:
    """Each ControlNet and T2I-Adapter on the base of the comparison, with the same people in OpenPose's style."""
    assert pictures.openpose is not None, "checked in `_sample`"
    shown = Pictures(pictures.size, conditions=(pictures.openpose,))
    nets = [(path, [path], []) for path in options.controlnet] + [(path, [], [path]) for path in options.adapter]
    scheduler = "ddim" if options.compat else options.scheduler
    for (path, controlnets, adapters), scale in zip(nets, options.control_scale, strict=True):
        network = _open(options, options.compare_base, controlnets, adapters)
        yield Model(_stem(path), *network, shown, [scale], scheduler)


def _draw(
    options: argparse.Namespace, mesh: Mesh, model: Model, jobs: list[tuple[str, int]]
) -> tuple[list[np.ndarray], list[Path]]:
    """Every job's picture and file, batch by batch."""
    program = jax.jit(model.system.sample_images)
    width = min(options.batch, len(jobs))
    width += -width % mesh.size
    params, lora = replicate(mesh, (model.params, model.lora))
    images: list[np.ndarray] = []
    written: list[Path] = []
    with tqdm(total=len(jobs), desc=f"drawing {model.name}".strip(), unit="image") as bar:
        for first in range(0, len(jobs), width):
            group = jobs[first : first + width]
            # The last group is filled up, so that one compiled program serves all.
            request = shard_rows(mesh, _request(options, model, group, width), width)
            drawn = np.asarray(program(params, request, jax.random.key(0), lora))[: len(group)]
            images.extend(drawn)
            for (prompt, seed), image in zip(group, drawn, strict=True):
                written.append(_write(options, model, prompt, seed, image))
            bar.update(len(group))
    return images, written


def _sheet(
    options: argparse.Namespace, columns: list[list[np.ndarray]], jobs: list[tuple[str, int]], pictures: Pictures
) -> Image.Image:
    """A contact sheet; of a comparison a row a job: skeleton, HumanSD, each ControlNet, each adapter."""
    prompts = [prompt for prompt, _ in jobs]
    if not options.compare_base:
        return sheet(np.stack(columns[0]), prompts)
    assert pictures.pose is not None, "checked in `_check_pose`"
    skeleton = pictures.pose / 127.5 - 1.0
    rows = [image for row in zip(*columns, strict=True) for image in (skeleton, *row)]
    names = ["HumanSD", *map(_stem, [*options.controlnet, *options.adapter])]
    titles = [title for prompt in prompts for title in (prompt, *names)]
    return sheet(np.stack(rows), titles, columns=1 + len(columns))


def _request(options: argparse.Namespace, model: Model, group: list[tuple[str, int]], width: int) -> Any:
    filled = group + [group[-1]] * (width - len(group))
    pictures = model.pictures
    return make_request(
        model.system,
        [prompt for prompt, _ in filled],
        [seed for _, seed in filled],
        steps=options.steps,
        guidance=options.guidance,
        rescale=options.guidance_rescale,
        size=pictures.size,
        negative=options.negative,
        scheduler=model.scheduler,
        strength=1.0 if options.strength is None else options.strength,
        image=pictures.image,
        mask=pictures.mask,
        conditions=pictures.conditions,
        scales=model.scales,
        pose=pictures.pose,
        pose_latent="sample" if options.compat else "mode",
        long_prompts=options.long_prompt,
    )


def _write(options: argparse.Namespace, model: Model, prompt: str, seed: int, image: np.ndarray) -> Path:
    """One PNG, named by prompt and seed, with its recipe as text chunk `parameters` (JSON)."""
    left_out = ("prompts", "file", "number", "batch", "mesh", "output", "debug", "seed", "size")
    recipe = {name: _plain(value) for name, value in vars(options).items() if name not in left_out}
    height, width = model.pictures.size
    recipe |= {"prompt": prompt, "seed": seed, "height": height, "width": width}
    recipe["scheduler"] = model.scheduler or rule_of(model.system.pipeline.schedule).name
    metadata = PngInfo()
    metadata.add_text("parameters", json.dumps(recipe))
    path = options.output / f"{'-'.join(filter(None, (_stem(prompt, 'image'), str(seed), model.name)))}.png"
    pixels = np.rint((image + 1.0) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=metadata)
    return path


def _stem(text: str, fallback: str = "model") -> str:
    """A name for files: letters and digits of the end of a path, or of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or fallback


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
