"""The sampling loop and classifier-free guidance with analytic denoisers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.diffusion import NoiseSchedule, classifier_free, ddim, euler_ancestral, sample

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


@pytest.mark.parametrize("rule", [ddim(), ddim(1.0), euler_ancestral()], ids=["ddim", "eta", "euler_ancestral"])
def test_point_data_is_reached(rule):
    result = sample(point_denoiser(SCHEDULE, 0.7), latents(), jax.random.key(0), SCHEDULE, 8, rule)
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
    with pytest.raises(ValueError, match="infinite sigma"):
        sample(lambda x, t: x, latents(), jax.random.key(0), schedule, 4, euler_ancestral())


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
