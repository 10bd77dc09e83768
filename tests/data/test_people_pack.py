from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

from fairhuman_jax.data.people import palette
from fairhuman_jax.data.people.pack import HAND_L, HAND_R, PeoplePack, pack_bytes
from fairhuman_jax.data.people.shape import factor_weights, shape_body, torso_vertices
from fairhuman_jax.data.people.spec import raised_sides, sample_spec

PLAIN = {
    "gender": 0.0,
    "age": 0.0,
    "muscle": 0.5,
    "weight": 0.5,
    "height": 0.5,
    "proportions": 0.5,
    "ancestry": [0, 0, 1],
    "face": [0.0] * 16,
}


@pytest.fixture(scope="module")
def pack() -> PeoplePack:
    return PeoplePack.load()


def test_pack_is_the_recorded_file():
    notice = resources.files("fairhuman_jax.data.people").joinpath("PEOPLE_PACK_NOTICE").read_text()
    recorded = notice.split("sha256:")[1].split()[0]
    assert hashlib.sha256(pack_bytes()).hexdigest() == recorded


def test_pack_loads_without_torch():
    code = (
        "import sys; from fairhuman_jax.data.people import pack, posing, spec; pack.PeoplePack.load();"
        "print(sorted({'torch', 'scipy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_pack_shapes(pack):
    v, f = len(pack.verts), len(pack.faces)
    assert 4000 < v < 5000 and 8000 < f < 9000
    assert pack.shape_basis.shape == (24, v, 3) and pack.face_basis.shape == (16, v, 3)
    assert pack.joints.shape == (92, 3) and pack.parents.shape == (77,) and len(pack.names["points"]) == 15
    assert pack.phen_mask.shape == (192, 17) and pack.phen_proj.shape == (192, 24)
    assert (pack.parents[1:] < np.arange(1, 77)).all()
    np.testing.assert_allclose(pack.weights.sum(1), 1, atol=1e-6)
    assert np.bincount(pack.face_part, minlength=11).min() > 0
    assert pack.verts.dtype == pack.shape_basis.dtype == np.float32


def test_left_is_plus_x_and_faces_are_outward(pack):
    assert pack.verts[pack.part_vertices(HAND_L), 0].min() > 0 > pack.verts[pack.part_vertices(HAND_R), 0].max()
    assert pack.canon[pack.mark["nose"], 1] < pack.joints[pack.bone["head"], 1]
    a, b, c = (pack.verts[pack.faces[pack.face_part == HAND_L, i]] for i in range(3))
    volume = np.einsum("ij,ij->i", a - a.mean(0), np.cross(b - a.mean(0), c - a.mean(0))).sum() / 6
    assert volume > 1e-4


def test_mesh_mirrors_left_to_right(pack):
    left = pack.joints[[i for n, i in pack.point.items() if n.endswith(".L")]]
    right = pack.joints[[i for n, i in pack.point.items() if n.endswith(".R")]]
    np.testing.assert_allclose(left, right * [-1, 1, 1], atol=2e-3)


def test_shape_of_the_mean_weights_is_the_mean_adult(pack):
    w = np.where(pack.phen_mask, factor_weights(PLAIN), 1).prod(1)
    c = w @ pack.phen_proj - pack.phen_c0
    shaped = shape_body(pack, PLAIN)
    expected = pack.verts + np.einsum("r,rvk->vk", c, pack.shape_basis)
    np.testing.assert_allclose(shaped.vertices, expected, atol=1e-5)
    # Four independent groups of terms, each weighted to 1 in all: universal, ancestry, height, proportions.
    assert w.sum() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize(("factor", "axis"), [("height", 2), ("weight", 1)])
def test_phenotype_grows_the_right_way(pack, factor, axis):
    vertices = torso_vertices(pack)
    small, large = (np.ptp(shape_body(pack, PLAIN | {factor: x}).vertices[vertices, axis]) for x in (0.2, 0.8))
    assert large > 1.03 * small


def test_expression_moves_the_face_only(pack):
    rest, open_mouth = shape_body(pack, PLAIN), shape_body(pack, PLAIN, {"open": 1.0})
    moved = np.linalg.norm(open_mouth.vertices - rest.vertices, axis=1)
    assert moved[pack.mark["chin"]] > 0.005
    assert moved[pack.part_vertices(HAND_L, HAND_R)].max() == 0
    with pytest.raises(KeyError):
        shape_body(pack, PLAIN, {"sneeze": 1.0})


def test_spec_is_a_function_of_seed_and_index():
    a = sample_spec(3, 11)
    assert json.loads(json.dumps(a)) == a == sample_spec(3, 11)
    for part in ("identity", "outfit", "pose", "camera", "light", "background"):
        assert a[part] != sample_spec(3, 12)[part] and a[part] != sample_spec(4, 11)[part], part


def test_identity_can_be_drawn_again():
    a, b = sample_spec(0, 1), sample_spec(0, 2, identity=(0, 1))
    assert a["identity"] == b["identity"] and a["identity_hash"] == b["identity_hash"]
    assert b["pose"] == sample_spec(0, 2)["pose"] and b["light"] == sample_spec(0, 2)["light"]
    assert b["identity_hash"] != sample_spec(0, 2)["identity_hash"]


def test_framing_shares():
    n = 500
    framings = [sample_spec(0, i)["camera"]["framing"] for i in range(n)]
    for name, share in palette.FRAMINGS.items():
        assert abs(framings.count(name) - n * share) <= 3 * (n * share * (1 - share)) ** 0.5, name
    assert sum(palette.FRAMINGS.values()) == pytest.approx(1)


def test_framing_can_be_forced_and_is_checked():
    assert sample_spec(0, 0, framing="portrait")["camera"]["framing"] == "portrait"
    with pytest.raises(ValueError, match="selfie"):
        sample_spec(0, 0, framing="selfie")


def test_clothes_differ_from_the_skin():
    for i in range(200):
        s = sample_spec(1, i)
        skin = np.asarray(palette.SKIN[s["identity"]["skin"]])
        outfit = s["outfit"]
        bottom = palette.TOPS if outfit["bottom"] == "dress" else palette.BOTTOMS
        colours = [palette.TOPS[outfit["top_colour"]], bottom[outfit["bottom_colour"]]]
        assert np.linalg.norm(np.asarray(colours) - skin, axis=1).min() >= 0.12
        assert outfit["top"] in palette.TOP_GARMENTS and outfit["bottom"] in palette.BOTTOM_GARMENTS


def test_close_ups_show_a_raised_hand():
    for i in range(60):
        s = sample_spec(2, i, framing="close-up of a hand")
        shown = raised_sides(s)
        assert s["camera"]["hand"] in shown or (not shown and s["pose"]["gesture"] == "crossed")
