"""Rotation matrices and frames, batched and float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NEXT, _LAST = [1, 2, 0], [2, 0, 1]


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross product over the last axis (several times quicker than numpy's on small arrays)."""
    return a[..., _NEXT] * b[..., _LAST] - a[..., _LAST] * b[..., _NEXT]


def unit(a: np.ndarray) -> np.ndarray:
    """Vectors scaled to length 1 over the last axis."""
    return a / np.sqrt((a * a).sum(-1, keepdims=True))


def axis_angle(axis: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Rodrigues: R = I + sin(t) K + (1 - cos t) K^2 for unit axes [..., 3] and angles [...] in radians."""
    angle = np.asarray(angle, np.float32)[..., None, None]
    axis = np.asarray(axis, np.float32)
    k = np.zeros((*axis.shape[:-1], 3, 3), np.float32)
    k[..., 0, 1], k[..., 0, 2], k[..., 1, 2] = -axis[..., 2], axis[..., 1], -axis[..., 0]
    k[..., 1, 0], k[..., 2, 0], k[..., 2, 1] = axis[..., 2], -axis[..., 1], axis[..., 0]
    return np.eye(3, dtype=np.float32) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def rotation_vector(vector: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3] in radians; zero is the identity."""
    angle = np.sqrt((vector * vector).sum(-1))
    return axis_angle(vector / np.maximum(angle, 1e-12)[..., None], angle)


def euler(degrees: np.ndarray | Sequence[float]) -> np.ndarray:
    """R = Rz Ry Rx of angles [..., 3] = (x, y, z) in degrees."""
    axes = axis_angle(np.eye(3, dtype=np.float32), np.deg2rad(np.asarray(degrees, np.float32)))
    return axes[..., 2, :, :] @ axes[..., 1, :, :] @ axes[..., 0, :, :]


def frame(d: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Fr(d, q) = [d, q', d x q'] with unit columns, q' = q made perpendicular to d; not parallel."""
    d = unit(d)
    q = unit(q - (q * d).sum(-1, keepdims=True) * d)
    return np.stack([d, q, cross(d, q)], -1)


def twist_angle(rotation: np.ndarray, axis: np.ndarray) -> float:
    """Angle in radians, within +-pi, that `rotation` [3,3] turns about the unit `axis` (swing-twist).

    With trace T and skew part v = (R32-R23, R13-R31, R21-R12), tan(t/2) = v . axis / (1 + T).
    """
    r = rotation
    v = np.stack([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
    return float(2.0 * np.arctan2(v @ axis, 1.0 + np.trace(r)))
