"""The options of `sample.py`, their defaults, and what of them can be refused before anything is read."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fairhuman_jax.commands import add_debug
from fairhuman_jax.diffusion import RULES
from fairhuman_jax.drawing.pictures import Size
from fairhuman_jax.systems.facediffuser.pipeline import add_subject_options, check_subject_options
from fairhuman_jax.systems.humansd.system import REFERENCE_ADDED, REFERENCE_NEGATIVE, REFERENCE_SCHEDULER

PUBLISHED = {"steps": 50, "guidance": 10.0, "negative": REFERENCE_NEGATIVE, "scheduler": REFERENCE_SCHEDULER}


def sample_parser() -> argparse.ArgumentParser:
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
        "--system",
        choices=["auto", "humansd", "facediffuser"],
        default="auto",
        help="what --base is (auto: as its channels say)",
    )
    skeleton.add_argument(
        "--pose", type=Path, default=None, metavar="FILE", help="key points (.npz, .json), or a picture of a skeleton"
    )
    skeleton.add_argument("--pose-of", type=Path, default=None, metavar="PHOTO", help="the pose of those on a picture")
    skeleton.add_argument(
        "--pose-network",
        default=None,
        metavar="PATH",
        help="what finds it: a HigherHRNet (a checkpoint of mmpose, a folder, people) in place of MediaPipe's networks",
    )
    skeleton.add_argument(
        "--pose-size", type=_size, default=None, metavar="N or HxW", help="of the picture that key points belong to"
    )
    skeleton.add_argument(
        "--compare-base", default=None, metavar="BASE", help="draw each --controlnet and --adapter beside it, on BASE"
    )
    skeleton.add_argument(
        "--compat", choices=["reference"], default=None, help="the published run: 49 of 50 steps, guidance 10, prompts"
    )

    add_subject_options(parser)
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--batch", type=int, default=16, help="images at once")
    machine.add_argument("--mesh", type=_mesh, default=1, metavar="N|all", help="devices that share each batch")
    machine.add_argument("--output", type=Path, default=Path("samples"), help="folder of the pictures")
    add_debug(parser)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    for name in ("number", "steps", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    _check_pose(options)
    check_subject_options(options)
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
    if options.pose_network and not options.pose_of:
        raise ValueError("--pose-network needs --pose-of")
    if options.system == "humansd" and not posed:
        raise ValueError("--system humansd needs --pose or --pose-of")
    if options.compare_base and not (options.controlnet or options.adapter):
        raise ValueError("--compare-base needs --controlnet or --adapter")


def fill_in(options: argparse.Namespace) -> None:
    """Defaults, which the published run has of its own."""
    defaults = {"steps": 40, "guidance": 4.0}
    if options.compat:
        defaults = PUBLISHED
        options.prompts = [f"{prompt}, {REFERENCE_ADDED}" for prompt in options.prompts]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
