"""What a single file holds: its tensors grouped by network, and by the naming each is in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from fairhuman_jax.weights.ldm.names import with_dots
from fairhuman_jax.weights.recognition import looks_like
from fairhuman_jax.weights.tensors import Tensors

UNET_PREFIX = "model.diffusion_model."
CONTROL_PREFIX = "control_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPENCLIP_PREFIX = "cond_stage_model.model."
CLIP_XL_PREFIX = "conditioner.embedders.0.transformer."
OPENCLIP_XL_PREFIX = "conditioner.embedders.1.model."
LONE_OPENCLIP_PREFIX = "conditioner.embedders.0.model."  # the SDXL refiner, and SD 2.x as some programs write it
EMA_PREFIX = "model_ema.diffusion_model"

LDM, DIFFUSERS, CLIP, OPENCLIP, OPENCLIP_PROJECTED = "ldm", "diffusers", "clip", "openclip", "openclip projected"
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet", "image_encoder", "postfuse")

PREFIXES = {
    UNET_PREFIX: ("unet", LDM),
    CONTROL_PREFIX: ("controlnet", LDM),
    VAE_PREFIX: ("vae", LDM),
    CLIP_PREFIX: ("text_encoder", CLIP),
    OPENCLIP_PREFIX: ("text_encoder", OPENCLIP),
    CLIP_XL_PREFIX: ("text_encoder", CLIP),
    OPENCLIP_XL_PREFIX: ("text_encoder_2", OPENCLIP_PROJECTED),
    LONE_OPENCLIP_PREFIX: ("text_encoder_2", OPENCLIP_PROJECTED),
}
# FastComposer's files, the networks of diffusers and transformers under one name each, and the tensor that tells them.
FLAT_PREFIXES = {
    "unet.": ("unet", DIFFUSERS),
    "vae.": ("vae", DIFFUSERS),
    "text_encoder.": ("text_encoder", CLIP),
    "image_encoder.": ("image_encoder", DIFFUSERS),
    "postfuse_module.": ("postfuse", DIFFUSERS),
}
FLAT_MARK = "unet.conv_in.weight"
# Files of one network without prefix: a tensor that no other network has.
MARKS = {
    "input_hint_block.0.weight": ("controlnet", LDM),
    "output_blocks.0.0.in_layers.0.weight": ("unet", LDM),
    "decoder.up.0.block.0.norm1.weight": ("vae", LDM),
    "controlnet_cond_embedding.conv_in.weight": ("controlnet", DIFFUSERS),
    "up_blocks.0.resnets.0.norm1.weight": ("unet", DIFFUSERS),
    "decoder.up_blocks.0.resnets.0.norm1.weight": ("vae", DIFFUSERS),
}
SCHEDULE = (
    "betas",
    "alphas_cumprod(_prev)?",
    "sqrt_(one_minus_)?alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recipm?1?_alphas_cumprod",
    "posterior_(variance|log_variance_clipped|mean_coef[12])",
    "logvar",
    "lvlb_weights",
    "scale_factor",
    r"denoiser\.(sigmas|log_sigmas)",
)
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors by which SDXL files say how they were trained
# What training leaves in a file and no network here reads: averages, losses, optimizers, a skeleton estimator.
LEFTOVERS = (
    r"model_ema\..*",
    r"(first_stage_model\.)?(loss|model_ema)\..*",
    r"(optimizer_states|lr_schedulers|callbacks|loops)\b.*",
    "(global_step|epoch|pytorch-lightning_version)",
    r"(mmpose_model|safety_checker|embedding_manager)\..*",
    r".*\b(position_ids|logit_scale|attn_mask)",
    f"({V_MARK}|{ZERO_SNR_MARK})",
)
IGNORED = re.compile("|".join((*SCHEDULE, *LEFTOVERS)))
LISTED = 4  # names an error spells out


@dataclass(frozen=True)
class Group:
    """One network in a file: its naming, and its names without prefix -> the names they are stored under."""

    naming: str
    stored: dict[str, str] = field(default_factory=dict)


def groups_of(tensors: Tensors) -> dict[str, Group]:
    """Component -> its tensors, in the order of `COMPONENTS`.

    Buffers and leftovers are passed over by name, averaged copies too unless the file has no other UNet. Raises:
    ValueError for an empty file; one that is none of the layouts that are read; tensors beside a known layout that
    belong to no component, listed.
    """
    names = tensors.names()
    if not names:
        raise ValueError(f"{tensors.label} holds no tensors")
    prefixes = PREFIXES | FLAT_PREFIXES if FLAT_MARK in names else PREFIXES
    groups: dict[str, Group] = {}
    strangers = []
    averaged = not any(name.startswith(UNET_PREFIX) for name in names)
    for name in names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if averaged and name.startswith(EMA_PREFIX) and (dotted := with_dots(name.removeprefix(EMA_PREFIX))):
            groups.setdefault("unet", Group(LDM)).stored[dotted] = name
        elif IGNORED.fullmatch(name):
            continue
        elif prefix is not None:
            component, naming = prefixes[prefix]
            groups.setdefault(component, Group(naming)).stored[name.removeprefix(prefix)] = name
        else:
            strangers.append(name)
    if strangers:
        component, group = _unprefixed(tensors, strangers)
        if component in groups:
            raise ValueError(f"{tensors.label} holds two networks of the kind {component}, with and without prefix")
        groups[component] = group
    if "unet" in groups and "label_emb.0.0.weight" not in groups["unet"].stored and "text_encoder" not in groups:
        lone = groups.pop("text_encoder_2", None)
        if lone is not None:
            groups["text_encoder"] = Group(OPENCLIP, lone.stored)
    if not groups:
        raise ValueError(f"{tensors.label} holds buffers only, as {names[0]}, and no network")
    return {component: groups[component] for component in COMPONENTS if component in groups}


def listed(names: Iterable[str]) -> str:
    """The first names, and that there are more."""
    names = list(names)
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _unprefixed(tensors: Tensors, names: list[str]) -> tuple[str, Group]:
    known = set(names)
    for mark, (component, naming) in MARKS.items():
        if mark in known:
            return component, Group(naming, {name: name for name in names})
    seems = looks_like(tensors)
    hint = f"; it looks like {seems}" if seems else ""
    raise ValueError(
        f"{tensors.label}: {len(names)} tensors belong to no network of a single file that is read, SD 1.x, 2.x, XL, "
        f"ControlNet or autoencoder ({listed(names)}){hint}"
    )
