"""Noise schedules and timesteps against diffusers."""

from __future__ import annotations

import numpy as np
import pytest

from fairhuman_jax.diffusion import NoiseSchedule, add_noise, timesteps, velocity

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def config(**changes) -> dict:
    return {**STABLE, "steps_offset": 1, "set_alpha_to_one": False, **changes}


def start(shape=(2, 6, 6, 4)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.01, 0.2, 50).tolist(), "num_train_timesteps": 50},
    ],
    ids=["scaled_linear", "linear", "squaredcos", "trained"],
)
def test_tables_noise_and_velocity(changes, zero):
    settings = config(rescale_betas_zero_snr=zero, **changes)
    theirs = diffusers.DDIMScheduler(**settings)
    ours = NoiseSchedule.from_config(dict(theirs.config))
    # Their tables are cumulative products in fp32.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-5, atol=2e-7)
    total = ours.num_train_timesteps
    t = np.array([0, total // 3, total // 2, total - 1])
    x0, noise = start((4, 3, 3, 2)), start((4, 3, 3, 2))[::-1].copy()
    parts = [torch.from_numpy(array) for array in (x0, noise, t)]
    # At t = 0 their 1 - alphas_cumprod has lost digits that ours keeps.
    np.testing.assert_allclose(add_noise(ours, x0, noise, t), theirs.add_noise(*parts), atol=1e-4)
    np.testing.assert_allclose(velocity(ours, x0, noise, t), theirs.get_velocity(*parts), atol=1e-4)
    ddpm = diffusers.DDPMScheduler.from_config(theirs.config)
    np.testing.assert_allclose(add_noise(ours, x0, noise, t), ddpm.add_noise(*parts), atol=1e-4)


def test_our_config_loads_in_diffusers():
    schedule = NoiseSchedule.from_config(config(_class_name="DDIMScheduler", prediction_type="v_prediction"))
    theirs = diffusers.DDIMScheduler.from_config(schedule.to_config())
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), schedule.alphas_cumprod, rtol=3e-5)
    assert theirs.config.prediction_type == "v_prediction" and theirs.config.steps_offset == 1


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps(spacing, steps):
    theirs = diffusers.DDIMScheduler(**config(timestep_spacing=spacing, steps_offset=0))
    theirs.set_timesteps(steps)
    ours = NoiseSchedule.from_config(dict(theirs.config))
    np.testing.assert_array_equal(timesteps(ours, steps), theirs.timesteps.numpy())
