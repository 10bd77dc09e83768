"""The contrastive loss: values computed by hand, invariances, limits, and rejected arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from fairhuman_jax.losses import contrastive_loss

RNG = np.random.default_rng(5)
FIRST, SECOND = RNG.normal(size=(2, 6, 4)).astype(np.float32)
ALL = np.ones(6, bool)


def by_hand(first, second, temperature):
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    logits = first.astype(np.float64) @ second.T.astype(np.float64) / temperature
    return -(np.diag(log_softmax(logits, axis=1)) + np.diag(log_softmax(logits, axis=0))).mean() / 2


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_it_is_the_mean_cross_entropy_of_both_directions(temperature):
    found = contrastive_loss(FIRST, SECOND, ALL, temperature)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_hand(FIRST, SECOND, temperature), rtol=1e-5)


def test_invalid_pairs_are_not_there():
    valid = np.array([True, False, True, True, False, True])
    found = contrastive_loss(FIRST, SECOND, valid)
    np.testing.assert_allclose(found, by_hand(FIRST[valid], SECOND[valid], 0.1), rtol=1e-5)
    gradient = jax.grad(lambda x: contrastive_loss(x, SECOND, valid))(FIRST)
    assert (np.asarray(gradient)[~valid] == 0).all() and (np.abs(np.asarray(gradient)[valid]).max(1) > 0).all()
    assert contrastive_loss(FIRST, SECOND, np.zeros(6, bool)) == 0.0


def test_lengths_do_not_matter_and_the_sides_may_change_places():
    lengths = RNG.uniform(0.1, 9, (6, 1)).astype(np.float32)
    usual = contrastive_loss(FIRST, SECOND, ALL)
    np.testing.assert_allclose(contrastive_loss(lengths * FIRST, SECOND, ALL), usual, rtol=1e-5)
    np.testing.assert_allclose(contrastive_loss(SECOND, FIRST, ALL), usual, rtol=1e-6)


def test_limits():
    assert contrastive_loss(np.eye(6), np.eye(6), ALL, 0.01) < 1e-6
    np.testing.assert_allclose(contrastive_loss(np.ones((6, 4)), np.ones((6, 4)), ALL), np.log(6), rtol=1e-6)
    gradient = jax.grad(lambda x: contrastive_loss(x, SECOND, ALL))(0 * FIRST)
    assert np.isfinite(gradient).all(), "an embedding of 0 has no direction"


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"embeddings are \(6, 4\) and \(6, 3\)"):
        contrastive_loss(FIRST, SECOND[:, :3], ALL)
    with pytest.raises(ValueError, match=r"valid \(5,\)"):
        contrastive_loss(FIRST, SECOND, ALL[:5])
