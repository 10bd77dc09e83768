"""The picture of one object: squares, the zoom, and what each random change does to it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.data import object_augmentation
from fairhuman_jax.data.object_augmentation import PROBABILITIES, augmented, bend, squared, zoom


@pytest.mark.parametrize(("height", "width"), [(20, 20), (20, 9), (9, 20)])
def test_squares_are_black_on_both_sides(height, width):
    out = squared(np.full((height, width, 3), 255, np.uint8), 20)
    rows, columns = (np.flatnonzero((out > 0).any((axis, 2))) for axis in (1, 0))
    assert (len(rows), len(columns)) == (height, width) and (out[rows][:, columns] == 255).all()
    assert rows[0] == (20 - height) // 2 and columns[0] == (20 - width) // 2
    crop = np.random.default_rng(0).integers(0, 256, (21, 10, 3), np.uint8)
    published = squared(crop, 21, "reference")
    own = squared(crop, 21)
    np.testing.assert_array_equal(own[:, 5:15], crop)
    assert not np.array_equal(published, own)  # 20 pixels wide, stretched to 21


def test_the_zoom_enlarges_the_upper_middle_and_the_published_one_nothing():
    crop = np.zeros((40, 20, 3), np.uint8)
    crop[..., 0], crop[..., 1] = np.arange(40)[:, None], np.arange(20)
    part = zoom(crop, 2.0)
    assert part.shape == (10, 10, 3)
    np.testing.assert_array_equal(part, crop[:10, 5:15])
    np.testing.assert_array_equal(zoom(crop, 1.0), crop[:20])
    np.testing.assert_array_equal(zoom(crop.swapaxes(0, 1), 2.0), crop.swapaxes(0, 1)[:10, 10:30])
    published = zoom(crop, 2.0, "reference")
    assert published.shape == (40, 40, 3)
    again = np.asarray(Image.fromarray(published).resize((20, 20), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(again.astype(int), crop[:20], atol=1)
    wide = zoom(crop[:10], 1.5, "reference")
    assert wide.shape == (15, 30, 3)


def test_bending_moves_pixels_a_little():
    """Displacements are blurred noise of less than a pixel's deviation at the published strength."""
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 64, 0).repeat(3, -1)
    moved = (bend(ramp, np.random.default_rng(0)).astype(float) - ramp)[8:-8, 8:-8, 0] / 3
    assert 0.5 < moved.std() < 1.5 and np.abs(np.diff(moved, axis=0)).max() < 0.8
    assert (bend(np.full((32, 32, 3), 90, np.uint8), np.random.default_rng(0))[4:-4, 4:-4] == 90).all()


def test_changes_happen_as_often_as_published():
    """Turns leave black corners, greys have three equal channels, colours go from the flat crop's own."""
    flat = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    outs = [augmented(flat, 64, np.random.default_rng(seed)) for seed in range(200)]
    assert all(out.shape == (64, 64, 3) and out.dtype == np.uint8 for out in outs)
    turned = np.mean([(out[[0, 0, -1, -1], [0, -1, 0, -1]] < 9).all() for out in outs])
    middle = np.array([out[32, 32].astype(int) for out in outs])
    grey = (np.ptp(middle, axis=1) <= 2).mean()
    changed = (np.abs(middle - (200, 40, 40)).max(1) > 4).mean()
    # Small turns leave corners that are not quite black: with probabilities of .5, .75, .9 the share is .36, .54, .65.
    assert abs(turned - 0.54) < 0.1 and abs(grey - 0.1) < 0.07 and abs(changed - (1 - 0.5 * 0.9)) < 0.1
    assert PROBABILITIES[0] == PROBABILITIES[3] == PROBABILITIES[5] == PROBABILITIES[6] == 0.5


CHANGES = ("zoomed", "turned", "recoloured", "blurred", "grey", "mirrored", "bent")


@pytest.mark.parametrize("change", ["nothing", *CHANGES])
def test_each_change_alone_does_what_it_says(change, monkeypatch):
    monkeypatch.setattr(object_augmentation, "PROBABILITIES", tuple(float(name == change) for name in CHANGES))
    crop = np.asarray(Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)).resize((24, 24)))
    out, rng, plain = augmented(crop, 24, np.random.default_rng(0)), np.random.default_rng(0), crop.astype(float)
    rng.random(7)
    middle = slice(8, 16), slice(8, 16)
    if change in ("nothing", "mirrored", "zoomed"):
        factor = rng.uniform(1, 2)
        expected = {"nothing": crop, "mirrored": crop[:, ::-1], "zoomed": squared(zoom(crop, factor), 24)}[change]
        np.testing.assert_array_equal(out, expected)
        return
    assert np.abs(out - plain).mean() > 1
    if change == "turned":
        angle = rng.uniform(-30, 30)
        np.testing.assert_array_equal(out, np.asarray(Image.fromarray(crop).rotate(angle, Image.Resampling.BILINEAR)))
    elif change == "recoloured":  # pixel by pixel: equal before, equal after
        flat = augmented(np.full((24, 24, 3), (90, 120, 60), np.uint8), 24, np.random.default_rng(0))
        assert (flat == flat[0, 0]).all() and np.abs(flat[0, 0] - (90.0, 120, 60)).max() > 4
    elif change == "blurred":
        assert np.abs(out.mean((0, 1)) - plain.mean((0, 1))).max() < 6
        assert np.diff(out.astype(float), axis=0).std() < 0.95 * np.diff(plain, axis=0).std()
    elif change == "grey":
        assert (out == out[..., :1]).all() and (out[..., 0] == np.asarray(Image.fromarray(crop).convert("L"))).all()
    else:
        assert np.abs(out[middle] - plain[middle]).mean() < 40
