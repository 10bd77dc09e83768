"""Comparisons of a network with its torch twin: random twins, their tensors as our parameters, and the tolerance."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from fairhuman_jax.weights import expected_params, save_tokenizer
from fairhuman_jax.weights.keys import canonical_names, leaves

TOLERANCE = 2e-4  # of the standard deviation of the output


def randomised(model, seed: int = 0):
    """The torch model in evaluation mode, with every vector random, norms that matter, and no matrix of zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif not parameter.any():
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def to_flax(tensors: dict, module) -> dict:
    """Torch tensors (weights, or gradients) as the module's parameter tree, in float32."""
    stored = canonical_names(type(module).__name__, tensors)

    def read(name: str) -> np.ndarray:
        return tensors[stored[name]].detach().numpy()

    wanted = leaves(expected_params(module))
    assert {name for leaf in wanted for name in leaf.names} == set(stored)
    return unflatten_dict({leaf.path: leaf.from_torch(read, np.dtype(np.float32)) for leaf in wanted})


def normal(*shape: int, seed: int) -> np.ndarray:
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(array) -> torch.Tensor:
    """[B, H, W, C] as a torch tensor [B, C, H, W]."""
    return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())


def assert_parity(found, expected: torch.Tensor) -> None:
    """Within the tolerance of a torch output of about unit size, whose channels come first where it is an image."""
    wanted = expected.detach().numpy()
    wanted = np.moveaxis(wanted, 1, -1) if wanted.ndim == 4 else wanted
    scale = wanted.std()
    assert 0.05 < scale < 20.0
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() <= TOLERANCE * scale


def transformers_tokenizer(tokenizer):
    """The same tokenizer as transformers has it."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        return CLIPTokenizer.from_pretrained(folder)
