"""Published configurations: parameter and tensor counts, and round trips of every config."""

from __future__ import annotations

import math

import pytest

from fairhuman_jax.models import (
    AutoencoderKL,
    CLIPText,
    CLIPVision,
    ControlNet,
    HigherHRNet,
    T2IAdapter,
    UNet2DCondition,
    presets,
)
from fairhuman_jax.weights import expected_params
from fairhuman_jax.weights.keys import leaves

# Parameters and torch tensors, counted in diffusers, transformers and mmpose.
COUNTS = {
    "SD15_UNET": (UNet2DCondition, 859_520_964, 686),
    "SD15_INPAINT_UNET": (UNet2DCondition, 859_535_364, 686),
    "SD21_UNET": (UNet2DCondition, 865_910_724, 686),
    "HUMANSD_UNET": (UNet2DCondition, 865_922_244, 686),
    "SDXL_UNET": (UNet2DCondition, 2_567_463_684, 1680),
    "SDXL_REFINER_UNET": (UNet2DCondition, 2_259_526_660, 1220),
    "SD15_CONTROLNET": (ControlNet, 361_279_120, 340),
    "SD21_CONTROLNET": (ControlNet, 364_228_240, 340),
    "SDXL_CONTROLNET": (ControlNet, 1_251_014_160, 844),
    "SD15_T2I_ADAPTER": (T2IAdapter, 77_369_280, 38),
    "SDXL_T2I_ADAPTER": (T2IAdapter, 79_028_160, 38),
    "SD_VAE": (AutoencoderKL, 83_653_863, 248),
    "SD15_TEXT": (CLIPText, 123_060_480, 196),
    "SD21_TEXT": (CLIPText, 340_387_840, 372),
    "SDXL_TEXT_2": (CLIPText, 694_659_840, 517),
    "CLIP_L_VISION": (CLIPVision, 303_966_208, 392),
    "HIGHER_HRNET_W48": (HigherHRNet, 63_827_139 + 80_448, 1509),  # with the running statistics
}
SAME_NETWORK = {"SDXL_VAE": "SD_VAE", "SDXL_FP16_FIX_VAE": "SD_VAE", "SDXL_TEXT": "SD15_TEXT"}
CONFIGS = {name: config for name, config in vars(presets).items() if name.isupper()}


@pytest.mark.parametrize("name", COUNTS)
def test_published_networks_have_their_numbers_of_parameters_and_tensors(name):
    network, parameters, tensors = COUNTS[name]
    found = leaves(expected_params(network.from_config(CONFIGS[name])))
    assert sum(math.prod(leaf.shape) * len(leaf.names) for leaf in found) == parameters
    assert len({tensor for leaf in found for tensor in leaf.names}) == tensors


def test_every_preset_is_kept_by_its_network():
    assert set(CONFIGS) == {*COUNTS, *SAME_NETWORK}
    for name, config in CONFIGS.items():
        network = COUNTS[SAME_NETWORK.get(name, name)][0]
        module = network.from_config(config)
        written = module.to_config()
        assert network.from_config(written) == module
        differing = {key for key, value in config.items() if key in written and written[key] != value}
        assert differing == set(), name


@pytest.mark.parametrize("name", ["SDXL_UNET", "SDXL_REFINER_UNET"])
def test_time_ids_follow_from_the_width_of_the_pooled_text(name):
    unet = UNet2DCondition.from_config(CONFIGS[name])
    assert unet.time_ids(1280) == {"SDXL_UNET": 6, "SDXL_REFINER_UNET": 5}[name]
    with pytest.raises(ValueError, match="pooled text of width 1000 does not fit"):
        unet.time_ids(1000)
    with pytest.raises(ValueError, match="takes no time_ids"):
        UNet2DCondition.from_config(presets.SD15_UNET).time_ids(1280)
