"""Names and files: model folders, models on the hub, single-file checkpoints, LoRA files, tokenizers."""

from __future__ import annotations

from fairhuman_jax.weights.diffusers import expected_params, params_from, save_model
from fairhuman_jax.weights.facediffuser import SubjectPipeline, load_subject_model, save_flat_file, save_subject_model
from fairhuman_jax.weights.ldm import load_component, load_single_file, open_single_file, save_single_file
from fairhuman_jax.weights.lora import load_lora, load_loras, save_lora
from fairhuman_jax.weights.mmpose import load_mmpose, load_pose_network
from fairhuman_jax.weights.opening import load_model, load_pipeline
from fairhuman_jax.weights.pipeline import Pipeline, save_pipeline
from fairhuman_jax.weights.tensors import Tensors, open_tensors
from fairhuman_jax.weights.tokenizers import (
    MARKER,
    SubjectTokens,
    build_small_clip_tokenizer,
    count_chunks,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    tokenize_chunks,
    tokenize_subjects,
    tokens_cut,
)

__all__ = [
    "MARKER",
    "Pipeline",
    "SubjectPipeline",
    "SubjectTokens",
    "Tensors",
    "build_small_clip_tokenizer",
    "count_chunks",
    "expected_params",
    "load_component",
    "load_lora",
    "load_loras",
    "load_mmpose",
    "load_model",
    "load_pipeline",
    "load_pose_network",
    "load_single_file",
    "load_subject_model",
    "load_tokenizer",
    "open_single_file",
    "open_tensors",
    "params_from",
    "save_flat_file",
    "save_lora",
    "save_model",
    "save_pipeline",
    "save_single_file",
    "save_subject_model",
    "save_tokenizer",
    "tokenize",
    "tokenize_chunks",
    "tokenize_subjects",
    "tokens_cut",
]
