"""Face-diffuser's two models: what trains, their objectives, what is frozen, written and refused."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_people
from tiny_models import (
    assert_trees_close,
    assert_trees_equal,
    quick_jit,
    random_params,
    small_pipeline,
    tiny_xl_pipeline,
)
from tiny_people import SLOTS, VISION, batch, subject_model

from fairhuman_jax.contract import Parts, PreviewConfig, WholePhase
from fairhuman_jax.models import CLIPVision
from fairhuman_jax.systems.facediffuser.scene_model import SceneModel, SceneModelConfig
from fairhuman_jax.systems.facediffuser.subject_model import SubjectModelConfig, parted, whole
from fairhuman_jax.training.objectives import linearise
from fairhuman_jax.weights import MARKER, SubjectPipeline, save_flat_file
from fairhuman_jax.weights.tensors import open_tensors

KEY = jax.random.key(4)


def losses(system, given, key=KEY, change=lambda trainable: trainable):
    trainable, frozen = system.init(jax.random.key(0))
    program = quick_jit(
        lambda tree, given: linearise(WholePhase(system=system), Parts(tree, {}, frozen), given, key).losses
    )
    return np.asarray(program(change(trainable), given))


def test_the_last_layers_of_the_image_encoder_are_parted_and_joined_again():
    encoder = tiny_people.encoder_params()
    first, last = parted(encoder, 1)
    layers = encoder["vision_model"]["encoder"]["layers"]
    assert_trees_equal(last["layers"], jax.tree.map(lambda leaf: leaf[2:], layers))
    assert_trees_equal(whole(first, last), encoder)


def test_denoiser_fusion_and_the_last_layers_get_gradients_and_nothing_else_trains():
    system = subject_model()
    trainable, frozen = system.init(jax.random.key(0))
    assert set(trainable) == {"unet", "postfuse", "image_encoder"} and set(trainable["image_encoder"]) == {"layers"}
    assert set(frozen) == {"vae", "text_encoder", "image_encoder"}
    assert_trees_equal(trainable["unet"], small_pipeline().params["unet"])  # a fresh model is its base

    def gradients(tree):
        return linearise(WholePhase(system=system), Parts(tree, {}, frozen), batch(system), KEY).pull_each()

    for part, tree in quick_jit(gradients)(trainable).items():
        sizes = [jnp.abs(leaf.reshape(2, -1)).max(axis=1) for leaf in jax.tree.leaves(tree)]
        reached = np.max(sizes, axis=0) > 0
        assert reached.all(), f"denoising, localization reach {part}: {reached}"


def test_all_of_the_image_encoder_trains_when_asked_to():
    trainable, frozen = subject_model(image_layers=0).init(jax.random.key(0))
    assert "image_encoder" not in frozen
    assert_trees_equal(trainable["image_encoder"], tiny_people.encoder_params())


def test_objectives_are_named_and_their_sum_is_the_published_loss():
    system = subject_model(localization_weight=0.5, mask_prob=0.0)
    trainable, frozen = system.init(jax.random.key(0))
    given = batch(system)
    prediction = quick_jit(lambda given: system.predict(trainable, frozen, given, KEY))(given)
    found = system.objectives(prediction, given)
    assert list(found) == ["denoising", "localization"]
    error = np.mean(np.square(prediction["output"] - prediction["target"]))
    assert float(found["denoising"]) == pytest.approx(float(error), rel=1e-5)
    twice = dataclasses.replace(system, config=dataclasses.replace(system.config, localization_weight=1.0))
    assert float(twice.objectives(prediction, given)["localization"]) == pytest.approx(
        2 * float(found["localization"]), rel=1e-5
    )
    assert list(subject_model(localization_weight=0.0).objectives(prediction, given)) == ["denoising"]


def test_the_masked_error_is_that_on_subjects_and_coins_are_thrown_by_sample():
    given = batch(subject_model())
    system = subject_model(mask_prob=0.5)
    trainable, frozen = system.init(jax.random.key(0))
    predict = quick_jit(lambda key, given: system.predict(trainable, frozen, given, key))
    masked = np.stack([predict(jax.random.key(i), given)["masked"] for i in range(8)])
    assert 0 < masked.mean() < 1 and len({tuple(row) for row in masked}) > 2
    assert not predict(KEY, given | {"times": np.full(4, 0.5, np.float32)})["masked"].any()
    published = subject_model(mask_prob=0.5, compat="reference")
    predict = quick_jit(lambda key, given: published.predict(trainable, frozen, given, key))
    masked = np.stack([predict(jax.random.key(i), given)["masked"] for i in range(8)])
    assert 0 < masked.mean() < 1 and all(len(set(row)) == 1 for row in masked)

    prediction = predict(KEY, given) | {"masked": jnp.ones(4)}
    squared = np.square(prediction["output"] - prediction["target"])
    mask = np.asarray(prediction["mask"])
    inside = [(squared[i] * mask[i] ** 2).sum() / (mask[i].sum() * squared.shape[-1]) for i in (0, 1)]
    own = [float(np.mean(squared[i])) for i in (2, 3)]  # those without subjects count whole
    ours = subject_model().objectives(prediction, given)["denoising"]
    assert float(ours) == pytest.approx(np.mean([*inside, *own]), rel=1e-4)
    theirs = published.objectives(prediction, given)["denoising"]
    assert float(theirs) == pytest.approx(np.mean(squared * mask**2), rel=1e-4)


def test_a_subject_changes_its_own_sample_alone_and_padding_changes_nothing():
    system = subject_model(mask_prob=0.0)
    trainable, frozen = system.init(jax.random.key(0))
    predict = quick_jit(lambda given: system.predict(trainable, frozen, given, KEY)["output"])
    given = batch(system)
    usual = np.asarray(predict(given))
    changed = given["object_pixels"].copy()
    changed[1, 1] = 255 - changed[1, 1]
    other = np.asarray(predict(given | {"object_pixels": changed}))
    assert np.abs(other[1] - usual[1]).max() > 1e-4
    np.testing.assert_allclose(other[[0, 2, 3]], usual[[0, 2, 3]], atol=1e-5)
    changed[:, 1], changed[2:] = 99, 77
    changed[1, 1] = given["object_pixels"][1, 1]
    np.testing.assert_allclose(predict(given | {"object_pixels": changed}), usual, atol=1e-5)


def test_an_exported_model_is_one_to_go_on_from(tmp_path):
    system = subject_model()
    trainable, frozen = system.init(jax.random.key(3))
    system.export(Parts(trainable, {}, frozen), tmp_path / "model", {})
    again = SubjectModelConfig(
        base=str(tmp_path / "model"), image_encoder=None, image_layers=1, max_objects=SLOTS, localization_blocks=1
    ).build()
    tree, rest = again.init(jax.random.key(5))
    assert_trees_close(again.joined(tree, rest), system.joined(trainable, frozen), 2e-3)


def test_previews_take_the_subjects_of_held_out_samples_in_turn():
    system = subject_model()
    config = PreviewConfig(prompts=(tiny_people.TWO, tiny_people.ONE, tiny_people.ONE), steps=2)
    asked = system.preview(config, batch(system))
    assert asked is not None
    request, titles = asked
    given = batch(system)["object_pixels"] / np.float32(255)
    expected = [given[0, 0], given[1, 0], given[1, 1], given[0, 0]]  # three there are, then again from the start
    found = np.asarray(request.references)[np.asarray(request.valid)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not any(MARKER in title for title in titles)
    images = quick_jit(partial(system.sample, *system.init(KEY)))(request, KEY)
    assert images.shape[0] == 3 and np.isfinite(np.asarray(images)).all()


def test_the_scene_model_trains_its_denoiser_alone():
    system = SceneModel(small_pipeline(), config=SceneModelConfig())
    trainable, frozen = system.init(KEY)
    assert set(trainable) == {"unet"} and set(frozen) == {"vae", "text_encoder"}
    given = batch(subject_model(), ("a face", "two hands"))
    loss = losses(system, given)
    moved = losses(system, given, change=partial(jax.tree.map, lambda leaf: 1.1 * leaf))
    assert loss.shape == (1,) and loss[0] != moved[0]


def changed_tensors(before, after, folder):
    """Names of the flat file, in FastComposer's naming, whose tensors differ."""
    files = [
        open_tensors(save_flat_file(model, folder / f"{i}.safetensors", "float32"))
        for i, model in enumerate((before, after))
    ]
    assert files[0].names() == files[1].names()
    return {name for name in files[0].names() if not np.array_equal(*(file.read(name) for file in files))}


