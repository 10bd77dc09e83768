"""Which stored tensor is which parameter: networks of LDM files in the names of diffusers and transformers, and back.

Three things are more than names. OpenCLIP keeps the three projections of an attention in one tensor; its projection
of the pooled state is a matrix [in, out] where a linear map has [out, in]; autoencoders keep their attention's linear
maps as 1x1 convolutions.
Source: the key names of CompVis' and Stability's checkpoints, OpenCLIP's text tower and transformers' CLIPTextModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fairhuman_jax.weights.ldm.names import (
    Table,
    diffusers_layout,
    inverted,
    ldm_layout,
    renamed,
    unet_table,
    vae_table,
)
from fairhuman_jax.weights.ldm.views import Slot

Slots = dict[str, Slot]
Stored = Mapping[str, str]  # a component's name without its prefix -> the name in the file

OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
OPENCLIP_WHOLE = {  # parameters that are no module's
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
VIT_H_LAYERS = 24
VAE_LINEAR = re.compile(r".*\.attentions\.\d+\.to_.*\.weight")
PROJECTED = re.compile(r".*\.attentions\.\d+\.proj_(in|out)\.weight")


def unet_slots(stored: Stored) -> tuple[Slots, list[str]]:
    """(slots in diffusers' names, stored names that no rule covers) of an LDM UNet or ControlNet."""
    return _by_table(stored, unet_table(ldm_layout(stored)))


def vae_slots(stored: Stored) -> tuple[Slots, list[str]]:
    """(slots in diffusers' names, stored names that no rule covers) of an LDM autoencoder."""
    slots, unknown = _by_table(stored, vae_table(stored))
    return {
        name: Slot(slot.stored, ndim=2) if VAE_LINEAR.fullmatch(name) else slot for name, slot in slots.items()
    }, unknown


def clip_slots(stored: Stored) -> tuple[Slots, list[str]]:
    """(slots, []) of CLIP ViT-L, which LDM files hold in transformers' names; some without their first word.

    The projection of the pooled state, which a few files carry along, is dropped: no Stable Diffusion reads it.
    """
    slots = {}
    for name, source in stored.items():
        if name != "text_projection.weight":
            slots[name if name.startswith("text_model.") else f"text_model.{name}"] = Slot((source,))
    return slots, []


def openclip_slots(stored: Stored, *, projected: bool) -> tuple[Slots, list[str]]:
    """(slots in transformers' names, stored names that no rule covers) of an OpenCLIP text tower.

    projected: keep all layers and the projection of the pooled state (SDXL). Otherwise (SD 2.x) conditioning is the
    state before the last layer, so that layer and the projection are dropped. A tower of 23 layers without a
    projection is one that was written by other programs after the cut, and is kept whole.
    """
    layers = openclip_layers(stored)
    if not projected and ("text_projection" in stored or layers == VIT_H_LAYERS):
        layers -= 1
    table = _openclip_table(layers)
    slots: Slots = {}
    unknown = []
    for name, source in stored.items():
        layer = re.match(r"transformer\.resblocks\.(\d+)\.", name)
        if (layer and int(layer[1]) >= layers) or (name == "text_projection" and not projected):
            continue
        if fused := FUSED.fullmatch(name):
            for which, part in enumerate(PROJECTIONS):
                twin = f"text_model.encoder.layers.{fused[1]}.self_attn.{part}.{fused[2]}"
                slots[twin] = Slot((source,), part=(which, len(PROJECTIONS)))
        elif name in OPENCLIP_WHOLE:
            slots[OPENCLIP_WHOLE[name]] = Slot((source,), transpose=name == "text_projection")
        elif (twin := renamed(name, table)) is not None:
            slots[twin] = Slot((source,))
        else:
            unknown.append(source)
    return slots, unknown


def openclip_layers(names: Iterable[str]) -> int:
    """Layers of an OpenCLIP text tower, from its names."""
    found = (re.match(r"transformer\.resblocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def ldm_unet_slots(names: Iterable[str], prefix: str, *, linear: bool) -> Slots:
    """Slots in LDM names of a diffusers UNet or ControlNet. linear: attention blocks begin and end in linear maps.

    Raises: ValueError for a network without middle block, which LDM has no name for.
    """
    names = tuple(names)
    layout = diffusers_layout(names)
    if not layout.mid:
        raise ValueError("a UNet without middle block has no place in an LDM file; save_pipeline writes a folder")
    slots = _inverted_slots(names, unet_table(layout), prefix)
    ndim = 2 if linear else 4
    return {
        name: Slot(slot.stored, ndim=ndim) if PROJECTED.fullmatch(slot.stored[0]) else slot
        for name, slot in slots.items()
    }


def ldm_vae_slots(names: Iterable[str], prefix: str) -> Slots:
    """Slots in LDM names of a diffusers autoencoder, its attention's linear maps as 1x1 convolutions."""
    names = tuple(names)
    slots = _inverted_slots(names, vae_table(names), prefix)
    return {
        name: Slot(slot.stored, ndim=4) if VAE_LINEAR.fullmatch(slot.stored[0]) else slot
        for name, slot in slots.items()
    }


def ldm_openclip_slots(names: Iterable[str], prefix: str) -> Slots:
    """Slots in OpenCLIP's names of a transformers text encoder, its attention projections fused again."""
    names = tuple(names)
    layers = 1 + max(int(match[1]) for name in names if (match := re.search(r"\.layers\.(\d+)\.", name)))
    back, whole = inverted(_openclip_table(layers)), inverted(OPENCLIP_WHOLE)
    slots: Slots = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        stem, _, part = module.rpartition(".")
        if name in whole:
            slots[prefix + whole[name]] = Slot((name,), transpose=name == "text_projection.weight")
        elif part in PROJECTIONS:
            layer = stem.split(".")[-2]
            sources = tuple(f"{stem}.{projection}.{leaf}" for projection in PROJECTIONS)
            slots[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = Slot(sources)
        else:
            slots[f"{prefix}{renamed(name, back)}"] = Slot((name,))
    return slots


def _openclip_table(layers: int) -> Table:
    table = {"ln_final": "text_model.final_layer_norm", "token_embedding": "text_model.embeddings.token_embedding"}
    for layer in range(layers):
        for name, twin in OPENCLIP_LAYER.items():
            table[f"transformer.resblocks.{layer}.{name}"] = f"text_model.encoder.layers.{layer}.{twin}"
    return table


def _by_table(stored: Stored, table: Table) -> tuple[Slots, list[str]]:
    slots: Slots = {}
    unknown = []
    for name, source in stored.items():
        twin = renamed(name, table)
        if twin is None:
            unknown.append(source)
        else:
            slots[twin] = Slot((source,))
    return slots, unknown


def _inverted_slots(names: tuple[str, ...], table: Table, prefix: str) -> Slots:
    back = inverted(table)
    return {f"{prefix}{renamed(name, back)}": Slot((name,)) for name in names}
