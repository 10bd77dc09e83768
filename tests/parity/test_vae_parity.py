"""AutoencoderKL against diffusers on the same random weights, through files both ways."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from fairhuman_jax.weights import load_model, save_model

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FULL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
}
BARE = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 2,
    "latent_channels": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}


def torch_vae(config):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def plain(config):
    """The settings of a config, as JSON holds them."""
    kept = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return json.loads(json.dumps(kept))


def assert_close(ours, theirs):
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2e-4 * theirs.std()


@pytest.mark.parametrize("config", [FULL, BARE], ids=["full", "bare"])
def test_encode_and_decode(config, tmp_path):
    model = torch_vae(config)
    model.save_pretrained(tmp_path / "torch")
    module, params = load_model(tmp_path / "torch")
    image = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(image.transpose(0, 3, 1, 2))).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, logvar = jax.jit(lambda p: module.apply({"params": p}, image, method="encode"))(params)
    assert_close(mean, posterior.mean)
    assert_close(logvar, posterior.logvar)
    latents = posterior.mean.numpy().transpose(0, 2, 3, 1)
    assert_close(jax.jit(lambda p: module.apply({"params": p}, latents, method="decode"))(params), decoded)

    save_model(module, params, tmp_path / "jax")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "jax")
    assert plain(again.config) == plain(model.config)
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