def step(system, given):
    """(trainable before, after one step along the gradients, frozen)."""
    trainable, frozen = system.init(jax.random.key(0))

    def gradients(tree):
        here = linearise(WholePhase(system=system), Parts(tree, {}, frozen), given, KEY)
        return here.pull(jnp.ones(len(here.names)))

    return trainable, jax.tree.map(lambda p, g: p - 0.1 * g, trainable, quick_jit(gradients)(trainable)), frozen


def test_a_step_of_the_subject_model_changes_three_parts_of_its_file(tmp_path):
    system = subject_model()
    begun, moved, frozen = step(system, batch(system))
    models = [
        SubjectPipeline(system.pipeline, system.image_encoder, system.postfuse, system.joined(tree, frozen))
        for tree in (begun, moved)
    ]
    names = changed_tensors(*models, tmp_path)
    last = "image_encoder.vision_model.encoder.layers.2."
    assert all(name.startswith(("unet.", "postfuse_module.", last)) for name in names)
    assert {name.split(".")[0] for name in names} == {"unet", "postfuse_module", "image_encoder"}


def test_a_fresh_scene_model_is_its_base_and_a_step_changes_the_denoiser_alone(tmp_path):
    system, base = SceneModel(small_pipeline(), config=SceneModelConfig()), small_pipeline()
    begun, moved, frozen = step(system, batch(subject_model(), ("a face", "two hands")))
    fresh, trained = (dataclasses.replace(base, params={**frozen, **tree}) for tree in (begun, moved))
    assert changed_tensors(base, fresh, tmp_path) == set()
    names = changed_tensors(base, trained, tmp_path)
    assert names and all(name.startswith("unet.") for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_prob": 1.5}, "mask_prob is 1.5; it is a probability"),
        ({"localization_weight": -1.0}, "localization_weight is -1.0; it must be 0 or more"),
        ({"compat": "published"}, "compat is 'published'; known: None, reference"),
        ({"image_layers": 4}, "image_layers is 4; the image encoder has 3 layers"),
        ({"localization_blocks": 9}, "9 blocks with cross-attention were asked for, and there are 3"),
    ],
)
def test_settings_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        subject_model(**changes)


