"""Every step rule against its diffusers scheduler, step by step along whole runs, with an analytic denoiser."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.diffusion import (
    NoiseSchedule,
    StepRule,
    ddim,
    keep_known,
    row_count,
    rule_named,
    rule_of,
    sample,
    start_latents,
    start_row,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
SHAPE = (2, 4, 4, 4)
STABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def torch_predict(x, t):
    """A denoiser in closed form that is nonlinear in position and depends on the timestep."""
    return torch.tanh(0.8 * x + 0.3) * (0.5 + float(t) / 2000.0) - 0.1 * x


def jax_predict(x, t):
    return jnp.tanh(0.8 * x + 0.3) * (0.5 + t[:, None, None, None] / 2000.0) - 0.1 * x


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def run_theirs(theirs, x, timesteps, after=lambda index, x: x, **extra) -> tuple[np.ndarray, np.ndarray]:
    """(latents after each step, the noise that a generator of seed 0 draws)."""
    if "generator" in inspect.signature(theirs.step).parameters:
        extra["generator"] = torch.Generator().manual_seed(0)
    states = []
    for index, t in enumerate(timesteps):
        x = theirs.step(torch_predict(theirs.scale_model_input(x, t), t), t, x, **extra).prev_sample
        x = after(index, x)
        states.append(x.numpy())
    generator = torch.Generator().manual_seed(0)
    return np.stack(states), np.stack([torch.randn(SHAPE, generator=generator).numpy() for _ in timesteps])


def run_ours(schedule, steps, rule: StepRule, latents, noise, start=None, after=lambda x, row: x) -> np.ndarray:
    states = []

    def record(x, row):
        x = after(x, row)
        states.append(np.asarray(x))
        return x

    # Operation by operation: compiling a loop for each case would take longer than running it.
    with jax.disable_jit():
        sample(
            jax_predict, jnp.asarray(latents), None, schedule, steps, rule, noise=noise, start=start, after_step=record
        )
    return np.stack(states)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal after each step, relative to the largest latent there."""
    assert ours.shape == theirs.shape
    axes = tuple(range(1, ours.ndim))
    error = np.abs(ours.astype(np.float64) - theirs).max(axes) / np.abs(theirs).max(axes)
    assert error.max() <= TOLERANCE, f"largest relative error {error.max():.2e} at step {error.argmax()}"


def assert_runs_agree(config: dict, name: str, steps: int, tables: str = "theirs", **extra) -> None:
    theirs = getattr(diffusers, CLASSES[name]).from_config(config)
    if tables == "fp64":
        theirs.alphas_cumprod = torch.from_numpy(NoiseSchedule.from_config(config).alphas_cumprod64.copy())
    theirs.set_timesteps(steps)
    expected, noise = run_theirs(
        theirs, torch.from_numpy(normal(0)) * theirs.init_noise_sigma, theirs.timesteps, **extra
    )
    rule = ddim(extra["eta"]) if "eta" in extra else rule_named(name)
    assert_same(run_ours(NoiseSchedule.from_config(config), steps, rule, normal(0), noise), expected)


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings(name, spacing):
    assert_runs_agree(STABLE | {"_class_name": CLASSES[name], "timestep_spacing": spacing}, name, 21)


# diffusers' PNDM and ancestral Euler have no step for predictions of the sample.
KINDS = [("v_prediction", name) for name in CLASSES] + [
    ("sample", name) for name in CLASSES if name not in ("pndm", "euler_ancestral")
]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_prediction_types(name, kind):
    assert_runs_agree(STABLE | {"_class_name": CLASSES[name], "prediction_type": kind}, name, 30)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "unipc"])
def test_zero_snr(name):
    assert_runs_agree(STABLE | ZERO_SNR | {"_class_name": CLASSES[name], "prediction_type": "v_prediction"}, name, 25)


