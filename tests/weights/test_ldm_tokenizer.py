"""CLIP's tokenizer out of its table of merges, out of folders, and with the padding that a text encoder wants."""

from __future__ import annotations

import gzip
import itertools

import pytest

from fairhuman_jax.weights import build_small_clip_tokenizer, load_tokenizer, save_tokenizer, tokenize
from fairhuman_jax.weights.ldm.tokenizer import MERGES, OPENCLIP_PAD, TABLE, clip_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table as long as CLIP's: "ca" and "cat" and pairs of other letters."""
    letters = [chr(code) for code in range(0x100, 0x100 + 60)] + list("bdefghijklmnopqrsuvwxyz0123456789")
    ends = [*letters, *(f"{letter}</w>" for letter in letters)]
    pairs = itertools.product(letters, ends)
    triples = ((first + second, third) for first, second in itertools.product(letters, letters) for third in ends)
    merges = [("c", "a"), ("ca", "t</w>"), *itertools.islice(itertools.chain(pairs, triples), MERGES - 2)]
    path = tmp_path_factory.mktemp("table") / TABLE
    path.write_bytes(gzip.compress("\n".join(["header", *map(" ".join, merges), "left out"]).encode()))
    return path


def test_the_table_gives_the_ids_of_clip(table):
    tokenizer = clip_tokenizer(table)
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
    # 256 bytes, the same at the end of a word, then the merges in their order
    assert tokenizer("a cat!")["input_ids"] == [49406, 256 + 64, 513, 256, 49407]
    assert tokenize(tokenizer, ["cat"])[0].tolist() == [49406, 513, *[49407] * 75]


def test_openclip_pads_with_zero(table, tmp_path):
    tokenizer = clip_tokenizer(table, pad=OPENCLIP_PAD)
    assert tokenize(tokenizer, ["cat"])[0].tolist() == [49406, 513, 49407, *[0] * 74]
    save_tokenizer(tokenizer, tmp_path)
    assert tokenize(load_tokenizer(tmp_path), ["cat"])[0, -1] == 0
    assert tokenize(clip_tokenizer(tmp_path), ["cat"])[0, -1] == 49407


def test_a_folder_or_a_pipeline_folder_gives_its_tokenizer_with_the_padding_asked_for(tmp_path):
    build_small_clip_tokenizer(["two hands"], tmp_path / "tokenizer", model_max_length=6)
    for folder in (tmp_path, tmp_path / "tokenizer"):
        tokenizer = clip_tokenizer(folder, pad=OPENCLIP_PAD)
        expected = load_tokenizer(tmp_path / "tokenizer")("two hands")["input_ids"]
        assert tokenize(tokenizer, ["two hands"])[0].tolist() == [*expected, 0, 0]


def test_the_shipped_table_is_clips_own():
    ids = clip_tokenizer()("oil painting of girls dancing on the stage,")["input_ids"]
    assert ids[:10] == [49406, 2870, 3086, 539, 1917, 6226, 525, 518, 2170, 267]
    assert len(clip_tokenizer()) == 49408


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"header\na b\n"), gzip.compress(b"a b c\n" * 50000)],
    ids=["empty", "not gzip", "short", "not pairs"],
)
def test_other_files_are_refused_by_name(content, tmp_path):
    (tmp_path / "table.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"table.gz is not CLIP's table"):
        clip_tokenizer(tmp_path / "table.gz")
