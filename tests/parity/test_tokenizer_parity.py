"""CLIP's tokenizer against transformers' on the same folders, as they have been written over the years."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from fairhuman_jax.weights import load_tokenizer, save_tokenizer, tokenize
from fairhuman_jax.weights.ldm.tokenizer import clip_tokenizer

transformers = pytest.importorskip("transformers")

PIECES = [
    *"abcdefgh IJKL'\"?!.,;:()[]0123456789\n\t éÉñßİı漢字かなñ😀\u200d\u0301",
    "woman ",
    "a ",
    "photo ",
    "'s ",
    "'LL ",
]
PIECES += ["<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<new1>", "<|image|>", " !"]
RECORD = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
START, END = ({"content": content, **RECORD} for content in ("<|startoftext|>", "<|endoftext|>"))


def texts(count=1500):
    rng = random.Random(0)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randrange(60))) for _ in range(count)]


def rewrite(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def published(folder):
    """As OpenAI published it: records in place of texts, but for the padding token."""
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END}
    rewrite(folder, "tokenizer_config.json", **{key: {"__type": "AddedToken", **tokens[key]} for key in tokens})
    rewrite(folder, "special_tokens_map.json", **tokens, pad_token="<|endoftext|>")


def openclip(folder):
    published(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        rewrite(folder, name, pad_token="!")


def decoder(folder):
    """As transformers 4.34 and later write it."""
    added = {"0": {**START, "content": "!", "normalized": False}, "49406": START, "49407": {**END, "normalized": False}}
    added = {index: {**token, "special": True} for index, token in added.items()}
    rewrite(folder, "tokenizer_config.json", added_tokens_decoder=added, pad_token="!")
    (folder / "special_tokens_map.json").unlink()


def learned_word(folder):
    """With a token of textual inversion."""
    rewrite(folder, "added_tokens.json", **{"<new1>": 49408})


def one_file(folder):
    """As transformers 5 writes it, with a learned word."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(["<new1>"])
    shutil.rmtree(folder)
    tokenizer.save_pretrained(str(folder))


@pytest.mark.parametrize("change", [None, published, openclip, decoder, learned_word, one_file])
def test_ids_are_those_of_transformers(change, tmp_path):
    save_tokenizer(clip_tokenizer(), tmp_path)
    if change:
        change(tmp_path)
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    expected = theirs(texts(), padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert tokenize(ours, texts()).tolist() == expected
    whole = theirs(texts(), add_special_tokens=False, verbose=False)["input_ids"]
    assert ours(texts(), add_special_tokens=False)["input_ids"] == whole
    assert ours.get_vocab() == theirs.get_vocab()
    assert (len(ours), ours.pad_token, ours.pad_token_id) == (len(theirs), str(theirs.pad_token), theirs.pad_token_id)
    assert [ours.decode(row, skip_special_tokens=True) for row in expected[:50]] == [
        theirs.decode(row, skip_special_tokens=True) for row in expected[:50]
    ]
