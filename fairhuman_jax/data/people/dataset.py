"""The people world as a random-access source of training samples."""

from __future__ import annotations

import operator

from fairhuman_jax.data.people.conditions import CONDITIONS
from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.render import render
from fairhuman_jax.data.people.spec import sample_spec


class PeopleDataset:
    """`length` rendered people; sample i is a function of (seed, start + i) alone. Has `__len__` and
    `__getitem__`, as grain's random-access sources; pickles small.

    `size` pixels a side; `framing` forces one framing; `supersample` squared samples a pixel. Samples are
    those of `render`; with `conditioning`, "fairhuman" or "humansd", also `conditioning_image` uint8 [S, S, 3]
    in that style (see `conditions`). Nothing is cached on disk. IndexError outside -length..length - 1.
    """

    def __init__(
        self,
        size: int,
        length: int,
        seed: int,
        start: int = 0,
        framing: str | None = None,
        supersample: int = 2,
        conditioning: str | None = None,
    ) -> None:
        if length < 1:
            raise ValueError(f"PeopleDataset: length {length} must be at least 1")
        if conditioning is not None and conditioning not in CONDITIONS:
            raise ValueError(f"PeopleDataset: conditioning {conditioning!r}; use {', '.join(CONDITIONS)} or None")
        self.size, self.length, self.seed, self.start = size, length, seed, start
        self.framing, self.supersample, self.conditioning = framing, supersample, conditioning

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        i = operator.index(index)
        if not -self.length <= i < self.length:
            raise IndexError(f"PeopleDataset: index {i} outside a set of {self.length} samples")
        spec = sample_spec(self.seed, self.start + i % self.length, self.framing)
        sample = render(PeoplePack.load(), spec, self.size, self.supersample)
        if self.conditioning is None:
            return sample
        return sample | {"conditioning_image": CONDITIONS[self.conditioning](sample)}

    def __repr__(self) -> str:
        fields = ("size", "length", "seed", "start", "framing", "supersample", "conditioning")
        return f"PeopleDataset({', '.join(f'{k}={getattr(self, k)!r}' for k in fields)})"
