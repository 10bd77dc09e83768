"""CLIPText against transformers on the same random weights, through files both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fairhuman_jax.weights import load_model, save_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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


def torch_clip(name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.CLIPTextConfig(**config)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm_scale = "norm" in key and key.endswith("weight")
            parameter.normal_(1.0 if norm_scale else 0.0, 0.2)
    return model


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
