"""Models of published size with random weights, written to disk tensor by tensor: for the full-size benchmarks.

    python benchmarks/random_models.py SDXL_UNET folder     # float16, any name of fairhuman_jax/models/presets.py
    python benchmarks/random_models.py SDXL folder          # the whole pipeline, 6.5 GiB

Linear and convolution weights are normal with variance 1 / fan-in, norms near 1, biases small: signals keep about unit
size through the depth of a network, as they do in a trained one. The same name gives the same file.
"""

from __future__ import annotations

import argparse
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fairhuman_jax.files import read_json, write_json
from fairhuman_jax.models import presets
from fairhuman_jax.weights import expected_params
from fairhuman_jax.weights.diffusers import NETWORKS, class_name
from fairhuman_jax.weights.keys import leaves
from fairhuman_jax.weights.safetensors_io import write_tensors
from fairhuman_jax.weights.shapes import SDXL
from fairhuman_jax.weights.shipped import shipped

SDXL_PARTS = {name: config for name, config in SDXL.items() if name != "scheduler"}
TOKENS = 77  # CLIP's, where the shipped tokenizer cuts earlier


def write_random_model(config: dict[str, Any], folder: Path, dtype: str = "float16") -> None:
    """A folder that both diffusers or transformers and this package load."""
    module = NETWORKS[class_name(config, folder)].from_config(config)
    kinds = {name: (leaf.path[-1], leaf.shape) for leaf in leaves(expected_params(module)) for name in leaf.names}

    def read(name: str) -> np.ndarray:
        kind, shape = kinds[name]
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        if kind == "scale":
            return 1.0 + 0.1 * values
        return values / np.sqrt(np.prod(shape[1:]) if kind == "kernel" else 100.0)

    stem = "model" if library_and_class(config)[0] == "transformers" else "diffusion_pytorch_model"
    shapes = {name: shape for name, (_, shape) in kinds.items()}
    write_tensors(folder / f"{stem}.safetensors", shapes, jnp.dtype(dtype), read)
    write_json(folder / "config.json", module.to_config())


def library_and_class(config: dict[str, Any]) -> tuple[str, str]:
    """What the peers load a network of this config with, as `model_index.json` names it."""
    if "_class_name" in config:
        return "diffusers", config["_class_name"]
    return "transformers", config["architectures"][0]


def write_random_sdxl(folder: Path, dtype: str = "float16") -> None:
    """A pipeline's folder that both diffusers and this package load, with the shipped tokenizer (a smaller table)."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    for name, config in SDXL_PARTS.items():
        write_random_model(config, folder / name, dtype)
        index[name] = library_and_class(config)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(shipped("people-base") / "tokenizer", folder / name, dirs_exist_ok=True)
        settings = read_json(folder / name / "tokenizer_config.json")
        write_json(folder / name / "tokenizer_config.json", settings | {"model_max_length": TOKENS})
        index[name] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    scheduler = SDXL["scheduler"] | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32", "bfloat16"])
    options = parser.parse_args()
    if options.preset == "SDXL":
        write_random_sdxl(options.folder, options.dtype)
    else:
        write_random_model(getattr(presets, options.preset), options.folder, options.dtype)


if __name__ == "__main__":
    main()
