"""The three gradients of a FairHuman LoRA step against torch autograd through diffusers' UNet."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import fairhuman, quick_jit, random_batch, tiny_gradients, trained_lora

from fairhuman_jax.systems.fairhuman import FairHuman
from fairhuman_jax.weights import save_model
from fairhuman_jax.weights.keys import is_stacked, module_names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
KEY = jax.random.fold_in(jax.random.key(5), 0)


@dataclass(frozen=True, eq=False)
class Inputs(FairHuman):
    """The system with what its denoiser is asked in place of what it answers."""

    def denoise(self, params, latents, timesteps, text, time_ids, lora=None):
        return {"latents": latents, "timesteps": timesteps, "text": text.hidden}


class LowRank(torch.nn.Module):
    """A linear layer with a trainable low-rank update, factors as JAX holds them."""

    def __init__(self, base, down, up):
        super().__init__()
        self.base = base
        self.down, self.up = (torch.nn.Parameter(torch.from_numpy(np.array(x))) for x in (down, up))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


def nchw(array):
    return torch.from_numpy(np.moveaxis(np.asarray(array, np.float32), -1, 1).copy())


def adapted_unet(system, lora, folder):
    """diffusers' UNet with the system's weights and LoRA; returns it and its factors by our path and layer."""
    save_model(system.pipeline.unet, system.pipeline.params["unet"], folder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder)
    unet.requires_grad_(False)
    layers = {}
    for path in {path[:-1] for path in flatten_dict(lora)}:
        factors = {name: np.asarray(flatten_dict(lora)[(*path, name)]) for name in ("down", "up")}
        assert is_stacked(path)
        for i, name in enumerate(module_names(path, len(factors["up"]))):
            layer = LowRank(unet.get_submodule(name), factors["down"][i], factors["up"][i])
            unet.set_submodule(name, layer)
            layers[path, i] = layer
    return unet, layers


def test_gradients_equal_torch_autograd(tmp_path):
    system, batch = fairhuman(), random_batch()
    lora = trained_lora(system)
    probe = Inputs(pipeline=system.pipeline, config=system.config)
    asked = quick_jit(lambda: probe.predict(lora, system.pipeline.params, batch, KEY))()
    unet, layers = adapted_unet(system, lora["unet"], tmp_path)
    given = asked["output"]
    output = unet(
        nchw(given["latents"]),
        torch.from_numpy(np.array(given["timesteps"])),
        torch.from_numpy(np.array(given["text"])),
    ).sample
    square = (output - nchw(asked["target"])) ** 2
    losses = {"global": square.mean()}
    for name in ("face", "hand"):
        covered = torch.nn.functional.avg_pool2d(nchw(batch[f"{name}_mask"]), 2) >= 0.25
        losses[name] = (square * covered).mean()

    gradients, ours = tiny_gradients()
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(gradients["unet"]).items()}
    assert len(flat) == 2 * 8 * 3  # two factors, eight projections, three stacks
    for task, (name, loss) in enumerate(losses.items()):
        np.testing.assert_allclose(ours[name], loss.item(), rtol=1e-5)
        unet.zero_grad()
        loss.backward(retain_graph=True)
        for (path, layer), module in layers.items():
            for factor in ("down", "up"):
                stacked = flat[(*path, factor)]
                expected = getattr(module, factor).grad.numpy()
                bound = 1e-5 * max(np.abs(stacked[task]).max(), 1e-8)
                label = f"{name}: {'.'.join(path)}[{layer}].{factor}"
                np.testing.assert_allclose(stacked[task, layer], expected, rtol=0, atol=bound, err_msg=label)
