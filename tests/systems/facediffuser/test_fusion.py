"""Drawing by scene and subject model: which network draws when, references in order, one compilation, refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SIZE, quick_jit
from tiny_people import ONE, PICTURE, TWO, face_diffuser

from fairhuman_jax.drawing.requests import draw_latents
from fairhuman_jax.systems.facediffuser.fusion import (
    SCENE,
    draw_delayed,
    draw_staged_latents,
    draw_with_maps,
    make_staged_request,
)
from fairhuman_jax.weights import MARKER

KEY = jax.random.key(0)
STEPS = 6


def pictures(*seeds: int) -> list[np.ndarray]:
    return [np.random.default_rng(s).integers(0, 256, (PICTURE, PICTURE, 3)).astype(np.uint8) for s in seeds]


def request(prompts=(TWO,), references=((1, 2),), **options):
    settings = {"steps": STEPS, "guidance": 4.0, "size": (SIZE, SIZE)} | options
    given = [pictures(*seeds) for seeds in references]
    return make_staged_request(face_diffuser()[0], prompts, range(len(prompts)), references=given, **settings)


@pytest.fixture(scope="module")
def draw():
    """Latents of a request; one program for all that differ in arrays alone."""
    system, params = face_diffuser()
    program = quick_jit(lambda params, asked: draw_staged_latents(system, params, asked, KEY)[0])
    return lambda asked, **changes: np.asarray(program(params | changes, asked))


def other(tree):
    return jax.tree.map(lambda leaf: -0.5 * leaf, tree)


def test_the_scene_model_alone_is_ordinary_drawing_without_markers(draw):
    system, params = face_diffuser()
    asked = request(start_merge_step=STEPS + 1)
    plain = dataclasses.replace(asked.request, scheduler="pndm")
    expected = quick_jit(lambda p: draw_latents(system, p, plain, KEY))(params | {"unet": params[SCENE]})
    np.testing.assert_allclose(draw(asked), expected, atol=2e-4)
    np.testing.assert_array_equal(draw(request(references=((3, 4),), start_merge_step=STEPS + 1)), draw(asked))


def test_each_network_draws_in_its_stages_alone(draw):
    _, params = face_diffuser()
    scene, subject = {SCENE: other(params[SCENE])}, {"unet": other(params["unet"])}
    alone = request(start_merge_step=-1, final_step=-1)
    np.testing.assert_array_equal(draw(alone, **scene), draw(alone))
    assert np.abs(draw(alone, **subject) - draw(alone)).max() > 1e-2
    fused = request(start_merge_step=1, final_step=3)
    assert np.abs(draw(fused, **scene) - draw(fused)).max() > 1e-3
    assert np.abs(draw(fused, **subject) - draw(fused)).max() > 1e-3


def test_references_belong_to_markers_in_their_order(draw):
    usual = draw(request())
    assert np.abs(draw(request(references=((2, 1),))) - usual).max() > 1e-4
    assert np.abs(draw(request(references=((1, 3),))) - usual).max() > 1e-4


def test_a_picture_depends_on_its_own_prompt_seed_and_references_alone(draw):
    both = draw(request(prompts=(TWO, ONE), references=((1, 2), (5,))))
    np.testing.assert_allclose(both[:1], draw(request()), atol=2e-4)


def test_another_request_compiles_nothing():
    system, params = face_diffuser()
    program = quick_jit(lambda params, asked: draw_staged_latents(system, params, asked, KEY)[0])
    program(params, request())
    before = program._cache_size()
    program(
        params, request(references=((3, 4),), guidance=7.0, alpha=0.1, beta=0.9, subject_guidance=2.0, gains=(2.0, 1.0))
    )
    assert program._cache_size() == before == 1


def test_one_call_on_stacked_parameters_is_two_calls(draw):
    np.testing.assert_allclose(draw(request(stacked=True)), draw(request()), atol=2e-4)


def test_maps_are_of_the_fused_rows_and_change_nothing(draw):
    system, params = face_diffuser()
    asked = request(start_merge_step=1, final_step=4, constant_stages=True)
    images, maps = quick_jit(lambda p: draw_with_maps(system, p, asked, KEY))(params)
    side = SIZE // system.pipeline.vae.downscale
    assert maps.mask.shape == maps.scene.shape == maps.subject.shape == (3, 1, side, side)
    assert images.shape == (1, SIZE, SIZE, 3)
    latents = draw(request(start_merge_step=1, final_step=4))
    expected = quick_jit(lambda p: system.decode(p, latents))(params)
    np.testing.assert_allclose(images, expected, atol=1e-3)


def test_a_soft_mask_and_one_by_channel_draw_something_else(draw):
    usual = draw(request(start_merge_step=-1, final_step=STEPS))
    for options in ({"temperature": 0.1}, {"per_channel": True}, {"baseline": "null"}):
        assert np.abs(draw(request(start_merge_step=-1, final_step=STEPS, **options)) - usual).max() > 1e-4


def test_delayed_conditioning_has_the_text_first_and_the_subjects_after():
    system, params = face_diffuser()
    program = quick_jit(lambda p, asked: draw_delayed(system, p, asked, KEY))
    never = program(params, request(start_merge_step=STEPS + 1))
    np.testing.assert_array_equal(program(params, request(references=((3, 4),), start_merge_step=STEPS + 1)), never)
    assert np.abs(program(params, request(start_merge_step=1)) - never).max() > 1e-4
    np.testing.assert_array_equal(
        program(params | {SCENE: other(params[SCENE])}, request()), program(params, request())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ("a face",)}, f"'a face' has no {MARKER.replace('|', '.')}"),
        ({"references": ((1,),)}, "marks 2 subjects, but there are 1 reference pictures"),
        ({"references": ((1, 2, 3),)}, "marks 2 subjects, but there are 3 reference pictures"),
        ({"prompts": (f"a per{MARKER}son",), "references": ((1,),)}, "stands inside a word"),
        ({"prompts": (f"a a a a person{MARKER}",), "references": ((1,),)}, "word of its subject number 1 is cut off"),
        ({"baseline": "image"}, "baseline is 'image'; known: text, null"),
        ({"guidance": 1.0}, "guidance is 1.0; staged drawing needs more than 1"),
        ({"alpha": 1.5}, "alpha is 1.5; expected a fraction"),
        ({"scheduler": "heun"}, "heun"),
    ],
)
def test_requests_that_cannot_be_drawn_are_refused_before_any_compute(options, message):
    with pytest.raises(ValueError, match=message):
        request(**options)


def test_references_of_different_sizes_are_refused():
    given = [[np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]]
    with pytest.raises(ValueError, match=r"of several sizes: \(8, 8, 3\), \(9, 8, 3\)"):
        make_staged_request(face_diffuser()[0], [TWO], [0], references=given, steps=2, guidance=2.0, size=(SIZE, SIZE))
    assert jnp.asarray(given[0][0]).shape == (8, 8, 3)
