"""Whether the subject model of the people world draws the people of its reference pictures, with and without fusion.

    python train.py configs/people_sdm.py
    python train.py configs/people_tdm.py
    python benchmarks/subject_identity.py runs/people_sdm/export runs/people_tdm/export --sheet drawn.png

The ruler comes first: a small network trained here on rendered people, to know the same person in other clothes, poses
and light, and to name the colour of a top. Its people, those of the training and those that are drawn are all different
ones. How well it knows people it has not seen, by renders, is printed with the rest.

Then --count people are drawn once each, the prompt giving clothes and background but nothing about the person, and
half as many pairs. Compared are the scene model alone (TDM), the subject model alone with delayed conditioning (SDM,
FastComposer) and both, fused (SNF). Reported is the cosine to other pictures of the right person than the one that was
given, and of another one of the same sex; for pairs the least cosine after greedy matching, of the two halves of the
picture. Intervals are 95 %, of the mean over pictures.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from humansd_poses import enlarged, held_out_errors, mean_and_interval
from PIL import Image

from fairhuman_jax.commands import table
from fairhuman_jax.data.cache import cached_subjects
from fairhuman_jax.data.object_augmentation import squared
from fairhuman_jax.data.people.palette import BACKGROUNDS, TOPS
from fairhuman_jax.data.people.spec import sample_spec
from fairhuman_jax.data.people.subjects import PeopleScenes, PeopleSubjects
from fairhuman_jax.data.subject_transforms import NOISE, bounds, cut
from fairhuman_jax.devices.kernels import choose_cpu_kernels
from fairhuman_jax.evaluate.identity import identity_similarity
from fairhuman_jax.systems.facediffuser.fusion import (
    FaceDiffuser,
    StagedRequest,
    draw_delayed,
    draw_staged,
    make_staged_request,
    open_staged,
)
from fairhuman_jax.systems.facediffuser.subject_model import SubjectModelConfig
from fairhuman_jax.weights import MARKER

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "people_sdm.py"
SIDE, SEEN = 64, 48  # pixels of a picture, and of what the ruler sees of it
RULER_SEED, TEST_SEED = 1_001, 1_002  # apart from the configurations' seed
RULER_PEOPLE, VIEWS, SCENES, PAIRS = 640, 4, 3, 0.3
WIDTH, COLOURS, SCALE = 64, tuple(TOPS), 16.0
BATCH, RULER_BATCH = 32, 128
ALPHA, BETA = 0.3, 0.6


class Ruler(nn.Module):
    """Pictures [N, 48, 48, 3] in [-1, 1] -> (embeddings [N, 64] of unit length, logits of the top's colour)."""

    @nn.compact
    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = pictures
        for features in (32, 64, 128, 192):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(features, (3, 3), (2, 2))(x)))
            x = x + nn.relu(nn.GroupNorm(8)(nn.Conv(features, (3, 3))(x)))
        flat = x.reshape(len(x), -1)
        embedding = nn.Dense(WIDTH)(flat)
        logits = nn.Dense(len(COLOURS))(flat)
        return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True), logits


