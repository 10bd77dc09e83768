"""CLIP's tokenizer for checkpoints that bring none: single files hold networks and no vocabulary."""

from __future__ import annotations

import gzip
from pathlib import Path

from fairhuman_jax.weights.clip_tokenizer import END, END_OF_WORD, START, CLIPTokenizer
from fairhuman_jax.weights.shipped import shipped
from fairhuman_jax.weights.tokenizers import byte_alphabet, load_tokenizer

TABLE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48894
LENGTH = 77
OPENCLIP_PAD = "!"  # id 0
CLIP_PAD = END


def clip_tokenizer(source: str | Path | None = None, *, pad: str = CLIP_PAD) -> CLIPTokenizer:
    """A CLIP tokenizer that pads with the token `pad` (CLIP: the end token; OpenCLIP: "!", id 0).

    source: a tokenizer folder, a pipeline folder with one, or the table `bpe_simple_vocab_16e6.txt.gz` (49408 tokens,
    77 a prompt). None takes the table that ships with this package.
    Raises: ValueError for no such folder or file.
    """
    path = shipped(f"clip-tokenizer/{TABLE}") if source is None else Path(source)
    if path.is_file():
        return tokenizer_from_table(path, pad=pad)
    inner = path / "tokenizer"
    tokenizer = load_tokenizer(inner if inner.is_dir() else path)
    if tokenizer.pad_token == pad:
        return tokenizer
    return CLIPTokenizer(tokenizer.get_vocab(), tokenizer.merges, tokenizer.model_max_length, {"pad_token": pad})


def tokenizer_from_table(path: Path, *, pad: str = CLIP_PAD) -> CLIPTokenizer:
    """The tokenizer of CLIP's own table of merges: bytes, bytes that end a word, 48894 merges, start and end token.

    Raises: ValueError for a file that is no such table. Source: the reference code of CLIP, `simple_tokenizer.py`.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not CLIP's table of merges, {TABLE} ({error})") from error
    pairs = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if not len(merges) == len(pairs) == MERGES:
        raise ValueError(f"{path} is not CLIP's table of {MERGES} merges, {TABLE}")
    alphabet = byte_alphabet()
    units = [*alphabet, *(char + END_OF_WORD for char in alphabet)]
    tokens = [*units, *("".join(merge) for merge in merges), START, END]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, LENGTH, {"pad_token": pad})
