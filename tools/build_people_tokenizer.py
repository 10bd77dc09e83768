"""Builds the tokenizer of the shipped base: `python tools/build_people_tokenizer.py OUT`.

Every word of the people world's captions becomes one token; any other text spells out in pieces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fairhuman_jax.data.cache import cached_people
from fairhuman_jax.data.people.paraphrase import paraphrases
from fairhuman_jax.weights import build_small_clip_tokenizer

MAX_LENGTH = 48

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for vocab.json, merges.txt and tokenizer_config.json")
    parser.add_argument("--count", type=int, default=24_000, help="captions to read")
    options = parser.parse_args()
    captions = [form for caption in cached_people(64, options.count, 0).captions for form in paraphrases(caption)]
    tokenizer = build_small_clip_tokenizer(captions, options.out, model_max_length=MAX_LENGTH)
    longest = max(len(ids) for ids in tokenizer(captions)["input_ids"])
    print(f"{options.out}: {len(tokenizer)} tokens; longest caption {longest} of {MAX_LENGTH}")
