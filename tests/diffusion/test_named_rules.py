"""Rules by name and by config file, and options that no rule supports."""

from __future__ import annotations

import pytest

from fairhuman_jax.diffusion import RULES, NoiseSchedule, rule_named, rule_of, timesteps


def test_a_name_is_always_the_same_static_argument():
    for name in RULES:
        assert rule_named(name) is rule_named(name) and hash(rule_named(name)) == hash(rule_named(name))
    with pytest.raises(ValueError, match="scheduler 'heun' is not known; known: ddim, ddim_humansd, ddpm, pndm, euler"):
        rule_named("heun")


def test_a_class_without_rule_is_refused():
    schedule = NoiseSchedule.from_config({"_class_name": "HeunDiscreteScheduler"})
    with pytest.raises(ValueError, match="HeunDiscreteScheduler has no step rule; name another scheduler: ddim"):
        rule_of(schedule)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pndm", {"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps = False"),
        ("pndm", {"_class_name": "PNDMScheduler"}, "skip_prk_steps = False"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type 'sample'"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type 'learned_range'"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type 'log_linear'"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ("euler", {"final_sigmas_type": "one"}, "final_sigmas_type is 'one'"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver'"),
        ("dpmpp_2m", {"solver_order": 4}, "solver_order is 4; expected 1 .. 3"),
        ("dpmpp_2m_sde", {"solver_order": 3}, "solver_order is 3; expected 1 .. 2"),
        ("dpmpp_2m", {"variance_type": "learned"}, "variance_type is not supported"),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}, "finite lambda_min_clipped"),
        ("unipc", {"predict_x0": False}, "predict_x0 = False"),
        ("unipc", {"lower_order_final": False}, "cannot end at sigma 0"),
    ],
)
def test_options_that_a_rule_does_not_follow(name, options, message):
    schedule = NoiseSchedule.from_config(options)
    with pytest.raises(ValueError, match=message):
        rule_named(name).table(schedule, 10)


def test_a_field_that_the_file_leaves_out_follows_the_rule():
    absent = NoiseSchedule.from_config({"_class_name": "PNDMScheduler", "steps_offset": 1})
    present = NoiseSchedule.from_config({"_class_name": "PNDMScheduler", "timestep_spacing": "leading"})
    assert absent.for_class("UniPCMultistepScheduler").timestep_spacing == "linspace"
    assert present.for_class("UniPCMultistepScheduler").timestep_spacing == "leading"
    assert absent.for_class("DDIMScheduler").set_alpha_to_one and not absent.set_alpha_to_one
    assert not absent.for_class("DDIMScheduler").clip_sample
    assert "timestep_spacing" not in absent.to_config()
    assert NoiseSchedule.from_config(absent.to_config()) == absent


def test_steps_with_a_point_left_out():
    schedule = NoiseSchedule(num_train_timesteps=10, timestep_spacing="leading")
    assert timesteps(schedule, 4, intervals=True).tolist() == [8, 6, 4, 2]
    with pytest.raises(ValueError, match=r"expected 1 \.\. 9"):
        timesteps(schedule, 10, intervals=True)
