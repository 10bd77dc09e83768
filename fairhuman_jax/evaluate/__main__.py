"""Measurements on folders of pictures.

python -m fairhuman_jax.evaluate {fetch,pose,fid,kid,clip,plan,identity} --help
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from fairhuman_jax.annotate.models import fetch_models
from fairhuman_jax.commands import add_command, run_commands, table
from fairhuman_jax.data.pictures import read_image
from fairhuman_jax.devices.kernels import choose_cpu_kernels, keep_compiled_programs
from fairhuman_jax.drawing.plans import read_plan
from fairhuman_jax.evaluate.clip_similarity import clip_similarities, load_clip
from fairhuman_jax.evaluate.fid import KID_SIZE, KID_SUBSETS, check_subsets, fid, kid
from fairhuman_jax.evaluate.folders import captions_for, list_pictures, paired_people, read_pictures
from fairhuman_jax.evaluate.identity import OpenFaceEmbedder, fetch_identity, identity_similarity, reference_embeddings
from fairhuman_jax.evaluate.inception import Resize, fetch_inception, load_inception, picture_features
from fairhuman_jax.evaluate.keypoint_metrics import pose_scores
from fairhuman_jax.evaluate.subject_plan import INSTANCES, NOUNS, SEED, find_subjects, plan_pictures, write_plan
from fairhuman_jax.files import read_json, write_json

FEW = 2048  # pictures, below which the covariance of Inception's features has not full rank


def fetch(options: argparse.Namespace) -> None:
    """Fetch Inception and the networks of faces from PyPI and npm, check their hashes and keep them in the cache."""
    chosen = options.only or ("inception", "faces")
    paths = [fetch_inception()] if "inception" in chosen else []
    paths += [fetch_identity(), *fetch_models()] if "faces" in chosen else []
    print("\n".join(map(str, paths)))


def _add_fetch(commands) -> None:
    parser = add_command(commands, fetch)
    parser.add_argument("--only", nargs="+", choices=("inception", "faces"), help="for fid and kid, or for identity")


def pose(options: argparse.Namespace) -> None:
    """Average precision and recall of key points by OKS and by shape (CAP), and the error of the number of people."""
    found, truth = paired_people(options.generated, options.true)
    scores = pose_scores(found, truth, options.compat)
    people = scores.pop("people")
    print(table([{"measure": name, **values} for name, values in scores.items()]))
    print()
    print(table([{"pictures": len(truth), **people}]))
    _write(options, {"pictures": len(truth), **scores, "people": people})


def _add_pose(commands) -> None:
    parser = _add(commands, pose)
    parser.add_argument("generated", type=Path, help="key points found on generated pictures: a folder or a COCO file")
    parser.add_argument("true", type=Path, help="those they were made for, files of the same names")
    parser.add_argument(
        "--compat", choices=("reference",), help="areas, batches of 10 and counts as in HumanSD's program"
    )


def frechet(options: argparse.Namespace) -> None:
    """Frechet distance of Inception features (FID) of two folders."""
    features = _features(options, _folders(options))
    row = {"FID": fid(*features), "generated": len(features[0]), "real": len(features[1])}
    print(table([row]))
    if min(map(len, features)) < FEW:
        print(f"fewer than {FEW} pictures a side: FID is biased upwards; compare equal numbers only, or use kid")
    _write(options, {**row, "resize": options.resize})


def _add_fid(commands) -> None:
    _add_folders(_add(commands, frechet, "fid"))


def kernel(options: argparse.Namespace) -> None:
    """Kernel distance of Inception features (KID) of two folders; unbiased, so fit for few pictures."""
    folders = _folders(options)
    counts = [len(paths) for paths in folders]
    size = options.size if options.size is not None else min(KID_SIZE, *counts)
    check_subsets(options.subsets, size, min(counts))
    features = _features(options, folders)
    mean, deviation = kid(*features, subsets=options.subsets, size=size, seed=options.seed)
    row = {"KID": mean, "deviation": deviation, "subset": size, "generated": counts[0], "real": counts[1]}
    print(table([row]))
    _write(options, {**row, "resize": options.resize, "subsets": options.subsets, "seed": options.seed})


def _add_kid(commands) -> None:
    parser = _add(commands, kernel, "kid")
    _add_folders(parser)
    parser.add_argument("--subsets", type=int, default=KID_SUBSETS, help=f"random subsets (default {KID_SUBSETS})")
    parser.add_argument("--size", type=int, help=f"pictures of each (default {KID_SIZE}, or all if there are fewer)")
    parser.add_argument("--seed", type=int, default=0, help="of the subsets (default 0)")


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("generated", type=Path, help="folder of pictures")
    parser.add_argument("real", type=Path, help="folder of pictures")
    parser.add_argument(
        "--resize", choices=get_args(Resize), default="tensorflow", help="to 299 pixels (default tensorflow)"
    )
    _add_batch_size(parser)


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time (default 16)")


def _folders(options: argparse.Namespace) -> list[list[Path]]:
    found = [list_pictures(folder) for folder in (options.generated, options.real)]
    for folder, paths in zip((options.generated, options.real), found, strict=True):
        if len(paths) < 2:
            raise ValueError(f"{folder} holds one picture; a distance of sets needs at least 2")
    return found


def _features(options: argparse.Namespace, folders: Sequence[Sequence[Path]]) -> list[np.ndarray]:
    params = load_inception()
    bars = [tqdm(read_pictures(paths), str(paths[0].parent), len(paths)) for paths in folders]
    return [picture_features(params, bar, options.batch_size, options.resize) for bar in bars]


def clip(options: argparse.Namespace) -> None:
    """CLIP similarity of pictures and their captions: 100 times the cosine, at least 0."""
    paths = list_pictures(options.pictures)
    captions = captions_for(paths, options.captions)
    model = load_clip(options.model)
    progress = tqdm(read_pictures(paths), str(options.pictures), len(paths))
    values = clip_similarities(model, progress, captions, options.batch_size)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    row = {"CLIP similarity": float(values.mean()), "standard error": error, "pictures": len(values)}
    print(table([row]))
    named = {path.name: float(value) for path, value in zip(paths, values, strict=True)}
    _write(options, {**row, "model": str(options.model), "by_picture": named})


def _add_clip(commands) -> None:
    parser = _add(commands, clip)
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help=".txt, .json or metadata.jsonl")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a CLIPModel of transformers")
    _add_batch_size(parser)


def plan(options: argparse.Namespace) -> None:
    """List the pictures that a subject model is to be measured on: every group of people x prompt x instance."""
    prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    nouns = NOUNS if options.nouns is None else read_json(options.nouns)
    planned = plan_pictures(
        find_subjects(options.subjects), prompts, options.people, options.instances, options.seed, nouns
    )
    write_plan(options.out, planned)
    print(f"{len(planned)} pictures of {options.people} each: {options.out}")
    print(f"draw them: python sample.py --system facediffuser --plan {options.out} ...")


def _add_plan(commands) -> None:
    parser = add_command(commands, plan)
    parser.add_argument("subjects", type=Path, help="a folder with a folder of pictures for each person")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="a line each, as in: a {noun} <|image|> in a hat"
    )
    parser.add_argument("--people", type=int, default=1, help="on each picture, markers in each prompt (default 1)")
    parser.add_argument("--instances", type=int, default=INSTANCES, help=f"of each prompt (default {INSTANCES})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the first of them (default {SEED})")
    parser.add_argument(
        "--nouns", type=Path, metavar="FILE", help='.json, {"000001": "man", ...} (default: the published 15 of CelebA)'
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .jsonl file")


def identity(options: argparse.Namespace) -> None:
    """Likeness of the people on drawn pictures to their references: least cosine after greedy matching, at least 0."""
    planned = read_plan(options.plan)
    missing = [row.image for row in planned if not (options.pictures / row.image).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{options.pictures} lacks {len(missing)} of the {len(planned)} pictures, first {missing[0]}"
        )
    embed = OpenFaceEmbedder()
    empty = embed.empty if options.compat else None
    paths = sorted({Path(name) for row in planned for name in row.references})
    known = reference_embeddings(embed, [read_image(path) for path in paths], [str(path) for path in paths])
    people = dict(zip(map(str, paths), known, strict=True))
    found, short = {}, 0
    for row in tqdm(planned, str(options.pictures)):
        faces = embed(read_image(options.pictures / row.image))
        short += len(faces) < len(row.references)
        references = np.stack([people[str(Path(name))] for name in row.references])
        found[row.image] = identity_similarity(faces, references, empty)
    values = np.array(list(found.values()))
    figures = {"identity": float(values.mean()), "deviation": float(values.std()), "pictures": len(values)}
    row = {**figures, "too few faces": short}
    print(table([row]))
    _write(options, {**row, "by_picture": found})


def _add_identity(commands) -> None:
    parser = _add(commands, identity)
    parser.add_argument("pictures", type=Path, help="folder of pictures, with the names of the plan")
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="of `plan`: who is on each picture")
    parser.add_argument(
        "--compat", choices=("reference",), help="a person without a face is matched with a black picture, not with 0"
    )


def _add(commands, run, name: str | None = None) -> argparse.ArgumentParser:
    parser = add_command(commands, run, name)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def _write(options: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    if options.json is not None:
        write_json(options.json, _plain(figures))
        print(f"written: {options.json}")


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is undefined becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run; `arguments` default to the command line's. Exit codes: 0, 2 (cannot run)."""
    choose_cpu_kernels()
    keep_compiled_programs()
    subcommands = (_add_fetch, _add_pose, _add_fid, _add_kid, _add_clip, _add_plan, _add_identity)
    run_commands("python -m fairhuman_jax.evaluate", __doc__, subcommands, arguments)


if __name__ == "__main__":
    main()
