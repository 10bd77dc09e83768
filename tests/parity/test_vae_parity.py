"""AutoencoderKL against diffusers on the same random weights, through files both ways."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.models import AutoencoderKL, tiled_decode
from fairhuman_jax.weights import load_model, save_model

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from torch_twins import assert_parity, nchw, normal, randomised, to_flax  # noqa: E402

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
    return randomised(diffusers.AutoencoderKL(**config))


def plain(config):
    """The settings of a config, as JSON holds them."""
    kept = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return json.loads(json.dumps(kept))


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
    assert_parity(mean, posterior.mean)
    assert_parity(logvar, posterior.logvar)
    latents = posterior.mean.numpy().transpose(0, 2, 3, 1)
    assert_parity(jax.jit(lambda p: module.apply({"params": p}, latents, method="decode"))(params), decoded)

    save_model(module, params, tmp_path / "jax")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "jax")
    assert plain(again.config) == plain(model.config)
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("size", [(13, 21), (16, 7)])
def test_tiled_decode(size):
    """Tiles of 8 latents every 6: full ones, cut ones, and one that lies wholly in the one before it."""
    model = torch_vae({**FULL, "layers_per_block": 1, "sample_size": 16})
    model.enable_tiling()
    z = normal(2, *size, 4, seed=1)
    with torch.no_grad():
        expected = model.decode(nchw(z)).sample
        whole = model.disable_tiling() or model.decode(nchw(z)).sample
    module = AutoencoderKL.from_config(dict(model.config))

    @quick_jit
    def tiled(params, z):
        return tiled_decode(lambda tile: module.apply({"params": params}, tile, method="decode"), z, tile=8)

    assert_parity(tiled(to_flax(model.state_dict(), module), z), expected)
    assert (whole - expected).abs().max() > 0.1 * expected.std()
