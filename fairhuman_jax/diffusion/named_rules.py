"""Step rules by the names that users give them, and the rule of a scheduler_config.json."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fairhuman_jax.diffusion.multistep import dpmpp_2m, unipc
from fairhuman_jax.diffusion.plms import pndm
from fairhuman_jax.diffusion.schedule import NoiseSchedule
from fairhuman_jax.diffusion.single_step import ddim, ddim_humansd, ddpm, euler, euler_ancestral
from fairhuman_jax.diffusion.step_rule import StepRule

RULES: dict[str, Callable[[], StepRule]] = {
    "ddim": ddim,
    "ddim_humansd": ddim_humansd,
    "ddpm": ddpm,
    "pndm": pndm,
    "euler": euler,
    "euler_karras": functools.partial(euler, karras=True),
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": functools.partial(dpmpp_2m, karras=True),
    "dpmpp_2m_sde": functools.partial(dpmpp_2m, sde=True),
    "dpmpp_2m_sde_karras": functools.partial(dpmpp_2m, karras=True, sde=True),
    "unipc": unipc,
    "unipc_karras": functools.partial(unipc, karras=True),
}

_RULE_OF_CLASS: dict[str, Callable[[], StepRule]] = {
    rule().class_name: rule for rule in (ddim, ddpm, pndm, euler, euler_ancestral, dpmpp_2m, unipc)
}


def rule_named(name: str) -> StepRule:
    """Look up a rule in `RULES`; one name always gives the same object, so a rule can be a static argument.

    The rule reads options that its name does not fix (Karras levels, orders) from the schedule's config.
    Raises: ValueError for an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"scheduler {name!r} is not known; known: {', '.join(RULES)}")
    return RULES[name]()


def rule_of(schedule: NoiseSchedule) -> StepRule:
    """The rule of the schedule's `_class_name`; it follows the other options of the config.

    Raises: ValueError for a class without a rule.
    """
    if schedule.class_name not in _RULE_OF_CLASS:
        raise ValueError(
            f"schedule: {schedule.class_name} has no step rule; name another scheduler: {', '.join(RULES)}"
        )
    return _RULE_OF_CLASS[schedule.class_name]()
