"""The command line of `sample.py`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import open_system
from fairhuman_jax.commands import USER_ERRORS, refuse
from fairhuman_jax.data.preview import sheet
from fairhuman_jax.devices.kernels import choose_cpu_kernels, keep_compiled_programs, split_cpu
from fairhuman_jax.devices.sharding import make_mesh
from fairhuman_jax.diffusion import rule_of
from fairhuman_jax.doors.options import check_options, fill_in, read_prompts, sample_parser
from fairhuman_jax.drawing.pictures import Pictures, read_pictures
from fairhuman_jax.drawing.pipeline import Job, Model, draw_jobs, stem
from fairhuman_jax.drawing.requests import draw_images, make_request
from fairhuman_jax.systems.facediffuser.pipeline import subject_jobs, subject_model
from fairhuman_jax.weights import load_loras, tokens_cut


def sample_door(arguments: Sequence[str] | None = None) -> None:
    """`sample.py [PROMPT ...] [--prompts FILE] [options]`."""
    parser = sample_parser()
    options = parser.parse_args(arguments)
    try:
        check_options(options)
        options.prompts += read_prompts(options.file) if options.file else []
        fill_in(options)
        if not options.prompts and not options.plan:
            raise ValueError("nothing to draw: give a prompt, or --prompts FILE")
        keep_compiled_programs()
        if options.mesh is not None and options.mesh > 1:
            split_cpu(options.mesh)
        choose_cpu_kernels(options.dtype)
        written = _sample(options)
    except USER_ERRORS as error:
        refuse(parser, error, options.debug)
    print("\n".join(map(str, written)))


def _sample(options: argparse.Namespace) -> list[Path]:
    """Draws and writes; returns the files."""
    mesh = make_mesh(devices=_devices(options.mesh))
    seeds = [seed + i for seed in options.seed for i in range(options.number)]
    jobs = [Job(prompt, seed) for prompt in options.prompts for seed in seeds]
    if options.system == "facediffuser":
        jobs = subject_jobs(options, jobs)
        if not jobs:
            return []
        images, written = draw_jobs(options, mesh, subject_model(options, jobs), jobs)
        return written + _sheets(options, [images], jobs)
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
    scales = [] if beside else options.control_scale
    model = _model(options, (system, params), pictures, scales, scheduler=options.scheduler, lora=lora)
    images, written = draw_jobs(options, mesh, model, jobs)
    columns = [images]
    for other in _others(options, pictures) if beside else ():
        drawn, files = draw_jobs(options, mesh, other, jobs)
        columns, written = [*columns, drawn], [*written, *files]
    return written + _sheets(options, columns, jobs, pictures)


def _model(
    options: argparse.Namespace,
    network: tuple[LatentDiffusion, Any],
    pictures: Pictures,
    scales: Sequence[float],
    *,
    scheduler: str | None,
    name: str = "",
    lora: Any = None,
) -> Model:
    """One pipeline and what it draws from."""
    system, params = network
    return Model(
        name,
        params,
        pictures.size,
        scheduler or rule_of(system.pipeline.schedule).name,
        partial(_request, options, system, pictures, scales, scheduler),
        partial(draw_images, system),
        lora,
    )


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
        yield _model(options, network, shown, [scale], scheduler=scheduler, name=stem(path))


def _sheets(
    options: argparse.Namespace, columns: list[list[np.ndarray]], jobs: list[Job], pictures: Pictures | None = None
) -> list[Path]:
    """A contact sheet of several pictures; of a comparison a row a job: skeleton, HumanSD, each ControlNet, adapter."""
    if len(jobs) == 1 and not options.compare_base:
        return []
    prompts, path = [job.prompt for job in jobs[: len(columns[0])]], options.output / "sheet.png"
    if not options.compare_base:
        sheet(np.stack(columns[0]), prompts).save(path)
        return [path]
    assert pictures is not None and pictures.pose is not None, "checked in `check_options`"
    skeleton = pictures.pose / 127.5 - 1.0
    rows = [image for row in zip(*columns, strict=True) for image in (skeleton, *row)]
    names = ["HumanSD", *map(stem, [*options.controlnet, *options.adapter])]
    titles = [title for prompt in prompts for title in (prompt, *names)]
    sheet(np.stack(rows), titles, columns=1 + len(columns)).save(path)
    return [path]


def _request(
    options: argparse.Namespace,
    system: LatentDiffusion,
    pictures: Pictures,
    scales: Sequence[float],
    scheduler: str | None,
    group: Sequence[Job],
) -> Any:
    return make_request(
        system,
        [job.prompt for job in group],
        [job.seed for job in group],
        steps=options.steps,
        guidance=options.guidance,
        rescale=options.guidance_rescale,
        size=pictures.size,
        negative=options.negative,
        scheduler=scheduler,
        strength=1.0 if options.strength is None else options.strength,
        image=pictures.image,
        mask=pictures.mask,
        conditions=pictures.conditions,
        scales=scales,
        pose=pictures.pose,
        pose_latent="sample" if options.compat else "mode",
        long_prompts=options.long_prompt,
    )


def _warn_of_cuts(prompts: Sequence[str], system: LatentDiffusion) -> None:
    for tokenizer in system.pipeline.tokenizers:
        for index, cut in tokens_cut(tokenizer, prompts).items():
            print(
                f"prompt {index + 1} is {cut} tokens too long for this model; its end is cut off (--long-prompt "
                f"keeps it): {prompts[index]!r}",
                file=sys.stderr,
            )


def _devices(mesh: int | None) -> list[Any]:
    """The first `mesh` devices, all of them for None."""
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
