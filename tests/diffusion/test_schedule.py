"""Noise schedules: published figures, config round trip, rejected configs, timestep sampling, conversions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.diffusion import (
    NoiseSchedule,
    add_noise,
    sample_timesteps,
    sigma,
    snr,
    target,
    timesteps,
    to_epsilon,
    to_x0,
)

SDXL_CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def test_sdxl_figures():
    schedule = NoiseSchedule.from_config(SDXL_CONFIG)
    np.testing.assert_allclose(sigma(schedule, jnp.asarray([0, 999])), [0.0292, 14.6146], atol=5e-5)
    inverse = 1 / schedule.alphas_cumprod[[0, 250, 500, 750, 900, 999]]
    np.testing.assert_allclose(inverse, [1.00085, 1.484, 3.619, 17.80, 70.67, 214.59], rtol=5e-4)
    np.testing.assert_allclose(snr(schedule, 500) * sigma(schedule, 500) ** 2, 1.0, rtol=1e-6)


def test_config_round_trip_keeps_every_key():
    schedule = NoiseSchedule.from_config(SDXL_CONFIG)
    config = schedule.to_config()
    assert {key: config[key] for key in SDXL_CONFIG if key != "_diffusers_version"} == {
        key: value for key, value in SDXL_CONFIG.items() if key != "_diffusers_version"
    }
    assert NoiseSchedule.from_config(config) == schedule and hash(NoiseSchedule.from_config(config)) == hash(schedule)


def test_absent_keys_take_the_defaults_of_the_class():
    assert NoiseSchedule.from_config({"_class_name": "DDIMScheduler"}).clip_sample
    assert NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"}).timestep_spacing == "linspace"
    assert not NoiseSchedule.from_config({"_class_name": "PNDMScheduler"}).set_alpha_to_one
    assert not NoiseSchedule.from_config({}).clip_sample


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"thresholding": True}, "thresholding = True is not supported"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas = True"),
        ({"sigma_min": 0.002}, "sigma_min = 0.002"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 entries"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name 'FlowMatchEulerDiscreteScheduler'"),
    ],
)
def test_unsupported_options_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(config)


def test_timesteps_outside_the_table_are_refused():
    with pytest.raises(ValueError, match="reach timestep 1000"):
        timesteps(NoiseSchedule(steps_offset=1), 1000)
    with pytest.raises(ValueError, match="steps is 0"):
        timesteps(NoiseSchedule(), 0)


def test_conversions_invert_the_forward_process():
    keys = jax.random.split(jax.random.key(0))
    x0, noise = jax.random.normal(keys[0], (5, 4, 4, 2)), jax.random.normal(keys[1], (5, 4, 4, 2))
    t = jnp.asarray([0, 10, 400, 800, 999])
    for kind in ("epsilon", "v_prediction", "sample"):
        for zero in (False, True):
            if zero and kind == "epsilon":
                continue
            schedule = NoiseSchedule(prediction_type=kind, rescale_betas_zero_snr=zero)
            noisy = jax.jit(add_noise)(schedule, x0, noise, t)
            wanted = target(schedule, x0, noise, t)
            # The SNR at t = 0 and t = 999 costs digits in one of the two directions.
            np.testing.assert_allclose(to_x0(schedule, wanted, noisy, t), x0, atol=2e-4, err_msg=kind)
            np.testing.assert_allclose(to_epsilon(schedule, wanted, noisy, t), noise, atol=2e-4, err_msg=kind)
    scalar = add_noise(schedule, x0, noise, jnp.asarray(10))
    np.testing.assert_allclose(scalar[1], noisy[1], rtol=1e-6)


def test_timestep_distributions():
    key = jax.random.key(0)
    cubic = np.asarray(sample_timesteps(key, (200_000,), 1000, "cubic"))
    assert cubic.dtype == np.int32 and cubic.min() >= 0 and cubic.max() == 999
    np.testing.assert_allclose((cubic >= 500).mean(), 0.7937, atol=5e-3)
    np.testing.assert_allclose((cubic >= 900).mean(), 0.4642, atol=5e-3)
    uniform = np.asarray(sample_timesteps(key, (200_000,), 1000))
    assert uniform.min() == 0 and uniform.max() == 999
    np.testing.assert_allclose((uniform >= 900).mean(), 0.1, atol=5e-3)
    with pytest.raises(ValueError, match="unknown mode 'logit'"):
        sample_timesteps(key, (2,), 1000, "logit")
