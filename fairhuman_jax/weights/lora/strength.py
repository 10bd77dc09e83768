"""The strength alpha / rank of each layer, where a LoRA file or the settings beside it give it.

Source of the rules: peft's LoraConfig (lora_alpha, alpha_pattern, use_rslora); alpha / sqrt(rank): Kalajdzievski 2023.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from fairhuman_jax.files import read_json
from fairhuman_jax.weights.tensors import Tensors

SETTINGS_NAME = "adapter_config.json"
HEADER_KEY = "lora_adapter_metadata"


def adapter_settings(tensors: Tensors, path: Path, component: str) -> dict[str, Any]:
    """peft's settings for a component: from the header that newer diffusers writes, or from the file's neighbour.

    Raises: ValueError, one line each: settings that cannot be read, or of an adapter that is no plain LoRA.
    """
    if HEADER_KEY in tensors.metadata:
        prefix = f"{component}."
        try:
            header = json.loads(tensors.metadata[HEADER_KEY])
            settings = {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}
        except (AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: its header's {HEADER_KEY} is no JSON object") from error
    elif (beside := path.with_name(SETTINGS_NAME)).is_file():
        settings = read_json(beside)
    else:
        return {}
    kind = str(settings.get("peft_type") or "LORA")
    if kind != "LORA" or settings.get("use_dora"):
        raise ValueError(f"{path} is a {'DoRA' if kind == 'LORA' else kind} adapter; only plain LoRA is read")
    return settings


def strength(settings: dict[str, Any], layer: str, rank: int, alpha: float | None) -> float:
    """The factor of `up`: the layer's own alpha / rank, else what `settings` say of it, else 1."""
    if alpha is not None:
        return alpha / rank
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
