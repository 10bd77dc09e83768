"""A HumanSD checkpoint of published size with random values, there and back: minutes and 12 GiB (`-m full_size`)."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from fairhuman_jax.models import presets
from fairhuman_jax.weights import expected_params, load_pipeline, save_pipeline, save_single_file
from fairhuman_jax.weights.diffusers import NETWORKS, class_name
from fairhuman_jax.weights.keys import leaves
from fairhuman_jax.weights.ldm.slots import ldm_openclip_slots, ldm_unet_slots, ldm_vae_slots
from fairhuman_jax.weights.safetensors_io import TensorFiles

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_utils as oracle  # noqa: E402

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
DROPPED = ("transformer.resblocks.23.", "text_projection", "logit_scale")  # of the text tower: no part of HumanSD


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network in diffusers' or transformers' naming."""
    module = NETWORKS[class_name(config, "a preset")].from_config(config)
    return {name: leaf.shape for leaf in leaves(expected_params(module)) for name in leaf.names}


def random_tensor(name: str, shape: tuple[int, ...]):
    """float16; the same name gives the same values."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).half()


def checkpoint() -> dict:
    """A state dict with the names and shapes of humansd-v1.ckpt, and what training leaves in such a file."""
    found: dict = {}
    unet, vae, text = (shapes_of(config) for config in (presets.HUMANSD_UNET, presets.SD_VAE, presets.SD21_TEXT))
    for slots, shapes in ((ldm_unet_slots(unet, UNET, linear=True), unet), (ldm_vae_slots(vae, VAE), vae)):
        for name, slot in slots.items():
            shape = shapes[slot.stored[0]]
            found[name] = random_tensor(name, (*shape, *(1,) * ((slot.ndim or len(shape)) - len(shape))))
    for name, slot in ldm_openclip_slots(text, TEXT).items():
        rows, *rest = text[slot.stored[0]]
        found[name] = random_tensor(name, (len(slot.stored) * rows, *rest))
    for name in [name for name in found if name.startswith(f"{TEXT}transformer.resblocks.22.")]:
        last = name.replace("resblocks.22.", "resblocks.23.")
        found[last] = random_tensor(last, tuple(found[name].shape))
    found[f"{TEXT}text_projection"] = random_tensor("projection", (1024, 1024))
    found[f"{TEXT}logit_scale"] = torch.tensor(4.6)
    found["mmpose_model.backbone.conv1.weight"] = random_tensor("mmpose", (64, 3, 3, 3))
    return found | {"betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2}


@pytest.mark.full_size
def test_a_published_size_checkpoint_goes_to_diffusers_and_back(tmp_path):
    original = checkpoint()
    sizes = {prefix: [t for name, t in original.items() if name.startswith(prefix)] for prefix in (UNET, VAE, TEXT)}
    assert {prefix: len(tensors) for prefix, tensors in sizes.items()} == {UNET: 686, VAE: 248, TEXT: 294}
    assert sum(tensor.numel() for tensor in sizes[UNET]) == 865_922_244
    torch.save({"state_dict": original, "global_step": 200_000}, tmp_path / "humansd-v1.ckpt")

    loaded = load_pipeline(tmp_path / "humansd-v1.ckpt", host=True)
    assert loaded.reads_pose and loaded.unet.in_channels == 8
    assert loaded.schedule.prediction_type == "epsilon"
    save_pipeline(loaded, tmp_path / "folder")
    del loaded
    converted = {
        "unet": oracle.convert_ldm_unet_checkpoint(dict(original), presets.HUMANSD_UNET),
        "vae": oracle.convert_ldm_vae_checkpoint(dict(original), presets.SD_VAE),
    }
    for name, network in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        model = network.from_pretrained(tmp_path / "folder" / name, torch_dtype=torch.float16)
        found = model.state_dict()
        assert found.keys() == converted[name].keys()
        for key, tensor in converted[name].items():
            assert torch.equal(found[key], tensor.reshape(found[key].shape)), key
        del model, found

    save_single_file(load_pipeline(tmp_path / "folder", host=True), tmp_path / "again.safetensors")
    files = TensorFiles([tmp_path / "again.safetensors"])
    kept = {
        name: tensor
        for name, tensor in original.items()
        if name.startswith((UNET, VAE, TEXT)) and not name.removeprefix(TEXT).startswith(DROPPED)
    }
    assert set(files.names()) == set(kept)
    for name, tensor in kept.items():
        np.testing.assert_array_equal(files.read(name), tensor.numpy(), err_msg=name)
