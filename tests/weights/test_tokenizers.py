"""The small CLIP tokenizer, and captions to ids."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fairhuman_jax.weights import build_small_clip_tokenizer, load_tokenizer, save_tokenizer, tokenize, tokens_cut
from fairhuman_jax.weights.tokenizers import count_chunks, tokenize_chunks

pytest.importorskip("transformers")

CAPTIONS = [
    "a woman in a red shirt, hands raised",
    "two men",
    "hered here herd",
    "banana bandana",
    "Zoë's 42",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_small_clip_tokenizer(CAPTIONS, path, model_max_length=12)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.mark.parametrize("caption", CAPTIONS[:4])
def test_every_word_of_the_captions_is_one_token(tokenizer, caption):
    words = caption.replace(",", " ,").split()
    assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in words]


def test_words_made_of_each_other_are_still_one_token_each(tmp_path):
    rng = np.random.default_rng(0)
    words = sorted({"".join(rng.choice(list("abc"), size=rng.integers(1, 9))) for _ in range(200)})
    tokenizer = build_small_clip_tokenizer([" ".join(words)], tmp_path)
    assert tokenizer.tokenize(" ".join(words)) == [f"{word}</w>" for word in words]


def test_other_words_spell_out_and_come_back(tokenizer):
    ids = tokenize(tokenizer, ["a Zebra"])[0]
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a zebra"


def test_ids_start_end_pad_and_truncate(tokenizer):
    ids = tokenize(tokenizer, ["red shirt", "red " * 15])
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    red, shirt = tokenizer.convert_tokens_to_ids(["red</w>", "shirt</w>"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[start, red, shirt] + [end] * 9, [start] + [red] * 10 + [end]]


def test_report_of_prompts_that_are_too_long(tokenizer):
    assert tokens_cut(tokenizer, ["red", "red " * 10, "red " * 15]) == {2: 5}


def test_same_captions_in_any_order_give_the_same_files(folder, tmp_path):
    build_small_clip_tokenizer(CAPTIONS[::-1], tmp_path, model_max_length=12)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_vocabulary_is_contiguous_and_ends_with_the_special_tokens(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert list(vocabulary)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert list(vocabulary)[:2] == ["!", '"']
    assert len(vocabulary) > 514


def test_saved_tokenizer_is_the_same(tokenizer, folder, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_padding_token_survives(tokenizer, folder, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    (tmp_path / "special_tokens_map.json").unlink()
    bang = load_tokenizer(tmp_path)
    assert tokenize(bang, ["red"])[0, 3:].tolist() == [bang.convert_tokens_to_ids("!")] * 9
    save_tokenizer(bang, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").pad_token == "!"


def test_folders_that_are_no_tokenizer_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="must state model_max_length"):
        load_tokenizer(tmp_path)


def test_chunks_hold_a_long_caption_whole(tokenizer):
    assert count_chunks(tokenizer, ["a zebra"]) == 1
    long = " ".join(["a zebra"] * tokenizer.model_max_length)
    chunks = count_chunks(tokenizer, ["a zebra", long])
    ids = tokenize_chunks(tokenizer, ["a zebra", long], chunks)
    assert ids.shape == (2, chunks, tokenizer.model_max_length)
    np.testing.assert_array_equal(ids[0, 0], tokenize(tokenizer, ["a zebra"])[0])
    assert (ids[:, :, 0] == tokenizer.bos_token_id).all()
    assert ((ids == tokenizer.eos_token_id).any(axis=-1)).all()
    words = tokenizer.decode(ids[1].reshape(-1), skip_special_tokens=True).split()
    assert words == long.split()
    shorter = tokenize_chunks(tokenizer, [long], chunks - 1)
    assert tokenizer.decode(shorter.reshape(-1), skip_special_tokens=True).split() != words
