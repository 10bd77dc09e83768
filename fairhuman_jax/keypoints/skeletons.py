"""Control images: skeletons, hands, face points and hand depth on black, in the styles of OpenPose and HumanSD.

Points are (x, y) or (x, y, confidence) in pixels, pixel centres at +.5; a point belongs to the pixel that holds it.
Nothing is smoothed, so a picture is a function of its points to the bit, on every machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]
FARTHEST = 1e5
FAR_HAND = 0.2  # value of the farthest pixel of a hand; the nearest is 1


@dataclass(frozen=True)
class BodyStyle:
    """How bodies are drawn, in pixels of a picture whose short side is `side`.

    limbs: pairs of points; limb_colours: one for each of them. shape: "ellipse" (joints lie at the ends of its long
    axis) or "line" (of constant width, with a disc of the limb's colour at both ends); half_width: of either. fade:
    what the limbs' colours are multiplied with, after all limbs of all people. joint_colours: of the discs drawn last,
    empty for none; joint_radius: of all discs. A point is there if both coordinates exceed `least` and its confidence
    exceeds `threshold`.
    """

    side: int
    limbs: tuple[tuple[int, int], ...]
    limb_colours: tuple[Colour, ...]
    joint_colours: tuple[Colour, ...]
    shape: str
    half_width: int
    joint_radius: int
    fade: float
    least: float
    threshold: float


def hue_circle(count: int, lightness: float, saturation: float, first: float) -> tuple[Colour, ...]:
    """`count` colours of equal lightness at hues first + i / count, channels cut to integers."""
    colours = (colorsys.hls_to_rgb((first + i / count) % 1.0, lightness, saturation) for i in range(count))
    return tuple((int(255 * r), int(255 * g), int(255 * b)) for r, g, b in colours)


OPENPOSE_PALETTE: tuple[Colour, ...] = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
OPENPOSE18 = BodyStyle(
    side=1024,
    limbs=(
        (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
        (0, 14), (14, 16), (0, 15), (15, 17),
    ),
    limb_colours=OPENPOSE_PALETTE[:17],
    joint_colours=OPENPOSE_PALETTE,
    shape="ellipse",
    half_width=4,
    joint_radius=4,
    fade=0.6,
    least=0.01,
    threshold=0.0,
)  # fmt: skip
HUMANSD17 = BodyStyle(
    side=512,
    limbs=(
        (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (6, 8), (7, 9), (8, 10), (5, 11), (6, 12), (11, 13),
        (12, 14), (13, 15), (14, 16),
    ),
    limb_colours=hue_circle(16, 0.6, 0.65, 0.01),
    joint_colours=(),
    shape="line",
    half_width=5,
    joint_radius=5,
    fade=1.0,
    least=-math.inf,
    threshold=0.05,
)  # fmt: skip
# Wrist to tip of thumb, index, middle, ring and little finger.
HAND_BONES = tuple((0 if k == 0 else 4 * f + k, 4 * f + k + 1) for f in range(5) for k in range(4))
HAND_COLOURS: tuple[Colour, ...] = tuple(
    (round(255 * r), round(255 * g), round(255 * b))
    for r, g, b in (colorsys.hsv_to_rgb(i / 20, 1, 1) for i in range(20))
)
HAND_JOINT_COLOUR: Colour = (0, 0, 255)
FACE_COLOUR: Colour = (255, 255, 255)
HAND_HALF_WIDTH, HAND_RADIUS, FACE_RADIUS = 1, 4, 3
CIRCLE = np.stack([np.cos(np.radians(np.arange(360))), np.sin(np.radians(np.arange(360)))], axis=1)


def control_image(
    size: tuple[int, int],
    bodies: Iterable[np.ndarray] = (),
    hands: Iterable[np.ndarray] = (),
    faces: Iterable[np.ndarray] = (),
    hand_depth: np.ndarray | None = None,
    mesh_hands: Iterable[np.ndarray] = (),
    scale: float | None = None,
) -> np.ndarray:
    """FairHuman's control image, uint8 [H, W, 3] for size (H, W), its five layers in the order of the arguments.

    bodies: OpenPose-18 [18, 2 or 3] each; hands: [21, 2 or 3] each, wrist first, then four points a finger from the
    thumb; faces: any number of points; hand_depth: float [H, W, 1], as `relative_depth` gives it, 0 outside hands;
    mesh_hands: as hands, but known as exactly as the depth and drawn over it.
    `scale` 1 draws the published sizes, made for pictures of about 1024 pixels; None: short side / 1024. No limb
    becomes thinner than three pixels, no bone thinner than one. Source: FairHuman, preprocessor/preprocess.py.
    """
    scale = _scale(size, OPENPOSE18, scale)
    canvas = draw_bodies(np.zeros((*size, 3), np.uint8), bodies, OPENPOSE18, scale)
    for hand in hands:
        draw_hand(canvas, hand, scale)
    for face in faces:
        points, there = _present(face)
        _discs(canvas, points[there], FACE_COLOUR, int(FACE_RADIUS * scale))
    if hand_depth is not None:
        grey = np.rint(255 * hand_depth).astype(np.uint8)
        np.copyto(canvas, grey, where=grey > 0)
    for hand in mesh_hands:
        draw_hand(canvas, hand, scale)
    return canvas


def draw_bodies(
    canvas: np.ndarray, people: Iterable[np.ndarray], style: BodyStyle, scale: float | None = None
) -> np.ndarray:
    """Draws people [K, 2 or 3] on `canvas` uint8 [H, W, 3], which is changed (and faded with the limbs), and returned.

    `scale` 1 draws the style's own sizes; None: short side / style.side. Shapes are cut at the picture's border.
    HumanSD trains with `threshold` 0.02 and samples with 0.05.
    Source: DWPose (OpenPose's style) and HumanSD's pose drawing.
    """
    scale = _scale(canvas.shape[:2], style, scale)
    half_width, radius = max(1, int(style.half_width * scale)), max(1, int(style.joint_radius * scale))
    known = [_present(person, style.least, style.threshold) for person in people]
    if style.shape == "ellipse":
        drawn = [
            (_ellipse(points[first], points[last], half_width), colour)
            for (first, last), colour in zip(style.limbs, style.limb_colours, strict=True)
            for points, there in known
            if there[first] and there[last]
        ]
        _polygons(canvas, drawn)
    else:
        for points, there in known:
            for limb, colour in zip(style.limbs, style.limb_colours, strict=True):
                if there[list(limb)].all():
                    _polygons(canvas, [(_rectangle(points[limb[0]], points[limb[1]], half_width), colour)])
                    _discs(canvas, points[list(limb)], colour, radius)
    if style.fade != 1.0:
        canvas[:] = canvas * style.fade
    if style.joint_colours:
        for points, there in known:
            _discs(canvas, points[there], np.array(style.joint_colours)[there, None], radius)
    return canvas


def draw_hand(canvas: np.ndarray, hand: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Draws one hand [21, 2 or 3] on `canvas` uint8 [H, W, 3], which is changed, and returned: 20 bones in the hues of
    the colour circle, thumb first, and blue joints. `scale` as in `control_image`."""
    scale = _scale(canvas.shape[:2], OPENPOSE18, scale)
    points, there = _present(hand)
    half_width = int(HAND_HALF_WIDTH * scale)
    bones = [
        (_rectangle(points[first], points[last], half_width), colour)
        for (first, last), colour in zip(HAND_BONES, HAND_COLOURS, strict=True)
        if there[first] and there[last]
    ]
    _polygons(canvas, bones)
    _discs(canvas, points[there], HAND_JOINT_COLOUR, int(HAND_RADIUS * scale))
    return canvas


def relative_depth(depth: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """1 - .8 (z - z_min) / (z_max - z_min) of the pixels `inside` one hand (nearest 1, farthest .2), 0 elsewhere.

    `depth` float (any unit, larger is farther) and `inside` bool of one shape; float32. A hand of one depth is 1.
    """
    out = np.zeros(depth.shape, np.float32)
    if inside.any():
        z = depth[inside]
        out[inside] = 1 - (1 - FAR_HAND) * (z - z.min()) / max(float(z.max() - z.min()), 1e-6)
    return out


def _scale(size: Sequence[int], style: BodyStyle, scale: float | None) -> float:
    return min(size) / style.side if scale is None else scale


def _present(
    points: np.ndarray, least: float = OPENPOSE18.least, threshold: float = OPENPOSE18.threshold
) -> tuple[np.ndarray, np.ndarray]:
    """(x and y of each point [K, 2]; whether it is there, bool [K])."""
    points = np.asarray(points, np.float64)
    there = np.all(np.isfinite(points), axis=1) & np.all(points[:, :2] > least, axis=1)
    there = there & (points[:, 2] > threshold) if points.shape[1] > 2 else there
    # Far points are cut, or a line to them would be as long as they are far.
    return np.clip(np.where(there[:, None], points[:, :2], 0), -FARTHEST, FARTHEST), there


def _discs(canvas: np.ndarray, points: np.ndarray, colours: np.ndarray | Colour, radius: int) -> None:
    """Discs x^2 + y^2 <= radius^2 about pixels [N, 2], later over earlier, of one colour or of colours [N, 1, 3]."""
    points = points.astype(np.int64)
    y, x = np.nonzero(np.square(np.mgrid[-radius : radius + 1, -radius : radius + 1]).sum(axis=0) <= radius**2)
    y, x = y - radius, x - radius
    columns, rows = points[:, :1] + x, points[:, 1:] + y
    inside = (columns >= 0) & (columns < canvas.shape[1]) & (rows >= 0) & (rows < canvas.shape[0])
    canvas[rows[inside], columns[inside]] = np.broadcast_to(colours, (*inside.shape, 3))[inside]


def _rectangle(first: np.ndarray, last: np.ndarray, half_width: int) -> np.ndarray:
    """Corners [4, 2] of all within `half_width` of the segment between two pixels, across it."""
    first, last = np.trunc(first), np.trunc(last)
    x, y = (last - first).tolist()
    across = half_width / max(math.hypot(x, y), 1e-9) * np.array([y, -x])
    return np.array([first + across, last + across, last - across, first - across])


def _ellipse(first: np.ndarray, last: np.ndarray, half_width: int) -> np.ndarray:
    """Corners [360, 2], each a whole pixel, of the ellipse with its long axis from joint to joint; as in the original,
    centre, half-length and angle in degrees are cut to integers."""
    x, y = (first - last).tolist()
    half_length, angle = int(math.hypot(x, y) / 2), math.radians(int(math.degrees(math.atan2(y, x))))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.trunc((first + last) / 2) + np.rint(CIRCLE * (half_length, half_width) @ turn)


def _polygons(canvas: np.ndarray, polygons: list[tuple[np.ndarray, Colour]]) -> None:
    """Filled convex polygons, (corners [N, 2] of one N, colour) each, with their outlines; later over earlier.

    An outline steps pixel by pixel along each edge's longer axis and rounds the other; a row is filled from its first
    to its last pixel, of the outline or where an edge crosses it.
    """
    if not polygons:
        return
    height, width = canvas.shape[:2]
    start = np.stack([corners for corners, _ in polygons])
    span = (np.roll(start, -1, axis=1) - start).reshape(-1, 2)
    by_row, by_column = (_steps(start.reshape(-1, 2), span, axis) for axis in (1, 0))
    edge, columns, rows = np.concatenate([by_row, by_column], axis=1)
    shown = (rows >= 0) & (rows < height)
    line = edge[shown] // start.shape[1] * height + rows[shown]
    first, last = np.full(len(polygons) * height, width), np.full(len(polygons) * height, -1)
    np.minimum.at(first, line, columns[shown])
    np.maximum.at(last, line, columns[shown])
    first, last = np.maximum(first, 0), np.minimum(last, width - 1)
    count = np.maximum(last - first + 1, 0)
    line = np.repeat(np.arange(len(count)), count)
    columns = np.arange(len(line)) - (np.cumsum(count) - count - first)[line]
    canvas[line % height, columns] = np.array([colour for _, colour in polygons], np.uint8)[line // height]


def _steps(start: np.ndarray, span: np.ndarray, axis: int) -> np.ndarray:
    """(edge, column, row) [3, M] of a pixel for each step along `axis` of the edges from `start` over `span` [N, 2];
    along x, of those edges alone that are longer in x."""
    used = np.arange(len(span)) if axis else np.flatnonzero(np.abs(span[:, 0]) >= np.abs(span[:, 1]))
    begin = np.rint(start[used, axis])
    length = np.rint(start[used, axis] + span[used, axis]) - begin
    steps = np.abs(length).astype(np.int64) + 1
    ends = np.cumsum(steps)
    each = np.repeat(np.arange(len(used)), steps)
    count = np.arange(len(each)) - (ends - steps)[each]
    along = begin[each] + count * np.sign(length)[each]
    share = count / np.maximum(steps - 1, 1)[each]
    across = np.rint(start[used, 1 - axis][each] + share * span[used, 1 - axis][each])
    pixel = (across, along) if axis else (along, across)
    return np.stack([used[each], *pixel]).astype(np.int64)
