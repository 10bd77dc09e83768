"""The heatmap-guided loss: published figures of each part, torch's resizes, and the flow of gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.losses import heatmap_mask, heatmap_weight, humansd_loss
from fairhuman_jax.losses.heatmap import missing_joints
from fairhuman_jax.resizing import average_area, resize_aligned, resize_bicubic

SCALE = 0.18215


def stage_heat(side: int, start: tuple[int, int], step: tuple[int, int], spread: float) -> np.ndarray:
    """17 Gaussian spots [side, side, 17] on a line."""
    x, y = np.arange(side)[None, :, None], np.arange(side)[:, None, None]
    joint = np.arange(17)
    distance = (x - (start[0] + step[0] * joint)) ** 2 + (y - (start[1] + step[1] * joint)) ** 2
    return np.exp(-distance / spread)


@pytest.fixture(scope="module")
def heat() -> jax.Array:
    """The mean of two stages' heat maps, [1, 256, 256, 17]."""
    coarse = 0.5 * stage_heat(128, (10, 15), (6, 5), 8.0)
    fine = stage_heat(256, (20, 30), (12, 10), 32.0)
    return (resize_aligned(jnp.asarray(coarse[None]), (256, 256)) + fine[None]) / 2.0


def stub_encode(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """8 x 8 average pools of the mean channel, times one factor per latent channel; a posterior without spread."""
    pooled = average_area(pixels.mean(-1, keepdims=True), (64, 64))
    mean = pooled * jnp.array([1.0, -1.0, 0.5, 2.0])
    return mean, jnp.full(mean.shape, -jnp.inf)


def stub_errors() -> tuple[jax.Array, jax.Array]:
    """(eps_hat, eps) [1, 64, 64, 4] of the published example."""
    n = np.arange(4 * 64 * 64).reshape(1, 4, 64, 64)
    eps = np.sin(0.1 * n)
    both = (0.9 * eps + 0.05 * np.cos(0.07 * n), eps)
    eps_hat, eps = (jnp.asarray(np.moveaxis(array, 1, -1), jnp.float32) for array in both)
    return eps_hat, eps


def stub_decode(latents: jax.Array) -> jax.Array:
    return resize_aligned(latents[..., :3], (512, 512))


def stub_weight(heat: jax.Array, **options) -> jax.Array:
    functions = {"vae_decode": stub_decode, "vae_encode_moments": stub_encode, "pose_heatmap_fn": lambda _: heat}
    return heatmap_weight(*stub_errors(), **functions | {"key": None, "sample_posterior": False} | options)


def test_stages_are_averaged(heat):
    assert float(heat.max()) == pytest.approx(0.7471279846238452, abs=1e-6)
    assert np.asarray(heat, np.float64).sum() == pytest.approx(1285.127392357927, rel=1e-6)
    assert float(heat[0, 30, 20, 0]) == pytest.approx(0.7471279846238452, abs=1e-6)
    assert float(heat[0, 190, 212, 16]) == pytest.approx(0.7273795271412871, abs=1e-6)


@pytest.mark.parametrize(
    ("threshold", "mean", "below", "lowest", "highest"),
    [
        (0.05, 16.927902221679688, 4368, 14.716140747070312, 17.222061157226562),
        (0.10, 16.94708251953125, 3446, 15.160263061523438, 17.252960205078125),
    ],
)
def test_counts_and_their_bicubic_picture(heat, threshold, mean, below, lowest, highest):
    count = missing_joints(heat, threshold)
    assert float(count.mean()) == pytest.approx(mean, rel=1e-6)
    assert (int((count < 17).sum()), float(count.min())) == (below, 15.0)
    picture = np.asarray(resize_bicubic(count, (512, 512)), np.float64)
    assert picture.mean() == pytest.approx(mean, rel=1e-6)
    assert (picture.min(), picture.max()) == pytest.approx((lowest, highest), rel=1e-6)


def test_a_heat_of_exactly_the_threshold_is_not_seen():
    heat = jnp.array([[[[0.05, np.nextafter(np.float32(0.05), np.float32(1.0))]]]], jnp.float32)
    assert missing_joints(heat, 0.05).item() == 1.0
    options = {"vae_decode": lambda latents: latents, "heat_threshold": 0.05}
    for seen, expected in ((heat[..., :1], 0.0), (heat, 1.0)):
        mask = heatmap_mask(*jnp.zeros((2, 1, 1, 1, 3)), pose_heatmap_fn=lambda _, seen=seen: seen, **options)
        assert mask.item() == expected


def test_the_published_example(heat):
    weight = stub_weight(heat)
    expected = (3.0834173897, -3.0834173897, 1.5417086948, 6.1668347794)
    np.testing.assert_allclose(np.asarray(weight, np.float64).mean((0, 1, 2)), expected, rtol=1e-6)
    loss, per_sample, plain = humansd_loss(*stub_errors(), weight)
    assert float(plain) == pytest.approx(0.006239380542611804, rel=1e-6)
    assert float(loss) == pytest.approx(0.007434978234488488, rel=1e-6)
    np.testing.assert_array_equal(per_sample, [loss])


def test_bicubic_weights_are_torchs():
    column = jnp.zeros((1, 8, 1, 1)).at[0, 4].set(1.0)
    doubled = np.asarray(resize_bicubic(column, (16, 1)))[0, :, 0, 0]
    expected = (-0.03515625, -0.10546875, 0.26171875, 0.87890625, 0.87890625, 0.26171875, -0.10546875, -0.03515625)
    np.testing.assert_allclose(doubled[5:13], expected, atol=1e-7)
    assert not doubled[:5].any() and not doubled[13:].any()


@pytest.mark.parametrize(("size", "wanted"), [((5, 7), (10, 14)), ((6, 4), (9, 3)), ((4, 4), (8, 8))])
def test_resizes_agree_with_torch(size, wanted):
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    channels_first = torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())
    for resize, options in (
        (resize_bicubic, {"mode": "bicubic", "align_corners": False}),
        (resize_aligned, {"mode": "bilinear", "align_corners": True}),
        (average_area, {"mode": "area"}),
    ):
        if resize is average_area and any(a % b for a, b in zip(size, wanted, strict=True)):
            continue  # torch's cells overlap there
        expected = torch.nn.functional.interpolate(channels_first, wanted, **options).numpy()
        np.testing.assert_allclose(np.moveaxis(np.asarray(resize(pixels, wanted)), -1, 1), expected, atol=1e-5)


