"""The embedded body: mesh, shape bases, skeleton and skin weights, read with numpy alone."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from importlib import resources

import numpy as np

PACK_FILE = "people_pack.npz"
UNIT = 5e-5  # metres per step of a stored position
BODY, HEAD, HAND_L, HAND_R, FOOT, EYE, HAIR, SKIRT, MOUTH, EYE_CAVITY, TEETH = range(11)


@dataclass(frozen=True, eq=False)
class PeoplePack:
    """Parametric adult: metres, z up, facing -y, the person's left is +x; float32 unless said otherwise.

    `verts` [V,3] mean adult at rest, `canon` [V,3] position used for painting, `faces` int32 [F,3]
    counter-clockwise from outside, `face_part` uint8 [F] (constants above), `shape_basis` [R,V,3],
    `phen_mask` bool [192,17], `phen_proj` [192,R], `phen_c0` [R], `face_basis` [16,V,3],
    `expr_basis` [9,V,3], `joints` [92,3] bone heads then extra points, `joint_shape` [R,92,3],
    `joint_face` [16,92,3], `weights` [V,4] sum 1, `weight_bones` int [V,4], `parents` int [77], -1 for the
    root, `marks` int [6], `names` dict of word lists.
    Derived: `bone`, `point`, `mark`, `expression` index by name (`point` covers bones and extra points),
    `levels` the bones of each depth, `point_bones` int [15] carriers of the extra points.
    """

    verts: np.ndarray
    canon: np.ndarray
    faces: np.ndarray
    face_part: np.ndarray
    shape_basis: np.ndarray
    phen_mask: np.ndarray
    phen_proj: np.ndarray
    phen_c0: np.ndarray
    face_basis: np.ndarray
    expr_basis: np.ndarray
    joints: np.ndarray
    joint_shape: np.ndarray
    joint_face: np.ndarray
    weights: np.ndarray
    weight_bones: np.ndarray
    parents: np.ndarray
    marks: np.ndarray
    names: dict[str, list]
    bone: dict[str, int]
    point: dict[str, int]
    mark: dict[str, int]
    expression: dict[str, int]
    levels: tuple[np.ndarray, ...]
    point_bones: np.ndarray

    @staticmethod
    def load() -> PeoplePack:
        """The pack shipped with the package, read once per process. Source: MakeHuman and Face Units, CC0."""
        return _load()

    def part_vertices(self, *parts: int) -> np.ndarray:
        """Bool [V]: vertices used by triangles of these parts."""
        used = np.zeros(len(self.verts), bool)
        used[self.faces[np.isin(self.face_part, parts)]] = True
        return used


def pack_bytes() -> bytes:
    """The pack file as shipped; FileNotFoundError when the package data was not installed."""
    return resources.files(__name__.rpartition(".")[0]).joinpath(PACK_FILE).read_bytes()


@functools.cache
def _load() -> PeoplePack:
    with np.load(io.BytesIO(pack_bytes()), allow_pickle=False) as raw:
        return _decode({k: raw[k] for k in raw.files})


def _decode(raw: dict[str, np.ndarray]) -> PeoplePack:
    names = json.loads(raw["names"].tobytes().decode())
    parents = raw["parents"].astype(np.intp)

    weights = raw["weights"].astype(np.float32) / np.float32(255)
    joint_shape = raw["joint_shape"].astype(np.float32)

    def basis(name: str) -> np.ndarray:
        return raw[f"{name}_basis"].astype(np.float32) * raw[f"{name}_scale"][:, None, None]

    # The file keeps the phenotype basis as what is left after each vertex has followed its bones' heads:
    # a body's height would otherwise use up the eight bits and leave steps of millimetres on faces.
    follow = np.einsum("vk,rvkc->rvc", weights, joint_shape[:, raw["weight_bones"]])

    depth = np.zeros(len(parents), int)
    for b in range(1, len(parents)):
        depth[b] = depth[parents[b]] + 1
    fields = {
        "verts": raw["verts"] * np.float32(UNIT),
        "canon": raw["canon"] * np.float32(UNIT),
        "faces": raw["faces"].astype(np.int32),
        "shape_basis": basis("shape") + follow,
        "face_basis": basis("face"),
        "expr_basis": basis("expr"),
        "joint_shape": joint_shape,
        "joint_face": raw["joint_face"].astype(np.float32),
        "weights": weights,
        "weight_bones": raw["weight_bones"].astype(np.intp),
        "parents": parents,
        "marks": raw["marks"].astype(np.intp),
    }
    fields |= {k: raw[k] for k in ("face_part", "phen_mask", "phen_proj", "phen_c0", "joints")}
    for array in fields.values():
        array.setflags(write=False)
    return PeoplePack(
        **fields,
        names=names,
        bone={n: i for i, n in enumerate(names["bones"])},
        point={n: i for i, n in enumerate(names["bones"] + names["points"])},
        mark=dict(zip(names["marks"], map(int, fields["marks"]), strict=True)),
        expression={n: i for i, n in enumerate(names["expressions"])},
        levels=tuple(np.flatnonzero(depth == d) for d in range(depth.max() + 1)),
        point_bones=np.asarray(names["point_bones"], np.intp),
    )