OPTIONS = [
    ("ddim", 50, {"timestep_spacing": "leading"}),
    ("ddim", 20, {"prediction_type": "sample", "clip_sample": True, "set_alpha_to_one": True}),
    ("ddim", 20, {"clip_sample": True, "clip_sample_range": 0.7}),
    ("ddpm", 20, {"clip_sample": True}),
    ("ddpm", 50, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    ("pndm", 50, {}),
    ("pndm", 20, {"set_alpha_to_one": True, "beta_schedule": "squaredcos_cap_v2"}),
    ("pndm", 3, {}),
    ("euler", 50, {}),
    ("euler", 20, {"use_karras_sigmas": True}),
    ("euler", 20, {"use_karras_sigmas": True, "timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
    ("euler", 20, {"trained_betas": np.linspace(0.01, 0.2, 50).tolist(), "num_train_timesteps": 50}),
    ("euler_ancestral", 50, {}),
    ("dpmpp_2m", 50, {}),
    ("dpmpp_2m", 20, {"use_karras_sigmas": True}),
    ("dpmpp_2m", 10, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", 20, {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_2m", 20, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_type": "heun"}),
    ("dpmpp_2m", 20, {"solver_type": "heun", "euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", 10, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", 10, {"solver_order": 3}),
    ("dpmpp_2m", 20, {"solver_order": 3, "use_karras_sigmas": True}),
    ("dpmpp_2m", 20, {"solver_order": 1}),
    ("unipc", 50, {}),
    ("unipc", 20, {"use_karras_sigmas": True}),
    ("unipc", 10, {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("unipc", 20, {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("unipc", 20, {"solver_order": 1, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("unipc", 20, {"disable_corrector": [0, 1, 5]}),
]


@pytest.mark.parametrize(("name", "steps", "options"), OPTIONS)
def test_options_of_the_config(name, steps, options):
    assert_runs_agree(STABLE | {"_class_name": CLASSES[name]} | options, name, steps)


@pytest.mark.parametrize(
    ("kind", "spacing", "zero", "eta"),
    [
        ("epsilon", "linspace", False, 1.0),
        ("v_prediction", "leading", False, 0.6),
        ("sample", "trailing", True, 1.0),
    ],
)
def test_ddim_with_noise(kind, spacing, zero, eta):
    options = {"prediction_type": kind, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero}
    # Rescaled to zero SNR, their fp32 table is off by 1e-4 at the noisy end, and noise makes that visible.
    tables = "fp64" if zero else "theirs"
    assert_runs_agree(STABLE | {"_class_name": "DDIMScheduler"} | options, "ddim", 20, tables, eta=eta)


def test_karras_levels_of_a_cosine_schedule():
    config = STABLE | {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
    theirs.set_timesteps(20)
    table = rule_named("dpmpp_2m").table(NoiseSchedule.from_config(config), 20)
    np.testing.assert_allclose(table["spread"] / table["signal"], theirs.sigmas[:-1], rtol=5e-4)
    # They cut 998.9999 down to 998 where the level is that of timestep 999.
    assert table["timestep"][0] == 999
    assert np.abs(table["timestep"] - theirs.timesteps.numpy()).max() <= 1


FILES = {
    "sd15": STABLE | {"_class_name": "PNDMScheduler", "trained_betas": None},
    "sdxl": STABLE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "bare": {"_class_name": "EulerDiscreteScheduler", "skip_prk_steps": True, "clip_sample": False},
    "karras": STABLE | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
}


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("file", list(FILES))
def test_another_scheduler_over_the_same_file(name, file):
    theirs = getattr(diffusers, FILES[file]["_class_name"]).from_config(FILES[file])
    switched = getattr(diffusers, CLASSES[name]).from_config(theirs.config)
    switched.set_timesteps(7)
    expected, noise = run_theirs(switched, torch.from_numpy(normal(0)) * switched.init_noise_sigma, switched.timesteps)
    schedule = NoiseSchedule.from_config(FILES[file])
    assert_same(run_ours(schedule, 7, rule_named(name), normal(0), noise), expected)


@pytest.mark.parametrize("name", list(CLASSES))
def test_rule_of_a_file(name):
    schedule = NoiseSchedule.from_config(STABLE | {"_class_name": CLASSES[name]})
    assert rule_of(schedule).class_name == CLASSES[name]


def part_way(name: str, steps: int, strength: float, **options):
    """Their scheduler set up as their image-to-image pipelines do it: (scheduler, timesteps left, first row)."""
    theirs = getattr(diffusers, CLASSES[name]).from_config(STABLE | options)
    theirs.set_timesteps(steps)
    first = max(steps - min(int(steps * strength), steps), 0) * theirs.order
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(first)
    return theirs, theirs.timesteps[first:], first


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("strength", [0.05, 0.58])
def test_image_to_image(name, strength):
    steps, clean, noise = 20, normal(1), normal(2)
    theirs, timesteps, first = part_way(name, steps, strength)
    noisy = theirs.add_noise(*map(torch.from_numpy, (clean, noise)), timesteps[:1])
    expected, drawn = run_theirs(theirs, noisy, timesteps)

    schedule, rule = NoiseSchedule.from_config(STABLE | {"_class_name": CLASSES[name]}), rule_named(name)
    start = start_row(steps, strength)
    assert start == first
    latents = start_latents(jnp.asarray(clean), jnp.asarray(noise), schedule, steps, rule, start)
    np.testing.assert_allclose(latents, noisy.numpy(), rtol=1e-5, atol=1e-5)
    injected = np.zeros((row_count(schedule, steps, rule), *SHAPE), np.float32)
    injected[start:] = drawn
    assert_same(run_ours(schedule, steps, rule, latents, injected, start), expected)


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_a_four_channel_model(name, strength):
    steps, clean, noise = 20, normal(1), normal(2)
    mask = (np.random.default_rng(3).random((2, 4, 4, 1)) > 0.5).astype(np.float32)
    theirs, timesteps, start = part_way(name, steps, strength, use_karras_sigmas=name != "unipc")
    image, fixed, repaint = map(torch.from_numpy, (clean, noise, mask))
    latents = fixed * theirs.init_noise_sigma if strength == 1.0 else theirs.add_noise(image, fixed, timesteps[:1])

    def blend(index, x):
        last = index == len(timesteps) - 1
        known = image if last else theirs.add_noise(image, fixed, timesteps[index + 1 : index + 2])
        return (1 - repaint) * known + repaint * x

    expected, drawn = run_theirs(theirs, latents, timesteps, after=blend)
    config = STABLE | {"_class_name": CLASSES[name], "use_karras_sigmas": name != "unipc"}
    schedule, rule = NoiseSchedule.from_config(config), rule_named(name)
    injected = np.zeros((row_count(schedule, steps, rule), *SHAPE), np.float32)
    injected[start:] = drawn
    begin = functools.partial(run_ours, schedule, steps, rule)
    keep = keep_known(*map(jnp.asarray, (clean, noise, mask)), schedule, steps, rule)
    if strength == 1.0:
        ours = begin(noise, injected, after=keep)
    else:
        ours = begin(start_latents(clean, noise, schedule, steps, rule, start), injected, start, after=keep)
    assert_same(ours, expected)
    np.testing.assert_array_equal(ours[-1] * (1 - mask), clean * (1 - mask))
