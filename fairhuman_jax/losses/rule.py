"""What a combiner's rule may read, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any


class TaskView(NamedTuple):
    """What a rule may read: `gram` [K, K] finite, None where one backward pass has to do; `active` bool [K];
    `losses` [K], finite for the rules that need them; a random `key`. What a rule did not ask for may be None."""

    gram: Any
    active: Any
    losses: Any
    key: Any


Solved = tuple[Array, PyTree, Array]


def no_state(count: int) -> PyTree:
    """The state of a rule that keeps none."""
    return ()


@dataclass(frozen=True)
class Rule:
    """One method. `solve(view, state)` returns (weights [K], new state, residual: relative error of its equation);
    `init(K)` is the first state. `reads` and `power` as in `Combiner`; `rescale` is what the reference does.
    `mix(task_grads, key)` combines gradients entry by entry where `reads` is "gradients"."""

    solve: Callable[[TaskView, PyTree], Solved]
    init: Callable[[int], PyTree] = no_state
    reads: str = "gram"
    rescale: str = "none"
    power: float | Array = 0.0
    needs_losses: bool = False
    needs_key: bool = False
    mix: Callable[[PyTree, Array], PyTree] | None = None
