"""How LoRA files call layers and factors: every dialect's names as one spelling, and what is refused.

A tensor's name is a component's prefix, a layer and a factor's ending. Dots and underscores are taken as the same,
so that `lora_unet_mid_block_attentions_0_proj_in` and `unet.mid_block.attentions.0.proj_in` meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fairhuman_jax.weights.ldm.names import diffusers_layout, inverted, renamed, unet_table

UNET, TEXT, TEXT_2 = COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
FACTORS = ("down", "up")

WRAPPERS = re.compile(r"^(?:base_model_model_|lycoris_(?!unet_|te\d?_))")
PREFIXES = {
    UNET: ("lora_unet", "unet", "model_diffusion_model", "diffusion_model", "lycoris_unet"),
    TEXT: ("lora_te", "lora_te1", "text_encoder", "clip_l", "text_encoders_clip_l_transformer", "lycoris_te"),
    TEXT_2: ("lora_te2", "text_encoder_2", "clip_g", "text_encoders_clip_g_transformer", "lycoris_te2"),
}
LONGEST_FIRST = sorted(
    ((f"{prefix}_", component) for component, prefixes in PREFIXES.items() for prefix in prefixes),
    key=lambda pair: -len(pair[0]),
)

# Old attention processors spoke of to_q_lora where the layer is to_q.
PROCESSOR = re.compile(r"(?:\.processor)?\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
# diffusers: .lora.down, .lora_linear_layer.down; kohya: .lora_down; PEFT: .lora_A, with or without an adapter's name.
FACTOR = re.compile(r"\.(?:lora(?:_linear_layer)?\.|lora_)(down|up|A|B)(?:\.[^.]+)?\.weight$")
ALPHA = re.compile(r"(?:\.lora)?\.alpha$")
KINDS = {"down": "down", "A": "down", "up": "up", "B": "up"}

# Marks of files that hold something else than two factors a layer.
REFUSED = tuple(
    (re.compile(mark), what)
    for mark, what in (
        (r"dora_scale|lora_magnitude_vector", "DoRA"),
        (r"\.hada_", "LoHa"),
        (r"\.lokr_", "LoKr"),
        (r"\.oft_|\.boft_|\.oft_diag", "OFT"),
        (r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$", "GLoRA"),
        (r"\.on_input$|ia3_l", "(IA)^3"),
        (r"\.vera_lambda", "VeRA"),
        (r"\.lora_mid\.", "LoCon with a CP decomposition (lora_mid)"),
        (r"\.diff(?:_b)?$|\.set_weight$", "weight differences (diff, diff_b)"),
        (r"\.[wb]_norm$", "norm weights (w_norm, b_norm)"),
        (r"lora_embedding_[AB]", "LoRA on token embeddings"),
        (r"\.lora_(?:up|B)(?:\.[^.]+)?\.bias$|lora_bias", "LoRA with biases"),
        (r"modules_to_save", "whole layers (modules_to_save)"),
        (r"^bundle_emb\.|string_to_param|^emb_params$", "textual inversion"),
        (r"^lora_prior_", "LoRA for Stable Cascade"),
        (
            r"double_blocks|joint_blocks|transformer\.(?:single_)?transformer_blocks",
            "LoRA for Flux or Stable Diffusion 3",
        ),
    )
)

# The layers of attention in a text encoder as old processors call them.
OLD_TEXT_PARTS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}


class Part(NamedTuple):
    """A tensor of a LoRA file: whose layer it is (None: the file does not say), which layer, and what of it."""

    component: str | None
    layer: str
    kind: str


def parse(name: str) -> Part | None:
    """What the tensor `name` is: `down`, `up` or `alpha` of a layer; None when it is in no dialect that is read."""
    if match := PROCESSOR.search(name):
        layer = match[1] + ".0" * (match[1] == "to_out")
        return _part(f"{name[: match.start()]}.{layer}", match[2])
    if match := FACTOR.search(name):
        return _part(name[: match.start()], KINDS[match[1]])
    if match := ALPHA.search(name):
        return _part(name[: match.start()], "alpha")
    return None


def refusal(names: Iterable[str]) -> str | None:
    """What else than two factors a layer `names` give away, when it is something that is not read."""
    for name in names:
        for mark, what in REFUSED:
            if mark.search(name):
                return f"{what} ({name})"
    return None


def spellings(component: str, layers: Iterable[str]) -> dict[str, str]:
    """Every way, with underscores, in which files call the layers of a network -> the layer's own name."""
    layers = tuple(layers)
    found = {}
    for layer, original in sgm_names(layers).items() if component == UNET else ():
        found[_flat(original)] = layer
    for layer in layers:
        found[_flat(layer)] = layer
        if component != UNET:
            *before, last = layer.split(".")
            found[_flat(".".join((*before, OLD_TEXT_PARTS.get(last, last))))] = layer
            found[_flat(layer.removeprefix("text_model."))] = layer
    return found


def sgm_names(layers: Iterable[str]) -> dict[str, str]:
    """A UNet's layers -> their names in the original (sgm, LDM) numbering of blocks."""
    leaves = {layer: f"{layer}.weight" for layer in layers}
    table = inverted(unet_table(diffusers_layout(leaves.values())))
    found = {layer: renamed(leaf, table) for layer, leaf in leaves.items()}
    return {layer: name.removesuffix(".weight") for layer, name in found.items() if name}


def _part(layer: str, kind: str) -> Part:
    flat = WRAPPERS.sub("", _flat(layer))
    for prefix, component in LONGEST_FIRST:
        if flat.startswith(prefix):
            return Part(component, flat.removeprefix(prefix), kind)
    return Part(None, flat, kind)


def _flat(name: str) -> str:
    return name.replace(".", "_")
