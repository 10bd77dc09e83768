"""CLIP similarity against transformers' CLIPModel and image processor on random weights, and through the door."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import CAPTIONS, TOKENS, tiny_tokenizer
from torch_twins import transformers_tokenizer

from fairhuman_jax.evaluate.__main__ import main
from fairhuman_jax.evaluate.clip_similarity import clip_pixels, clip_similarities, load_clip
from fairhuman_jax.weights.tokenizers import save_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch_twins import randomised  # noqa: E402

SIDE = 16
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = " ".join(CAPTIONS)  # more tokens than there are positions
SHAPES = ((16, 16), (40, 23), (17, 64))


def tiny_clip():
    vocabulary = len(tiny_tokenizer())
    tokens = {"vocab_size": vocabulary, "max_position_embeddings": TOKENS, "eos_token_id": vocabulary - 1}
    config = transformers.CLIPConfig(
        text_config=LAYERS | tokens | {"bos_token_id": vocabulary - 2},
        vision_config=LAYERS | {"image_size": SIDE, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    return randomised(transformers.CLIPModel(config), seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    return folder


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def processed(shown):
    """What transformers makes of the pictures."""
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return processor(shown, return_tensors="pt")["pixel_values"]


def test_pictures_are_prepared_alike():
    ours = np.stack([clip_pixels(picture, SIDE) for picture in pictures()])
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), processed(pictures()).numpy(), atol=1e-5)


def test_similarities(model, folder):
    """Three pairs in batches of two; the last caption is cut at the limit; negative cosines become 0."""
    captions = [CAPTIONS[0], CAPTIONS[1], LONG]
    tokenizer = transformers_tokenizer(tiny_tokenizer())
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        cosines = model(input_ids=tokens["input_ids"], pixel_values=processed(pictures())).logits_per_image.diag()
        cosines = (cosines / model.logit_scale.exp()).numpy()
    assert cosines.min() < -0.01 and cosines.max() > 0.01, "both signs occur"
    found = clip_similarities(load_clip(folder), pictures(), captions, batch_size=2)
    np.testing.assert_allclose(found, 100 * np.maximum(cosines, 0), atol=1e-4)


def test_unequal_numbers(folder):
    clip = load_clip(folder)
    with pytest.raises(ValueError, match=r"another number of pictures than of captions \(2\)"):
        clip_similarities(clip, pictures(), CAPTIONS[:2], batch_size=8)
    with pytest.raises(ValueError, match=r"another number of pictures than of captions \(4\)"):
        clip_similarities(clip, pictures(), CAPTIONS, batch_size=8)
    with pytest.raises(ValueError, match="no pictures to measure"):
        clip_similarities(clip, [], [])


def test_command(folder, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS[:3]))
    command = ["clip", tmp_path / "pictures", "--captions", tmp_path / "captions.txt", "--model", folder]
    command = [*map(str, command), "--json", str(tmp_path / "clip.json")]
    main(command)
    assert "CLIP similarity" in capsys.readouterr().out
    written = json.loads((tmp_path / "clip.json").read_text())
    expected = clip_similarities(load_clip(folder), pictures(), CAPTIONS[:3])
    np.testing.assert_allclose([written["by_picture"][f"{i}.png"] for i in range(3)], expected, atol=1e-4)
    assert written["CLIP similarity"] == pytest.approx(expected.mean(), abs=1e-4)
    path = tmp_path / "pictures" / "1.png"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "1.png: damaged picture" in capsys.readouterr().err


def test_other_models_are_refused(model, folder, tmp_path):
    model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(
        ValueError, match=r"is for CLIPTextModel; needs a CLIPModel, with text_config and vision_config"
    ):
        load_clip(tmp_path / "text")
    model.save_pretrained(
        tmp_path / "cut",
        state_dict={name: tensor for name, tensor in model.state_dict().items() if name != "visual_projection.weight"},
    )
    with pytest.raises(ValueError, match=r"1 missing \(visual_projection\.weight\)"):
        load_clip(tmp_path / "cut")
    model.save_pretrained(tmp_path / "silent")
    with pytest.raises(FileNotFoundError, match="a CLIP tokenizer folder holds"):
        load_clip(tmp_path / "silent")
