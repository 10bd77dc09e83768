"""Subject losses: measured values of the reference, torch's resizes, and properties of the masks and `masked`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.losses import localization_loss, object_mask, object_masked_loss
from fairhuman_jax.losses.localization import _resize


def measured() -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """(column [2, 2, 8, 8, 3], segmaps [2, 3, 16, 16], valid [2, 3]) of the measured value."""
    scores = np.sin(0.11 * np.arange(4 * 64 * 5)).reshape(2, 2, 8, 8, 5)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    positions = np.array([[1, 3, 0], [2, 0, 0]])
    column = np.stack([weights[i][..., tokens] for i, tokens in enumerate(positions)])
    segmaps = np.zeros((2, 3, 16, 16))
    segmaps[0, 0, :8] = 1
    segmaps[0, 1, 8:, 4:12] = 1
    segmaps[1, 0, :, :5] = 1
    return jnp.asarray(column, jnp.float32), segmaps, np.array([[1, 1, 0], [1, 0, 0]], bool)


def upper_half(side: int) -> np.ndarray:
    """A mask [1, 1, side, side]."""
    return (np.arange(side) < side // 2).astype(np.float32)[None, None, :, None] * np.ones((1, 1, 1, side), np.float32)


def as_columns(maps: np.ndarray, heads: int = 2) -> jax.Array:
    """Masks [B, N, h, w] as attention [B, heads, h, w, N]."""
    return jnp.repeat(jnp.moveaxis(maps, 1, -1)[:, None], heads, axis=1)


def test_the_measured_value():
    column, segmaps, valid = measured()
    assert float(localization_loss([column], segmaps, valid)) == pytest.approx(-0.0002509409291, abs=3e-8)


def test_attention_that_is_the_mask_gives_almost_minus_one():
    loss = localization_loss([as_columns(upper_half(8))], upper_half(8), np.ones((1, 1), bool))
    assert float(loss) == pytest.approx(-0.9999896876, abs=1e-7)


def test_uniform_attention_gives_nothing_and_layers_count_alike():
    segmaps, valid = upper_half(16), np.ones((1, 1), bool)
    uniform = jnp.full((1, 2, 4, 6, 1), 1 / 77)
    assert abs(float(localization_loss([uniform], segmaps, valid))) < 1e-5
    exact = as_columns(upper_half(16))
    both = localization_loss([exact, uniform], segmaps, valid)
    assert float(both) == pytest.approx(-0.5, abs=1e-4)
    three = localization_loss([exact, uniform, uniform], segmaps, valid)
    assert float(three) == pytest.approx(-1 / 3, abs=1e-4)


def test_each_layer_has_its_own_size():
    """The subject is the left half of a wide picture; attention is on that half or the upper half, in any shape."""
    left = np.zeros((1, 1, 16, 32), np.float32)
    left[..., :16] = 1
    for height, width in ((4, 8), (8, 4), (16, 32)):
        on = np.zeros((1, 1, height, width), np.float32)
        on[..., : width // 2] = 1
        across = np.zeros_like(on)
        across[:, :, : height // 2] = 1
        found = [
            float(localization_loss([as_columns(maps)], left, np.ones((1, 1), bool))) for maps in (on, across, 1 - on)
        ]
        assert found[0] < -0.85 and abs(found[1]) < 2e-5 and found[2] > 0.85


def test_padding_and_samples_without_subjects():
    column, segmaps, valid = measured()
    noise = jnp.asarray(np.random.default_rng(0).uniform(size=column.shape), jnp.float32)
    mixed = jnp.where(valid[:, None, None, None, :], column, noise)
    loss = localization_loss([column], segmaps, valid)
    assert localization_loss([mixed], segmaps, valid) == loss
    assert localization_loss([column], segmaps, np.zeros_like(valid)) == 0.0
    second_empty = valid & np.array([[True], [False]])
    alone = localization_loss([column[:1]], segmaps[:1], valid[:1])
    np.testing.assert_allclose(localization_loss([column], segmaps, second_empty), alone / 2, rtol=1e-6)


def test_normalised_attention_does_not_depend_on_its_scale():
    column, segmaps, valid = measured()
    halved = column * jnp.array([1.0, 0.5])[:, None, None, None]  # in one head
    found = [float(localization_loss([each], segmaps, valid, normalize=True)) for each in (column, halved)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    peaks = np.asarray(column).max((2, 3), keepdims=True)
    by_hand = localization_loss([column / (peaks + 1e-5)], segmaps, valid)
    assert found[0] == pytest.approx(float(by_hand), rel=1e-5)
    assert abs(found[0]) > 2 * abs(float(localization_loss([column], segmaps, valid)))


def test_a_step_along_the_gradient_moves_attention_onto_the_subject():
    def loss(scores):
        column = jax.nn.softmax(scores, -1)[..., 1:2]
        return localization_loss([column], upper_half(8), np.ones((1, 1), bool))

    scores = jnp.zeros((1, 1, 4, 4, 5))
    gradient = jax.jit(jax.grad(loss))(scores)
    assert (gradient[0, 0, :2, :, 1] < 0).all() and (gradient[0, 0, 2:, :, 1] > 0).all()


@pytest.mark.parametrize(
    ("columns", "segmaps", "valid", "message"),
    [
        ([], (2, 3, 8, 8), (2, 3), "no columns"),
        ([(2, 1, 4, 4, 2)], (2, 3, 8, 8), (2, 3), r"columns are \(2, 1, 4, 4, 2\); expected \(2, ., ., ., 3\)"),
        ([(2, 1, 16, 3)], (2, 3, 8, 8), (2, 3), "columns are"),
        ([(2, 1, 4, 4, 3)], (2, 3, 8, 8), (2,), r"valid is \(2,\); expected \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(columns, segmaps, valid, message):
    with pytest.raises(ValueError, match=message):
        localization_loss([jnp.ones(shape) for shape in columns], jnp.ones(segmaps), jnp.ones(valid))


@pytest.mark.parametrize(("edge", "near"), [(256, (1.0, 0.875, 0.125, 0.0)), (252, (1.0, 0.71875, 0.03125, 0.0))])
def test_the_antialiased_edge(edge, near):
    columns = (np.arange(512) < edge).astype(np.float32) * np.ones((1, 1, 512, 1), np.float32)
    np.testing.assert_allclose(_resize(columns, (32, 32), antialias=True)[0, 0, 7, 14:18], near, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 5), (16, 24), (3, 3), (20, 9)])
def test_both_resizes_agree_with_torch(size):
    torch = pytest.importorskip("torch")
    maps = np.random.default_rng(0).uniform(size=(1, 2, 16, 24)).astype(np.float32)
    for antialias in (True, False):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(maps), size, mode="bilinear", align_corners=False, antialias=antialias
        )
        np.testing.assert_allclose(_resize(maps, size, antialias=antialias), expected, atol=1e-6)


def test_the_mask_at_latent_size_is_the_mean_of_two_taps():
    segmaps = np.zeros((1, 2, 512, 512), np.uint8)
    segmaps[0, 0, :, :252] = 1
    mask = object_mask(segmaps, (64, 64))
    assert mask.shape == (1, 64, 64, 1)
    np.testing.assert_array_equal(mask[0, 5, 29:34, 0], [1, 1, 0.5, 0, 0])
    segmaps[0, 1, 4:, 256:] = 1
    np.testing.assert_array_equal(object_mask(segmaps, (64, 64))[0, :2, 32:, 0], [[0.5] * 32, [1] * 32])


def residual() -> tuple[jax.Array, jax.Array]:
    return jnp.full((3, 4, 4, 2), 3.0), jnp.ones((3, 4, 4, 2))


def half_masks() -> jax.Array:
    """Three samples: a subject on a quarter and a half-covered column, one on the whole picture, no subject."""
    mask = np.zeros((3, 4, 4, 1), np.float32)
    mask[0, :, 0], mask[0, :, 1] = 1.0, 0.5
    mask[1] = 1.0
    return jnp.asarray(mask)


def test_masked_loss_as_published():
    loss = object_masked_loss(*residual(), half_masks(), jnp.ones(3, bool), compat="reference")
    np.testing.assert_allclose(loss, [4 * (4 + 4 / 4) / 16, 4.0, 0.0])
    loss = object_masked_loss(*residual(), half_masks(), jnp.zeros(3, bool), compat="reference")
    np.testing.assert_allclose(loss, [4.0, 4.0, 4.0])


def test_masked_loss_is_a_mean_over_the_subjects():
    prediction, target = residual()
    coins = jnp.array([True, False, True])
    np.testing.assert_allclose(object_masked_loss(prediction, target, half_masks(), coins), [4.0] * 3, rtol=1e-6)
    beside = prediction.at[:, :, 2:].add(5.0)
    found = object_masked_loss(beside, target, half_masks(), coins)
    np.testing.assert_allclose(found, [4.0, (4 + 49) / 2, (4 + 49) / 2], rtol=1e-6)
    gradient = jax.grad(lambda x: object_masked_loss(x, target, half_masks(), coins).sum())(beside)
    assert not gradient[0, :, 2:].any() and gradient[0, :, :2].all() and gradient[1:].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": jnp.ones((3, 4, 4, 1))}, "differ in shape"),
        ({"mask": jnp.ones((3, 4, 4))}, r"mask is \(3, 4, 4\); expected \(3, 4, 4, 1\)"),
        ({"masked": jnp.ones((), bool)}, r"masked is \(\); expected \(3,\)"),
        ({"compat": "paper"}, "unknown compat 'paper'"),
    ],
)
def test_masked_loss_refuses_what_does_not_fit(change, message):
    prediction, target = residual()
    given = {"prediction": prediction, "target": target, "mask": half_masks(), "masked": jnp.ones(3, bool)}
    with pytest.raises(ValueError, match=message):
        object_masked_loss(**given | change)
