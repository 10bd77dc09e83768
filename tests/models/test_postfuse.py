"""Postfuse: size, unchanged states, slots of padding, the order of subjects, gradients, rejected inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit, random_params

from fairhuman_jax.models import Postfuse
from fairhuman_jax.weights import expected_params

MODULE = Postfuse(width=8)
PARAMS = {"params": random_params(MODULE, 0)}
RNG = np.random.default_rng(1)
TEXT = jnp.asarray(RNG.normal(size=(3, 6, 8)), jnp.float32)
SUBJECTS = jnp.asarray(RNG.normal(size=(3, 2, 8)), jnp.float32)
POSITIONS = np.array([[2, 5], [4, 0], [0, 0]], np.int32)
VALID = np.array([[True, True], [True, False], [False, False]])
fuse = quick_jit(MODULE.apply)


def test_the_published_size():
    params = expected_params(Postfuse())
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    assert counts == {"mlp1": 1_774_080, "mlp2": 1_182_720, "layer_norm": 1_536}
    assert sum(counts.values()) == 2_958_336


def test_all_other_states_pass_through_bit_for_bit():
    fused = np.asarray(fuse(PARAMS, TEXT, SUBJECTS, POSITIONS, VALID))
    changed = (fused != np.asarray(TEXT)).any(-1)
    assert np.argwhere(changed).tolist() == [[0, 2], [0, 5], [1, 4]]
    half = fuse(PARAMS, TEXT.astype(jnp.bfloat16), SUBJECTS, POSITIONS, VALID)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half[~changed], TEXT.astype(jnp.bfloat16)[~changed])
    np.testing.assert_allclose(half[changed].astype(np.float32), fused[changed], atol=0.1)


def test_padding_does_not_overwrite_a_subject_at_its_position():
    """Slots of padding have the start token's position, which a marker before all words also gets."""
    positions, valid = np.array([[0, 0], [0, 0], [3, 3]]), np.array([[True, False], [False, True], [True, False]])
    fused = np.asarray(fuse(PARAMS, TEXT, SUBJECTS, positions, valid))
    assert np.argwhere((fused != np.asarray(TEXT)).any(-1)).tolist() == [[0, 0], [1, 0], [2, 3]]
    others = fuse(PARAMS, TEXT, jnp.where(valid[..., None], SUBJECTS, 1e6), positions, valid)
    np.testing.assert_array_equal(others, fused)


def test_the_order_of_slots_does_not_matter_and_that_of_pictures_does():
    fused = fuse(PARAMS, TEXT, SUBJECTS, POSITIONS, VALID)
    turned = fuse(PARAMS, TEXT, SUBJECTS[:, ::-1], POSITIONS[:, ::-1], VALID[:, ::-1])
    np.testing.assert_array_equal(turned, fused)
    same = TEXT.at[0, 5].set(TEXT[0, 2])
    straight = np.asarray(fuse(PARAMS, same, SUBJECTS, POSITIONS, VALID))[0]
    swapped = np.asarray(fuse(PARAMS, same, SUBJECTS[:, ::-1], POSITIONS, VALID))[0]
    np.testing.assert_allclose(straight[[2, 5]], swapped[[5, 2]], atol=1e-6)
    assert np.abs(straight[2] - swapped[2]).max() > 0.05


def test_gradients_reach_subjects_words_and_parameters_and_no_padding():
    weight = jnp.asarray(RNG.normal(size=TEXT.shape), jnp.float32)

    def loss(params, text, subjects):
        return jnp.vdot(MODULE.apply(params, text, subjects, POSITIONS, VALID), weight)

    params, text, subjects = quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(PARAMS, TEXT, SUBJECTS)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(params))
    assert ((np.abs(subjects) > 0).any(-1) == VALID).all()
    np.testing.assert_array_equal(text[2], weight[2])
    assert not np.allclose(text[0, 2], weight[0, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": TEXT[..., :4]}, r"text is \[3, 6, 4\], not \[3, 6, 8\]"),
        ({"subjects": SUBJECTS[:, :1]}, r"subjects is \[3, 1, 8\], not \[3, 2, 8\]"),
        ({"valid": VALID[:, 0]}, r"valid is \[3\], not \[3, 2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    given = {"text": TEXT, "subjects": SUBJECTS, "positions": POSITIONS, "valid": VALID} | change
    with pytest.raises(ValueError, match=message):
        MODULE.apply(PARAMS, **given)


def test_configs():
    module = Postfuse.from_config({"_class_name": "Postfuse", "width": 12}, dtype=jnp.bfloat16)
    assert (module.width, module.dtype) == (12, jnp.bfloat16)
    assert Postfuse.from_config(module.to_config(), dtype=jnp.bfloat16) == module
    with pytest.raises(ValueError, match="unknown config keys depth"):
        Postfuse.from_config({"depth": 2})
    with pytest.raises(ValueError, match="of class 'T2IAdapter'"):
        Postfuse.from_config({"_class_name": "T2IAdapter"})
