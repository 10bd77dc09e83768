"""Photos of people into training samples of a subject model: picture, crops of people, a caption that marks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from PIL import Image

from fairhuman_jax.data.object_augmentation import augmented, squared
from fairhuman_jax.data.subject_folder import MARKER
from fairhuman_jax.data.transforms import JointTransform

NOISE = 255  # background pixels of crops are uniform in 0 ... NOISE - 1


@dataclass(frozen=True)
class SubjectConfig:
    """The objects of a sample that the model is shown, and how; defaults are those of Face-diffuser's SDM script.

    identities, references, pairs and looks are of the people world alone.
    """

    max_objects: Annotated[int, "most objects of a sample; of more a random choice is taken"] = 4
    object_resolution: Annotated[int, "pixels a side of an object's picture"] = 224
    object_types: Annotated[tuple[str, ...], "labels of objects that count; () takes any"] = ("person",)
    appear_prob: Annotated[float, "probability that an object is shown"] = 0.9
    uncondition_prob: Annotated[float, "probability of no caption and no object"] = 0.1
    text_only_prob: Annotated[float, "probability of the caption alone"] = 0.0
    augment: Annotated[bool, "change the objects' pictures at random"] = True
    identities: Annotated[int | None, "number of people in the set; None draws another person for each sample"] = None
    references: Annotated[
        int,
        "pictures of each person, in other clothes and poses, to take an object's picture from",
    ] = 4
    pairs: Annotated[float, "fraction of samples with two people"] = 0.25
    looks: Annotated[bool, "captions describe what people look like"] = True

    def __post_init__(self) -> None:
        if self.max_objects < 1 or self.object_resolution < 8:
            raise ValueError(
                f"max_objects = {self.max_objects} must be >= 1 and object_resolution = {self.object_resolution} >= 8"
            )
        for name in ("appear_prob", "uncondition_prob", "text_only_prob", "pairs"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} = {getattr(self, name)}: use 0 ... 1")
        if self.uncondition_prob + self.text_only_prob > 1.0:
            raise ValueError(f"uncondition_prob + text_only_prob = {self.uncondition_prob + self.text_only_prob} > 1")

    def plain(self) -> SubjectConfig:
        """The same for evaluation: every object appears, captions stay, nothing is augmented."""
        return replace(self, appear_prob=1.0, uncondition_prob=0.0, text_only_prob=0.0, augment=False)


@dataclass(frozen=True)
class SubjectTransform(JointTransform):
    """JointTransform of a sample with `segments` and a `segment_map` [H, W], as SubjectDataset and PeopleSubjects give.

    Adds, for N = max_objects of S = object_resolution pixels, `object_pixels` uint8 [N, S, S, 3], `object_masks` uint8
    [N, h, w] in {0, 1}, where they are in the cropped picture, `num_objects` int32 [], and the `caption`, with MARKER
    behind the words of each object. Objects are in the order of their markers; the rest is zeros. An object's picture
    is its box in the whole, unmirrored photo, where all pixels but its own are noise; if the sample has `references`
    (for each segment some (picture uint8 [H, W, 3], mask [H, W]) of the same person), one of these. An empty caption
    comes without objects.

    Objects that the crop cut off are left out, and of several that one word names, all but the largest: so the k-th
    marker is always the k-th object's. compat "reference" is what FastComposer does, also where it goes wrong: pictures
    higher than wide get black bars and mixed segment ids at borders, objects of one word take the places of those
    behind them, the zoom is none; needs a square and crop="center". Raises: ValueError for options; a sample without
    segments. Source: FastComposer, data.py; Face-diffuser, data.py.
    """

    masks: tuple[str, ...] = ()
    subjects: SubjectConfig = field(default_factory=SubjectConfig)
    compat: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat = {self.compat!r}: use 'reference' or None")
        if self.masks or self.maps or self.keypoints:
            raise ValueError("masks, maps and keypoints are not carried with subjects: leave them empty")
        if self.compat and (self.crop != "center" or self.size[0] != self.size[1]):
            raise ValueError("compat = 'reference' crops squares from the middle: use crop='center' and one number")

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if lacking := [name for name in ("segments", "segment_map") if name not in sample]:
            raise ValueError(f"the sample has no {' and no '.join(lacking)}; it has {', '.join(sample)}")
        height, width = sample["image"].shape[:2]
        geometry = self.geometry(height, width, rng)
        if self.compat:
            image, ids = _published(sample["image"], sample["segment_map"], self.size[0], geometry.flip)
        else:
            image, ids = geometry.image(sample["image"]), geometry.labels(sample["segment_map"])
        caption, chosen, ends = self._choose(sample, ids, rng)
        settings = self.subjects
        count, side = settings.max_objects, settings.object_resolution
        pixels = np.zeros((count, side, side, 3), np.uint8)
        masks = np.zeros((count, *self.size), np.uint8)
        for k, (number, crop) in enumerate(zip(chosen, self._crops(sample, chosen, rng), strict=True)):
            show = augmented(crop, side, rng, self.compat) if settings.augment else squared(crop, side, self.compat)
            pixels[k], masks[k] = show, ids == sample["segments"][number].id
        return {
            "image": image,
            "object_pixels": pixels,
            "object_masks": masks,
            "num_objects": np.int32(len(chosen)),
            "caption": marked(caption, ends),
        } | ({} if self.compat else {"time_ids": geometry.time_ids()})

    def _crops(
        self, sample: Mapping[str, Any], chosen: Sequence[int], rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """The picture of each chosen object on noise; objects of one photo share theirs."""
        if "references" in sample:
            for number in chosen:
                options = sample["references"][number]
                picture, mask = options[rng.integers(len(options))]
                yield cut(picture, mask > 0, bounds(mask), rng.integers(0, NOISE, picture.shape, np.uint8))
            return
        noise = rng.integers(0, NOISE, sample["image"].shape, np.uint8)
        for segment in (sample["segments"][number] for number in chosen):
            yield cut(sample["image"], sample["segment_map"] == segment.id, segment.box, noise)

    def _choose(
        self, sample: Mapping[str, Any], ids: np.ndarray, rng: np.random.Generator
    ) -> tuple[str, list[int], list[int]]:
        """The caption, numbers of the objects in the order of their markers, and where these go."""
        settings, segments, caption = self.subjects, sample["segments"], sample["caption"]
        coin, appear = rng.random(), rng.random(len(segments))
        order = rng.permutation(len(segments))
        if coin < settings.uncondition_prob:
            return "", [], []
        if coin < settings.uncondition_prob + settings.text_only_prob:
            return caption, [], []
        typed = [k for k, s in enumerate(segments) if not settings.object_types or s.label in settings.object_types]
        chosen = [k for k in typed if appear[k] < settings.appear_prob]
        ends = {k: len(caption[: segments[k].end].rstrip()) for k in chosen}
        if not self.compat:
            areas = {k: int((ids == segments[k].id).sum()) for k in chosen}
            largest = {ends[k]: k for k in sorted(chosen, key=areas.__getitem__) if areas[k]}
            chosen = list(largest.values())
        drawn = sorted(chosen, key=order.tolist().index)[: settings.max_objects]
        drawn = sorted(sorted(drawn), key=ends.__getitem__)
        places = sorted({ends[k] for k in drawn})
        # As published there may be more objects than marked words; then the last ones go, whosever words those are.
        return caption, drawn[: len(places)], places


def marked(caption: str, ends: Iterable[int]) -> str:
    """The caption with MARKER put in at each of the numbers of characters, without spaces."""
    for end in sorted(ends, reverse=True):
        caption = caption[:end] + MARKER + caption[end:]
    return caption


def cut(image: np.ndarray, mask: np.ndarray, box: Sequence[int], noise: np.ndarray) -> np.ndarray:
    """The box (x0, y0, x1, y1) of an image uint8 [H, W, 3], with `noise` [H, W, 3] wherever mask [H, W] is false."""
    x0, y0, x1, y1 = box
    part = slice(y0, y1), slice(x0, x1)
    return np.where(mask[part][..., None], image[part], noise[part])


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Smallest box (x0, y0, x1, y1) around the non-zero pixels of [H, W]; the whole if there are none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _published(image: np.ndarray, ids: np.ndarray, size: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Picture and segment ids as FastComposer squares them: cropped if wide, between black bars if high.

    Resized so that the shorter side is `size`, ids by the pixel above and left; bars of (high - wide) // 2; then both
    are resized to the square bilinearly, which mixes ids and rounds what comes out.
    """
    height, width = image.shape[:2]
    high, wide = (size, size * width // height) if height <= width else (size * height // width, size)
    image = np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR))
    ids = ids[np.arange(high)[:, None] * height // high, np.arange(wide) * width // wide]
    if flip:
        image, ids = image[:, ::-1], ids[:, ::-1]
    if wide >= high:
        left = round((wide - high) / 2)
        return np.ascontiguousarray(image[:, left : left + high]), np.ascontiguousarray(ids[:, left : left + high])
    bar = (high - wide) // 2
    image, ids = np.pad(image, ((0, 0), (bar, bar), (0, 0))), np.pad(ids, ((0, 0), (bar, bar)))
    mixed = Image.fromarray(ids.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    return image, np.rint(np.asarray(mixed)).astype(ids.dtype)
