"""CLIPText, CLIPVision and its input against transformers and torch; text encoders through files both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.models import CLIPText, CLIPVision, presets, subject_pixels
from fairhuman_jax.weights import load_model, save_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch_twins import assert_parity, nchw, normal, randomised, to_flax  # noqa: E402

CONFIG = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
IDS = np.array([[58, 3, 4, 59, 59, 59, 59], [58, 5, 2, 7, 8, 9, 59]])


SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "projection_dim": 10,
}


def torch_clip(name, config):
    torch.manual_seed(0)
    settings = transformers.CLIPVisionConfig if "Vision" in name else transformers.CLIPTextConfig
    return randomised(getattr(transformers, name)(settings(**config)))


@pytest.mark.parametrize("eos", [2, 49407])
@pytest.mark.parametrize("preset", ["SD15_TEXT", "SD21_TEXT", "SDXL_TEXT_2"])
def test_published_text_towers_at_small_width(preset, eos):
    """Activation, projection and both conventions of the end token, in the real vocabulary."""
    config = getattr(presets, preset) | SMALL | {"eos_token_id": eos, "bos_token_id": 49406}
    model = torch_clip(config["architectures"][0], config)
    ids = np.array([[49406, 320, 2, 7, 49407, 49407, 49407], [49406, 5, 1929, 7, 8, 9, 49407]])
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), output_hidden_states=True)
    module = CLIPText.from_config(config)
    ours = quick_jit(module.apply)({"params": to_flax(model.state_dict(), module)}, ids)
    assert_parity(ours["last_hidden_state"], theirs.last_hidden_state)
    assert_parity(ours["penultimate"], theirs.hidden_states[-2])
    projected = config["architectures"][0].endswith("WithProjection")
    assert_parity(ours["pooled"], theirs.text_embeds if projected else theirs.pooler_output)


@pytest.mark.parametrize(
    ("name", "change"),
    [("CLIPVisionModelWithProjection", {}), ("CLIPVisionModel", {"hidden_act": "gelu"})],
    ids=["ViT-L", "gelu-without-projection"],
)
def test_image_encoder(name, change):
    small = SMALL | {"image_size": 12, "patch_size": 4, "architectures": [name]}
    config = presets.CLIP_L_VISION | small | change
    model = torch_clip(name, config)
    pixels = normal(2, 12, 12, 3, seed=1)
    with torch.no_grad():
        theirs = model(nchw(pixels), output_hidden_states=True)
    module = CLIPVision.from_config(config)
    ours = quick_jit(module.apply)({"params": to_flax(model.state_dict(), module)}, pixels)
    assert_parity(ours["last_hidden_state"], theirs.last_hidden_state)
    assert_parity(ours["penultimate"], theirs.hidden_states[-2])
    if name.endswith("WithProjection"):
        assert_parity(ours["image_embeds"], theirs.image_embeds)
    else:
        assert_parity(ours["pooled"], theirs.pooler_output)
        assert "image_embeds" not in ours


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("CLIPTextModel", {}),
        ("CLIPTextModel", {"eos_token_id": 2, "hidden_act": "gelu"}),
        ("CLIPTextModelWithProjection", {"hidden_act": "gelu"}),
    ],
    ids=["SD1", "legacy-end-token", "SDXL-second"],
)
def test_outputs_and_files(name, change, tmp_path):
    model = torch_clip(name, CONFIG | change)
    model.save_pretrained(tmp_path / "torch")
    module, params = load_model(tmp_path / "torch")
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS), output_hidden_states=True)
    ours = jax.jit(lambda p: module.apply({"params": p}, IDS))(params)
    pairs = {
        "last_hidden_state": theirs.last_hidden_state,
        "penultimate": theirs.hidden_states[-2],
        "pooled": theirs.text_embeds if name.endswith("WithProjection") else theirs.pooler_output,
    }
    for key, expected in pairs.items():
        expected = expected.numpy()
        assert np.abs(ours[key] - expected).max() <= 2e-4 * expected.std(), key

    save_model(module, params, tmp_path / "jax")
    again = type(model).from_pretrained(tmp_path / "jax")
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    kept = ("hidden_act", "eos_token_id", "projection_dim", "architectures")
    assert all(getattr(again.config, key) == getattr(model.config, key) for key in kept)


@pytest.mark.parametrize("size", [(30, 30), (7, 7), (25, 18), (12, 12)], ids=str)
def test_pictures_of_subjects_are_resized_as_torch_does(size):
    images = np.random.default_rng(0).uniform(size=(2, 3, *size, 3)).astype(np.float32)
    flat = nchw(images.reshape(6, *size, 3))
    resized = torch.nn.functional.interpolate(flat, (12, 12), mode="bilinear", align_corners=False, antialias=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    found = subject_pixels(images, 12)
    assert found.shape == (6, 12, 12, 3)
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), (resized - mean) / std, atol=1e-5)


def test_the_embedding_of_a_subject_is_the_projected_class_token_of_any_length():
    small = SMALL | {"image_size": 12, "patch_size": 4, "architectures": ["CLIPVisionModelWithProjection"]}
    config = presets.CLIP_L_VISION | small
    model = torch_clip("CLIPVisionModelWithProjection", config)
    images = np.random.default_rng(1).uniform(size=(1, 2, 20, 20, 3)).astype(np.float32)
    module = CLIPVision.from_config(config)
    pixels = subject_pixels(images, 12)
    with torch.no_grad():
        expected = model(nchw(pixels)).image_embeds
    found = quick_jit(module.apply)({"params": to_flax(model.state_dict(), module)}, pixels)["image_embeds"]
    assert_parity(found, expected)
    assert (np.abs(np.linalg.norm(found, axis=-1) - 1.0) > 0.1).all()


def test_pictures_without_an_axis_of_subjects_are_refused():
    with pytest.raises(ValueError, match=r"images are \[2, 4, 4, 3\], not \[B, N, H, W, 3\]"):
        subject_pixels(np.ones((2, 4, 4, 3), np.float32), 12)
