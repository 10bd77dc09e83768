"""The noise process of a base: signal and spread, targets, and the way back to clean latents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.diffusion.process import VariancePreserving

RNG = np.random.default_rng(0)
CLEAN, NOISE = (RNG.normal(size=(4, 3, 3, 2)).astype(np.float32) for _ in range(2))
T = jnp.asarray([0, 100, 500, 990])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_at_a_noisy_sample_leads_back_to_the_clean_one(prediction_type):
    process = VariancePreserving(NoiseSchedule.from_config({"prediction_type": prediction_type}))
    noisy = process.noisy(CLEAN, NOISE, T)
    np.testing.assert_allclose(noisy, process.signal(T, 4) * CLEAN + process.spread(T, 4) * NOISE, rtol=1e-5)
    np.testing.assert_allclose(process.signal(T, 4) ** 2 + process.spread(T, 4) ** 2, np.ones((4, 1, 1, 1)), rtol=1e-5)
    np.testing.assert_allclose(process.to_clean(process.target(CLEAN, NOISE, T), noisy, T), CLEAN, atol=2e-3)


def test_times_are_those_of_the_schedule():
    process = VariancePreserving(NoiseSchedule.from_config({"num_train_timesteps": 50}))
    drawn = jax.vmap(lambda key: process.times(key, "uniform"))(jax.random.split(jax.random.key(0), 500))
    assert (int(drawn.min()), int(drawn.max())) == (0, 49)
    np.testing.assert_array_equal(process.at_fraction(jnp.asarray([0.0, 0.5, 0.999])), [0, 25, 49])
