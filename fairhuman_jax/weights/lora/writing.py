"""LoRA files out, in diffusers' naming or in kohya's, which ComfyUI and the A1111 web UI read as well."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fairhuman_jax.weights.keys import is_stacked, module_names
from fairhuman_jax.weights.lora.names import COMPONENTS, FACTORS, TEXT, TEXT_2, UNET
from fairhuman_jax.weights.lora.strength import HEADER_KEY
from fairhuman_jax.weights.safetensors_io import write_tensors

PyTree = Any
FILE_NAMES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "kohya_lora.safetensors"}
INFIX = {UNET: "lora", TEXT: "lora_linear_layer", TEXT_2: "lora_linear_layer"}
DTYPES = ("float32", "float16", "bfloat16")
# Text width -> how kohya's headers call the base.
KOHYA_BASES = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


class Pair(NamedTuple):
    """The factors of one layer, [in, r] or [h, w, in, r] and [r, out]."""

    component: str
    layer: str
    down: np.ndarray
    up: np.ndarray


def save_lora(
    loras: Mapping[str, PyTree],
    folder: str | Path,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dialect: str = "diffusers",
    dtype: str = "float32",
) -> Path:
    """Write the trees `loras` by component (unet, text_encoder, text_encoder_2); returns the file.

    dialect: `diffusers` (pytorch_lora_weights.safetensors) or `kohya` (kohya_lora.safetensors); a `folder` that ends in
    .safetensors is the file itself. The strength `alpha / rank` (1 when alpha is None) is multiplied into `up` for
    diffusers, so that every reader applies it without being told, and stands in `.alpha` for kohya. dtype: float32,
    float16, bfloat16. Raises: ValueError for an unknown component, dialect or dtype; alpha without rank; values that do
    not fit into `dtype`.
    """
    if dialect not in FILE_NAMES:
        raise ValueError(f"save_lora: unknown dialect {dialect!r}; known: {', '.join(FILE_NAMES)}")
    if dtype not in DTYPES:
        raise ValueError(f"save_lora: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if unknown := sorted(set(loras) - set(COMPONENTS)):
        raise ValueError(f"save_lora: unknown component {unknown[0]!r}; known: {', '.join(COMPONENTS)}")
    if alpha is not None and rank is None:
        raise ValueError("save_lora: alpha has a meaning only with the rank it was trained at")
    strength = 1.0 if alpha is None or rank is None else alpha / rank
    pairs = [pair for component, lora in loras.items() for pair in _pairs(component, lora)]
    tensors, metadata = (_diffusers if dialect == "diffusers" else _kohya)(pairs, strength)
    if rank is not None:
        metadata["rank"] = str(rank)
    folder = Path(folder)
    path = folder if folder.suffix == ".safetensors" else folder / FILE_NAMES[dialect]
    kinds = {name: jnp.dtype(dtype if array.ndim else "float32") for name, array in tensors.items()}
    write_tensors(path, {name: array.shape for name, array in tensors.items()}, kinds, tensors.__getitem__, metadata)
    return path


def _pairs(component: str, lora: PyTree) -> Iterator[Pair]:
    """Each adapted layer's factors, stacks taken apart."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(lora)
    for module in dict.fromkeys(path[:-1] for path in flat):
        down, up = (np.asarray(flat[(*module, factor)], np.float32) for factor in FACTORS)
        stacked = is_stacked(module)
        for i, layer in enumerate(module_names(module, len(down) if stacked else None)):
            yield Pair(component, layer, *((down[i], up[i]) if stacked else (down, up)))


def _diffusers(pairs: list[Pair], strength: float) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    tensors = {}
    for pair in pairs:
        name = f"{pair.component}.{pair.layer}.{INFIX[pair.component]}"
        down, up = _to_torch(pair)
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up if strength == 1.0 else up * strength}
    return tensors, _adapter_metadata(pairs)


def _kohya(pairs: list[Pair], strength: float) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    width = next((pair.down.shape[-2] for pair in pairs if pair.layer.endswith("attn2.to_k")), None)
    base = KOHYA_BASES.get(width or 0)
    first = "lora_te1" if base == KOHYA_BASES[2048] or any(pair.component == TEXT_2 for pair in pairs) else "lora_te"
    prefixes = {UNET: "lora_unet", TEXT: first, TEXT_2: "lora_te2"}
    tensors = {}
    for pair in pairs:
        name = f"{prefixes[pair.component]}_{pair.layer.replace('.', '_')}"
        down, up = _to_torch(pair)
        alpha = np.asarray(strength * pair.up.shape[0], np.float32)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    metadata = {"ss_network_module": "networks.lora"}
    if base:
        metadata |= {"ss_base_model_version": base, "ss_v2": str(base == KOHYA_BASES[1024])}
    return tensors, metadata


def _to_torch(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    if pair.down.ndim == 2:
        return pair.down.T, pair.up.T
    return pair.down.transpose(3, 2, 0, 1), pair.up.T[:, :, None, None]


def _adapter_metadata(pairs: list[Pair]) -> dict[str, str]:
    """peft's settings where layers differ in rank: without them some readers scale all by one layer's rank."""
    settings: dict[str, Any] = {}
    for component in dict.fromkeys(pair.component for pair in pairs):
        # Text encoders carry the `text_model.` of their names in some versions of transformers only.
        ranks = {p.layer.removeprefix("text_model."): p.up.shape[0] for p in pairs if p.component == component}
        (usual, count), *_ = Counter(ranks.values()).most_common()
        if count == len(ranks):
            continue
        others = {layer: rank for layer, rank in ranks.items() if rank != usual}
        settings |= {
            f"{component}.{key}": value
            for key, value in (
                ("r", usual),
                ("lora_alpha", usual),
                ("rank_pattern", others),
                ("alpha_pattern", others),
                ("target_modules", sorted(ranks)),
            )
        }
    return {HEADER_KEY: json.dumps(settings, sort_keys=True)} if settings else {}