def test_networks_that_do_not_fit_together_are_refused():
    narrow = CLIPVision.from_config(VISION | {"projection_dim": 4})
    config = SubjectModelConfig(image_layers=1)
    with pytest.raises(ValueError, match="image_encoder projects to 4, but the text is 8 wide"):
        config.attach(small_pipeline(), narrow, {})
    with pytest.raises(ValueError, match="starts from Stable Diffusion 1 or 2, not SDXL"):
        config.attach(tiny_xl_pipeline(), CLIPVision.from_config(VISION), {})
    bare = CLIPVision.from_config(VISION | {"architectures": ["CLIPVisionModel"]})
    with pytest.raises(ValueError, match="no CLIP image encoder with projection"):
        config.attach(small_pipeline(), bare, {"image_encoder": random_params(bare, 1)})


def test_batches_without_subjects_or_with_other_slots_are_refused():
    system, given = subject_model(), batch(subject_model())
    trainable, frozen = system.init(KEY)
    short = given | {"object_pixels": given["object_pixels"][:, :1]}
    with pytest.raises(ValueError, match=r"batches hold 1 subjects \(data.subjects.max_objects\), the system 2"):
        system.predict(trainable, frozen, short, KEY)
    del given["object_pixels"]
    with pytest.raises(ValueError, match=r"reads object_pixels, which the batches lack: set data\.subjects"):
        system.predict(trainable, frozen, given, KEY)
