"""What a base's noise process is: how clean latents become noisy, and what a denoiser answers to that.

A variance-preserving schedule fulfils it here; a rectified flow has the same members with x_t = (1 - t) x_0 + t noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax

from fairhuman_jax.diffusion.prediction import target, to_x0
from fairhuman_jax.diffusion.schedule import NoiseSchedule, add_noise, coefficients, sample_timesteps

Array = jax.Array


class Process(Protocol):
    """x_t = signal(t) x_0 + spread(t) noise, at times that denoisers read; everything is float32."""

    def signal(self, t: Array, ndim: int) -> Array:
        """The factor of x_0 at times [B], shaped [B, 1, ...] with `ndim` axes."""
        ...

    def spread(self, t: Array, ndim: int) -> Array:
        """The factor of the noise at times [B], shaped as `signal`."""
        ...

    def noisy(self, clean: Array, noise: Array, t: Array) -> Array:
        """x_t of x_0 and noise [B, ...] at times [B]."""
        ...

    def target(self, clean: Array, noise: Array, t: Array) -> Array:
        """What the denoiser is trained to answer, [B, ...]."""
        ...

    def to_clean(self, prediction: Array, noisy: Array, t: Array) -> Array:
        """x_0 that an answer to x_t implies, [B, ...]."""
        ...

    def times(self, key: Array, mode: str) -> Array:
        """One random time of training, a scalar; `mode` names its density."""
        ...

    def at_fraction(self, fraction: Array) -> Array:
        """Times at fractions [B] in [0, 1) of the process."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """The process of a `NoiseSchedule`: signal^2 + spread^2 = 1, times are integers below `num_train_timesteps`."""

    schedule: NoiseSchedule

    def signal(self, t: Array, ndim: int) -> Array:
        """sqrt(a_t)."""
        return coefficients(self.schedule, t, ndim)[0]

    def spread(self, t: Array, ndim: int) -> Array:
        """sqrt(1 - a_t)."""
        return coefficients(self.schedule, t, ndim)[1]

    def noisy(self, clean: Array, noise: Array, t: Array) -> Array:
        """See `add_noise`."""
        return add_noise(self.schedule, clean, noise, t)

    def target(self, clean: Array, noise: Array, t: Array) -> Array:
        """Noise, velocity or x_0, as the schedule's prediction type says."""
        return target(self.schedule, clean, noise, t)

    def to_clean(self, prediction: Array, noisy: Array, t: Array) -> Array:
        """See `to_x0`."""
        return to_x0(self.schedule, prediction, noisy, t)

    def times(self, key: Array, mode: str) -> Array:
        """See `sample_timesteps`."""
        return sample_timesteps(key, (), self.schedule.num_train_timesteps, mode)

    def at_fraction(self, fraction: Array) -> Array:
        """floor(fraction num_train_timesteps)."""
        return jax.numpy.floor(fraction * self.schedule.num_train_timesteps).astype(jax.numpy.int32)
