"""Samples of a subject model: one geometry for picture and masks, crops on noise, markers that keep their order."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from tiny_subjects import CAPTION, ENTITIES, SIZES, scene, write_subjects

from fairhuman_jax.data import make_loader
from fairhuman_jax.data.object_augmentation import squared
from fairhuman_jax.data.subject_folder import MARKER, Segment, SubjectDataset
from fairhuman_jax.data.subject_transforms import SubjectConfig, SubjectTransform, bounds, cut, marked

SIDE, CROP = 32, 24
ANY = SubjectConfig(object_resolution=CROP, object_types=(), appear_prob=1.0, uncondition_prob=0.0, augment=False)
PEOPLE = replace(ANY, object_types=("person",))
COLOURS = {number: np.array(colour) for number, _, _, _, _, colour in ENTITIES}


def sample(height: int = 48, width: int = 64, **changes) -> dict:
    image, ids, entries = scene(height, width)
    segments = tuple(Segment(e["id"], tuple(e["bbox"]), e["end"], e["coco_label"]) for e in entries)
    return {"image": image, "caption": CAPTION, "segment_map": ids, "segments": segments} | changes


def transform(config: SubjectConfig = PEOPLE, **options) -> SubjectTransform:
    return SubjectTransform(SIDE, subjects=config, **options)


def run(config: SubjectConfig = PEOPLE, seed: int = 0, whole: dict | None = None, **options) -> dict:
    return transform(config, **options)(sample() if whole is None else whole, np.random.default_rng(seed))


def shown(out: dict) -> list[int]:
    """Ids of the entities that the objects' pictures show, by the colour in their middle."""
    middles = [pixels[CROP // 2, CROP // 2].astype(int) for pixels in out["object_pixels"][: out["num_objects"]]]
    return [min(COLOURS, key=lambda number: np.abs(COLOURS[number] - middle).sum()) for middle in middles]


def test_arrays_of_the_contract():
    out = run(replace(PEOPLE, max_objects=3))
    assert {name: (array.shape, array.dtype.name) for name, array in out.items() if name != "caption"} == {
        "image": ((SIDE, SIDE, 3), "uint8"),
        "time_ids": ((6,), "float32"),
        "object_pixels": ((3, CROP, CROP, 3), "uint8"),
        "object_masks": ((3, SIDE, SIDE), "uint8"),
        "num_objects": ((), "int32"),
    }
    assert out["num_objects"] == 2 and out["object_masks"][:2].any((1, 2)).all()
    assert not out["object_masks"][2:].any() and not out["object_pixels"][2:].any()
    wide = SubjectTransform((16, 24), subjects=PEOPLE)(sample(), np.random.default_rng(0))
    assert wide["image"].shape == (16, 24, 3) and wide["object_masks"].shape == (4, 16, 24)


def test_markers_stand_behind_the_words_of_their_objects():
    out = run(ANY)
    assert out["caption"] == f"a man{MARKER} and a woman{MARKER} with a dog{MARKER}"
    assert out["caption"].replace(MARKER, "") == CAPTION
    assert shown(out) == [3, 7, 300]  # by `end`, not as listed
    assert run()["caption"] == f"a man{MARKER} and a woman{MARKER} with a dog" and shown(run()) == [3, 7]
    assert marked("ab", [2, 0, 1]) == f"{MARKER}a{MARKER}b{MARKER}" and marked("ab", []) == "ab"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_picture_and_masks_go_through_one_geometry(size, flip):
    """Wherever a mask is set the picture has that entity's colour, mirrored or not, but for a pixel at its border."""
    whole = sample(*size)
    out = run(ANY, whole=whole, flip=flip)
    for number, mask in zip(shown(out), out["object_masks"], strict=False):
        inner = mask.astype(bool)
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            inner &= np.roll(mask, step, axis).astype(bool)
        inner[[0, -1]] = inner[:, [0, -1]] = False
        assert inner.any() and (out["image"][inner] == COLOURS[number]).all()
        outside = ~mask.astype(bool)
        assert (np.abs(out["image"][outside].astype(int) - COLOURS[number]).sum(-1) > 0).all()
    plain, mirrored = run(ANY, whole=whole), run(ANY, whole=whole, flip=1.0)
    if size[0] == size[1]:
        np.testing.assert_array_equal(mirrored["image"], plain["image"][:, ::-1])
        np.testing.assert_array_equal(mirrored["object_masks"], plain["object_masks"][..., ::-1])
    np.testing.assert_array_equal(mirrored["object_pixels"], plain["object_pixels"])


def test_ids_are_nearest_and_there_are_no_bars():
    """Resizing neither makes new ids nor bars, up and down, lying and standing."""
    for height, width in ((48, 64), (64, 48), (9, 7), (200, 90)):
        rng = np.random.default_rng(height)
        ids = rng.choice([0, 5, 9, 1000], (height, width)).astype(np.int32)
        whole = {"image": np.full((height, width, 3), 77, np.uint8), "segment_map": ids, "caption": "", "segments": ()}
        geometry = transform().geometry(height, width, np.random.default_rng(0))
        assert set(np.unique(geometry.labels(ids))) <= {0, 5, 9, 1000}
        assert (run(whole=whole)["image"] == 77).all()
    # Rows 20 to 51 of 71: (20 + .5) 200 / 71 and (51 + .5) 200 / 71.
    rows = geometry.labels(np.arange(200)[:, None] * np.ones((1, 90), int))[:, 0]
    assert rows[[0, -1]].tolist() == [57, 145]


def test_crops_are_the_photos_own_pixels_on_noise_below_255():
    """From the whole picture at its own size, never mirrored, although the training picture is."""
    rng = np.random.default_rng(5)
    image = rng.integers(0, 255, (60, 80, 3), np.uint8)
    ids = np.zeros((60, 80), np.int32)
    yy, xx = np.indices(ids.shape)
    ids[(yy - 30) ** 2 + (xx - 40) ** 2 < 300] = 4
    whole = {
        "image": image,
        "segment_map": ids,
        "caption": "a man",
        "segments": (Segment(4, bounds(ids), 5, "person"),),
    }
    x0, y0, x1, y1 = bounds(ids)
    side = x1 - x0
    assert side == y1 - y0
    config = replace(PEOPLE, object_resolution=side)
    out = run(config, whole=whole, flip=1.0)
    pixels, inside = out["object_pixels"][0], ids[y0:y1, x0:x1] == 4
    np.testing.assert_array_equal(pixels[inside], image[y0:y1, x0:x1][inside])
    background = pixels[~inside]
    assert (background != image[y0:y1, x0:x1][~inside]).any(-1).mean() > 0.99
    values = np.concatenate([run(config, seed, whole)["object_pixels"][0][~inside].ravel() for seed in range(40)])
    assert values.min() == 0 and values.max() == 254 and abs(values.mean() - 127) < 1
    np.testing.assert_allclose(np.bincount(values, minlength=255) / len(values), 1 / 255, rtol=0.35)


def test_objects_share_one_background():
    whole = sample()
    whole["segments"] = (Segment(7, (0, 0, 64, 48), 17, "person"), Segment(3, (0, 0, 64, 48), 5, "person"))
    first, second = run(replace(PEOPLE, object_resolution=64), whole=whole)["object_pixels"][:2]
    neither = squared(np.repeat((whole["segment_map"] == 0)[..., None] * np.uint8(255), 3, -1), 64) == 255
    np.testing.assert_array_equal(first[neither], second[neither])
    assert neither.mean() > 0.3


def test_an_empty_caption_has_no_objects_and_the_other_way_round():
    config = replace(ANY, uncondition_prob=0.3, text_only_prob=0.2)
    outs = [run(config, seed) for seed in range(400)]
    empty = [out for out in outs if out["caption"] == ""]
    text = [out for out in outs if out["caption"] == CAPTION]
    assert len(empty) + len(text) + sum(out["num_objects"] == 3 for out in outs) == 400
    assert 90 < len(empty) < 150 and 55 < len(text) < 105
    for out in empty + text:
        assert out["num_objects"] == 0 and not out["object_pixels"].any() and not out["object_masks"].any()
    assert all(out["caption"].count(MARKER) == out["num_objects"] for out in outs)


def test_objects_appear_one_by_one_and_at_most_so_many_of_them():
    counts = np.array([run(replace(ANY, appear_prob=0.6), seed)["num_objects"] for seed in range(300)])
    np.testing.assert_allclose(np.bincount(counts) / 300, [0.064, 0.288, 0.432, 0.216], atol=0.08)
    pairs = [tuple(shown(run(replace(ANY, max_objects=2), seed))) for seed in range(150)]
    assert set(pairs) == {(3, 7), (3, 300), (7, 300)} and min(pairs.count(pair) for pair in set(pairs)) > 30
    out = run(replace(ANY, max_objects=1), 1)
    assert out["object_pixels"].shape[0] == 1 and out["caption"].count(MARKER) == 1


def test_types_are_filtered():
    assert shown(run(replace(ANY, object_types=("dog",)))) == [300]
    assert run(replace(ANY, object_types=("cat",)))["num_objects"] == 0
    assert shown(run(replace(ANY, object_types=("dog", "person")))) == [3, 7, 300]


def three(ends: tuple[int, int, int]) -> dict:
    whole = sample()
    return whole | {"segments": tuple(replace(s, end=e) for s, e in zip(whole["segments"], ends, strict=True))}


def test_of_several_objects_of_one_word_the_largest_stays():
    """Ids 7 and 3 both end "a man": the third object keeps its own word."""
    for less, more in ((7, 3), (3, 7)):
        whole = three((5, 5, 28))
        ids, x0 = whole["segment_map"], {7: 36, 3: 20}[less]
        ids[ids == less] = 0
        ids[20:28, x0 : x0 + 8] = less
        out = run(ANY, whole=whole)
        assert out["caption"] == f"a man{MARKER} and a woman with a dog{MARKER}" and shown(out) == [more, 300]
    spaces = run(ANY, whole=three((5, 6, 28)))  # the blank behind a word belongs to its last token
    assert spaces["num_objects"] == 2 and spaces["caption"].count(MARKER) == 2


def test_as_published_later_words_get_the_wrong_object():
    out = run(ANY, whole=three((5, 5, 28)), compat="reference")
    assert out["caption"] == f"a man{MARKER} and a woman with a dog{MARKER}"
    assert out["num_objects"] == 2 and shown(out) == [7, 3]  # id 3 stands at the word "dog"


def test_objects_outside_the_crop_are_left_out_but_not_as_published():
    """The dog is in the left quarter of a lying picture: of 72 x 24 the middle third is kept."""
    whole = sample(24, 72)
    assert shown(run(ANY, whole=whole)) == [3, 7] and MARKER not in run(ANY, whole=whole)["caption"][-8:]
    published = run(ANY, whole=whole, compat="reference")
    assert shown(published) == [3, 7, 300] and not published["object_masks"][2].any()


def test_as_published_standing_pictures_get_bars_and_mixed_ids():
    whole = sample(64, 48)
    whole["image"][:] = 200
    out = run(ANY, whole=whole, compat="reference")
    assert out["image"].shape == (SIDE, SIDE, 3) and "time_ids" not in out
    bar = round(SIDE * (64 - 48) / 2 / 64)
    assert (out["image"][:, : bar - 1] == 0).all() and (out["image"][:, bar + 1 : -bar - 1] == 200).all()
    own = run(ANY, whole=whole)
    assert (own["image"] == 200).all()
    # At the border of 3 and 7 the mean is 5, which nobody has: pixels of both are lost.
    ids = np.zeros((40, 30), np.int32)
    ids[:, :13], ids[:, 13:] = 3, 7
    border = {"image": np.zeros((40, 30, 3), np.uint8), "segment_map": ids, "caption": "a b"}
    border["segments"] = (Segment(3, (0, 0, 13, 40), 1, "x"), Segment(7, (13, 0, 30, 40), 3, "x"))
    mixed, clean = (run(ANY, whole=border, compat=compat)["object_masks"][:2].sum(0) for compat in ("reference", None))
    assert (clean == 1).all()
    between = mixed[:, SIDE // 2 - 4 : SIDE // 2 + 2]
    assert (between == 0).all(0).sum() == 1 and (mixed[:, :2] == 0).all()


def test_as_published_lying_pictures_are_cropped_from_the_middle():
    whole = sample(48, 64)
    published, own = run(ANY, whole=whole, compat="reference"), run(ANY, whole=whole)
    np.testing.assert_array_equal(published["image"], own["image"])
    assert np.abs(published["object_masks"].astype(int) - own["object_masks"]).mean() < 0.02
    flipped = run(ANY, whole=whole, compat="reference", flip=1.0)
    for number, mask in zip(shown(flipped), flipped["object_masks"], strict=False):
        right = np.abs(flipped["image"][mask > 0] - COLOURS[number]).sum(-1) < 60
        assert right.mean() > 0.7


def test_references_stand_in_for_the_crop():
    """One of several other pictures of the same entity is shown; the mask stays that of the picture itself."""
    grey = [np.full((20, 30, 3), value, np.uint8) for value in (60, 120)]
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 10:20] = 1
    options = tuple((picture, mask) for picture in grey)
    whole = sample(references=(options, options, options))
    seen = set()
    for seed in range(20):
        out = run(replace(PEOPLE, object_resolution=10), seed, whole)
        assert out["num_objects"] == 2 and all((pixels == pixels[0, 0]).all() for pixels in out["object_pixels"][:2])
        seen |= {int(pixels[0, 0, 0]) for pixels in out["object_pixels"][:2]}
        np.testing.assert_array_equal(out["object_masks"], run(PEOPLE, seed)["object_masks"])
    assert seen == {60, 120}
    mask[5, 10] = 0
    corner = run(replace(PEOPLE, object_resolution=10), 0, whole)["object_pixels"][0]
    assert (corner[0, 0] != corner[1, 1]).any() and (corner[1:] == corner[1, 1]).all()


def test_the_same_generator_gives_the_same_sample_and_pickles():
    first = transform(replace(SubjectConfig(object_resolution=CROP), uncondition_prob=0.0), flip=0.5, crop="random")
    copy = pickle.loads(pickle.dumps(first))
    one, two, other = (t(sample(), np.random.default_rng(s)) for t, s in ((first, 3), (copy, 3), (copy, 4)))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    assert not np.array_equal(one["object_pixels"], other["object_pixels"])


def test_evaluation_shows_everything_unchanged():
    config = SubjectConfig(object_resolution=CROP, appear_prob=0.1, uncondition_prob=0.5, text_only_prob=0.5).plain()
    assert {tuple(shown(run(config, seed))) for seed in range(30)} == {(3, 7)}
    pixels = [run(config, seed)["object_pixels"][0] for seed in range(3)]
    x0, y0, x1, y1 = sample()["segments"][1].box
    np.testing.assert_array_equal(pixels[0], squared(sample()["image"][y0:y1, x0:x1], CROP))
    np.testing.assert_array_equal(pixels[0], pixels[2])


def test_the_loader_takes_the_marked_caption_and_drops_both_together(tmp_path):
    said = []

    def tokenize(captions):
        said.extend(captions)
        return {"input_ids": np.array([[len(caption)] for caption in captions], np.int32)}

    data = SubjectDataset(write_subjects(tmp_path, 4, test=0), on_error="stop")
    config = replace(PEOPLE, uncondition_prob=0.5, appear_prob=0.7)
    with make_loader(data, transform(config), tokenize, 4, seed=0, caption_dropout=1.0, prefetch=1) as batches:
        batch, said = next(batches), said[:0] or said
        rows = [batch] + [next(batches) for _ in range(7)]
    assert "caption" not in batch and batch["object_pixels"].shape == (4, 4, CROP, CROP, 3)
    counts = np.concatenate([row["num_objects"] for row in rows])
    lengths = np.concatenate([row["input_ids"][:, 0] for row in rows])
    assert counts.dtype == np.int32 and set(counts) == {0, 1, 2}
    assert ((lengths == 0) | (lengths == len(CAPTION) + counts * len(MARKER))).all()
    assert 8 < (lengths == 0).sum() < 24 and (counts[lengths == 0] == 0).all()
    assert set(said[:32]) <= {"", CAPTION} | {marked(CAPTION, ends) for ends in ([5], [17], [5, 17])}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_objects": 0}, "max_objects = 0 must be >= 1"),
        ({"object_resolution": 4}, "object_resolution = 4 >= 8"),
        ({"appear_prob": 1.5}, "appear_prob = 1.5: use 0 ... 1"),
        ({"uncondition_prob": 0.6, "text_only_prob": 0.6}, "uncondition_prob . text_only_prob = 1.2 > 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        SubjectConfig(**wrong)


def test_options_and_samples_that_do_not_fit_are_refused():
    refused: tuple[tuple[dict, str], ...] = (
        ({"compat": "published"}, "use 'reference' or None"),
        ({"compat": "reference", "crop": "random"}, "crops squares from the middle"),
        ({"masks": ("face_mask",)}, "not carried with subjects"),
    )
    for wrong, words in refused:
        with pytest.raises(ValueError, match=words):
            transform(**wrong)
    with pytest.raises(ValueError, match="no segments and no segment_map; it has image, caption"):
        run(whole={"image": np.zeros((8, 8, 3), np.uint8), "caption": ""})


def test_cut_takes_rows_from_the_second_and_fourth_number():
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    out = cut(image, np.ones((6, 8), bool), (2, 1, 7, 4), np.zeros_like(image))
    np.testing.assert_array_equal(out, image[1:4, 2:7])
    assert bounds(np.zeros((3, 5))) == (0, 0, 5, 3)