def test_corners_are_kept_where_they_are_aligned():
    stretched = resize_aligned(jnp.arange(4.0).reshape(1, 4, 1, 1), (8, 1))
    np.testing.assert_allclose(stretched[0, :, 0, 0], np.arange(8) * 3 / 7, atol=1e-6)


def test_area_averages_keep_the_mean_for_any_ratio():
    pixels = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 8, 2)), jnp.float32)
    for size in ((3, 4), (4, 5), (9, 8)):
        np.testing.assert_allclose(average_area(pixels, size).mean((1, 2)), pixels.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(average_area(pixels, (3, 4))[0, 1, 2], pixels[0, 2:4, 4:6].mean((0, 1)), atol=1e-6)


def test_the_intended_mask_is_one_where_joints_are_seen(heat):
    options = {"vae_decode": stub_decode, "pose_heatmap_fn": lambda _: heat}
    mask = heatmap_mask(*stub_errors(), **options)
    assert mask.shape == (1, 64, 64, 1)
    np.testing.assert_allclose(float(mask.mean()), 4368 / 256**2, rtol=1e-6)
    assert float(mask[0, 30 // 4, 20 // 4, 0]) == 1.0
    eps_hat, eps = stub_errors()
    expected = np.mean(np.square(eps_hat - eps) * (1.0 + 0.1 * np.asarray(mask)))
    np.testing.assert_allclose(humansd_loss(eps_hat, eps, mask)[0], expected, rtol=1e-6)


def test_no_gradient_flows_through_the_weight():
    eps_hat, eps = stub_errors()

    def heat_of(picture: jax.Array) -> jax.Array:  # depends on the error, so that a leaking gradient shows
        return jnp.repeat(picture.mean(-1, keepdims=True), 17, -1)

    functions = {"vae_decode": stub_decode, "pose_heatmap_fn": heat_of}

    def losses(eps_hat: jax.Array) -> tuple[jax.Array, jax.Array]:
        encode = {"vae_encode_moments": lambda p: (stub_encode(p)[0] * eps_hat, jnp.zeros_like(eps))}
        weight = heatmap_weight(eps_hat, eps, key=jax.random.key(0), **functions, **encode)
        return humansd_loss(eps_hat, eps, weight)[0], weight

    (_, weight), gradient = jax.value_and_grad(losses, has_aux=True)(eps_hat)
    expected = 2.0 * (eps_hat - eps) * (1.0 + 0.1 * weight) / eps.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9)
    through_mask = jax.grad(lambda e: heatmap_mask(e, eps, **functions).sum())(eps_hat)
    assert not through_mask.any()


def test_without_weight_the_loss_is_the_plain_one(heat):
    eps_hat, eps = stub_errors()
    for weight, factor in ((jnp.zeros_like(eps), 0.1), (stub_weight(heat), 0.0)):
        loss, _, plain = humansd_loss(eps_hat, eps, weight, pose_loss_weight=factor)
        assert float(loss) == pytest.approx(float(plain), rel=1e-6)
    with pytest.raises(ValueError, match=r"eps_hat .* and eps .* differ in shape"):
        humansd_loss(eps_hat, eps[:, :1], eps)


def test_the_posterior_is_sampled_by_key(heat):
    def encode(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = stub_encode(pixels)[0]
        return mean, jnp.full_like(mean, 2.0 * np.log(3.0))

    drawn = stub_weight(heat, vae_encode_moments=encode, sample_posterior=True, key=jax.random.key(3))
    noise = np.asarray(drawn - stub_weight(heat)) / SCALE
    assert noise.std() == pytest.approx(3.0, rel=0.02) and abs(noise.mean()) < 0.1
    with pytest.raises(ValueError, match="needs a key"):
        stub_weight(heat, sample_posterior=True)


def test_samples_do_not_depend_on_their_neighbours():
    """One key per sample gives the same results under vmap, jit and pmap."""
    rng = np.random.default_rng(2)
    eps_hat, eps = jnp.asarray(rng.normal(size=(2, 4, 8, 8, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    functions = {
        "vae_decode": lambda latents: resize_aligned(latents, (16, 16)),
        "vae_encode_moments": lambda p: (average_area(p, (8, 8)), jnp.zeros((p.shape[0], 8, 8, 3))),
        "pose_heatmap_fn": lambda picture: picture[:, ::2, ::2],
        "heat_threshold": 0.5,
    }

    def weight(eps_hat: jax.Array, eps: jax.Array, key: jax.Array) -> jax.Array:
        return heatmap_weight(eps_hat, eps, key=key, **functions)

    whole = weight(eps_hat, eps, keys)
    assert np.ptp(np.asarray(whole)) > 0.1
    alone = jax.jit(jax.vmap(lambda *row: weight(*(x[None] for x in row))[0]))(eps_hat, eps, keys)
    np.testing.assert_allclose(alone, whole, atol=1e-6)
    halves = jax.pmap(weight)(*(x.reshape(1, 4, *x.shape[1:]) for x in (eps_hat, eps, keys)))
    np.testing.assert_allclose(halves[0], whole, atol=1e-6)
