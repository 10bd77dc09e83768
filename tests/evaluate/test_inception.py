"""The Inception network: shapes, resizing, batches; with the fetched weights, torch and golden features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.data.pictures import BadSample
from fairhuman_jax.evaluate.batching import in_batches
from fairhuman_jax.evaluate.folders import read_pictures
from fairhuman_jax.evaluate.inception import (
    MEMBER,
    fetch_inception,
    inception,
    layer_shapes,
    load_inception,
    picture_features,
    resized,
)


def drawing() -> np.ndarray:
    """Stripes, curves and a chequerboard, 200 x 260."""
    y, x = np.mgrid[:200, :260]
    planes = (7 * x + 3 * y) % 256, (x * x // 50 + y) % 256, (x // 20 + y // 20) % 2 * 255
    return np.stack(planes, -1).astype(np.uint8)


def test_layers():
    shapes = dict(layer_shapes())
    assert len(shapes) == 94
    assert sum(np.prod(shape) for shape in shapes.values()) == 21_751_136
    assert shapes["mixed_3.conv"] == (3, 3, 288, 384) and shapes["mixed_4.tower_1.conv_4"] == (1, 7, 128, 192)
    assert shapes["mixed_10.tower_2_conv"] == (1, 1, 2048, 192)
    params = {
        name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1:])} for name, shape in list(shapes.items())[:1]
    }
    with pytest.raises(KeyError, match="conv_1"):
        jax.eval_shape(inception, params, jnp.zeros((1, 299, 299, 3)))


def test_resizing_of_tensorflow():
    """Pixel i of 299 lies at i H / 299 of the picture, between two of its pixels, and nothing is smoothed."""
    ramp = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[:, None, None], 40, 1).repeat(3, 2)
    found = resized(ramp)
    assert found.shape == (299, 299, 3) and found.dtype == np.float32
    expected = np.minimum(2 * np.arange(299) * (120 / 299), 238)
    np.testing.assert_allclose(found[:, 7, 1], expected, atol=1e-3)
    dots = np.zeros((598, 598, 3), np.uint8)
    dots[1::2, 1::2] = 255
    assert not resized(dots).any()
    assert resized(dots, "clean").mean() == pytest.approx(255 / 4, abs=2)
    same = drawing()[:150, :150].repeat(2, 0).repeat(2, 1)[:299, :299]
    np.testing.assert_array_equal(resized(same), same)


def test_bad_pictures(tmp_path):
    with pytest.raises(ValueError, match="resize='bilinear' is unknown; choose tensorflow or clean"):
        resized(drawing(), "bilinear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs uint8 \[H, W, 3\], found float32 \[200, 260, 3\]"):
        resized(drawing().astype(np.float32))
    with pytest.raises(ValueError, match="no pictures to measure"):
        picture_features({}, [])
    Image.fromarray(drawing()).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:600])
    with pytest.raises(BadSample, match=r"cut\.png: damaged picture"):
        picture_features({}, read_pictures([tmp_path / "cut.png"]))


def test_batches_have_one_shape():
    shapes = []

    def run(a, b):
        shapes.append((a.shape, b.shape))
        return a.sum(1) + b

    rows = [(np.arange(3.0) + i, np.array(10.0 * i)) for i in range(7)]
    found = in_batches(run, iter(rows), 3)
    np.testing.assert_array_equal(found, [3 + 13 * i for i in range(7)])
    assert shapes == [((3, 3), (3,))] * 3
    with pytest.raises(ValueError, match="batch size 0"):
        in_batches(run, rows, 0)


def test_weights_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fetch it once with: python -m fairhuman_jax\.evaluate fetch"):
        load_inception(tmp_path)
    (tmp_path / MEMBER.split("/")[-1]).write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="its sha256 differs"):
        load_inception(tmp_path)


@pytest.mark.network
def test_real_weights(tmp_path):
    """Fetched by the package index; features equal those of the original archive run by torch, and these numbers."""
    path = fetch_inception(tmp_path)
    pictures = [drawing(), drawing()[::-1, 20:90]]
    found = picture_features(load_inception(tmp_path), pictures, batch_size=2)
    golden = [0.2831283, 0.0567454, 0.3815024, 0.1224458, 0.0, 0.0138747, 0.0, 0.0]
    np.testing.assert_allclose(found[0, ::256], golden, atol=1e-4)
    assert np.linalg.norm(found[0]) == pytest.approx(18.5466158, rel=1e-5) and found[0].argmax() == 478

    torch = pytest.importorskip("torch")
    pixels = np.stack([resized(picture) for picture in pictures]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = torch.jit.load(str(path), map_location="cpu").eval()(torch.from_numpy((pixels - 128) / 128))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
