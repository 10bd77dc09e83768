"""One training step of HumanSD against torch: data, denoiser, decoded error, pose network, loss and every gradient."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_models import SIZE, control_batch, quick_jit
from tiny_pose import JOINTS, THRESHOLD, humansd, spots_variables

from fairhuman_jax.contract import Parts, WholePhase, sample_keys
from fairhuman_jax.systems.humansd.system import POSE_STREAM, WEIGHT_STREAM, joined
from fairhuman_jax.training.objectives import task_gradients
from fairhuman_jax.weights import save_model

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
import torch_twins  # noqa: E402
from torch.nn import functional as tf  # noqa: E402

KEY = jax.random.fold_in(jax.random.key(5), 0)
SCALE = 0.5  # of the tiny autoencoder
TOLERANCE = 1e-4


def nchw(array):
    return torch_twins.nchw(np.asarray(array, np.float32))


def draws(batch):
    """The step's random numbers: noise of three posteriors and of the image, and the timesteps."""
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(sample_keys(KEY, batch))

    def normal(keys):
        return nchw(jax.vmap(lambda key: jax.random.normal(key, (SIZE // 2, SIZE // 2, 4)))(keys))

    pose, weight = (sample_keys(jax.random.fold_in(KEY, stream), batch) for stream in (POSE_STREAM, WEIGHT_STREAM))
    times = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(keys[:, 3])
    noises = {"image": keys[:, 0], "noise": keys[:, 1], "pose": pose, "weight": weight}
    return {name: normal(keys) for name, keys in noises.items()} | {"times": torch.from_numpy(np.array(times))}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The system's networks in torch, by name."""
    folder, pipeline = tmp_path_factory.mktemp("twins"), humansd().pipeline
    networks = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoders[0]}
    for name, network in networks.items():
        save_model(network, pipeline.params[name], folder / name)
    return {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False),
        "text": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False),
    }


def latents_of(vae, pictures, noise):
    posterior = vae.encode(pictures).latent_dist
    return SCALE * (posterior.mean + posterior.std * noise)


def heatmaps(pictures):
    """The stand-in for the pose network, and the mean of its stages."""
    stages = []
    for name, stride in (("coarse", 4), ("fine", 2)):
        layer = spots_variables()["params"][name]
        kernel = torch.from_numpy(np.array(layer["kernel"]).transpose(3, 2, 0, 1).copy())
        stages.append(tf.conv2d(pictures, kernel, torch.from_numpy(np.array(layer["bias"])), stride=stride))
    coarse, fine = stages
    enlarged = tf.interpolate(coarse[:, :JOINTS], fine.shape[2:], mode="bilinear", align_corners=True)
    return (enlarged + fine) / 2.0


@torch.no_grad()
def weight_of(loss, vae, error, noise):
    """What multiplies the squared error, less one."""
    picture = torch.clamp((vae.decode(error / SCALE).sample + 1.0) / 2.0, 0.0, 1.0)
    if loss == "intent":
        seen = heatmaps((picture - 0.4) / 1.25).amax(1, keepdim=True) > THRESHOLD
        assert 0.2 < seen.float().mean() < 0.9
        return 0.1 * tf.avg_pool2d(seen.float(), 1)
    count = (heatmaps(picture) <= THRESHOLD).float().sum(1, keepdim=True)
    assert len(torch.unique(count)) > 2
    missing = tf.interpolate(count.repeat(1, 3, 1, 1), (SIZE, SIZE), mode="bicubic", align_corners=False)
    return 0.1 * latents_of(vae, missing, noise)


def torch_loss(loss, twins, batch):
    """The step's loss as a torch scalar."""
    drawn, vae = draws(batch), twins["vae"]
    image, pose = (nchw(batch[name]) / 127.5 - 1.0 for name in ("image", "conditioning_image"))
    betas = np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    level = torch.from_numpy(np.cumprod(1.0 - betas)).float()[drawn["times"]].reshape(-1, 1, 1, 1)
    clean = latents_of(vae, image, drawn["image"])
    noisy = level.sqrt() * clean + (1.0 - level).sqrt() * drawn["noise"]
    text = twins["text"](torch.from_numpy(batch["input_ids"]).long()).last_hidden_state
    both = torch.cat([noisy, latents_of(vae, pose, drawn["pose"])], 1)
    error = twins["unet"](both, drawn["times"], text).sample - drawn["noise"]
    weight = 0.0 if loss == "plain" else weight_of(loss, vae, error, drawn["weight"])
    return torch.mean(error**2 * (1.0 + weight))


@pytest.mark.parametrize("loss", ["plain", "reference", "intent"])
def test_step(loss, twins):
    system, batch = humansd(loss=loss, pose_latent="sample"), control_batch(4, cached=False)
    trainable, frozen = system.init(KEY)
    step = quick_jit(lambda tree, batch: task_gradients(WholePhase(system=system), Parts(tree, {}, frozen), batch, KEY))
    gradients, losses = step(trainable, batch)
    expected_loss = torch_loss(loss, twins, batch)
    np.testing.assert_allclose(losses["denoising"], expected_loss.item(), rtol=TOLERANCE)
    twins["unet"].zero_grad()
    expected_loss.backward()
    grads = {name: parameter.grad for name, parameter in twins["unet"].named_parameters()}
    expected = torch_twins.to_flax(grads, system.pipeline.unet)
    found = jax.tree.map(np.asarray, joined(jax.tree.map(lambda leaf: leaf[0], gradients), {})["unet"])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert np.abs(expected["conv_in"]["kernel"][:, :, 4:]).max() > 1e-3 * largest  # the pose matters
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        bound = TOLERANCE * largest
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))
