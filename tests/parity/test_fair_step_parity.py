"""The three gradients of every FairHuman trainable against torch autograd through diffusers' networks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import (
    fairhuman,
    quick_jit,
    random_batch,
    random_params,
    small_pipeline,
    tiny_gradients,
    tiny_pipeline,
    trained_lora,
)

from fairhuman_jax.contract import Parts, WholePhase
from fairhuman_jax.losses import make_combiner
from fairhuman_jax.systems.fairhuman.system import FairHuman
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable, ControlNetTrainable, LoraTrainable
from fairhuman_jax.training.objectives import task_gradients
from fairhuman_jax.weights import save_model
from fairhuman_jax.weights.keys import is_stacked, module_names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
torch_twins = pytest.importorskip("torch_twins")
KEY = jax.random.fold_in(jax.random.key(5), 0)


@dataclass(frozen=True, eq=False)
class Inputs(FairHuman):
    """The system with what its denoiser is asked in place of what it answers."""

    def denoise(self, params, latents, timesteps, conditioning, lora=None):
        given = conditioning
        return {"latents": latents, "timesteps": timesteps, "text": given.hidden, "conditions": given.conditions}


class LowRank(torch.nn.Module):
    """A linear layer with a trainable low-rank update, factors as JAX holds them."""

    def __init__(self, base, down, up):
        super().__init__()
        self.base = base
        self.down, self.up = (torch.nn.Parameter(torch.from_numpy(np.array(x))) for x in (down, up))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


def nchw(array):
    return torch_twins.nchw(np.asarray(array, np.float32))


def as_torch(array):
    return torch.from_numpy(np.array(array))


def torch_unet(system, folder):
    """diffusers' UNet with the system's frozen weights."""
    save_model(system.pipeline.unet, system.pipeline.params["unet"], folder)
    return diffusers.UNet2DConditionModel.from_pretrained(folder).requires_grad_(False)


def adapt(model, lora):
    """Puts a LoRA on the torch model; returns its layers by our path and their place in the stack."""
    layers = {}
    for path in {path[:-1] for path in flatten_dict(lora)}:
        factors = {name: np.asarray(flatten_dict(lora)[(*path, name)]) for name in ("down", "up")}
        assert is_stacked(path)
        for i, name in enumerate(module_names(path, len(factors["up"]))):
            layer = LowRank(model.get_submodule(name), factors["down"][i], factors["up"][i])
            model.set_submodule(name, layer)
            layers[path, i] = layer
    return layers


def asked_of(trainable, tree, batch, pipeline):
    """What the system asks its denoiser in this step, and the target."""
    probe = fairhuman(pipeline, Inputs, trainable=trainable)
    prediction = quick_jit(lambda: probe.predict(tree, probe.pipeline.params, batch, KEY))()
    return prediction["output"], prediction["target"]


def torch_losses(output, target, batch):
    """Global, face and hand losses as torch scalars."""
    square = (output - nchw(target)) ** 2
    losses = {"global": square.mean()}
    for name in ("face", "hand"):
        covered = torch.nn.functional.avg_pool2d(nchw(batch[f"{name}_mask"]), 2) >= 0.25
        losses[name] = (square * covered).mean()
    return losses


def our_gradients(system, trainable, batch):
    step = quick_jit(
        lambda tree, batch: task_gradients(
            WholePhase(system=system), Parts(tree, {}, system.pipeline.params), batch, KEY
        )
    )
    return step(trainable, batch)


def assert_lora_gradients(gradients, ours, losses, layers):
    """Each factor of each layer, for each loss, within 1e-5 of the largest entry of its stack."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(gradients).items()}
    assert len(flat) == 2 * len({path for path, _ in layers})
    for task, (name, loss) in enumerate(losses.items()):
        np.testing.assert_allclose(ours[name], loss.item(), rtol=1e-5)
        for module in layers.values():
            module.zero_grad()
        loss.backward(retain_graph=True)
        for (path, layer), module in layers.items():
            for factor in ("down", "up"):
                stacked = flat[(*path, factor)]
                expected = getattr(module, factor).grad.numpy()
                bound = 1e-5 * max(np.abs(stacked[task]).max(), 1e-8)
                label = f"{name}: {'.'.join(path)}[{layer}].{factor}"
                np.testing.assert_allclose(stacked[task, layer], expected, rtol=0, atol=bound, err_msg=label)


def assert_network_gradients(gradients, ours, losses, twin, network):
    """Every parameter of a network, for each loss, within 1e-5 of the largest entry of the network's gradient."""
    for task, (name, loss) in enumerate(losses.items()):
        np.testing.assert_allclose(ours[name], loss.item(), rtol=1e-5)
        twin.zero_grad()
        loss.backward(retain_graph=True)
        expected = torch_twins.to_flax({key: value.grad for key, value in twin.named_parameters()}, network)
        found = jax.tree.map(lambda leaf, task=task: np.asarray(leaf[task]), gradients)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        for (path, leaf), wanted in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            label = f"{name}: {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5 * largest, err_msg=label)


