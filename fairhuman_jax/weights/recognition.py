"""What a file looks like, for errors about one that does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable

from fairhuman_jax.weights.tensors import Tensors

# The width of text that attention reads, which tells the families of Stable Diffusion apart.
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}
TEXT_TOWERS = {768: "CLIP ViT-L/14", 1024: "OpenCLIP ViT-H/14", 1280: "OpenCLIP ViT-bigG/14"}
USUAL_CHANNELS = {4: "", 9: " for inpainting"}

# Cross-attention's keys are made of text; self-attention's are square.
CROSS_KEY = r"attn2\.to_k\.weight$"
FIRST_CONV = r"(^|\.)(conv_in|input_blocks\.0\.0)\.weight$"


def looks_like(tensors: Tensors) -> str | None:
    """A few words, as "an SDXL UNet (cross-attention 2048)", or None for tensors of no known kind."""
    names = tensors.names()
    for mark, describe in TELLTALES:
        pattern = re.compile(mark)
        if any(pattern.search(name) for name in names):
            return describe if isinstance(describe, str) else describe(tensors)
    return None


def _family(tensors: Tensors) -> str:
    """As "SD 1.x" with its width of text, or that width alone; empty without cross-attention."""
    width = _second_extent(tensors, CROSS_KEY)
    if width is None:
        return ""
    return f"{FAMILIES.get(width, 'unknown')} (cross-attention {width})"


def _unet(tensors: Tensors) -> str:
    channels = _second_extent(tensors, FIRST_CONV)
    use = "" if channels is None else USUAL_CHANNELS.get(channels, f" with {channels} input channels")
    return f"the UNet{use} of {_family(tensors) or 'a model without text'}"


def _of_family(kind: str) -> Callable[[Tensors], str]:
    def describe(tensors: Tensors) -> str:
        family = _family(tensors)
        return f"{kind} for {family}" if family else kind

    return describe


def _text_encoder(tensors: Tensors) -> str:
    width = _second_extent(tensors, r"token_embedding\.weight$")
    return f"a CLIP text encoder ({TEXT_TOWERS.get(width or 0, f'width {width}')})"


def _second_extent(tensors: Tensors, mark: str) -> int | None:
    shapes = (tensors.shape(name) for name in tensors.names() if re.search(mark, name))
    return next((shape[1] for shape in shapes if len(shape) > 1), None)


# A pattern that some name of the file matches -> what the file is. The first that matches counts.
TELLTALES: tuple[tuple[str, str | Callable[[Tensors], str]], ...] = (
    (r"(^|\.)hada_w", "a LoHa"),
    (r"(^|\.)lokr_w", "a LoKr"),
    (r"(^|[._])lora[._]|\.lora_[AB]\.|^lora_unet_", "a LoRA"),
    (r"^postfuse_module\.", _of_family("a subject model of FastComposer or Face-diffuser (SDM)")),
    (r"^unet\.(conv_in|down_blocks)\.", _of_family("a whole model in FastComposer's naming, as Face-diffuser's TDM,")),
    (r"^control_model\.|^input_hint_block\.", _of_family("a ControlNet in the naming of a single file")),
    (r"^model\.diffusion_model\.", _of_family("a whole LDM checkpoint")),
    (r"^(input|output)_blocks\.", _of_family("a UNet in the naming of a single file")),
    (r"^controlnet_cond_embedding\.", _of_family("a ControlNet")),
    (r"^image_proj\.|^ip_adapter\.", "an IP-Adapter"),
    (r"^(adapter\.)?body\.0\.", "a T2I-Adapter"),
    (r"^(model\.)?(diffusion_model\.)?double_blocks\.", "a Flux model"),
    (r"joint_blocks\.|\.add_q_proj\.", "an SD 3 or other multimodal transformer"),
    (r"^up_blocks\.\d+\.resnets\.0\.time_emb_proj\.", _unet),
    (r"^(first_stage_model\.)?decoder\.up\.\d", "an autoencoder in the naming of a single file"),
    (r"^decoder\.up_blocks\.", "an autoencoder"),
    (r"vision_model\.|patch_embedding\.weight$", "a CLIP image encoder"),
    (r"(^|\.)token_embedding\.weight$", _text_encoder),
    (r"^(cond_stage_model\.model\.)?transformer\.resblocks\.", "an OpenCLIP text encoder"),
    (r"^(string_to_param|emb_params|clip_[lg]$)", "a textual inversion"),
)
