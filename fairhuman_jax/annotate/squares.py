"""Turned squares of a picture, which networks look at: their geometry, cutting them out, and masks put back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates


@dataclass(frozen=True)
class Square:
    """A turned square of a picture: centre (x, y) and side in pixels; its up is the picture's up turned clockwise by
    `angle` (radians). Unit coordinates run over it from (0, 0), its top left corner, to (1, 1)."""

    centre: tuple[float, float]
    side: float
    angle: float = 0.0

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """Pixels (x, y) of points [..., 2] in unit coordinates."""
        return (points - 0.5) @ self._turn().T * self.side + self.centre

    def from_picture(self, points: np.ndarray) -> np.ndarray:
        """Unit coordinates of points [..., 2] in pixels."""
        return (points - self.centre) @ self._turn() / self.side + 0.5

    def _turn(self) -> np.ndarray:
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.array([[cos, -sin], [sin, cos]])


def check_picture(picture: np.ndarray) -> None:
    """Refuses what is no picture uint8 [H, W, 3]."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(f"a picture is uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")


def letterbox(height: int, width: int) -> Square:
    """The upright square around a whole picture."""
    return Square((width / 2, height / 2), max(height, width))


def cut(picture: np.ndarray, square: Square, side: int, outside: str) -> np.ndarray:
    """What `square` shows of a picture uint8 [H, W, 3], as float32 [side, side, 3] in [0, 1].

    outside: "black", or "edge" for the nearest pixel of the picture. Bilinear, after box averages where it shrinks.
    """
    factor = max(1, int(square.side / side))
    if factor > 1:
        picture = np.asarray(Image.fromarray(picture).reduce(factor))
    at = square.to_picture(cell_centres(side, side) / side) / factor
    mode = "grid-constant" if outside == "black" else "nearest"
    return np.stack([_bilinear(picture[..., i], at, mode) for i in range(3)], axis=-1) / 255


def paste(mask: np.ndarray, square: Square, height: int, width: int) -> np.ndarray:
    """A mask [S, S] that covers `square`, on a picture: float32 [height, width, 1], 0 outside the square."""
    at = square.from_picture(cell_centres(height, width)) * len(mask)
    return _bilinear(mask, at, "grid-constant")[..., None]


def _bilinear(layer: np.ndarray, at: np.ndarray, mode: str) -> np.ndarray:
    """Values float32 [h, w] of a layer [H, W] at points [h, w, 2] (x, y), pixel centres at +.5."""
    return map_coordinates(layer, np.moveaxis(at[..., ::-1], 2, 0) - 0.5, np.float32, order=1, mode=mode)


def cell_centres(height: int, width: int) -> np.ndarray:
    """Centres (x, y) of the cells of a grid, of pixels for one, [height, width, 2]."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.stack([columns, rows], axis=-1)