def seen(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 pictures of any size as the ruler takes them, float32 [N, 48, 48, 3]."""
    resized = [np.asarray(Image.fromarray(p).resize((SEEN, SEEN), Image.Resampling.BILINEAR)) for p in pictures]
    return np.stack(resized).astype(np.float32) / 127.5 - 1.0


def halves(picture: np.ndarray) -> list[np.ndarray]:
    """The two halves of a picture of two people, each with its border repeated to a square."""
    middle = picture.shape[1] // 2
    margin = (picture.shape[0] - middle) // 2
    return [np.pad(part, ((0, 0), (margin, margin), (0, 0)), "edge") for part in np.split(picture, [middle], axis=1)]


def subjects(seed: int, people: int) -> PeopleSubjects:
    """Scenes and views of the people of a seed."""
    return cached_subjects(SIDE, people * SCENES, seed, SIDE, people, PAIRS, VIEWS)


def rendered(seed: int, people: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(pictures of one person each, who it is, index of the top's colour or -1) of a seed: views, scenes, and halves
    of scenes of two."""
    source = subjects(seed, people)
    pictures = [source.views[i]["image"] for i in range(people * VIEWS)]
    who, tops = [i // VIEWS for i in range(len(pictures))], [-1] * len(pictures)
    scenes = PeopleScenes(SIDE, people * SCENES, seed, people, PAIRS)
    for i in range(len(scenes)):
        shown, image = scenes.people(i), source.scenes[i]["image"]
        pictures += [image] if len(shown) == 1 else halves(image)
        who += shown
        tops += [COLOURS.index(spec["outfit"]["top_colour"]) for spec in scenes.specs(i)]
    return pictures, np.array(who), np.array(tops)


def through(system: FaceDiffuser, params: Any, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The pictures as the model's own autoencoder gives them back, which is what drawn ones look like."""
    program = jax.jit(lambda params, images: system.decode(params, system.encode_posterior(params, images, None)))
    rounds = [program(params, jnp.asarray(np.stack(part), jnp.float32) / 127.5 - 1.0) for part in in_parts(pictures)]
    return as_bytes(np.concatenate(rounds)[: len(pictures)])


def in_parts(items: Sequence[Any]) -> list[list[Any]]:
    """Lists of BATCH, the last one filled up with the last item."""
    filled = [*items, *[items[-1]] * (-len(items) % BATCH)]
    return [filled[i : i + BATCH] for i in range(0, len(filled), BATCH)]


def as_bytes(images: np.ndarray) -> list[np.ndarray]:
    """uint8 pictures of images [N, H, W, 3] in [-1, 1]."""
    return list(np.rint((np.asarray(images) + 1.0) * 127.5).clip(0, 255).astype(np.uint8))


def train_ruler(pictures: np.ndarray, who: np.ndarray, tops: np.ndarray, steps: int) -> Any:
    """Parameters of a ruler that tells the people of `who` apart: cross entropy of scaled cosines to learned
    directions, one for each person, and of the tops' colours where they are known (not -1)."""
    ruler, rng = Ruler(), np.random.default_rng(0)
    directions = jax.random.normal(jax.random.key(1), (who.max() + 1, WIDTH))
    params = {"ruler": ruler.init(jax.random.key(0), jnp.zeros((1, SEEN, SEEN, 3)))["params"], "people": directions}
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 10, steps), weight_decay=0.05)

    def loss(params: Any, shown: jax.Array, who: jax.Array, tops: jax.Array) -> jax.Array:
        embeddings, logits = ruler.apply({"params": params["ruler"]}, shown)
        people = params["people"] / jnp.linalg.norm(params["people"], axis=-1, keepdims=True)
        told = optax.softmax_cross_entropy_with_integer_labels(SCALE * embeddings @ people.T, who)
        named = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tops, 0)) * (tops >= 0)
        return told.mean() + named.mean()

    @jax.jit
    def step(params: Any, state: Any, *batch: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        rows = rng.integers(len(pictures), size=RULER_BATCH)
        shown = pictures[rows] + rng.normal(0, 0.03, (RULER_BATCH, 1, 1, 3)).astype(np.float32)
        shown = np.where(rng.random((RULER_BATCH, 1, 1, 1)) < 0.5, shown, shown[:, :, ::-1])
        shown = np.roll(shown, rng.integers(-3, 4, 2), (1, 2))
        params, state = step(params, state, shown, who[rows], tops[rows])
    return jax.device_get(params["ruler"])


def measured(params: Any, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings [N, 64], numbers of the tops' colours [N])."""
    embeddings, logits = jax.jit(Ruler().apply)({"params": params}, seen(pictures))
    return np.asarray(embeddings), np.asarray(logits).argmax(-1)


def others(sexes: Sequence[Any]) -> np.ndarray:
    """For each the next one of the same sex (or the same pair of sexes)."""
    order = range(len(sexes))
    return np.array(
        [next(j % len(sexes) for j in range(i + 1, i + len(sexes)) if sexes[j % len(sexes)] == sexes[i]) for i in order]
    )


class People:
    """Those that are drawn: sexes, the picture of each that the model is given, and the others, for the ruler."""

    def __init__(self, count: int, side: int) -> None:
        source, rng = subjects(TEST_SEED, count), np.random.default_rng(1)
        self.sexes = [sample_spec(TEST_SEED, i, None, (TEST_SEED, i))["identity"]["sex"] for i in range(count)]
        views = [source.views[i] for i in range(count * VIEWS)]
        self.views = [view["image"] for view in views]
        self.given = []
        for view in views[::VIEWS]:
            image, mask = view["image"], view["person_mask"][..., 0] > 0
            crop = cut(image, mask, bounds(mask), rng.integers(0, NOISE, image.shape, np.uint8))
            self.given.append(squared(crop, side))

    def embeddings(self, ruler: Any) -> np.ndarray:
        """Of everybody, the mean over the pictures that the model is not given, of unit length, [count, 64]."""
        found = measured(ruler, self.views)[0].reshape(len(self.sexes), VIEWS, -1)[:, 1:].mean(1)
        return found / np.linalg.norm(found, axis=-1, keepdims=True)


def errors(subject: str) -> dict[str, float]:
    """`held_out_errors` of the subject model by whose pictures it is given: those of the people in the sample, of
    others (as many), or black ones."""
    leaf = "object_pixels"

    def strangers(batch: dict[str, Any]) -> np.ndarray:
        pictures = batch[leaf].copy()
        for count in np.unique(batch["num_objects"]):
            rows = np.flatnonzero(batch["num_objects"] == count)
            pictures[rows] = pictures[np.roll(rows, 1)]
        return pictures

    given = {"own": lambda batch: batch[leaf], "another's": strangers, "black": lambda batch: 0 * batch[leaf]}
    system = SubjectModelConfig(base=subject, image_encoder=None, image_layers=0, max_objects=2, mask_prob=0.0).build()
    return held_out_errors(system, CONFIG, leaf, given)


def programs(system: FaceDiffuser, steps: int) -> dict[str, tuple[Any, dict[str, int]]]:
    """What is compared: (program, rows at which its stages end)."""
    staged = jax.jit(partial(draw_staged, system))
    return {
        "TDM": (staged, {"start_merge_step": steps, "final_step": steps}),
        "SDM": (jax.jit(functools.partial(draw_delayed, system)), {}),
        "SNF": (staged, {}),
    }


def draw(
    system: FaceDiffuser, params: Any, prompts: Sequence[str], references: Sequence[Sequence[np.ndarray]], options: Any
) -> dict[str, list[np.ndarray]]:
    """The pictures of each method, from the same noise."""
    jobs, drawn = list(zip(prompts, references, range(len(prompts)), strict=True)), {}
    for name, (program, rows) in programs(system, options.steps).items():
        parts = []
        for part in in_parts(jobs):
            request: StagedRequest = make_staged_request(
                system,
                [prompt for prompt, _, _ in part],
                [seed for _, _, seed in part],
                references=[given for _, given, _ in part],
                steps=options.steps,
                guidance=options.guidance,
                size=(SIDE, SIDE),
                alpha=ALPHA,
                beta=BETA,
                **rows,
            )
            parts.append(np.asarray(program(params, request, jax.random.key(0))))
        drawn[name] = as_bytes(np.concatenate(parts)[: len(jobs)])
    return drawn


def compared(name: str, own: np.ndarray, other: np.ndarray) -> dict[str, str]:
    """The row of a method: cosines of its pictures to the right person and to another."""
    return {
        "drawn by": name,
        "own": mean_and_interval(own),
        "another's": mean_and_interval(other),
        "own - another's": mean_and_interval(own - other),
        "nearer to the own": f"{(own > other).mean():.2f}",
    }


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Pictures in rows, each enlarged."""
    return Image.fromarray(np.concatenate([np.concatenate([*map(enlarged, row)], axis=1) for row in rows]))


def shown_sheet(people: People, pairs: Sequence[Any], single: Any, double: Any) -> Image.Image:
    """Six pairs, then six people: references beside what each model drew."""
    rows = [[*(people.given[i] for i in pairs[k]), *(images[k] for images in double.values())] for k in range(6)]
    blank = np.full_like(people.given[0], 255)
    rows += [[people.given[k], blank, *(images[k] for images in single.values())] for k in range(6)]
    return sheet(rows)


def parsed() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", help="a subject model")
    parser.add_argument("scene", help="the scene model")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0, help="of both models (default 5, the published one)")
    parser.add_argument("--ruler", type=Path, metavar="FILE", help="keep the ruler there, and take it if it is there")
    parser.add_argument("--ruler-steps", type=int, default=900)
    parser.add_argument("--sheet", type=Path, help="a picture: first pairs, then people; references, TDM, SDM, SNF")
    return parser.parse_args()


def opened_ruler(options: argparse.Namespace, system: Any, params: Any) -> Any:
    """The ruler that is kept in `--ruler`, or one that is trained now (and kept there)."""
    if options.ruler and options.ruler.is_file():
        return flax.serialization.msgpack_restore(options.ruler.read_bytes())
    pictures, who, tops = rendered(RULER_SEED, RULER_PEOPLE)
    ruler = train_ruler(seen(through(system, params, pictures)), who, tops, options.ruler_steps)
    if options.ruler:
        options.ruler.write_bytes(flax.serialization.msgpack_serialize(ruler))
    return ruler


def main() -> None:
    """Trains or reads the ruler, draws single people and pairs, and prints how near they are to their references."""
    options = parsed()
    choose_cpu_kernels()
    found = ", ".join(f"{name} {value:.5f}" for name, value in errors(options.subject).items())
    print(f"held-out denoising error of the subject model, by the pictures it is given: {found}", flush=True)
    system, params = open_staged(options.subject, options.scene, slots=2)
    ruler = opened_ruler(options, system, params)
    pictures, who, tops = rendered(TEST_SEED, options.count)
    embeddings, colours = measured(ruler, through(system, params, pictures))
    people = People(options.count, system.image_encoder.config["image_size"])
    known, wrong = people.embeddings(ruler), others(people.sexes)
    scenes = np.arange(len(who)) >= options.count * VIEWS
    own, other = ((embeddings * known[of]).sum(-1)[scenes] for of in (who, wrong[who]))
    named = (colours == tops)[tops >= 0].mean()
    print(
        f"the ruler on {scenes.sum()} renders of {options.count} people: own {own.mean():.3f}, another's "
        f"{other.mean():.3f}, nearer to the own {(own > other).mean():.2f}, colour of the top {named:.2f}"
    )

    rng = np.random.default_rng(2)
    told = [(str(rng.choice(COLOURS)), str(rng.choice(list(BACKGROUNDS)))) for _ in people.sexes]
    single = draw(
        system,
        params,
        [
            f"a photo of a {sex} {MARKER} wearing a {top} t-shirt, {background} background"
            for sex, (top, background) in zip(people.sexes, told, strict=True)
        ],
        [[picture] for picture in people.given],
        options,
    )
    figures = []
    for name, images in single.items():
        embeddings, colours = measured(ruler, images)
        own, other = ((embeddings * known[of]).sum(-1) for of in (np.arange(len(known)), wrong))
        named = np.array([COLOURS[colour] for colour in colours]) == [top for top, _ in told]
        figures.append(compared(name, own, other) | {"colour of the top": f"{named.mean():.2f}"})
    print(f"{len(known)} pictures of one person\n" + table(figures), flush=True)

    pairs = [(i, (i + 1) % len(known)) for i in range(0, len(known), 2)]
    kinds = [tuple(people.sexes[i] for i in pair) for pair in pairs]
    double = draw(
        system,
        params,
        [f"a photo of a {first} {MARKER} and a {second} {MARKER}" for first, second in kinds],
        [[people.given[i] for i in pair] for pair in pairs],
        options,
    )
    figures, wrong = [], others(kinds)
    for name, images in double.items():
        found = [measured(ruler, halves(image))[0] for image in images]
        own, other = (
            np.array([identity_similarity(faces, known[list(pairs[k])]) for faces, k in zip(found, of, strict=True)])
            for of in (range(len(pairs)), wrong)
        )
        figures.append(compared(name, own, other))
    print(f"{len(pairs)} pictures of two people\n" + table(figures))
    if options.sheet:
        shown_sheet(people, pairs, single, double).save(options.sheet)


if __name__ == "__main__":
    main()
