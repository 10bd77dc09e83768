"""Noise schedules from diffusers' scheduler_config.json: tables, timesteps and the forward process."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")

# Options that would change a sampler's result and that no rule here supports.
_REFUSED_OPTIONS = (
    "thresholding",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "sigma_min",
    "sigma_max",
)
_LINSPACE_CLASSES = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
_CLIPPING_CLASSES = ("DDIMScheduler", "DDPMScheduler")
_KNOWN_CLASSES = (*_LINSPACE_CLASSES, *_CLIPPING_CLASSES, "PNDMScheduler", "LCMScheduler")
_OWN_FIELDS = ("class_name", "extra", "defaulted")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving discrete schedule, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    Fields carry the names and meanings of diffusers' scheduler_config.json. A schedule is hashable and a static pytree:
    close over it or pass it to a jitted function, and its tables become constants. Tables (fp32 numpy
    [num_train_timesteps], computed in fp64): `alphas_cumprod` a, `signal` sqrt(a), `noise` sqrt(1 - a), `snr`
    a / (1 - a), `sigma` sqrt((1 - a) / a).
    Raises: ValueError for an unknown prediction type, spacing or beta schedule, or `trained_betas` of another length.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False
    class_name: str = "DDIMScheduler"
    # Other keys of the file, for `option` and `to_config`.
    extra: tuple[tuple[str, Any], ...] = ()
    # Fields that the file left out; they have the defaults of its class.
    defaulted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("prediction_type", PREDICTION_TYPES), ("timestep_spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"schedule: {name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.trained_betas is None and self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"schedule: beta_schedule is {self.beta_schedule!r}; known: {', '.join(BETA_SCHEDULES)}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"schedule: trained_betas has {len(self.trained_betas)} entries; expected num_train_timesteps = "
                f"{self.num_train_timesteps}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Build from the content of a scheduler_config.json; absent keys take the defaults of its `_class_name`.

        Raises: ValueError, which names the key, for an unsupported scheduler class or option.
        """
        config = dict(config)
        class_name = config.pop("_class_name", None)
        if class_name is not None and class_name not in _KNOWN_CLASSES:
            raise ValueError(
                f"schedule: _class_name {class_name!r} is not supported; known: {', '.join(_KNOWN_CLASSES)}"
            )
        for option in _REFUSED_OPTIONS:
            if config.get(option):
                raise ValueError(f"schedule: {option} = {config[option]!r} is not supported; expected false")
        names = {field.name for field in dataclasses.fields(cls)} - set(_OWN_FIELDS)
        known = {name: config.pop(name) for name in list(config) if name in names}
        known.setdefault("clip_sample", class_name in _CLIPPING_CLASSES)
        defaults = {name: value for name, value in _class_defaults(class_name).items() if name not in known}
        if class_name == "PNDMScheduler":
            config.setdefault("skip_prk_steps", False)
        if known.get("trained_betas") is not None:
            known["trained_betas"] = tuple(float(beta) for beta in known["trained_betas"])
        extra = tuple(sorted((key, _frozen(value)) for key, value in config.items() if key[0] != "_"))
        # Without a class name no field counts as a default, so no rule changes one.
        defaulted = tuple(sorted(defaults)) if class_name else ()
        return cls(**known, **defaults, class_name=class_name or "DDIMScheduler", extra=extra, defaulted=defaulted)

    def to_config(self) -> dict[str, Any]:
        """The content of a scheduler_config.json that diffusers loads to the same schedule."""
        config = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in (*_OWN_FIELDS, *self.defaulted)
        }
        config["trained_betas"] = None if self.trained_betas is None else list(self.trained_betas)
        return {
            "_class_name": self.class_name,
            **config,
            **{key: _thawed(value) for key, value in self.extra},
        }

    def for_class(self, class_name: str) -> NoiseSchedule:
        """The schedule for another scheduler class: fields that the file left out take that class's defaults.

        `timestep_spacing` and `set_alpha_to_one` differ between classes. A change of class does not turn
        `clip_sample` on: clipping to [-1, 1] is meant for pixels, and files of classes without it describe latents.
        """
        if class_name == self.class_name:
            return self
        defaults = {name: value for name, value in _class_defaults(class_name).items() if name in self.defaulted}
        return dataclasses.replace(self, class_name=class_name, **defaults)

    def option(self, name: str, default: Any = None) -> Any:
        """A key of the file that is not a field, such as `use_karras_sigmas`; `default` when the key is absent."""
        return dict(self.extra).get(name, default)

    @functools.cached_property
    def alphas_cumprod64(self) -> np.ndarray:
        """a_t in fp64, [num_train_timesteps]; the last entry is 0 with `rescale_betas_zero_snr`."""
        table = np.cumprod(1.0 - _betas(self))
        if self.rescale_betas_zero_snr:
            root = np.sqrt(table)
            table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        table.flags.writeable = False
        return table

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return _fp32(self.alphas_cumprod64)

    @functools.cached_property
    def signal(self) -> np.ndarray:
        return _fp32(np.sqrt(self.alphas_cumprod64))

    @functools.cached_property
    def noise(self) -> np.ndarray:
        return _fp32(np.sqrt(1.0 - self.alphas_cumprod64))

    @functools.cached_property
    def snr(self) -> np.ndarray:
        return _fp32(self.alphas_cumprod64 / (1.0 - self.alphas_cumprod64))

    @functools.cached_property
    def sigma(self) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return _fp32(np.sqrt((1.0 - self.alphas_cumprod64) / self.alphas_cumprod64))


