"""Distances between two sets of features: FID and KID, in float64 on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KID_SUBSETS, KID_SIZE = 100, 1000
IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and sample covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, name: str = "features") -> Gaussian:
        """The Gaussian of features [N, D]. Raises: ValueError for fewer than 2 rows; values that are not finite."""
        checked = _checked(features, name)
        return cls(checked.mean(0), np.cov(checked, rowvar=False).reshape(checked.shape[1], -1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0.

    The trace of the root is that of the roots of the eigenvalues of R^T S2 R with S1 = R R^T, a symmetric matrix, so
    covariances of less than full rank need no jitter. Raises: ValueError for another number of features. Source: Heusel
    et al. 2017.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"FID: {len(first.mean)} features on one side, {len(second.mean)} on the other")
    values, vectors = np.linalg.eigh(first.covariance)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])
    spectrum = np.linalg.eigvalsh(root.T @ second.covariance @ root)
    overlap = np.sqrt(np.clip(spectrum, 0.0, None)).sum()
    shift = np.square(first.mean - second.mean).sum()
    return float(max(0.0, shift + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * overlap))


def fid(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the Gaussians of two sets of features [N, D] and [M, D].

    With fewer rows than features it is biased upwards, the more the fewer there are: compare equal numbers only.
    Raises: ValueError, as `Gaussian.of` and `frechet_distance`.
    """
    return frechet_distance(Gaussian.of(first, "the first features"), Gaussian.of(second, "the second features"))


def kid(
    first: np.ndarray, second: np.ndarray, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the squared maximum mean discrepancy, without bias.

    Kernel (x.y / D + 1)^3; terms within a set leave out pairs of an element with itself, those between the sets take
    all pairs. Subsets are of `size` rows of each set, drawn without repetition; where that is all of both, one is
    taken. An unbiased estimate can be below 0. Published tables often print it times 10 or 1000.
    Raises: ValueError, as `fid`; sizes that the sets do not have. Source: Binkowski et al. 2018, equation 4.
    """
    x, y = _checked(first, "the first features"), _checked(second, "the second features")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"KID: {x.shape[1]} features on one side, {y.shape[1]} on the other")
    check_subsets(subsets, size, min(len(x), len(y)))
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(1 if size == len(x) == len(y) else subsets):
        rows = [generator.choice(len(features), size, replace=False) for features in (x, y)]
        found.append(_squared_discrepancy(x[rows[0]], y[rows[1]]))
    return float(np.mean(found)), float(np.std(found))


def check_subsets(subsets: int, size: int, count: int) -> None:
    """Refuses subsets that `count` rows a side do not have."""
    if not 2 <= size <= count or subsets < 1:
        raise ValueError(f"KID: {subsets} subsets of {size}; choose at least 1 of 2 to {count} pictures")


def _squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def within(a: np.ndarray) -> float:
        table = kernel(a, a)
        return (table.sum() - np.trace(table)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2.0 * kernel(x, y).mean()


def _checked(features: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or len(array) < 2:
        raise ValueError(f"{name} are {list(array.shape)}; needs [N, D] with at least 2 rows")
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise ValueError(f"{name}: row {bad[0]} is not finite ({len(bad)} of {len(array)} rows)")
    return array


def reference_uint8(pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [..., 3] as HumanSD's evaluation hands them to Inception, uint8: not a way to measure anything.

    Colours normalised for ImageNet are taken for ones in [0, 1], multiplied by 255 and cast, so what lies outside
    wraps around. Source: utils/metrics/quality_metrics.py.
    """
    colours = pictures.astype(np.float32) / 255.0
    return wrapped_uint8((colours - IMAGENET_MEAN) / IMAGENET_STD)


def wrapped_uint8(colours: np.ndarray) -> np.ndarray:
    """Float colours times 255, cut towards 0, modulo 256, as a CPU's cast to uint8 does it."""
    return (colours.astype(np.float32) * 255.0).astype(np.int64).astype(np.uint8)
