"""From K objectives on many devices to one gradient: who pulls back what, and what the devices tell each other.

Everything here runs inside `shard_map`. Task gradients are averaged over all devices before the Gram matrix is formed,
which is not linear in them, and over micro-batches too. Beside the reduction of the gradients themselves the devices
exchange K x K + K floats: the Gram matrix, with the losses, in one all-reduce. Every device then solves the same small
system.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fairhuman_jax.contract import Batch, Parts, Phase
from fairhuman_jax.devices.sharding import AXES, DATA, FSDP, is_split, unbox
from fairhuman_jax.losses import Combiner, combine_weighted, gram_matrix, make_combiner
from fairhuman_jax.training.objectives import Linearised, linearise, mean_over_micro_batches

PyTree = Any
Metrics = dict[str, jax.Array]
Point = Callable[[Batch], Linearised]
GRADIENTS = ("stacked", "sequential", "replay")
COMBINER_KEY = 2**31 - 1  # no sample of a batch has this position


@dataclass(frozen=True)
class FairConfig:
    """How the gradients of K > 1 objectives become one; a phase of one objective takes its plain gradient."""

    method: Annotated[str, "rule of losses.COMBINERS: mpd (alpha-fair), sum, single (the first objective), ..."] = "mpd"
    alpha: Annotated[float, "alpha of the fair rule; 2 is minimum potential delay"] = 2.0
    priority: Annotated[tuple[float, ...] | None, "priority of each objective under the fair rule"] = None
    rescale: Annotated[str | None, "length of the combined gradient; None is the rule's own"] = None
    options: Annotated[tuple[tuple[str, float], ...], 'further arguments of the rule, as (("c", 0.4),)'] = ()
    gradients: Annotated[
        str, "stacked (K pull-backs at once), sequential (one after the other) or replay (memory of one gradient)"
    ] = "stacked"
    refresh_every: Annotated[int, "number of steps that share one solution of the weights; 1 is exact"] = 1

    def combiner(self) -> Combiner:
        """The rule. Raises: ValueError for unknown names or an interval below 1."""
        if self.gradients not in GRADIENTS:
            raise ValueError(f"fair.gradients={self.gradients!r}; known: {', '.join(GRADIENTS)}")
        if self.refresh_every < 1:
            raise ValueError(f"fair.refresh_every={self.refresh_every}; 1 solves at every step, n at every n-th")
        priority = None if self.priority is None else jnp.asarray(self.priority, jnp.float32)
        return make_combiner(
            self.method, alpha=self.alpha, priority=priority, rescale=self.rescale, **dict(self.options)
        )


class FairState(flax.struct.PyTreeNode):
    """What combining carries from step to step: the rule's own state, its last weights and coefficients [K]."""

    rule: PyTree
    weights: jax.Array
    coefficients: jax.Array


def init_fair(fair: FairConfig, count: int) -> FairState:
    """For `count` objectives; until a first solution the coefficients are those of the plain sum."""
    ones = jnp.ones(count, jnp.float32)
    # Copies: a step takes each array of its state for good, so none may appear twice.
    return jax.tree.map(jnp.copy, FairState(fair.combiner().init(count), ones, ones))


class Combined(NamedTuple):
    """A phase's gradient, averaged over devices, with what else came of it; losses are averaged over devices too."""

    gradient: PyTree
    state: FairState
    losses: jax.Array
    statistics: PyTree
    metrics: Metrics


