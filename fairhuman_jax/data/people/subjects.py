"""People with reference views: scenes of one or two people, and other pictures of each of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from fairhuman_jax.data.loader import Source
from fairhuman_jax.data.people.captions import noun_ends, pair_captions, without_looks
from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.paraphrase import paraphrases
from fairhuman_jax.data.people.render import compose, draw, part_masks, render, shares
from fairhuman_jax.data.people.spec import draw_pose, sample_spec, stream
from fairhuman_jax.data.subject_folder import Segment
from fairhuman_jax.data.subject_transforms import bounds

FRAMINGS = {"portrait": 0.4, "upper body": 0.4, "half body": 0.2}  # faces stay large enough to tell people apart
VIEW_FRAMINGS = {"portrait": 0.6, "upper body": 0.4}
PAIR_FRAMING = "upper body"
# Arms of two people side by side: nothing that reaches out.
PAIR_GESTURES = ("down", "crossed", "cheek", "thinking", "clasped", "sign")
PAIR_SHIFT, PAIR_ZOOM = 0.5, (1.3, 1.5)  # of half the frame to either side, and of its size
GROUP = 8  # pairs are made among so many people that follow each other, so the last of a set keep to themselves
VIEW, SECOND = 1 << 32, 1 << 62  # apart from each other, draws of one index: scenes, views 1, 2, ..., second people


class PeopleScenes:
    """`length` pictures of `identities` people (None: of as many as pictures); a share `pairs` shows two side by side.

    A sample is `image` uint8 [S, S, 3], `segment_map` uint8 [S, S] (0 background, 1 the person named first, 2 the
    other), `people` int32 [2] (numbers of the identities; -1: nobody) and `caption`. Sample i is drawn from (seed, i)
    but for its people: neighbours show the same, number i identities // length, and pairs are made among neighbours;
    so nearly all people of the last samples are in no other. Raises: ValueError for a length below 1, more people than
    samples, pairs of less than two people.
    """

    def __init__(
        self,
        size: int,
        length: int,
        seed: int,
        identities: int | None = None,
        pairs: float = 0.0,
        supersample: int = 2,
    ) -> None:
        self.identities = length if identities is None else identities
        if not 1 <= self.identities <= length:
            raise ValueError(f"{self.identities} identities in {length} samples: use 1 ... the number of samples")
        if pairs and self.identities < 2:
            raise ValueError(f"pairs = {pairs} needs 2 identities or more")
        self.size, self.length, self.seed, self.pairs, self.supersample = size, length, seed, pairs, supersample

    def __len__(self) -> int:
        return self.length

    def people(self, index: int) -> tuple[int, ...]:
        """Numbers of the identities of a sample, from left to right."""
        rng, first = stream(self.seed, index, "people"), index * self.identities // self.length
        if rng.random() >= self.pairs:
            return (first,)
        start = min(first // GROUP * GROUP, self.identities - 2)
        others = [k for k in range(start, min(start + GROUP, self.identities)) if k != first]
        second = others[int(rng.integers(len(others)))]
        return (first, second) if rng.random() < 0.5 else (second, first)

    def specs(self, index: int) -> list[dict[str, Any]]:
        """What is drawn of each of them (see `sample_spec`)."""
        people, rng = self.people(index), stream(self.seed, index, "scene")
        if len(people) == 1:
            return [sample_spec(self.seed, index, _pick(rng, FRAMINGS), (self.seed, people[0]))]
        pair = [sample_spec(self.seed, index + SECOND * k, PAIR_FRAMING, (self.seed, p)) for k, p in enumerate(people)]
        zoom, (across, up) = rng.uniform(*PAIR_ZOOM), rng.normal(0, 0.02, (2, 2))
        for k, spec in enumerate(pair):
            while spec["pose"]["gesture"] not in PAIR_GESTURES:
                spec["pose"] = draw_pose(rng, PAIR_FRAMING)
            shift = [(PAIR_SHIFT, -PAIR_SHIFT)[k] + across[k], up[k]]
            spec["camera"] |= {"shift": shift, "zoom": zoom, "keep_hands": False}
            # One place, one light and one camera's height for both.
            spec["camera"]["elevation"] = pair[0]["camera"]["elevation"]
            spec |= {name: pair[0][name] for name in ("light", "background")}
        return pair

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = operator.index(index)
        if not 0 <= i < self.length:
            raise IndexError(f"PeopleScenes: index {i} outside a set of {self.length} samples")
        people, specs, rng = self.people(i), self.specs(i), stream(self.seed, i, "caption")
        if len(people) == 1:
            sample = render(PeoplePack.load(), specs[0], self.size, self.supersample)
            image, ids = sample["image"], sample["person_mask"][..., 0]
            captions = paraphrases(sample["caption"])
        else:
            image, ids, captions = self._pair(specs, front=int(rng.integers(2)))
        return {
            "image": image,
            "segment_map": ids,
            "people": np.array([*people, -1][:2], np.int32),
            "caption": captions[int(rng.integers(len(captions)))],
        }

    def _pair(self, specs: Sequence[dict[str, Any]], front: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Picture, segment map and captions of two people, of whom `front` hides what of the other is behind him."""
        drawings = [draw(PeoplePack.load(), spec, self.size, self.supersample) for spec in specs]
        behind = 1 - front
        hidden = np.isin(drawings[behind].fragments.pixel, drawings[front].fragments.pixel)
        masks: list[dict[str, np.ndarray]] = [{}, {}]
        masks[front], _ = part_masks(drawings[front], self.size, self.supersample)
        masks[behind], _ = part_masks(drawings[behind], self.size, self.supersample, hidden)
        image = compose(specs[0]["background"], [drawings[behind], drawings[front]], self.size, self.supersample)
        ids = np.zeros((self.size, self.size), np.uint8)
        for k in (behind, front):
            ids[masks[k]["person_mask"][..., 0] > 0] = k + 1
        return image, ids, pair_captions(specs, [shares(m, self.size) for m in masks])


