"""AutoencoderKL: shapes, asymmetric padding, clipped log-variance, attention in chunks, rejected configs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairhuman_jax.models import AutoencoderKL
from fairhuman_jax.models import vae as vae_module
from fairhuman_jax.models.vae import CONFIG_DEFAULTS, MidBlock, Resample

TINY = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "latent_channels": 3,
}
SD_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


def random_params(module, scale=0.3):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32), shapes)


def encode(module, variables, image):
    return jax.jit(lambda variables: module.apply(variables, image, method="encode"))(variables)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).normal(size=(1, 8, 12, 3)).astype(np.float32)


def test_full_size_autoencoder_has_the_published_number_of_parameters():
    module = AutoencoderKL.from_config(SD_VAE)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863
    assert module.downscale == 8


def test_encode_and_decode_shapes_and_dtypes(image):
    module = AutoencoderKL.from_config(TINY, dtype=jnp.bfloat16)
    variables = {"params": random_params(module)}

    @jax.jit
    def there_and_back(image):
        mean, logvar = module.apply(variables, image, method="encode")
        return mean, logvar, module.apply(variables, mean, method="decode")

    mean, logvar, decoded = there_and_back(image)
    assert mean.shape == logvar.shape == (1, 4, 6, 3)
    assert decoded.shape == image.shape
    assert {mean.dtype, logvar.dtype, decoded.dtype} == {jnp.dtype(jnp.float32)}


def test_downsampling_pads_bottom_and_right_only():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0).at[0, 3, 3, 0].set(10.0)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0).at[2, 2].set(100.0)
    params = {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}
    out = Resample("down").apply({"params": params}, x)
    assert out.shape == (1, 2, 2, 1)
    np.testing.assert_array_equal(out[0, :, :, 0], [[1.0, 0.0], [0.0, 0.0]])


def test_logvar_is_clipped(image):
    module = AutoencoderKL.from_config(TINY)
    params = random_params(module)
    params["quant_conv"]["bias"] = jnp.array([0.0, 0.0, 0.0, -100.0, 100.0, 0.0])
    _, logvar = encode(module, {"params": params}, image)
    assert float(logvar[..., 0].max()) == -30.0
    assert float(logvar[..., 1].min()) == 20.0


def test_attention_over_many_pixels_in_turns_equals_attention_at_once(image, monkeypatch):
    module = AutoencoderKL.from_config(TINY)
    variables = {"params": random_params(module)}
    at_once = encode(module, variables, image)[0]
    monkeypatch.setattr(vae_module, "QUERY_CHUNK", 7)  # 24 pixels: three full chunks and a remainder
    in_turns = encode(module, variables, image)[0]
    np.testing.assert_allclose(in_turns, at_once, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_rematerialised_gradients_equal_plain_ones(remat):
    config = dict(AutoencoderKL.from_config(TINY).config)
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)
    params = MidBlock(config).init(jax.random.key(0), x)["params"]

    def gradients(module):
        return jax.jit(jax.grad(lambda p: jnp.square(module.apply({"params": p}, x)).mean()))(params)

    expected, got = gradients(MidBlock(config)), gradients(MidBlock(config, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, got)


def test_optional_parts_leave_no_parameters():
    switches = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    params = random_params(AutoencoderKL.from_config(TINY | switches))
    assert set(params) == {"encoder", "decoder"}
    assert set(params["encoder"]["mid_block"]) == {"resnets.0", "resnets.1"}


def test_config_round_trip():
    config = AutoencoderKL.from_config(TINY | {"scaling_factor": 0.13025}).to_config()
    assert config == {"_class_name": "AutoencoderKL"} | CONFIG_DEFAULTS | TINY | {"scaling_factor": 0.13025}
    assert AutoencoderKL.from_config(config).scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"surprise": 1}, "surprise"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"act_fn": "tanhexp"}, "tanhexp"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        AutoencoderKL.from_config(TINY | change)


def test_image_that_does_not_divide_is_refused(image):
    module = AutoencoderKL.from_config(TINY)
    with pytest.raises(ValueError, match="7x12 is no multiple of 2"):
        module.apply({"params": random_params(module)}, image[:, :7], method="encode")
