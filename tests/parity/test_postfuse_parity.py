"""Postfuse and pictures of subjects against torch modules that were written from FastComposer's description."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.models import Postfuse

torch = pytest.importorskip("torch")
from torch_twins import assert_parity, normal, randomised, to_flax  # noqa: E402

WIDTH = 12


class MLP(torch.nn.Module):
    def __init__(self, into: int, width: int):
        super().__init__()
        self.layernorm = torch.nn.LayerNorm(into)
        self.fc1 = torch.nn.Linear(into, width)
        self.fc2 = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.fc2(torch.nn.functional.gelu(self.fc1(self.layernorm(x))))


class Fusion(torch.nn.Module):
    """Words of all samples in one row, in the order of the flags, as the subjects are."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp1, self.mlp2 = MLP(2 * width, width), MLP(width, width)
        self.layer_norm = torch.nn.LayerNorm(width)

    def forward(self, text, subjects, flags, counts):
        kept = torch.cat([row[:count] for row, count in zip(subjects, counts, strict=True)])
        words = text[flags]
        fused = self.mlp1(torch.cat([words, kept], -1)) + words
        out = text.clone()
        out[flags] = self.layer_norm(self.mlp2(fused) + fused)
        return out


def test_values_and_gradients_of_ragged_subjects():
    original = randomised(Fusion(WIDTH))
    text, subjects, weight = normal(3, 7, WIDTH, seed=0), normal(3, 3, WIDTH, seed=1), normal(3, 7, WIDTH, seed=2)
    positions = np.array([[2, 5, 6], [4, 0, 0], [0, 0, 0]], np.int32)
    valid = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    flags = torch.zeros(3, 7, dtype=torch.bool)
    for row, places, real in zip(flags, positions, valid, strict=True):
        row[torch.from_numpy(places[real])] = True
    given = [torch.from_numpy(array).requires_grad_() for array in (text, subjects)]
    expected = original(*given, flags, valid.sum(1).tolist())
    (expected * torch.from_numpy(weight)).sum().backward()
    module = Postfuse.from_config({"width": WIDTH})

    def loss(params, text, subjects):
        out = module.apply({"params": params}, text, subjects, positions, valid)
        return jnp.vdot(out, weight), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
        to_flax(original.state_dict(), module), text, subjects
    )
    assert_parity(out, expected)
    wanted = to_flax({name: value.grad for name, value in original.named_parameters()}, module)
    for ours, theirs in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    for ours, tensor in zip(gradients[1:], given, strict=True):
        np.testing.assert_allclose(ours, tensor.grad, atol=1e-4)
