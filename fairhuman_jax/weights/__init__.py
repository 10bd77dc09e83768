"""Names and files: model folders of diffusers and transformers, LoRA files, tokenizers."""

from __future__ import annotations

from fairhuman_jax.weights.diffusers import expected_params, load_model, save_model
from fairhuman_jax.weights.lora import load_lora, save_lora
from fairhuman_jax.weights.pipeline import Pipeline, load_pipeline, save_pipeline
from fairhuman_jax.weights.tokenizers import (
    build_small_clip_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    tokens_cut,
)

__all__ = [
    "Pipeline",
    "build_small_clip_tokenizer",
    "expected_params",
    "load_lora",
    "load_model",
    "load_pipeline",
    "load_tokenizer",
    "save_lora",
    "save_model",
    "save_pipeline",
    "save_tokenizer",
    "tokenize",
    "tokens_cut",
]
