"""Saliency-adaptive noise fusion: published values and invariances."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.diffusion import snf_fuse, snf_saliency

SCALE = 5.0
OPTIONS = [{}, {"per_channel": True}, {"temperature": 0.1}, {"per_channel": True, "temperature": 0.1}]
NAMES = ["hard", "per-channel", "soft", "soft-per-channel"]


def published() -> list[jax.Array]:
    """The four predictions [1, 64, 64, 4] of the published example."""
    y, x, c = np.mgrid[:64, :64, :4]
    e_t0 = 0.1 * np.sin(2 * np.pi * (x - y) / 64)
    e_t1 = e_t0 + 0.05 * np.cos(2 * np.pi * (x + 2 * y) / 64 + c)
    e_s0 = 0.1 * np.cos(2 * np.pi * (x - y) / 64)
    e_s1 = e_s0 + 0.08 * np.exp(-((x - 20) ** 2 + (y - 30) ** 2) / 200) * (1 + 0.25 * c)
    return [jnp.asarray(array[None], jnp.float32) for array in (e_t0, e_t1, e_s0, e_s1)]


def predictions(height: int = 9, width: int = 14, batch: int = 2) -> list[jax.Array]:
    """Four random predictions whose responses differ between pixels."""
    keys = jax.random.split(jax.random.key(3), 4)
    return [0.1 * jax.random.normal(key, (batch, height, width, 4)) for key in keys]


def smoothing_by_definition(field: np.ndarray) -> np.ndarray:
    """Sm on [h, w] by its definition, pixel by pixel in fp64."""
    height, width = field.shape
    padded = np.pad(field.astype(np.float64), 1)
    pooled = np.array([[padded[y : y + 4, x : x + 4].sum() / 16 for x in range(width - 1)] for y in range(height - 1)])

    def neighbours(place: int, side: int) -> list[tuple[int, float]]:
        source = max(0.0, (place + 0.5) * (side - 1) / side - 0.5)
        return [(int(source), 1 - source % 1), (min(int(source) + 1, side - 2), source % 1)]

    result = np.zeros_like(field, np.float64)
    for y, x in np.ndindex(height, width):
        for (v, down), (u, right) in ((a, b) for a in neighbours(y, height) for b in neighbours(x, width)):
            result[y, x] += down * right * pooled[v, u]
    return result


def test_published_values():
    fused, mask, m_t, m_s = snf_fuse(*published(), SCALE)
    assert fused.dtype == m_t.dtype == m_s.dtype == jnp.float32 and mask.dtype == bool
    expected = {
        (30, 20): (0.133926184, 0.541841977, True),
        (31, 31): (0.173260977, 0.296817432, True),
        (30, 45): (0.161860723, 0.026223980, False),
        (0, 0): (0.099782435, 0.000784792, False),
    }
    for place, (scene, subject, wins) in expected.items():
        np.testing.assert_allclose([m_t[0][place], m_s[0][place]], [scene, subject], rtol=0, atol=1e-6)
        assert mask[0][place] == wins
    lse_t, lse_s = (np.log(np.exp(np.asarray(m, np.float64)).sum()) for m in (m_t, m_s))
    np.testing.assert_allclose([lse_t, lse_s], [8.474545967, 8.411313991], rtol=0, atol=1e-6)
    omega = np.exp([m_t[0, 30, 20] - lse_t, m_s[0, 30, 20] - lse_s])
    np.testing.assert_allclose(omega, [2.386244e-4, 3.822361e-4], rtol=1e-6)
    rows, columns = np.nonzero(np.asarray(mask[0]))
    assert len(rows) == 1169 and rows.sum() == 35049 and columns.sum() == 22922
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 49, 0, 39)
    fused = np.asarray(fused, np.float64)
    np.testing.assert_allclose([fused.mean(), fused.std()], [0.081343397, 0.221616051], rtol=0, atol=1e-6)
    ends = [fused[0, 30, 20, 0], fused[0, 63, 63, 3]]
    np.testing.assert_allclose(ends, [0.455557023, -0.226599694], rtol=0, atol=1e-6)


def test_published_saliency_of_each_channel():
    _, mask, m_t, _ = snf_fuse(*published(), SCALE, per_channel=True)
    assert mask.shape == m_t.shape == (1, 64, 64, 4)
    expected = [0.054114433, 0.205754368, 0.216969637, 0.058866298]
    np.testing.assert_allclose(m_t[0, 30, 20], expected, rtol=0, atol=1e-6)


def test_published_smoothing_of_ones():
    field = snf_saliency(jnp.ones((1, 64, 64, 4)))[0]
    expected = np.ones(64)
    expected[[0, -1]], expected[[1, -2]] = 0.75, 0.994140625
    np.testing.assert_allclose(field, np.outer(expected, expected), rtol=1e-6)
    assert expected[0] ** 2 == 0.5625


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (9, 14), (16, 6)])
def test_smoothing_is_pooling_and_resizing_at_every_size(size):
    response = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    expected = np.stack([smoothing_by_definition(np.abs(one).mean(-1)) for one in response])
    np.testing.assert_allclose(snf_saliency(response), expected, rtol=1e-5, atol=1e-7)


def test_identical_responses_are_a_tie_which_goes_to_the_scene():
    e_t0, e_t1, e_s0, _ = predictions()
    response = e_t1 - e_t0
    zero = jnp.zeros_like(response)
    fused, mask, m_t, m_s = snf_fuse(zero, response, e_s0 - e_s0, -response, SCALE)
    np.testing.assert_array_equal(m_t, m_s)
    assert not mask.any()
    np.testing.assert_array_equal(fused, SCALE * response)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_exchanging_the_models_complements_the_mask(options):
    e_t0, e_t1, e_s0, e_s1 = predictions()
    fused, mask, m_t, m_s = snf_fuse(e_t0, e_t1, e_s0, e_s1, 3.0, 4.0, **options)
    swapped = snf_fuse(e_s0, e_s1, e_t0, e_t1, 4.0, 3.0, **options)
    np.testing.assert_allclose(swapped[1].astype(float), 1.0 - mask.astype(float), atol=1e-6)
    np.testing.assert_allclose(swapped[0], fused, atol=1e-6)
    np.testing.assert_array_equal(swapped[2], m_s)
    np.testing.assert_array_equal(swapped[3], m_t)
    assert 0.1 < mask.mean() < 0.9


def test_a_constant_on_a_saliency_changes_nothing():
    e_t0, e_t1, e_s0, e_s1 = published()
    zero, scene, subject = jnp.zeros_like(e_t0), jnp.abs(e_t1 - e_t0), jnp.abs(e_s1 - e_s0)
    stripes = jnp.tile(jnp.array([0.0, 2.0, 2.0, 0.0]), 16)
    lattice = (stripes[:, None] * stripes)[None, :, :, None]  # Sm of this pattern is a constant
    np.testing.assert_allclose(snf_saliency(lattice), 1.0, rtol=1e-6)
    _, mask, _, m_s = snf_fuse(zero, scene, zero, subject, SCALE)
    _, shifted, _, raised = snf_fuse(zero, scene, zero, subject + 0.06 * lattice, SCALE)
    np.testing.assert_allclose(raised - m_s, 0.06 * SCALE, rtol=1e-5)
    np.testing.assert_array_equal(shifted, mask)


def test_doubled_responses_change_the_mask():
    arrays = published()
    mask, doubled = (snf_fuse(*(factor * array for array in arrays), SCALE)[1] for factor in (1, 2))
    assert 0 < (doubled != mask).sum() < mask.sum()


def test_one_mask_serves_all_channels():
    e_t0, e_t1, e_s0, e_s1 = predictions()
    fused, mask, _, _ = snf_fuse(e_t0, e_t1, e_s0, e_s1, SCALE)
    assert mask.shape == (2, 9, 14)
    of_scene, of_subject = e_t0 + SCALE * (e_t1 - e_t0), e_s0 + SCALE * (e_s1 - e_s0)
    np.testing.assert_allclose(fused, jnp.where(mask[..., None], of_subject, of_scene), atol=1e-6)
    per_channel = snf_fuse(e_t0, e_t1, e_s0, e_s1, SCALE, per_channel=True)[1]
    assert (per_channel != per_channel[..., :1]).any()


@pytest.mark.parametrize("axis", [1, 2], ids=["vertical", "horizontal"])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_mirroring_goes_through(axis, options):
    arrays = predictions()
    plain, mirrored = (
        snf_fuse(*arrays, SCALE, **options),
        snf_fuse(*(jnp.flip(a, axis) for a in arrays), SCALE, **options),
    )
    for ours, theirs in zip(plain, mirrored, strict=True):
        np.testing.assert_allclose(jnp.flip(theirs, axis).astype(float), ours.astype(float), atol=1e-5)


def test_temperature_goes_from_the_hard_mask_to_the_mean():
    arrays = predictions()
    hard, _, m_t, m_s = snf_fuse(*arrays, SCALE)
    for nothing in (None, 0, 0.0):
        np.testing.assert_array_equal(snf_fuse(*arrays, SCALE, temperature=nothing)[0], hard)
    sharp, soft = (snf_fuse(*arrays, SCALE, temperature=tau) for tau in (1e-8, 1e6))
    np.testing.assert_allclose(sharp[0], hard, atol=1e-5)
    np.testing.assert_allclose(soft[1], 0.5, atol=1e-5)
    omega_t, omega_s = (jax.nn.softmax(m.reshape(2, -1)).reshape(m.shape) for m in (m_t, m_s))
    np.testing.assert_allclose(snf_fuse(*arrays, SCALE, temperature=1.0)[1], omega_s / (omega_s + omega_t), rtol=1e-5)


def test_scales_and_gains_are_their_own():
    e_t0, e_t1, e_s0, e_s1 = arrays = predictions()
    _, mask, m_t, m_s = snf_fuse(*arrays, 2.0, 6.0, gain_t=3.0, gain_s=0.5)
    np.testing.assert_allclose(m_t, snf_saliency(2.0 * (e_t1 - e_t0)), rtol=1e-5)
    np.testing.assert_allclose(m_s, snf_saliency(6.0 * (e_s1 - e_s0)), rtol=1e-5)
    weighed = [jax.nn.log_softmax(g * m.reshape(2, -1)).reshape(m.shape) for g, m in ((3.0, m_t), (0.5, m_s))]
    np.testing.assert_array_equal(mask, weighed[1] > weighed[0])
    # A factor of a scale acts like the same factor of its gain.
    sharper = snf_fuse(*arrays, 6.0, 3.0)[1]
    np.testing.assert_array_equal(sharper, snf_fuse(*arrays, 2.0, 6.0, gain_t=3.0, gain_s=0.5)[1])
    each = jnp.asarray([2.0, 5.0])
    together = snf_fuse(*arrays, each, gain_s=each)
    for i, scale in enumerate((2.0, 5.0)):
        alone = snf_fuse(*(array[i : i + 1] for array in arrays), scale, gain_s=scale)
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[i].astype(float), theirs[0].astype(float), atol=1e-6)


def test_under_transformations():
    arrays = predictions()
    plain = snf_fuse(*arrays, SCALE)
    split = [array[:, None] for array in arrays]
    for transform in (jax.vmap, jax.pmap):
        results = transform(functools.partial(snf_fuse, scale_t=SCALE))(*split)
        for ours, theirs in zip(results, plain, strict=True):
            np.testing.assert_allclose(ours[:, 0].astype(float), theirs.astype(float), atol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True], ids=["shared", "per-channel"])
def test_gradients(per_channel):
    e_t0, e_t1, e_s0, e_s1 = predictions()
    e_t1 = e_t1.at[:, :3].set(e_t0[:, :3])  # no response, where |R| has a kink
    weights = jax.random.normal(jax.random.key(5), e_t0.shape)

    def fuse(scene, subject, temperature=None):
        return snf_fuse(e_t0, scene, e_s0, subject, SCALE, per_channel=per_channel, temperature=temperature)

    def loss(scene, subject, temperature=None):
        return jnp.sum(weights * fuse(scene, subject, temperature)[0])

    hard = jax.jit(jax.grad(loss, argnums=(0, 1)))(e_t1, e_s1)
    mask = fuse(e_t1, e_s1)[1]
    mask = mask if per_channel else mask[..., None]
    np.testing.assert_allclose(hard[0], SCALE * weights * ~mask, rtol=1e-6)
    np.testing.assert_allclose(hard[1], SCALE * weights * mask, rtol=1e-6)
    soft = jax.jit(jax.grad(functools.partial(loss, temperature=0.1), argnums=(0, 1)))(e_t1, e_s1)
    assert np.isfinite(soft[0]).all()
    direction = 1e-3 * jax.random.normal(jax.random.key(6), e_s1.shape)
    numeric = float(loss(e_t1, e_s1 + direction, 0.1) - loss(e_t1, e_s1 - direction, 0.1)) / 2
    assert float(jnp.vdot(soft[1], direction)) == pytest.approx(numeric, rel=1e-2)
    assert jnp.abs(soft[1] - hard[1]).max() > 0.1


def test_half_precision_inputs_are_computed_in_fp32():
    arrays = [array.astype(jnp.bfloat16) for array in predictions()]
    wide = [array.astype(jnp.float32) for array in arrays]
    for ours, theirs in zip(snf_fuse(*arrays, SCALE), snf_fuse(*wide, SCALE), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_refusals():
    arrays = predictions()
    with pytest.raises(ValueError, match=r"expected four of one shape \[B, h, w, C\]"):
        snf_fuse(*arrays[:3], arrays[3][:1], SCALE)
    with pytest.raises(ValueError, match=r"temperature is -1\.0; expected 0 \(hard mask\) or more"):
        snf_fuse(*arrays, SCALE, temperature=-1.0)
    with pytest.raises(ValueError, match="responses are 1x8; expected 2x2 or more"):
        snf_saliency(jnp.ones((1, 1, 8, 4)))
