"""The rule of a combiner: its inputs, its functions and its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any


class TaskView(NamedTuple):
    """Inputs of a rule; an input that the rule does not need may be None."""

    gram: Any  # [K, K], finite; None where the step has a single backward pass
    active: Any  # bool [K]
    losses: Any  # [K], finite for rules that need them
    key: Any  # random key


Solved = tuple[Array, PyTree, Array]


def no_state(count: int) -> PyTree:
    """The empty state, for a rule without state."""
    return ()


@dataclass(frozen=True)
class Rule:
    """The functions and properties of one method."""

    # (view, state) -> (weights [K], new state, residual: the relative error of the rule's equation).
    solve: Callable[[TaskView, PyTree], Solved]
    # K -> the first state.
    init: Callable[[int], PyTree] = no_state
    # As in `Combiner`.
    reads: str = "gram"
    # The default rescaling, which is the reference's.
    rescale: str = "none"
    # As in `Combiner`.
    power: float | Array = 0.0
    needs_losses: bool = False
    needs_key: bool = False
    # (task_grads, key) -> the gradients combined entry by entry, where `reads` is "gradients".
    mix: Callable[[PyTree, Array], PyTree] | None = None
