"""CLIP's tokenizer on the `tokenizers` library: the ids of transformers' `CLIPTokenizer`, and none of its imports.

Source: Radford et al. 2021 (CLIP), byte-pair encoding of lower-cased text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fairhuman_jax.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
NO_LIMIT = int(1e30)  # what transformers takes where a folder states no limit
Merge = tuple[str, str]


class CLIPTokenizer:
    """Text to ids: NFC, one space for white space, lower case, words, then merges of pairs inside a word.

    vocab: id by token; merges: pairs in order of rank; model_max_length: ids a prompt, start and end included. special:
    the four tokens of `SPECIAL` that are other ones; added: further tokens that no merge makes.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[Merge],
        model_max_length: int = NO_LIMIT,
        special: Mapping[str, str | AddedToken] | None = None,
        added: Sequence[AddedToken] = (),
    ) -> None:
        tokens = {**SPECIAL, **(special or {})}
        self.model_max_length, self.merges = model_max_length, list(merges)
        names = {name: str(getattr(token, "content", token)) for name, token in tokens.items()}
        self.pad_token = names["pad_token"]
        model = BPE(dict(vocab), self.merges, unk_token=names["unk_token"], end_of_word_suffix=END_OF_WORD)
        self._backend = Tokenizer(model)
        self._backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._backend.decoder = decoders.ByteLevel()
        self._backend.add_tokens(list(added))
        # A token that is a text in one place and a record in another is added as both, and the last one counts.
        known = {token.content for token in added}
        for token in dict.fromkeys(tokens[name] for name in SPECIAL if names[name] not in known):
            self._backend.add_tokens([AddedToken(token, special=True) if isinstance(token, str) else token])
        ids = [self._backend.token_to_id(names[name]) for name in ("bos_token", "eos_token", "pad_token")]
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids

    @classmethod
    def from_folder(cls, folder: Path) -> CLIPTokenizer:
        """The tokenizer of a folder with vocab.json and merges.txt, or tokenizer.json, as transformers reads it.

        Raises: OSError and ValueError for files that are missing or broken.
        """
        config = _read(folder / "tokenizer_config.json")
        whole = _read(folder / "tokenizer.json")
        special = {name: config[name] for name in SPECIAL if config.get(name) is not None}
        added = {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
        if "added_tokens_decoder" not in config:
            legacy = _read(folder / "special_tokens_map.json")
            special |= {name: legacy[name] for name in SPECIAL if legacy.get(name) is not None}
            names = {str(token["content"] if isinstance(token, dict) else token) for token in special.values()}
            for token, index in _read(folder / "added_tokens.json").items():
                added[index] = {"content": token, "special": token in names, "normalized": token not in names}
            added |= {token["id"]: token for token in whole.get("added_tokens", ())}
        tokens = [_added_token(added[index]) for index in sorted(added)]
        vocab, merges = _vocabulary(folder, whole)
        limit = int(config.get("model_max_length", NO_LIMIT))
        named = {name: _added_token(token) if isinstance(token, dict) else token for name, token in special.items()}
        return cls(vocab, merges, limit, named, tokens)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: str | bool = False,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, Any]:
        """{"input_ids": ids of a text, or one list of ids for each of several}.

        truncation: to `max_length` (default: the tokenizer's own), the end token kept; padding "max_length": up to it.
        """
        if isinstance(text, str):
            options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": max_length}
            whole = self([text], add_special_tokens=add_special_tokens, **options)
            return {"input_ids": whole["input_ids"][0]}
        limit = self.model_max_length if max_length is None else max_length
        room = limit - 2 if add_special_tokens else limit
        rows = []
        for encoding in self._backend.encode_batch(list(text), add_special_tokens=False):
            ids = encoding.ids[:room] if truncation else encoding.ids
            row = [self.bos_token_id, *ids, self.eos_token_id] if add_special_tokens else ids
            rows.append(row + [self.pad_token_id] * (limit - len(row)) if padding == "max_length" else row)
        return {"input_ids": rows}

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without start and end."""
        return self._backend.encode(text, add_special_tokens=False).tokens

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or a list of them; a token that is not known gives None."""
        if isinstance(tokens, str):
            return self._backend.token_to_id(tokens)
        return [self._backend.token_to_id(token) for token in tokens]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids, words apart."""
        text = self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)
        return text.replace(END_OF_WORD, " ").strip()

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def words(self, text: str) -> list[str]:
        """The words of a text as merges see them: normalised, in stand-ins of bytes."""
        assert self._backend.normalizer is not None and self._backend.pre_tokenizer is not None
        normal = self._backend.normalizer.normalize_str(text)
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(normal)]


def _vocabulary(folder: Path, whole: Mapping[str, Any]) -> tuple[dict[str, int], list[Merge]]:
    """Vocabulary and merges of tokenizer.json, or of the two files."""
    if whole:
        pairs = whole["model"]["merges"]
        return whole["model"]["vocab"], [_pair(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return vocab, merges


def _pair(pieces: Sequence[str]) -> Merge:
    first, second = pieces
    return first, second


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    options = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(str(token["content"]), special=bool(token.get("special", True)), **options)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}