class PeopleViews:
    """`count` pictures of each of the first `identities` people of a seed, in other clothes and poses than any scene's.

    Picture k count + v is view v of person k, drawn from (seed, k, v): `image` uint8 [S, S, 3], `person_mask` uint8 [S,
    S, 1] and `caption`; heads, shoulders and chests. Raises: ValueError for no view.
    """

    def __init__(self, size: int, identities: int, seed: int, count: int, supersample: int = 2) -> None:
        if count < 1:
            raise ValueError(f"references = {count}: use 1 or more")
        self.size, self.identities, self.seed, self.count, self.supersample = size, identities, seed, count, supersample

    def __len__(self) -> int:
        return self.identities * self.count

    def spec(self, index: int) -> dict[str, Any]:
        """What is drawn of picture `index` (see `sample_spec`)."""
        person, view = divmod(index, self.count)
        place = person + VIEW * (view + 1)
        framing = _pick(stream(self.seed, place, "view"), VIEW_FRAMINGS)
        spec = sample_spec(self.seed, place, framing, (self.seed, person))
        spec["camera"]["keep_hands"] = False  # or raised hands would make the head small
        return spec

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = operator.index(index)
        if not 0 <= i < len(self):
            raise IndexError(f"PeopleViews: index {i} outside a set of {len(self)} pictures")
        sample = render(PeoplePack.load(), self.spec(i), self.size, self.supersample)
        return {name: sample[name] for name in ("image", "person_mask", "caption")}


class PeopleSubjects:
    """Samples as SubjectTransform takes them, out of scenes and views that were drawn or read from the cache.

    A sample is `image`, `caption`, `segment_map` and `people` of a scene; `segments`, one for each person, whose `end`
    is that of "man" or "woman"; and `references`: for each segment the views of that person, (picture, mask [H, W]).
    Without `looks` captions leave to the references what people look like.
    """

    def __init__(self, scenes: Source, views: Source, count: int, looks: bool = True) -> None:
        self.scenes, self.views, self.count, self.looks = scenes, views, count, looks

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = dict(self.scenes[index])
        if not self.looks:
            scene["caption"] = without_looks(scene["caption"])
        masks = [scene["segment_map"] == k for k in (1, 2)]
        named = zip(masks, noun_ends(scene["caption"]), scene["people"].tolist(), strict=False)
        shown = [(k, mask, end, person) for k, (mask, end, person) in enumerate(named, 1) if mask.any()]
        return scene | {
            "segments": tuple(Segment(k, bounds(mask), end, "person") for k, mask, end, _ in shown),
            "references": tuple(self._references(person) for *_, person in shown),
        }

    def _references(self, person: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        views = [self.views[person * self.count + view] for view in range(self.count)]
        return tuple((view["image"], view["person_mask"][..., 0]) for view in views)


def _pick(rng: np.random.Generator, table: dict[str, float]) -> str:
    return list(table)[int(rng.choice(len(table), p=list(table.values())))]