def assert_sum_is_published_and_fair_is_not(gradients, losses, twin, network):
    """The published trainers of networks follow the gradient of the summed losses."""
    twin.zero_grad()
    sum(losses.values()).backward(retain_graph=True)
    expected = torch_twins.to_flax({key: value.grad for key, value in twin.named_parameters()}, network)
    published, plain, fair = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (expected, *(make_combiner(method).update(gradients, ())[0] for method in ("sum", "mpd")))
    )
    np.testing.assert_allclose(plain, published, rtol=0, atol=1e-5 * np.abs(published).max())
    assert fair @ published < 0.999 * np.linalg.norm(fair) * np.linalg.norm(published)


def test_lora(tmp_path):
    system, batch = fairhuman(), random_batch()
    lora = trained_lora(system)
    given, target = asked_of(LoraTrainable(rank=2), lora, batch, None)
    unet = torch_unet(system, tmp_path)
    layers = adapt(unet, lora["unet"])
    output = unet(nchw(given["latents"]), as_torch(given["timesteps"]), as_torch(given["text"])).sample
    gradients, ours = tiny_gradients()
    assert len(flatten_dict(gradients["unet"])) == 2 * 8 * 3  # two factors, eight projections, three stacks
    assert_lora_gradients(gradients["unet"], ours, torch_losses(output, target, batch), layers)


def test_lora_on_the_text_encoder_too(tmp_path):
    trainable = LoraTrainable(rank=2, text_targets=("q_proj", "k_proj", "v_proj", "out_proj"))
    system, batch = fairhuman(small_pipeline(), trainable=trainable), random_batch(4)
    lora = trained_lora(system)
    given, target = asked_of(trainable, lora, batch, system.pipeline)
    unet = torch_unet(system, tmp_path / "unet")
    encoder = system.pipeline.text_encoders[0]
    save_model(encoder, system.pipeline.params["text_encoder"], tmp_path / "text")
    text = transformers.CLIPTextModel.from_pretrained(tmp_path / "text").requires_grad_(False)
    # Newer versions of transformers have no `text_model.` in their module names.
    root = text if hasattr(text, "text_model") else torch.nn.ModuleDict({"text_model": text})
    layers = {"unet": adapt(unet, lora["unet"]), "text_encoder": adapt(root, lora["text_encoder"])}
    hidden = text(as_torch(batch["input_ids"]).long()).last_hidden_state
    np.testing.assert_allclose(hidden.detach(), given["text"], atol=1e-4)
    output = unet(nchw(given["latents"]), as_torch(given["timesteps"]), hidden).sample
    losses = torch_losses(output, target, batch)
    gradients, ours = our_gradients(system, lora, batch)
    assert set(gradients) == set(layers)
    for name, adapted in layers.items():
        assert_lora_gradients(gradients[name], ours, losses, adapted)


@functools.cache
def control_batch():
    pictures = np.random.default_rng(5).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return random_batch(4) | {"conditioning_image": pictures}


def test_controlnet(tmp_path):
    trainable, pipeline, batch = ControlNetTrainable(widths=(4, 8)), small_pipeline(), control_batch()
    system = fairhuman(pipeline, trainable=trainable)
    (network,) = system.controlnets
    tree = {"controlnet": random_params(network, 20)}  # no convolution at zero, so that all of it has a gradient
    given, target = asked_of(trainable, tree, batch, pipeline)
    unet = torch_unet(system, tmp_path / "unet")
    twin = diffusers.ControlNetModel.from_pretrained(system.export(Parts(tree, {}, {}), tmp_path / "net", {}))
    latents, times, text = nchw(given["latents"]), as_torch(given["timesteps"]), as_torch(given["text"])
    condition = nchw(batch["conditioning_image"]) / 255.0
    down, middle = twin(latents, times, text, condition, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    losses = torch_losses(unet(latents, times, text, **residuals).sample, target, batch)
    gradients, ours = our_gradients(system, tree, batch)
    assert_network_gradients(gradients["controlnet"], ours, losses, twin, network)
    assert_sum_is_published_and_fair_is_not(gradients["controlnet"], losses, twin, network)


def test_adapter(tmp_path):
    trainable, pipeline, batch = AdapterTrainable(num_res_blocks=1), tiny_pipeline(), control_batch()
    system = fairhuman(pipeline, trainable=trainable)
    (network,) = system.adapters
    tree = {"adapter": random_params(network, 21)}
    given, target = asked_of(trainable, tree, batch, pipeline)
    unet = torch_unet(system, tmp_path / "unet")
    twin = diffusers.T2IAdapter.from_pretrained(system.export(Parts(tree, {}, {}), tmp_path / "net", {}))
    features = twin(nchw(batch["conditioning_image"]) / 255.0)
    arguments = nchw(given["latents"]), as_torch(given["timesteps"]), as_torch(given["text"])
    output = unet(*arguments, down_intrablock_additional_residuals=list(features)).sample
    gradients, ours = our_gradients(system, tree, batch)
    losses = torch_losses(output, target, batch)
    assert_network_gradients(gradients["adapter"], ours, losses, twin, network)
    assert_sum_is_published_and_fair_is_not(gradients["adapter"], losses, twin, network)
