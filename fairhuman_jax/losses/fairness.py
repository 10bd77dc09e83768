"""Combiners: one interface for every way to make one gradient out of K, the alpha-fair rules and their baselines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fairhuman_jax.losses import gram_rules, loss_rules
from fairhuman_jax.losses.gram import (
    active_tasks,
    as_float,
    combine_weighted,
    cosine_matrix,
    gradient_scale,
    gram_matrix,
    gram_product,
    task_count,
)
from fairhuman_jax.losses.rule import Rule, TaskView

Array = jax.Array
PyTree = Any
Info = dict[str, Array]

RESCALES = ("n_tasks", "none", "match_sum_norm", "unit")
_RULES: dict[str, Callable[..., Rule]] = {
    "mpd": gram_rules.mpd,
    "sum": gram_rules.linear_sum,
    "single": gram_rules.single,
    "log_sum": loss_rules.log_sum,
    "uncertainty": loss_rules.uncertainty,
    "dwa": loss_rules.dwa,
    "famo": loss_rules.famo,
    "rlw": loss_rules.rlw,
    "mgda": gram_rules.mgda,
    "pcgrad": gram_rules.pcgrad,
    "cagrad": gram_rules.cagrad,
    "imtl_g": gram_rules.imtl_g,
    "nash_mtl": gram_rules.nash_mtl,
    "graddrop": gram_rules.graddrop,
}
COMBINERS = tuple(_RULES)


@dataclass(frozen=True)
class Combiner:
    """A way to make one gradient out of K, in the manner of an optax transformation: `init`, then `update` each step.

    `reads` says what the weights need: "losses" (their values alone, so one backward pass of sum_i c_i L_i will do),
    "gram" (the Gram matrix of the gradients), or "gradients" (the gradients themselves, entry by entry; see `mix`).
    `power`: the weights of u g are u^-power times those of g. Made by `make_combiner`.
    """

    name: str
    reads: str
    power: float | Array
    rescale: str
    rule: Rule

    def init(self, count: int) -> PyTree:
        """State for `count` tasks: a pytree of arrays, () for a rule that keeps none."""
        return self.rule.init(count)

    def weigh(
        self, gram: Array | None, state: PyTree, losses: Array | None = None, key: Array | None = None
    ) -> tuple[Array, PyTree, Info]:
        """Coefficients of the task gradients from their Gram matrix [K, K] (None where `reads` is "losses").

        `losses` [K] and `key` are needed by the rules that read or draw; on several devices both must be the same on
        all. Returns (coefficients [K], new state, info). `info`: `coefficients`; `weights` [K] before rescaling;
        `active` bool [K], the tasks that take part (nonzero gradient; without a Gram matrix nonzero loss); `finite`
        bool; `residual`, the relative error of the rule's own equation; with a Gram matrix also `gram` and `cosines`.
        Where the Gram matrix, or a loss that the rule reads, is not finite, the coefficients are 0, `finite` is False
        and the state is the old one. Raises: ValueError when something that the rule needs is None.
        """
        view, finite = self._view(gram, losses, key)
        weights, new_state, residual = self.rule.solve(view, state)
        weights = jnp.where(finite, weights, 0.0)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
        info = {"weights": weights, "active": view.active & finite, "finite": finite}
        info["residual"] = jnp.where(finite, residual, 0.0)
        if gram is not None:
            info |= {"gram": as_float(gram), "cosines": cosine_matrix(view.gram, view.active)}
        info["coefficients"] = weights * _rescale_factor(view.gram, weights, self.rescale)
        return info["coefficients"], state, info

    def undo(self, unit: Array) -> tuple[Array, Array]:
        """(factor of the weights, factor of the combined gradient) that turn the results for unit * g into those of g.

        For a Gram matrix of gradients that were multiplied by `unit` > 0 first, as by `gradient_scale`.
        """
        still = isinstance(self.power, float) and self.power == 0.0
        weight_factor = jnp.ones_like(unit) if still else unit**self.power
        if self.rescale == "unit":
            return weight_factor, jnp.ones_like(unit)
        if still or self.rescale == "match_sum_norm":
            return weight_factor, 1.0 / unit
        return weight_factor, unit ** (self.power - 1.0)

    def mix(self, task_grads: PyTree, key: Array) -> PyTree:
        """The combined gradient where `reads` is "gradients", rescaled, fp32; linear in the scale of the gradients.

        Leaves [K, ...]. A leaf that is split over devices needs a key of its own on each of them.
        """
        if self.rule.mix is None:
            raise ValueError(
                f"{self.name} is a linear combination: use combine_weighted with the coefficients of weigh"
            )
        factor = float(task_count(task_grads)) if self.rescale == "n_tasks" else 1.0
        return jax.tree.map(lambda leaf: leaf * factor, self.rule.mix(task_grads, key))

    def update(
        self,
        task_grads: PyTree,
        state: PyTree,
        *,
        losses: Array | None = None,
        key: Array | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        loss_scale: float | Array = 1.0,
    ) -> tuple[PyTree, PyTree, Info]:
        """Combine K task gradients: (gradient without the task axis, new state, info as `weigh`).

        Every leaf of `task_grads` is [K, ...]; `losses` [K] are the true ones. With `axis_name` gradients and losses
        are averaged over that mapped axis first (the Gram matrix is not linear in the gradients). `loss_scale` is the
        factor the losses were multiplied by before they were differentiated; it is removed before anything else. If any
        task gradient is not finite, the result is zero, the state is the old one and `info["finite"]` is False: the
        caller skips the update. The direction is right for any finite fp32 scale; the entries of `gram`, `weights`
        and `coefficients` leave the fp32 range for gradient norms outside about 1e-19 .. 1e19 and are reported as 0
        or the largest number. `coefficients` are the factors applied to `task_grads` as given.
        """
        if axis_name is not None:
            task_grads = jax.tree.map(
                lambda leaf: jax.lax.pmean(leaf.astype(jnp.float32), axis_name).astype(leaf.dtype), task_grads
            )
            losses = None if losses is None else jax.lax.pmean(losses, axis_name)
        scale = gradient_scale(task_grads)
        applied, state, info = self.weigh(gram_matrix(task_grads, scale), state, losses, key)
        # What is solved is h = unit * g, g the gradient of the unscaled loss; both results go back to g by one power.
        unit = scale * loss_scale
        weight_factor, output_factor = self.undo(unit)
        if self.reads == "gradients" and key is not None:
            total = self.mix(jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * scale, task_grads), key)
        else:
            total = combine_weighted(task_grads, applied, scale)
        grads = jax.tree.map(
            lambda one, leaf: jnp.where(info["finite"], one * output_factor, 0.0).astype(leaf.dtype), total, task_grads
        )
        largest = jnp.finfo(jnp.float32).max
        info["gram"] = jnp.clip(info["gram"] / unit / unit, -largest, largest)
        info["weights"] = jnp.clip(info["weights"] * weight_factor, -largest, largest)
        info["coefficients"] = jnp.clip(applied * output_factor * scale, -largest, largest)
        return grads, state, info

    def _view(self, gram: Array | None, losses: Array | None, key: Array | None) -> tuple[TaskView, Array]:
        """What the rule may read, with anything not finite replaced, and whether it was finite."""
        if gram is None and (self.reads != "losses" or losses is None):
            wanted = "the losses" if self.reads == "losses" else "the Gram matrix of the task gradients"
            raise ValueError(f"{self.name} needs {wanted}, but got None")
        if self.rule.needs_losses and losses is None:
            raise ValueError(f"{self.name} reads the values of the losses: pass losses=[K]")
        if self.rule.needs_key and key is None:
            raise ValueError(f"{self.name} draws random numbers: pass key=")
        finite, active = jnp.asarray(True), None
        if gram is not None:
            gram = as_float(gram)
            finite &= jnp.all(jnp.isfinite(gram))
            gram = jnp.where(finite, gram, jnp.eye(gram.shape[0], dtype=gram.dtype))
            active = active_tasks(gram)
        if losses is not None:
            losses = as_float(losses)
            if losses.ndim != 1 or (gram is not None and losses.shape[0] != gram.shape[0]):
                expected = "[K]" if gram is None else f"({gram.shape[0]},)"
                raise ValueError(f"losses has shape {losses.shape}; expected {expected}, one entry a task")
            if self.rule.needs_losses:
                finite &= jnp.all(jnp.isfinite(losses))
                losses = jnp.where(finite, losses, 1.0)
            active = losses != 0 if active is None else active
        return TaskView(gram, active, losses, key), finite


def make_combiner(
    method: str = "mpd",
    *,
    alpha: float | Array = 2.0,
    priority: Any = None,
    rescale: str | None = None,
    **options: Any,
) -> Combiner:
    """The combiner of a name in `COMBINERS`.

    Args: `alpha` >= 0, of "mpd" alone (2 is minimum potential delay, 1 proportional, 0 uniform), ignored by the others;
    `priority` [K] > 0, for mpd and nash_mtl (in their equation), sum, log_sum and pcgrad (as factors).
    `rescale` multiplies the weights: "n_tasks" by K, "none" by 1, "match_sum_norm" so that the combined norm is that of
    the plain sum, "unit" to norm 1; None is what the reference does: n_tasks for mpd, mgda, cagrad and graddrop, none
    for the others. The last two need the Gram matrix, whatever the method, and do not go with graddrop.
    `options` of single: task=0; uncertainty: learning_rate=1e-3; dwa: window=25, temperature=2; famo:
    learning_rate=0.025, weight_decay=1e-5, min_losses=None; mgda: normalization="none"; cagrad: c=0.4.
    Raises: ValueError for an unknown name, option or value.
    Source: FairHuman, weighting_strategy/weight_methods.py, and the paper of each method.
    """
    if method not in _RULES:
        raise ValueError(f"make_combiner: unknown method {method!r}; known: {', '.join(_RULES)}")
    known = tuple(inspect.signature(_RULES[method]).parameters)
    if "alpha" in known:
        options["alpha"] = alpha
    if priority is not None:
        if "priority" not in known:
            takers = [name for name, rule in _RULES.items() if "priority" in inspect.signature(rule).parameters]
            raise ValueError(f"make_combiner: {method} takes no priority; {', '.join(takers)} do")
        options["priority"] = priority
    for option in options:
        if option not in known:
            raise ValueError(f"make_combiner: {method} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    rule = _RULES[method](**options)
    rescale = rescale or rule.rescale
    if rescale not in RESCALES:
        raise ValueError(f"make_combiner: unknown rescale {rescale!r}; known: {', '.join(RESCALES)}")
    reads = rule.reads
    if rescale in ("match_sum_norm", "unit"):
        if reads == "gradients":
            raise ValueError(f"make_combiner: rescale={rescale!r} does not go with {method}; use n_tasks or none")
        reads = "gram"
    return Combiner(method, reads, rule.power, rescale, rule)


def fair_combine(
    task_grads: PyTree,
    alpha: float | Array = 2.0,
    priority: Any = None,
    rescale: str = "n_tasks",
    axis_name: str | tuple[str, ...] | None = None,
    loss_scale: float | Array = 1.0,
) -> tuple[PyTree, Info]:
    """Alpha-fair (alpha = 2: MPD) combination of K task gradients, d = c sum_i w_i g_i with w from `mpd_weights`.

    Arguments and (grads, info) are those of `make_combiner("mpd", ...).update`, which needs no state here.
    """
    combiner = make_combiner("mpd", alpha=alpha, priority=priority, rescale=rescale)
    grads, _, info = combiner.update(task_grads, (), axis_name=axis_name, loss_scale=loss_scale)
    return grads, info


def _rescale_factor(gram: Array | None, weights: Array, rescale: str) -> Array | float:
    """The scalar that `rescale` multiplies the weights by; 1 where the combined gradient is zero."""
    if rescale == "none":
        return 1.0
    if rescale == "n_tasks" or gram is None:
        return float(weights.shape[0])
    squared = jnp.sum(weights * gram_product(gram, weights))
    wanted = 1.0 if rescale == "unit" else jnp.maximum(jnp.sum(gram), 0.0)
    return jnp.where(squared > 0, jnp.sqrt(wanted / jnp.where(squared > 0, squared, 1.0)), 1.0)