def timesteps(schedule: NoiseSchedule, steps: int, *, intervals: bool = False) -> np.ndarray:
    """Timesteps of a sampling run by the schedule's spacing and offset: int32 [steps], descending.

    With T training steps: linspace spreads [0, T - 1] evenly; leading takes i * (T // steps) + steps_offset; trailing
    takes T - 1, T - 1 - T / steps, ... With `intervals`, linspace and leading spread steps + 1 points and leave out
    the last (DPM-Solver, UniPC).
    Raises: ValueError when `steps` is not in 1 .. T, or when the offset moves a timestep beyond T - 1.
    """
    total = schedule.num_train_timesteps
    points = steps + intervals
    if not 1 <= steps <= total - intervals:
        raise ValueError(
            f"timesteps: steps is {steps}; expected 1 .. {total - intervals} (num_train_timesteps is {total})"
        )
    if schedule.timestep_spacing == "linspace":
        table = np.round(np.linspace(0, total - 1, points))[::-1][:steps]
    elif schedule.timestep_spacing == "leading":
        table = np.arange(points)[::-1][:steps] * (total // points) + schedule.steps_offset
    else:
        table = np.round(total - np.arange(steps) * (total / steps)) - 1
    if table.max() >= total:
        raise ValueError(
            f"timesteps: {steps} steps with steps_offset {schedule.steps_offset} reach timestep {int(table.max())}; "
            f"the schedule ends at {total - 1}, use fewer steps"
        )
    return table.astype(np.int32)


def add_noise(schedule: NoiseSchedule, x0: Array, noise: Array, t: Array) -> Array:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    `x0`, `noise` [B, ...], any float dtype; `t` int [B] or scalar. Returns fp32 [B, ...].
    """
    signal, spread = coefficients(schedule, t, x0.ndim)
    return signal * x0.astype(jnp.float32) + spread * noise.astype(jnp.float32)


def coefficients(schedule: NoiseSchedule, t: Array, ndim: int) -> tuple[Array, Array]:
    """(sqrt(a_t), sqrt(1 - a_t)) fp32, shaped [B, 1, ...] to broadcast against a batch of `ndim` axes."""
    t = jnp.asarray(t)
    shape = t.shape + (1,) * (ndim - t.ndim)
    return jnp.asarray(schedule.signal)[t].reshape(shape), jnp.asarray(schedule.noise)[t].reshape(shape)


def snr(schedule: NoiseSchedule, t: Array) -> Array:
    """Signal-to-noise ratio a_t / (1 - a_t), fp32, of the shape of `t`."""
    return jnp.asarray(schedule.snr)[t]


def sigma(schedule: NoiseSchedule, t: Array) -> Array:
    """Noise level sqrt((1 - a_t) / a_t) of the variance-exploding form x_0 + sigma noise, fp32, of the shape of `t`."""
    return jnp.asarray(schedule.sigma)[t]


def sample_timesteps(key: Array, shape: tuple[int, ...], num: int, mode: str = "uniform") -> Array:
    """Random training timesteps in 0 .. num - 1, int32 of `shape`.

    `mode` is "uniform" or "cubic": floor((1 - u^3) num), which favours noisy steps, P(t >= num / 2) = 0.5^(1/3).
    Raises: ValueError for another mode.
    """
    if mode == "uniform":
        return jax.random.randint(key, shape, 0, num)
    if mode == "cubic":
        scaled = jnp.floor((1.0 - jax.random.uniform(key, shape) ** 3) * num)
        return jnp.clip(scaled, 0, num - 1).astype(jnp.int32)
    raise ValueError(f"sample_timesteps: unknown mode {mode!r}; known: uniform, cubic")


def _class_defaults(class_name: str | None) -> dict[str, Any]:
    """Fields whose default differs between the scheduler classes of diffusers."""
    return {
        "timestep_spacing": "linspace" if class_name in _LINSPACE_CLASSES else "leading",
        "set_alpha_to_one": class_name != "PNDMScheduler",
    }


def _betas(schedule: NoiseSchedule) -> np.ndarray:
    total = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, np.float64)
    if schedule.beta_schedule == "linear":
        return np.linspace(schedule.beta_start, schedule.beta_end, total)
    if schedule.beta_schedule == "scaled_linear":
        return np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, total) ** 2
    edges = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - edges[1:] / edges[:-1], 0.999)


def _fp32(table: np.ndarray) -> np.ndarray:
    table = table.astype(np.float32)
    table.flags.writeable = False
    return table


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value
