"""Identity similarity: matching by hand, alignment, the plan of the protocol, its commands; networks on request."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fairhuman_jax.annotate.squares import Square
from fairhuman_jax.drawing.plans import PlannedPicture, read_plan
from fairhuman_jax.evaluate import __main__ as evaluate
from fairhuman_jax.evaluate import identity
from fairhuman_jax.evaluate.folders import captions_for
from fairhuman_jax.evaluate.identity import TEMPLATE, aligned_square, identity_similarity, reference_embeddings
from fairhuman_jax.evaluate.subject_plan import NOUNS, find_subjects, plan_pictures, write_plan
from fairhuman_jax.weights import MARKER


def unit(*degrees: float) -> np.ndarray:
    """Embeddings in a plane, whose cosines are those of the angles between them."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def cosine(degrees: float) -> float:
    return float(np.cos(np.radians(degrees)))


def test_one_person_is_the_largest_face():
    assert identity_similarity(unit(40, 0), unit(0)) == pytest.approx(cosine(40))
    assert identity_similarity(unit(120), unit(0)) == 0.0
    assert identity_similarity(np.empty((0, 2)), unit(0)) == 0.0


def test_two_people_score_as_the_worse_of_the_greedy_pairs():
    assert identity_similarity(unit(80, 10), unit(0, 90)) == pytest.approx(cosine(10))
    # The largest cosine of all (5 degrees) is matched first, though 35 + 40 degrees would be the better pair of pairs.
    assert identity_similarity(unit(35, 0), unit(40, 75)) == pytest.approx(cosine(75))
    assert identity_similarity(unit(80, 10, 0), unit(0, 90)) == pytest.approx(cosine(10)), "a third face is left out"


def test_a_missing_person_counts_nothing_or_as_published_like_a_black_picture():
    references, empty = unit(0, 90), unit(60)[0]
    assert identity_similarity(unit(5), references) == 0.0
    assert identity_similarity(unit(5), references, empty) == pytest.approx(cosine(30))
    assert identity_similarity(np.empty((0, 2)), references, empty) == 0.0


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        identity_similarity(unit(0), np.empty((0, 2)))
    with pytest.raises(ValueError, match=r"faces are \[1, 2\], references \[1, 3\]"):
        identity_similarity(unit(0), np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"b\.jpg: no face found"):
        reference_embeddings(
            lambda p: unit(0)[: int(p[0, 0, 0])], [np.ones((1, 1, 3)), np.zeros((1, 1, 3))], ["a.jpg", "b.jpg"]
        )


def test_alignment_undoes_turning_scaling_and_moving():
    square = Square((70.0, 40.0), 56.0, 0.6)
    found = aligned_square(square.to_picture(TEMPLATE / 112))
    np.testing.assert_allclose([*found.centre, found.side, found.angle], [70, 40, 56, 0.6])
    noisy = aligned_square(square.to_picture(TEMPLATE / 112) + np.random.default_rng(0).normal(0, 1, (5, 2)))
    np.testing.assert_allclose([*noisy.centre, noisy.side, noisy.angle], [70, 40, 56, 0.6], rtol=0.1)


def people(folder, names=("000001", "000612", "tim")):
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for file in ("b.png", "a.png"):
            Image.fromarray(np.full((4, 4, 3), 10 * i, np.uint8)).save(folder / name / file)
    return find_subjects(folder)


def test_the_protocol_has_2400_and_8820_pictures(tmp_path):
    subjects = dict.fromkeys(NOUNS, tmp_path)
    single = plan_pictures(subjects, [f"a {{noun}} {MARKER} number {i}" for i in range(40)])
    pairs = plan_pictures(subjects, [f"a man {MARKER} and a woman {MARKER}, {i}" for i in range(21)], people=2)
    assert (len(subjects), len(single), len(pairs)) == (15, 2400, 8820)
    assert len({row.image for row in pairs}) == 8820 and all(len(set(row.references)) == 1 for row in pairs)


