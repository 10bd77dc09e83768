"""The people world as a random-access source of training samples."""

from __future__ import annotations

import operator

import numpy as np

from fairhuman_jax.data.people import palette
from fairhuman_jax.data.people.conditions import CONDITIONS
from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.render import render
from fairhuman_jax.data.people.spec import sample_spec, stream


def check_framings(framings: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    """The same ((name, share), ...), whose shares need not sum to one.

    Raises ValueError: a name that is not in `palette.FRAMINGS`, a share below zero, or no share above zero.
    """
    for name, share in framings:
        if name not in palette.FRAMINGS:
            raise ValueError(f"framings: {name!r} is not one of {', '.join(palette.FRAMINGS)}")
        if not share >= 0:
            raise ValueError(f"framings: the share {share} of {name!r} is below 0")
    if framings and not sum(share for _, share in framings) > 0:
        raise ValueError("framings: at least one share must be above 0")
    return tuple((str(name), float(share)) for name, share in framings)


class PeopleDataset:
    """`length` rendered people; sample i is a function of (seed, start + i) alone. Has `__len__` and
    `__getitem__`, as grain's random-access sources; pickles small.

    `size` pixels a side; `framing` forces one framing; `framings` = ((name, share), ...) draws the framing with
    those shares in place of the palette's; `supersample` squared samples a pixel. Samples are those of `render`;
    with `conditioning`, "fairhuman" or "humansd", also `conditioning_image` uint8 [S, S, 3] in that style (see
    `conditions`). Nothing is cached on disk. IndexError outside -length..length - 1.
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
        framings: tuple[tuple[str, float], ...] = (),
    ) -> None:
        if length < 1:
            raise ValueError(f"PeopleDataset: length {length} must be at least 1")
        if conditioning is not None and conditioning not in CONDITIONS:
            raise ValueError(f"PeopleDataset: conditioning {conditioning!r}; use {', '.join(CONDITIONS)} or None")
        if framing is not None and framings:
            raise ValueError(f"PeopleDataset: framing {framing!r} and framings exclude each other")
        self.framings = check_framings(framings)
        self.size, self.length, self.seed, self.start = size, length, seed, start
        self.framing, self.supersample, self.conditioning = framing, supersample, conditioning

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        i = operator.index(index)
        if not -self.length <= i < self.length:
            raise IndexError(f"PeopleDataset: index {i} outside a set of {self.length} samples")
        number = self.start + i % self.length
        spec = sample_spec(self.seed, number, self.framing_of(number))
        sample = render(PeoplePack.load(), spec, self.size, self.supersample)
        if self.conditioning is None:
            return sample
        return sample | {"conditioning_image": CONDITIONS[self.conditioning](sample)}

    def framing_of(self, number: int) -> str | None:
        """The framing of picture `number`, drawn from a stream of its own; None leaves it to the spec."""
        if not self.framings:
            return self.framing
        shares = np.cumsum([share for _, share in self.framings])
        place = stream(self.seed, number, "framing").random() * shares[-1]
        return self.framings[int(np.searchsorted(shares[:-1], place, side="right"))][0]

    def __repr__(self) -> str:
        fields = ("size", "length", "seed", "start", "framing", "supersample", "conditioning", "framings")
        return f"PeopleDataset({', '.join(f'{k}={getattr(self, k)!r}' for k in fields)})"
