"""Names of latent-diffusion (LDM) checkpoints and those of diffusers: tables of module names that hold both ways.

An LDM file numbers its blocks in one row (`input_blocks.0` ...), diffusers by resolution and layer. Which number is
which layer follows from where attentions and resamplers are, and those can be read off either set of names; so the
same rule serves SD 1.x, 2.x, XL and networks of any other depth.
Source: the key names of CompVis' and Stability's checkpoints and of diffusers' networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Table = dict[str, str]  # LDM module -> diffusers module

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
ATTENTION_PARTS = ("norm", "proj_in", "proj_out", "transformer_blocks")

# An average of weights (LitEma) is stored under the name of its weight without dots. These words, longest first
# where one begins another, and the numbers between them bring the dots back.
EMA_TOKENS = re.compile(
    "input_blocks|output_blocks|middle_block|time_embed|label_emb|in_layers|out_layers|emb_layers|skip_connection|"
    "transformer_blocks|attn[12]|to_q|to_k|to_v|to_out|ff|net|proj_in|proj_out|proj|norm[123]|norm|out|op|conv|"
    r"weight|bias|(?<=put_blocks)\d+(?=\d)|(?<=label_emb)\d(?=\d)|\d+"
)


@dataclass(frozen=True)
class Stage:
    """One resolution of a UNet: for each layer whether it has attention; whether a resampler follows."""

    attentions: tuple[bool, ...]
    resampled: bool


@dataclass(frozen=True)
class Layout:
    """Blocks of a UNet or ControlNet: `mid` says for each member of the middle block whether it is attention.

    `hints`: convolutions between the first and the last one of a ControlNet's condition embedding, None for a UNet.
    """

    down: tuple[Stage, ...]
    mid: tuple[bool, ...]
    up: tuple[Stage, ...]
    hints: int | None = None


def ldm_layout(names: Iterable[str]) -> Layout:
    """The layout behind the names of an LDM UNet or ControlNet, prefixes removed."""
    names = tuple(names)
    places: dict[int, bool] = {}
    for parts in _split(names, "middle_block"):
        places[int(parts[1])] = places.get(int(parts[1]), False) or parts[2] in ATTENTION_PARTS
    hints = [int(parts[1]) for parts in _split(names, "input_hint_block")]
    return Layout(
        down=_ldm_stages(names, "input_blocks"),
        mid=tuple(places[place] for place in sorted(places)),
        up=_ldm_stages(names, "output_blocks"),
        hints=max(hints) // 2 - 1 if hints else None,
    )


def diffusers_layout(names: Iterable[str]) -> Layout:
    """The layout behind the names of a diffusers UNet or ControlNet."""
    names = tuple(names)
    members = {(parts[1], int(parts[2])) for parts in _split(names, "mid_block")}
    attentions = sum(kind == "attentions" for kind, _ in members)
    resnets = len(members) - attentions
    hints = {parts[2] for parts in _split(names, "controlnet_cond_embedding") if parts[1] == "blocks"}
    return Layout(
        down=_diffusers_stages(names, "down_blocks"),
        mid=(False, *(True, False) * attentions) if attentions else (False,) * resnets,
        up=_diffusers_stages(names, "up_blocks"),
        hints=len(hints) if hints else None,
    )


def unet_table(layout: Layout) -> Table:
    """LDM module -> diffusers module of a UNet or ControlNet; the inside of attention blocks has the same names."""
    table = dict(OUTSIDE_BLOCKS)
    number = 1
    for block, stage in enumerate(layout.down):
        for layer, attention in enumerate(stage.attentions):
            _layer(table, f"input_blocks.{number}", f"down_blocks.{block}", layer, attention)
            number += 1
        if stage.resampled:
            table[f"input_blocks.{number}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
            number += 1
    if layout.hints is not None:
        _control(table, number, layout.hints)
    resnets = attentions = 0
    for place, attention in enumerate(layout.mid):
        if attention:
            table[f"middle_block.{place}"] = f"mid_block.attentions.{attentions}"
            attentions += 1
        else:
            _resnet(table, f"middle_block.{place}", f"mid_block.resnets.{resnets}")
            resnets += 1
    number = 0
    for block, stage in enumerate(layout.up):
        for layer, attention in enumerate(stage.attentions):
            _layer(table, f"output_blocks.{number}", f"up_blocks.{block}", layer, attention)
            if stage.resampled and layer == len(stage.attentions) - 1:
                table[f"output_blocks.{number}.{1 + attention}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
            number += 1
    return table


def vae_table(names: Iterable[str]) -> Table:
    """LDM module -> diffusers module of an autoencoder, from its names in either naming, prefixes removed."""
    text = "\n".join(names)
    levels = 1 + max((int(level) for level in re.findall(r"(?:\.down|\.up|_blocks)\.(\d+)\.", text)), default=-1)
    depth = 1 + max((int(layer) for layer in re.findall(r"\.(?:block|resnets)\.(\d+)\.", text)), default=-1)
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, group, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for name, twin in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            table[f"{half}.{name}"] = f"{half}.{twin}"
        for level in range(levels):
            block = f"{half}.{group}_blocks.{level if group == 'down' else levels - 1 - level}"
            table[f"{half}.{group}.{level}.{resample}.conv"] = f"{block}.{resample}rs.0.conv"
            for layer in range(depth):
                for name, twin in VAE_RESNET.items():
                    table[f"{half}.{group}.{level}.block.{layer}.{name}"] = f"{block}.resnets.{layer}.{twin}"
        for layer in range(2):
            for name, twin in VAE_RESNET.items():
                table[f"{half}.mid.block_{layer + 1}.{name}"] = f"{half}.mid_block.resnets.{layer}.{twin}"
        for name, twin in VAE_ATTENTION.items():
            table[f"{half}.mid.attn_1.{name}"] = f"{half}.mid_block.attentions.0.{twin}"
    return table


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with the longest leading module that `table` knows replaced; None when it knows none."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        twin = table.get(".".join(parts[:length]))
        if twin is not None:
            return ".".join([twin, *parts[length:]])
    return None


def inverted(table: Mapping[str, str]) -> Table:
    """diffusers module -> LDM module; a table has no diffusers module twice, so nothing is lost."""
    return {twin: name for name, twin in table.items()}


def with_dots(name: str) -> str | None:
    """The dotted UNet name behind the dotless one of an averaged copy, None when it is no such name.

    `input_blocks110in_layers0weight` -> `input_blocks.11.0.in_layers.0.weight`.
    """
    tokens = EMA_TOKENS.findall(name)
    return ".".join(tokens) if "".join(tokens) == name else None


def _split(names: tuple[str, ...], group: str) -> Iterable[list[str]]:
    return (name.split(".") for name in names if name.startswith(f"{group}."))


def _ldm_stages(names: tuple[str, ...], group: str) -> tuple[Stage, ...]:
    kinds: dict[int, set[str]] = {}
    for _, number, place, part, *_ in _split(names, group):
        if (group, number) != ("input_blocks", "0"):
            kind = "resampler" if part in ("op", "conv") else "attention" if place == "1" else "resnet"
            kinds.setdefault(int(number), set()).add(kind)
    stages: list[Stage] = []
    layers: list[bool] = []
    for number in sorted(kinds):
        if "resnet" in kinds[number]:
            layers.append("attention" in kinds[number])
        if "resampler" in kinds[number]:
            stages.append(Stage(tuple(layers), True))
            layers = []
    return (*stages, Stage(tuple(layers), False)) if layers else tuple(stages)


def _diffusers_stages(names: tuple[str, ...], group: str) -> tuple[Stage, ...]:
    members: dict[int, set[tuple[str, int]]] = {}
    for _, block, kind, layer, *_ in _split(names, group):
        members.setdefault(int(block), set()).add((kind, int(layer)))
    stages = []
    for block in sorted(members):
        resnets = sorted(layer for kind, layer in members[block] if kind == "resnets")
        attentions = tuple(("attentions", layer) in members[block] for layer in resnets)
        stages.append(Stage(attentions, any(kind.endswith("samplers") for kind, _ in members[block])))
    return tuple(stages)


def _layer(table: Table, name: str, block: str, layer: int, attention: bool) -> None:
    _resnet(table, f"{name}.0", f"{block}.resnets.{layer}")
    if attention:
        table[f"{name}.1"] = f"{block}.attentions.{layer}"


def _resnet(table: Table, name: str, twin: str) -> None:
    for part, twin_part in RESNET.items():
        table[f"{name}.{part}"] = f"{twin}.{twin_part}"


def _control(table: Table, blocks: int, hints: int) -> None:
    for number in range(blocks):
        table[f"zero_convs.{number}.0"] = f"controlnet_down_blocks.{number}"
    table["middle_block_out.0"] = "controlnet_mid_block"
    table["input_hint_block.0"] = "controlnet_cond_embedding.conv_in"
    for hint in range(hints):
        table[f"input_hint_block.{2 * hint + 2}"] = f"controlnet_cond_embedding.blocks.{hint}"
    table[f"input_hint_block.{2 * hints + 2}"] = "controlnet_cond_embedding.conv_out"
