"""CLIP tokenizers: opening and writing their folders, building a small one from captions, captions to ids.

Captions may mark subjects: a marker behind a noun says that a picture of it is at hand, "a man <|image|> and a dog".
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fairhuman_jax.contract import MARKER
from fairhuman_jax.files import replacing, write_json
from fairhuman_jax.weights.clip_tokenizer import END, END_OF_WORD, START, CLIPTokenizer, Merge

LONGEST_PROMPT = 1 << 20  # transformers means "no limit" by any larger model_max_length


class SubjectTokens(NamedTuple):
    """Captions as ids int32 [B, L], and where their subjects' words are, from left to right.

    positions: int32 [B, N], of a word's last token, 0 in slots of padding, which `valid` bool [B, N] tells from others.
    counts: int32 [B], valid slots of a caption.
    """

    ids: np.ndarray
    positions: np.ndarray
    valid: np.ndarray
    counts: np.ndarray


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder holding vocab.json and merges.txt, or tokenizer.json.

    Raises: FileNotFoundError, ValueError for no such folder or files; a tokenizer without a length limit, which would
    truncate nothing.
    """
    folder = Path(folder)
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not pair and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: a CLIP tokenizer folder holds vocab.json and merges.txt, or tokenizer.json")
    tokenizer = CLIPTokenizer.from_folder(folder)
    if tokenizer.model_max_length > LONGEST_PROMPT:
        raise ValueError(f"{folder}/tokenizer_config.json must state model_max_length (77 for Stable Diffusion)")
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, which transformers 4 and 5 both load."""
    _write(Path(folder), tokenizer.get_vocab(), tokenizer.merges, tokenizer.model_max_length, tokenizer.pad_token)


def build_small_clip_tokenizer(
    captions: Iterable[str], folder: str | Path, *, model_max_length: int = 77
) -> CLIPTokenizer:
    """Write and open a CLIP tokenizer in which every word of `captions` is one token.

    Byte-level like CLIP's own, so any other text still spells out in pieces. Vocabulary: 256 bytes, the same
    at the end of a word, one token a merge, start and end token (the largest id; also the padding). Words are
    merged in order of frequency, so the same captions give the same files.
    Source: byte-pair encoding, Sennrich et al. 2016, with words instead of counted pairs choosing the merges.
    """
    alphabet = byte_alphabet()
    units = [*alphabet, *(char + END_OF_WORD for char in alphabet)]
    vocabulary = {token: i for i, token in enumerate([*units, START, END])}
    splitter = CLIPTokenizer(vocabulary, [])
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(splitter.words(caption))
    ranks: dict[Merge, int] = {}
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        _merge_whole(word, ranks)
    tokens = dict.fromkeys([*units, *("".join(merge) for merge in ranks), START, END])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    _write(Path(folder), vocabulary, list(ranks), model_max_length, END)
    return load_tokenizer(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> np.ndarray:
    """Captions -> int32 ids [B, model_max_length]: start, words, end, padding; longer ones are cut."""
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return np.asarray(encoded["input_ids"], np.int32)


def tokenize_subjects(
    tokenizer: CLIPTokenizer, captions: Sequence[str], slots: int, *, strict: bool = True, compat: str | None = None
) -> SubjectTokens:
    """Captions with markers -> their ids as if there were none, and the tokens that the markers follow.

    "a man <|image|> and a woman <|image|>" flags positions 2 and 5, the start token being 0. A word of several tokens
    is flagged at its last. Several markers in a row flag once; one before all words flags the start token. Longer
    captions are cut as by `tokenize`. slots: N, the largest number of subjects.
    strict: a caption without marker, with more than `slots` or with one whose word is cut off is an error; otherwise,
    as training data want it, it has no subject, the first `slots`, or those that are left.
    compat="reference": a caption that is cut loses its end token, as in FastComposer.
    Raises: ValueError, one line each: those; a marker inside a word; another `compat`. Source: fastcomposer/data.py.
    """
    if compat not in (None, "reference"):
        raise ValueError(f"tokenize_subjects: unknown compat {compat!r}; known: reference")
    limit = tokenizer.model_max_length
    room = limit - 1 if compat else limit - 2  # the published cut takes the end token first
    ids = np.full((len(captions), limit), tokenizer.pad_token_id, np.int32)
    positions = np.zeros((len(captions), slots), np.int32)
    counts = np.zeros(len(captions), np.int32)
    for row, caption in enumerate(captions):
        words, flags = _flagged(tokenizer, caption)
        tokens = [tokenizer.bos_token_id, *words[:room], tokenizer.eos_token_id][:limit]
        inside = [flag for flag in flags if flag <= room]
        if strict:
            _check_flags(caption, flags, inside, slots)
        inside = inside[:slots]
        ids[row, : len(tokens)] = tokens
        positions[row, : len(inside)] = inside
        counts[row] = len(inside)
    return SubjectTokens(ids, positions, np.arange(slots) < counts[:, None], counts)


def _flagged(tokenizer: CLIPTokenizer, caption: str) -> tuple[list[int], list[int]]:
    """Ids of the words without markers, and positions of the flagged ones where the start token has 0."""
    pieces = caption.split(MARKER)
    whole, *parts = _inner_ids(tokenizer, ["".join(pieces), *pieces])
    if list(itertools.chain(*parts)) != whole:
        raise ValueError(f"{MARKER} stands inside a word of {caption!r}; it belongs behind the noun of a subject")
    ends = itertools.accumulate(len(part) for part in parts[:-1])
    return whole, list(dict.fromkeys(ends))


def _check_flags(caption: str, flags: list[int], inside: list[int], slots: int) -> None:
    if not flags:
        raise ValueError(f"{caption!r} has no {MARKER}; it belongs behind the noun of each subject")
    if len(flags) > slots:
        raise ValueError(f"{caption!r} marks {len(flags)} subjects; at most {slots} have a place")
    if len(inside) < len(flags):
        raise ValueError(
            f"{caption!r} is too long: the word of its subject number {len(inside) + 1} is cut off; shorten it"
        )


def count_chunks(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> int:
    """Chunks of `model_max_length - 2` words' tokens that the longest caption fills, at least 1."""
    return max(1, *(-(-len(ids) // (tokenizer.model_max_length - 2)) for ids in _inner_ids(tokenizer, captions)))


def tokenize_chunks(tokenizer: CLIPTokenizer, captions: Sequence[str], chunks: int) -> np.ndarray:
    """Captions -> int32 ids [B, chunks, model_max_length]: each chunk has its own start, end and padding.

    Nothing is cut when `chunks` is at least `count_chunks`. A tokenizer's usual row is the first chunk.
    """
    limit = tokenizer.model_max_length - 2
    rows = []
    for ids in _inner_ids(tokenizer, captions):
        for first in range(0, chunks * limit, limit):
            words = [tokenizer.bos_token_id, *ids[first : first + limit], tokenizer.eos_token_id]
            rows.append(words + [tokenizer.pad_token_id] * (limit + 2 - len(words)))
    return np.asarray(rows, np.int32).reshape(len(captions), chunks, limit + 2)


def _inner_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[int]]:
    """Ids of each caption's words, without start and end."""
    return tokenizer(list(captions), add_special_tokens=False)["input_ids"]


def tokens_cut(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> dict[int, int]:
    """Which captions are too long: index -> number of tokens that `tokenize` drops from the end."""
    lengths = (len(ids) for ids in tokenizer(list(captions))["input_ids"])
    limit = tokenizer.model_max_length
    return {i: length - limit for i, length in enumerate(lengths) if length > limit}


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes, in CLIP's order: printable ones first, as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _merge_whole(word: str, ranks: dict[Merge, int]) -> None:
    """Add the merges that make `word` one token. New merges rank last, so words done before stay whole."""
    pieces = _pieces(word, ranks)
    while len(pieces) > 1:
        ranks[(pieces[0], pieces[1])] = len(ranks)
        pieces = _pieces(word, ranks)


def _pieces(word: str, ranks: dict[Merge, int]) -> list[str]:
    """Byte-pair encoding of one word: the earliest known merge is applied everywhere, until none is left."""
    pieces = [*word[:-1], word[-1] + END_OF_WORD]
    while True:
        known = [pair for pair in itertools.pairwise(pieces) if pair in ranks]
        if not known:
            return pieces
        best = min(known, key=ranks.__getitem__)
        merged, i = [], 0
        while i < len(pieces):
            joined = tuple(pieces[i : i + 2]) == best
            merged.append("".join(best) if joined else pieces[i])
            i += 2 if joined else 1
        pieces = merged


def _write(folder: Path, vocabulary: dict[str, int], merges: Sequence[Merge], limit: int, pad: str) -> None:
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    with replacing(folder / "vocab.json") as file:
        file.write(json.dumps(ordered, ensure_ascii=False).encode())
    with replacing(folder / "merges.txt") as file:
        file.write("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges), ""]).encode())
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": limit,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    write_json(folder / "tokenizer_config.json", config)
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", special)