@dataclass(frozen=True)
class Combining:
    """The combination of one phase's objectives; `specs` says how each leaf that it moves is split."""

    phase: Phase
    fair: FairConfig
    specs: PyTree
    accumulate: int = 1

    def __call__(self, parts: Parts, batch: Batch, key: jax.Array, state: FairState, refresh: bool) -> Combined:
        """The combined gradient, split as the trainables are, of this device's part of a batch.

        Trees come boxed (sharding.box). Metrics: loss/NAME, weight/NAME, gradient_norm, finite; where a Gram matrix was
        formed also norm/NAME, cosine/A_B and residual.
        Raises: ValueError for a state of another number of objectives.
        """

        names: list[str] = []

        def point(part: Batch) -> Linearised:
            here = linearise(self.phase, parts, part, key)
            names[:] = here.names
            if len(names) != state.coefficients.size:
                raise ValueError(
                    f"the state was made for {state.coefficients.size} objectives, but the system has {len(names)}: "
                    f"{', '.join(names)}; make it with init_state(fair=init_fair(config, {len(names)}))"
                )
            return here

        rule, own_key = self.fair.combiner(), jax.random.fold_in(key, COMBINER_KEY)
        if state.coefficients.size > 1 and refresh and rule.reads != "losses":
            found = self._solved(rule, point, names, batch, own_key, state)
        else:

            def weigh(losses: jax.Array) -> FairState:
                if state.coefficients.size == 1 or not refresh:
                    return state
                coefficients, own, info = rule.weigh(None, state.rule, jax.lax.pmean(losses, AXES), own_key)
                return FairState(own, info["weights"], coefficients)

            found = self._weighted(point, batch, weigh)
        # Named here, where the objectives are in order: a dict leaves a transformation sorted by name.
        for i, name in enumerate(names):
            found.metrics.update({f"loss/{name}": found.losses[i], f"weight/{name}": found.state.weights[i]})
        return found._replace(statistics=jax.lax.pmean(found.statistics, AXES))

    def _weighted(self, point: Point, batch: Batch, weigh: Callable[[jax.Array], FairState]) -> Combined:
        """One pull-back, of the losses' weighted sum."""

        if self.accumulate == 1:
            here = point(batch)
            state, losses, statistics = weigh(here.losses), here.losses, here.statistics
            gradient = here.pull(state.coefficients)
        else:
            # The weights come first: a forward pass of its own over the micro-batches, unless no rule looks at it.
            state = weigh(mean_over_micro_batches(lambda part: point(part).losses, batch, self.accumulate))

            def at_part(part: Batch) -> tuple[PyTree, jax.Array, PyTree]:
                here = point(part)
                return here.pull(state.coefficients), here.losses, here.statistics

            gradient, losses, statistics = mean_over_micro_batches(at_part, batch, self.accumulate)
        gradient = self._average(gradient)
        norm, losses = self._norm(gradient, losses)
        return Combined(gradient, state, losses, statistics, {"gradient_norm": norm, "finite": jnp.isfinite(norm)})

    def _solved(
        self, rule: Combiner, point: Point, names: list[str], batch: Batch, key: jax.Array, state: FairState
    ) -> Combined:
        """K pull-backs and a Gram matrix."""
        replay = self.fair.gradients == "replay" and rule.reads == "gram"
        if replay and self.accumulate > 1:
            raise ValueError(
                "fair.gradients='replay' keeps no task gradient, so it cannot average them over "
                f"train.accumulate={self.accumulate} micro-batches; use fair.gradients=sequential, or accumulate=1"
            )

        def pulled(here: Linearised) -> tuple[PyTree, jax.Array, PyTree]:
            gradients = here.pull_each() if self.fair.gradients == "sequential" else here.pull_all()
            return gradients, here.losses, here.statistics

        if self.accumulate == 1:
            here = point(batch)
            gradients, losses, statistics = pulled(here)
        else:
            gradients, losses, statistics = mean_over_micro_batches(
                lambda part: pulled(point(part)), batch, self.accumulate
            )
        gradients = self._average(gradients)
        gram, losses = self._exchange(gradients, losses)
        coefficients, own, info = rule.weigh(gram, state.rule, losses, key)
        if rule.reads == "gradients":
            gradient = self._mixed(rule, gradients, key)
            norm, _ = self._norm(gradient, losses)
        else:
            gradient = self._average(here.pull(coefficients)) if replay else combine_weighted(gradients, coefficients)
            squared = coefficients @ jnp.matmul(gram, coefficients, precision=jax.lax.Precision.HIGHEST)
            norm = jnp.sqrt(jnp.maximum(squared, 0.0))
        metrics = {f"norm/{name}": jnp.sqrt(gram[i, i]) for i, name in enumerate(names)}
        for (i, first), (j, second) in itertools.combinations(enumerate(names), 2):
            metrics[f"cosine/{first}_{second}"] = info["cosines"][i, j]
        metrics |= {"gradient_norm": norm, "residual": info["residual"], "finite": info["finite"] & jnp.isfinite(norm)}
        return Combined(gradient, FairState(own, info["weights"], coefficients), losses, statistics, metrics)

    # ---- between devices -----------------------------------------------------------------------------------------

    def _average(self, gradient: PyTree) -> PyTree:
        """This device's part of the mean over all devices; a split leaf arrives summed over `fsdp` already."""

        def mean(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
            leaf = leaf.astype(jnp.float32)
            if not is_split(spec):
                return jax.lax.pmean(leaf, AXES)
            leaf = leaf / jax.lax.axis_size(FSDP)
            return jax.lax.pmean(leaf, DATA) if jax.lax.axis_size(DATA) > 1 else leaf

        return jax.tree.map(mean, unbox(gradient), self.specs)

    def _exchange(self, gradients: PyTree, losses: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(Gram matrix of averaged gradients [K, ...], losses averaged over devices), by one all-reduce.

        A device adds its share of the matrix: what split leaves give is there once for each row of `data`, what whole
        leaves give once for each device.
        """
        count = jax.tree.leaves(gradients)[0].shape[0]
        parts: dict[bool, list[jax.Array]] = {True: [], False: []}
        for leaf, spec in zip(jax.tree.leaves(gradients), jax.tree.leaves(self.specs), strict=True):
            parts[is_split(spec)].append(leaf)
        devices = jax.lax.axis_size(AXES)
        share = jnp.zeros((count, count), jnp.float32)
        if parts[True]:
            share += gram_matrix(parts[True]) / jax.lax.axis_size(DATA)
        if parts[False]:
            share += gram_matrix(parts[False]) / devices
        total = jax.lax.psum(jnp.concatenate([share.reshape(-1), losses / devices]), AXES)
        return total[: count * count].reshape(count, count), total[count * count :]

    def _norm(self, gradient: PyTree, losses: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(norm of an averaged gradient, losses averaged over devices)."""
        squared, losses = self._exchange(jax.tree.map(lambda leaf: leaf[None], gradient), losses)
        return jnp.sqrt(squared[0, 0]), losses

    def _mixed(self, rule: Combiner, gradients: PyTree, key: jax.Array) -> PyTree:
        """A rule that works entry by entry: whole leaves draw the same numbers on every device, parts their own."""
        whole = rule.mix(gradients, key)
        parts = rule.mix(gradients, jax.random.fold_in(key, jax.lax.axis_index(FSDP)))
        return jax.tree.map(lambda spec, a, b: b if is_split(spec) else a, self.specs, whole, parts)
