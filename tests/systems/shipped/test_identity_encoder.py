"""The image encoder that tells people apart: what it sees, its objective, its previews and its export."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_models import assert_trees_close, quick_jit
from tiny_people import SLOTS, VISION, batch, subject_model

from fairhuman_jax.bases.opening import open_image_encoder
from fairhuman_jax.contract import Parts, PreviewConfig
from fairhuman_jax.losses import contrastive_loss
from fairhuman_jax.models import CLIPVision
from fairhuman_jax.systems.facediffuser.subject_model import SubjectModelConfig
from fairhuman_jax.systems.shipped.identity_encoder import IdentityEncoder, IdentityEncoderConfig, people_alone
from fairhuman_jax.weights.shipped import shipped

KEY = jax.random.key(0)


def system(**changes) -> IdentityEncoder:
    return IdentityEncoderConfig(network=VISION, **changes).build()


def test_people_are_seen_alone():
    given = batch(subject_model())
    alone = np.asarray(people_alone(given))
    assert alone.shape == (4, SLOTS, *given["image"].shape[1:])
    inside = given["object_masks"][1, 0] > 0
    np.testing.assert_allclose(alone[1, 0][inside], given["image"][1][inside] / 255.0, atol=1e-6)
    assert (alone[1, 0][~inside] == 0.5).all() and (alone[3] == 0.5).all()


def test_the_objective_is_that_of_the_pairs_that_are_there():
    encoder, given = system(temperature=0.2), batch(subject_model())
    trainable, frozen = encoder.init(KEY)
    prediction = quick_jit(lambda tree: encoder.predict(tree, frozen, given, KEY))(trainable)
    assert prediction["valid"].tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    rows = [0, 2, 3]
    expected = contrastive_loss(
        prediction["reference"][np.array(rows)], prediction["scene"][np.array(rows)], np.ones(3, bool), 0.2
    )
    (name, found), *more = encoder.objectives(prediction, given).items()
    assert name == "contrastive" and not more
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_step_along_the_gradient_makes_pairs_easier_to_find():
    encoder, given = system(), batch(subject_model())
    trainable, frozen = encoder.init(KEY)

    def loss(tree):
        return encoder.objectives(encoder.predict(tree, frozen, given, KEY), given)["contrastive"]

    before, gradient = quick_jit(jax.value_and_grad(loss))(trainable)
    after = loss(jax.tree.map(lambda p, g: p - 1e-3 * g, trainable, gradient))
    assert float(after) < float(before)


def test_previews_show_a_person_beside_the_nearest_scene():
    encoder, given = system(), batch(subject_model())
    trainable, frozen = encoder.init(KEY)
    request, titles = encoder.preview(PreviewConfig(), given)
    shown = np.asarray(encoder.sample(trainable, frozen, request, KEY))
    height, width = given["image"].shape[1:3]
    assert shown.shape == (4, height, 2 * width, 3) and len(titles) == 4
    scenes = given["image"] / 127.5 - 1.0
    first = given | {name: given[name][:, :1] for name in ("object_pixels", "object_masks")}
    found = [encoder.embed(trainable, x) for x in (first["object_pixels"] / 255.0, people_alone(first))]
    person, scene = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in found)
    np.testing.assert_allclose(shown[:, :, width:], scenes[(person @ scene.T).argmax(1)], rtol=0, atol=1e-5)


def test_a_subject_model_begins_from_what_was_written(tmp_path):
    encoder = system()
    trainable, frozen = encoder.init(KEY)
    encoder.export(Parts(trainable, {}, frozen), tmp_path, {})
    network, params = open_image_encoder(str(tmp_path), dtype="float32")
    assert network.to_config() == encoder.network.to_config()
    assert_trees_close(params, trainable, 2e-3)


def test_the_shipped_encoder_fits_the_shipped_model_and_tells_people_apart():
    from fairhuman_jax.data.cache import cached_subjects
    from fairhuman_jax.data.subject_transforms import SubjectConfig, SubjectTransform

    model = SubjectModelConfig(image_encoder="people", image_layers=0, max_objects=1).build()
    assert "image_encoder" in model.begun
    network, params = open_image_encoder("people", dtype="float32")
    assert isinstance(network, CLIPVision)
    count = 32
    people = cached_subjects(64, count, 77, 64, count, count=2)
    shown = SubjectConfig(max_objects=1, object_resolution=48, augment=False).plain()
    transform, rng = SubjectTransform(64, crop="center", flip=0.0, subjects=shown), np.random.default_rng(0)
    samples = [transform(people[i], rng) for i in range(count)]
    given = {
        name: np.stack([sample[name] for sample in samples]) for name in ("image", "object_pixels", "object_masks")
    }
    given["num_objects"] = np.ones(count, np.int32)
    encoder = IdentityEncoder(network, IdentityEncoderConfig(network=network.to_config()))
    found = quick_jit(lambda p: encoder.predict(p, {}, given, KEY))(params)
    pair = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.asarray, (found["reference"], found["scene"]))]
    cosines = pair[0] @ pair[1].T
    own = np.diag(cosines)
    assert (own[:, None] >= cosines).mean() > 0.85, "a person's own scene among the nearest"
    assert (cosines.argmax(1) == np.arange(count)).mean() > 0.2


def test_what_makes_no_encoder_is_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        system(temperature=0.0)
    with pytest.raises(ValueError, match="no CLIP image encoder with projection"):
        IdentityEncoderConfig(network=VISION | {"architectures": ["CLIPVisionModel"]}).build()
    with pytest.raises(ValueError, match="is a AutoencoderKL, not a CLIP image encoder"):
        open_image_encoder(str(shipped("people-base/vae")))
    given = batch(subject_model())
    del given["object_pixels"]
    encoder = system()
    with pytest.raises(ValueError, match=r"lack: set data\.subjects"):
        encoder.predict(encoder.init(KEY)[0], {}, given, KEY)
