"""Model folders of diffusers and transformers: `config.json` and the files with the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fairhuman_jax.files import read_json
from fairhuman_jax.weights.tensors import shards

# Names without variant, in the order they are looked for: safetensors before pickles.
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
DEFAULT_VARIANT = "fp16"  # what is taken where full precision is not there
WEIGHT_LIKE = re.compile(r"\.(safetensors|bin|ckpt|pt|pth|msgpack|gguf)(\.index\b.*)?$")
EXPECTED = "a model folder holds config.json and *.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises: FileNotFoundError for what is missing, and what the folder may be instead.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {EXPECTED}")
    if not (folder / "config.json").is_file():
        if (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder} is a pipeline; name one of its networks, as in subfolder='unet'")
        raise FileNotFoundError(f"{folder} has no config.json; {EXPECTED}")
    return read_json(folder / "config.json")


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files with the weights of a model folder: one, or the shards of one model.

    variant None: full precision, or fp16 where that is all there is. Raises: FileNotFoundError for nothing of the kind,
    or not of that variant, with what there is; an index that names files elsewhere.
    """
    path = folder / choose_weights([path.name for path in folder.iterdir()], variant, str(folder))
    return shards(path) if path.suffix == ".json" else [path]


def choose_weights(names: Iterable[str], variant: str | None, label: str) -> str:
    """Of the file names in one folder, the one that holds the weights or is the index of their shards.

    Safetensors come before pickles and a whole file before shards. Raises: FileNotFoundError for see `weight_files`;
    `label` is its name.
    """
    names = set(names)
    for kind in ("", f".{DEFAULT_VARIANT}") if variant is None else (f".{variant}",):
        for name in WEIGHTS:
            stem, ending = name.rsplit(".", 1)
            for candidate in (f"{stem}{kind}.{ending}", f"{name}.index{kind}.json"):
                if candidate in names:
                    return candidate
    held = sorted(name for name in names if WEIGHT_LIKE.search(name))
    wanted = f"weights of the variant {variant!r}" if variant else " and no ".join(WEIGHTS[:2])
    raise FileNotFoundError(f"{label} has no {wanted}; it holds {', '.join(held) or 'no weights'}")


def pipeline_parts(index: dict[str, Any], label: str) -> dict[str, list[str]]:
    """What a `model_index.json` names of what is read: {"networks", "text_encoders", "tokenizers"}.

    A part that is absent stands there as null, as the first text encoder of the SDXL refiner does. Raises: ValueError
    for no unet, vae, scheduler or text encoder; a text encoder without its tokenizer, or the reverse.
    """
    present = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    encoders, tokenizers = (
        [name for name in (kind, f"{kind}_2") if name in present] for kind in ("text_encoder", "tokenizer")
    )
    needed = ["unet", "vae", "scheduler", *[name.replace("tokenizer", "text_encoder") for name in tokenizers]]
    needed += [name.replace("text_encoder", "tokenizer") for name in encoders or ["text_encoder"]]
    needed += encoders or ["text_encoder"]
    for name in needed:
        if name not in present:
            raise ValueError(f"{label}/model_index.json ({index.get('_class_name')}) has no {name}")
    return {"networks": ["unet", "vae"], "text_encoders": encoders, "tokenizers": tokenizers}