def test_plan(tmp_path):
    subjects = people(tmp_path / "people")
    assert [path.name for path in subjects.values()] == 3 * ["a.png"]
    planned = plan_pictures(subjects, [f"a {{noun}} {MARKER} hugs a {{noun}} {MARKER}"], people=2, instances=2, seed=5)
    assert len(planned) == 6
    first, last = planned[0], planned[-1]
    assert first == PlannedPicture(
        "subject_0000_prompt_0000_instance_0000.png",
        f"a man {MARKER} hugs a woman {MARKER}",
        5,
        (str(subjects["000001"]), str(subjects["000612"])),
    )
    assert (last.image, last.prompt, last.seed) == (
        "subject_0002_prompt_0000_instance_0001.png",
        f"a woman {MARKER} hugs a person {MARKER}",
        6,
    )
    write_plan(tmp_path / "plan.jsonl", planned)
    assert read_plan(tmp_path / "plan.jsonl") == planned
    (caption,) = captions_for([tmp_path / last.image], tmp_path / "plan.jsonl")
    assert caption.split() == ["a", "woman", "hugs", "a", "person"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plans no picture"),
        ("{}", "line 1: needs an object with image, prompt, seed, references"),
        ('{"image": "../a.png", "prompt": "x", "seed": 1, "references": []}', "is no file name"),
        ('{"image": "a.png", "prompt": "x", "seed": 1, "references": []}\n' * 2, r"a\.png stands on 2 lines"),
    ],
)
def test_bad_plans(tmp_path, text, message):
    (tmp_path / "plan.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.jsonl")


def test_commands_plan_and_measure(tmp_path, capsys, monkeypatch):
    """With an embedder that takes a picture's two halves for faces, as bright as they are."""
    people(tmp_path / "people", ("dark", "bright"))
    Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(tmp_path / "people" / "bright" / "a.png")
    (tmp_path / "prompts.txt").write_text(f"a man {MARKER} and a woman {MARKER}\n\n")
    plan = tmp_path / "plan.jsonl"
    arguments = [str(tmp_path / "people"), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(plan)]
    evaluate.main(["plan", *arguments, "--people", "2", "--instances", "2"])
    assert "2 pictures of 2 each" in capsys.readouterr().out

    class Halves:
        empty = unit(90)[0]

        def __call__(self, picture):
            width = picture.shape[1]
            tones = {float(picture[:, part].mean()) for part in (slice(width // 2), slice(width // 2, None))}
            return unit(*(tone / 255 * 90 for tone in sorted(tones)))

    monkeypatch.setattr(evaluate, "OpenFaceEmbedder", Halves)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    both = np.concatenate([np.full((4, 4, 3), 0, np.uint8), np.full((4, 4, 3), 200, np.uint8)], axis=1)
    Image.fromarray(both[:, ::-1]).save(drawn / "subject_0000_prompt_0000_instance_0000.png")
    with pytest.raises(SystemExit):
        evaluate.main(["identity", str(drawn), "--plan", str(plan)])
    assert "lacks 1 of the 2 pictures" in capsys.readouterr().err
    Image.fromarray(both[:, :4]).save(drawn / "subject_0000_prompt_0000_instance_0001.png")
    evaluate.main(["identity", str(drawn), "--plan", str(plan), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["identity"], found["too few faces"], found["pictures"]) == (pytest.approx(0.5), 1, 2)
    evaluate.main(
        ["identity", str(drawn), "--plan", str(plan), "--compat", "reference", "--json", str(tmp_path / "r.json")]
    )
    published = json.loads((tmp_path / "r.json").read_text())["by_picture"]
    assert published["subject_0000_prompt_0000_instance_0001.png"] == pytest.approx(cosine(90 - 200 / 255 * 90))


def test_networks_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path))
    pytest.importorskip("onnxruntime")
    with pytest.raises(FileNotFoundError, match=r"fr_feature\.onnx does not exist; fetch it once with"):
        identity.OpenFaceEmbedder()


@pytest.mark.network
def test_photographs_of_one_person_are_alike_and_of_two_are_not(photographs):
    evaluate.main(["fetch"])
    embed = identity.OpenFaceEmbedder()
    found = {name: embed(picture) for name, (_, picture) in photographs.items()}
    assert all(len(faces) == 1 for faces in found.values())
    cosines = np.array([[a[0] @ b[0] for b in found.values()] for a in found.values()])
    same = np.array([[a[:5] == b[:5] for b in found] for a in found])
    assert cosines[same].min() > 0.7 and cosines[~same].max() < 0.2
    assert abs(np.linalg.norm(embed.empty) - 1) < 1e-5
