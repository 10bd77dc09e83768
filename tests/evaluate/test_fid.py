"""FID and KID: closed forms, invariances, an independent formula, and the published program's cast."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fairhuman_jax.evaluate.fid import Gaussian, fid, frechet_distance, kid, reference_uint8, wrapped_uint8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def gaussian(seed, width=6):
    factor = normal(width, width, seed=seed)
    return Gaussian(normal(width, seed=seed + 100), factor @ factor.T)


def test_gaussians_with_commuting_covariances():
    """(m1 - m2)^2 + sum (s1 - s2)^2 over the common axes, turned into any direction."""
    turn = np.linalg.qr(normal(5, 5))[0]
    deviations = np.array([[1.0, 2.0, 0.5, 3.0, 0.0], [2.0, 1.0, 0.5, 0.0, 4.0]])
    first, second = (Gaussian(normal(5, seed=i), turn @ np.diag(d**2) @ turn.T) for i, d in enumerate(deviations))
    expected = np.square(first.mean - second.mean).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_matrix_root_of_scipy(seed):
    linalg = pytest.importorskip("scipy.linalg")
    first, second = gaussian(seed), gaussian(seed + 10)
    root = linalg.sqrtm(first.covariance @ second.covariance).real
    expected = np.square(first.mean - second.mean).sum()
    expected += np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)


def test_fewer_pictures_than_features():
    """The trace of the root is then the nuclear norm of X Y^T, of centred features over the root of n - 1."""
    x, y = normal(12, 40) * np.geomspace(1, 1e-3, 40), normal(9, 40, seed=1) + 0.3
    centred = [(features - features.mean(0)) / np.sqrt(len(features) - 1) for features in (x, y)]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + sum(np.square(c).sum() for c in centred) - 2 * overlap
    assert fid(x, y) == pytest.approx(expected, abs=1e-6)
    assert fid(x, x) == pytest.approx(0.0, abs=1e-6)
    assert fid(1e3 * x, 1e3 * y) == pytest.approx(1e6 * fid(x, y), rel=1e-6)
    assert fid(x, x + 2.0) == pytest.approx(4.0 * 40, rel=1e-6)


def test_order_and_direction_do_not_matter():
    x, y = normal(50, 7), normal(40, 7, seed=1) * 2
    turn = np.linalg.qr(normal(7, 7, seed=2))[0]
    assert fid(x[::-1], y) == pytest.approx(fid(x, y), rel=1e-9)
    assert fid(x @ turn, y @ turn) == pytest.approx(fid(x, y), rel=1e-9)


def test_kid_by_its_definition():
    x, y = normal(5, 3), normal(5, 3, seed=1) + 0.5

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = list(itertools.permutations(range(5), 2))
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 25
    assert kid(x, y, size=5) == (pytest.approx(within - 2 * across, rel=1e-9), 0.0)


def test_kid_is_unbiased_and_sees_a_difference():
    same, other = normal(400, 8), normal(400, 8, seed=1)
    mean, deviation = kid(same, other, subsets=200, size=20)
    assert abs(mean) < 4 * deviation / np.sqrt(200) + 0.02
    biased = (
        np.mean([(same[i : i + 20] @ same[i : i + 20].T / 8 + 1.0).diagonal() ** 3 for i in range(0, 400, 20)]) / 10
    )
    assert biased > 10 * abs(mean), "leaving in the pairs of an element with itself would show"
    moved, _ = kid(same, other + 1.0, subsets=20, size=100)
    assert moved > 1.0


def test_kid_subsets_follow_the_seed():
    x, y = normal(30, 4), normal(25, 4, seed=1)
    assert kid(x, y, 5, 10, seed=3) == kid(x, y, 5, 10, seed=3) != kid(x, y, 5, 10, seed=4)
    assert kid(x, y, 5, 10)[1] > 0


@pytest.mark.parametrize("measure", [fid, lambda x, y: kid(x, y, size=2)], ids=["fid", "kid"])
def test_bad_features(measure):
    x = normal(6, 3)
    broken = x.copy()
    broken[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"the second features: row 4 is not finite \(1 of 6 rows\)"):
        measure(x, broken)
    with pytest.raises(ValueError, match=r"the first features are \[1, 3\]; needs \[N, D\] with at least 2 rows"):
        measure(x[:1], x)
    with pytest.raises(ValueError, match="3 features on one side, 2 on the other"):
        measure(x, x[:, :2])


@pytest.mark.parametrize(("subsets", "size"), [(0, 3), (5, 7), (5, 1)])
def test_impossible_subsets(subsets, size):
    with pytest.raises(ValueError, match=f"KID: {subsets} subsets of {size}; choose at least 1 of 2 to 6 pictures"):
        kid(normal(6, 3), normal(8, 3), subsets, size)


def test_reference_wraps_around():
    """Values outside of [0, 1] wrap around in uint8, and so does white, as in HumanSD's program."""
    values = np.array([-2.1, -0.5, 0.2, 1.0, 1.5, 2.64], np.float32)
    assert wrapped_uint8(values).tolist() == [233, 129, 51, 255, 126, 161]
    white = reference_uint8(np.full((1, 1, 3), 255, np.uint8))
    assert white[0, 0].tolist() == [
        int((1 - m) / s * 255) % 256 for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    ]
