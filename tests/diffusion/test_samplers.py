"""The sampling loop and classifier-free guidance with analytic denoisers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.diffusion import (
    RULES,
    NoiseSchedule,
    classifier_free,
    ddim,
    dpmpp_2m,
    euler,
    euler_ancestral,
    keep_known,
    pndm,
    renoise_known,
    row_count,
    rule_named,
    sample,
    start_latents,
    start_row,
    unipc,
)

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def latents(batch: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (batch, 4, 4, 3))


def point_denoiser(schedule: NoiseSchedule, point: float):
    """Exact noise prediction when the data is one point: every path ends there."""
    signal, spread = jnp.asarray(schedule.signal), jnp.asarray(schedule.noise)

    def predict(x, t):
        t = t.astype(int)[:, None, None, None]
        return (x - signal[t] * point) / spread[t]

    return predict


@pytest.mark.parametrize("name", list(RULES))
def test_point_data_is_reached(name):
    result = sample(point_denoiser(SCHEDULE, 0.7), latents(), jax.random.key(0), SCHEDULE, 8, rule_named(name))
    np.testing.assert_allclose(result, 0.7, atol=5e-3)


def test_seed_and_guidance_are_runtime_arguments():
    traces = []

    @jax.jit
    def run(key, noise, guidance):
        traces.append(1)

        def predict(x, t, condition):
            return 0.1 * x + condition[:, None, None, None]

        guided = classifier_free(predict, jnp.ones(2), jnp.zeros(2), guidance)
        return sample(guided, noise, key, SCHEDULE, 4, ddim(0.5))

    first = run(jax.random.key(0), latents(), 2.0)
    other_seed, other_guidance = (
        run(jax.random.key(1), latents(), 2.0),
        run(jax.random.key(0), latents(), 3.0),
    )
    assert len(traces) == 1
    assert np.abs(first - other_seed).max() > 1e-2 and np.abs(first - other_guidance).max() > 1e-2


def test_injected_noise_replaces_the_key():
    predict = point_denoiser(SCHEDULE, 0.2)
    key = jax.random.key(3)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, step), (2, 4, 4, 3)) for step in range(5)])
    drawn = sample(predict, latents(), key, SCHEDULE, 5, ddim(1.0))
    np.testing.assert_allclose(sample(predict, latents(), None, SCHEDULE, 5, ddim(1.0), noise=noise), drawn, atol=1e-6)
    with pytest.raises(ValueError, match="expected a key or noise"):
        sample(predict, latents(), None, SCHEDULE, 5, ddim(1.0))
    with pytest.raises(ValueError, match=r"noise is \(4,"):
        sample(predict, latents(), None, SCHEDULE, 5, ddim(1.0), noise=noise[:4])


def test_clipping_bounds_the_result():
    clipped = NoiseSchedule(clip_sample=True, clip_sample_range=0.5)
    result = sample(point_denoiser(clipped, 2.0), latents(), None, clipped, 10)
    np.testing.assert_allclose(result, 0.5, atol=1e-5)


def test_zero_snr_needs_another_prediction_type():
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="undefined at zero SNR"):
        sample(lambda x, t: x, latents(), None, schedule, 4)
    for rule in (dpmpp_2m(), unipc()):
        with pytest.raises(ValueError, match="undefined at zero SNR"):
            sample(lambda x, t: x, latents(), None, schedule, 4, rule)
    with pytest.raises(ValueError, match="zero-SNR schedule is not supported; expected ddim"):
        sample(lambda x, t: x, latents(), None, schedule, 4, pndm())


def gaussian_denoiser(schedule: NoiseSchedule, width: float):
    """Exact noise prediction for centred normal data; the flow scales latents by the ratio of the widths."""
    variance = jnp.asarray(schedule.alphas_cumprod) * width**2 + 1 - jnp.asarray(schedule.alphas_cumprod)

    def predict(x, t):
        t = t.astype(int)[:, None, None, None]
        return jnp.asarray(schedule.noise)[t] * x / variance[t]

    return predict


def test_orders_of_convergence():
    schedule = NoiseSchedule.from_config(
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "timestep_spacing": "linspace",
            "final_sigmas_type": "sigma_min",
            "lower_order_final": False,
        }
    )
    width, first, last = 0.5, schedule.alphas_cumprod64[-1], schedule.alphas_cumprod64[0]
    ratio = np.sqrt((last * width**2 + 1 - last) / (first * width**2 + 1 - first))

    def error(rule, steps):
        result = sample(gaussian_denoiser(schedule, width), jnp.ones((1, 1, 1, 1)), None, schedule, steps, rule)
        return abs(float(result[0, 0, 0, 0]) / ratio - 1)

    coarse, fine = ({rule.name: error(rule, steps) for rule in (dpmpp_2m(), unipc())} for steps in (37, 111))
    # Three times the steps: first order would err a third. The long last step keeps the ratio below nine.
    assert all(fine[name] < coarse[name] / 4 for name in fine), (coarse, fine)
    assert error(euler(), 111) > max(fine.values())


@pytest.mark.parametrize(
    ("denoiser", "expected"),
    [
        (lambda x, t: jnp.zeros_like(x), 13.152870586),
        (lambda x, t: jnp.ones_like(x), 0.067191963),
        (lambda x, t: 0.5 * x, 2.601852570),
        (lambda x, t: 0.001 * t[:, None] * jnp.ones_like(x), 3.053131402),
    ],
    ids=["zero", "one", "linear", "time"],
)
def test_published_pndm_values(denoiser, expected):
    schedule = NoiseSchedule.from_config(SD15)
    assert row_count(schedule, 50, pndm()) == 51
    times = pndm().table(schedule, 50)["timestep"]
    assert [*times[:4], *times[-2:]] == [981, 961, 961, 941, 21, 1]
    np.testing.assert_allclose(
        sample(denoiser, jnp.ones((1, 1)), None, schedule, 50, pndm()), expected, rtol=1e-5, atol=2e-6
    )


def test_published_ddim_steps():
    schedule = NoiseSchedule.from_config(SD15 | {"_class_name": "DDIMScheduler"})
    table = ddim().table(schedule, 50)
    assert table["timestep"][[0, 24, 49]].tolist() == [981, 501, 1]
    cumprod = [0.0057755001, 0.2749990669, 0.9982960278]
    following = [0.0072817271, 0.3022956610, 0.9991500000]
    np.testing.assert_allclose(table["signal"][[0, 24, 49]] ** 2, cumprod, rtol=1e-6)
    np.testing.assert_allclose(table["next_signal"][[0, 24, 49]] ** 2, following, rtol=1e-6)
    moved = []
    sample(
        lambda x, t: jnp.full_like(x, 0.5),
        jnp.ones((1, 1)),
        None,
        schedule,
        50,
        before_step=lambda x, row: jnp.ones_like(x),
        after_step=lambda x, row: (jax.debug.callback(lambda v: moved.append(float(v[0, 0])), x, ordered=True), x)[1],
    )
    jax.effects_barrier()
    np.testing.assert_allclose([moved[1], moved[49]], [1.0592382260249622, 0.9943565783818035], rtol=1e-6)


def test_strength_and_start_are_runtime_arguments():
    traces = []

    @jax.jit
    def run(start, x0):
        traces.append(1)
        noisy = start_latents(x0, latents(), SCHEDULE, 6, dpmpp_2m(), start)
        return sample(lambda x, t: 0.3 * jnp.tanh(x), noisy, None, SCHEDULE, 6, dpmpp_2m(), start=start)

    for strength in (0.34, 0.7, 1.0):
        start = start_row(6, strength)
        noisy = start_latents(jnp.ones((2, 4, 4, 3)), latents(), SCHEDULE, 6, dpmpp_2m(), start)
        static = sample(lambda x, t: 0.3 * jnp.tanh(x), noisy, None, SCHEDULE, 6, dpmpp_2m(), start=start)
        np.testing.assert_allclose(run(jnp.int32(start), jnp.ones((2, 4, 4, 3))), static, atol=1e-5)
    assert len(traces) == 1


def test_rows_before_the_start_call_nothing():
    calls = []

    def predict(x, t):
        jax.debug.callback(lambda t: calls.append(int(t[0])), t, ordered=True)
        return 0.1 * x

    run = jax.jit(lambda start: sample(predict, latents(), None, SCHEDULE, 10, start=start))
    run(jnp.int32(7)).block_until_ready()
    jax.effects_barrier()
    assert calls == [201, 101, 1]
    assert start_row(10, 0.39) == 7 and start_row(20, 1.0) == 0
    with pytest.raises(ValueError, match="takes 0 of 10 steps"):
        start_row(10, 0.05)
    with pytest.raises(ValueError, match=r"start is 10; expected a row in 0 \.\. 9"):
        sample(predict, latents(), None, SCHEDULE, 10, start=10)


def test_batches_of_starts_under_vmap():
    def run(start):
        return sample(lambda x, t: 0.2 * jnp.sin(x), latents(), None, SCHEDULE, 6, unipc(), start=start)

    together = jax.jit(jax.vmap(run))(jnp.asarray([0, 4]))
    np.testing.assert_allclose(together[1], run(4), atol=1e-5)


def test_gradients_through_a_static_loop():
    def loss(scale):
        return sample(lambda x, t: scale * x, latents(), None, SCHEDULE, 4, dpmpp_2m()).mean()

    numeric = (loss(0.3 + 1e-2) - loss(0.3 - 1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(loss)(0.3), numeric, rtol=1e-2)


def test_a_key_for_each_example():
    keys = jax.random.split(jax.random.key(0), 2)
    run = jax.jit(lambda x, keys: sample(lambda x, t: 0.1 * x, x, keys, SCHEDULE, 4, euler_ancestral()))
    np.testing.assert_allclose(run(latents(), keys)[1:], run(latents()[1:], keys[1:]), atol=1e-5)


def test_known_region_is_kept():
    mask = jnp.zeros((1, 4, 4, 1)).at[:, :2].set(1.0)
    known = jnp.full((2, 4, 4, 3), 0.4)
    for rule in (ddim(), euler()):
        keep = keep_known(known, latents(), mask, SCHEDULE, 6, rule)
        result = sample(point_denoiser(SCHEDULE, -0.5), latents(), None, SCHEDULE, 6, rule, after_step=keep)
        np.testing.assert_array_equal(result[:, 2:], known[:, 2:])
        np.testing.assert_allclose(result[:, :2], -0.5, atol=2e-2)


def test_known_region_is_renoised_before_each_call():
    schedule = NoiseSchedule.from_config(SD15 | {"_class_name": "DDIMScheduler"})
    mask = jnp.zeros((1, 4, 4, 1)).at[:, :2].set(1.0)
    known = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    noise = jax.random.normal(jax.random.key(2), (5, 2, 4, 4, 3))

    def predict(x, t):
        return 0.3 * jnp.tanh(x) + 1e-4 * t[:, None, None, None]

    expected, table = latents(), ddim().table(schedule, 5)
    for row, t in enumerate(table["timestep"]):
        a, following = schedule.alphas_cumprod64[t], schedule.alphas_cumprod64[t - 200 if t > 200 else 0]
        blended = (1 - mask) * (a**0.5 * known + (1 - a) ** 0.5 * noise[row]) + mask * expected
        epsilon = predict(blended, jnp.full(2, t))
        expected = following**0.5 * (blended - (1 - a) ** 0.5 * epsilon) / a**0.5 + (1 - following) ** 0.5 * epsilon
    before = renoise_known(known, mask, schedule, 5, ddim(), noise=noise)
    result = sample(predict, latents(), None, schedule, 5, before_step=before)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    with pytest.raises(ValueError, match="expected a key or noise, one of them"):
        renoise_known(known, mask, schedule, 5, ddim())


def test_guidance_is_one_call_of_twice_the_batch():
    calls = []

    def predict(x, t, condition):
        calls.append(x.shape)
        return x * condition["scale"][:, None, None, None] + t[:, None, None, None]

    cond, uncond = {"scale": jnp.asarray([3.0, 5.0])}, {"scale": jnp.asarray([1.0, 1.0])}
    t = jnp.asarray([4, 6])
    result = classifier_free(predict, cond, uncond, jnp.asarray([0.0, 7.5]))(latents(), t)
    assert calls == [(4, 4, 4, 3)]
    np.testing.assert_allclose(result[0], latents()[0] + 4, rtol=1e-5)
    np.testing.assert_allclose(result[1], latents()[1] * (1 + 7.5 * 4) + 6, rtol=1e-5, atol=1e-4)


def test_guidance_rescale_restores_the_conditional_spread():
    def predict(x, t, condition):
        return x * condition[:, None, None, None]

    def run(rescale):
        return classifier_free(predict, jnp.full(2, 2.0), jnp.ones(2), 7.5, rescale)(latents(), jnp.zeros(2, jnp.int32))

    conditional = np.asarray(2 * latents())
    np.testing.assert_allclose(run(1.0), conditional, rtol=1e-5)
    np.testing.assert_allclose(run(0.7), 0.7 * conditional + 0.3 * np.asarray(run(0.0)), rtol=1e-5)
