"""Networks of published size against torch, in float32, on random weights: the table of docs/benchmarks.md.

    python benchmarks/full_size_parity.py                          # all of them, one after the other
    python benchmarks/full_size_parity.py SDXL_UNET SD_VAE         # some, by name in fairhuman_jax/models/presets.py

Each network is written once in float16 and loaded by diffusers or transformers and by this package in processes of
their own, so that only one copy is in memory: SDXL's UNet needs 12 GiB and 5 GiB of disk. Latents are those of 256-px
pictures. The error is the largest difference over the standard deviation of torch's output, the worst of all outputs;
above 2e-4 the command fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from random_models import write_random_model
from safetensors import safe_open

from fairhuman_jax.models import presets

NETWORKS = (
    "SD15_UNET",
    "SD21_UNET",
    "SDXL_UNET",
    "SDXL_REFINER_UNET",
    "SD15_CONTROLNET",
    "SDXL_CONTROLNET",
    "SDXL_T2I_ADAPTER",
    "SD_VAE",
    "SDXL_VAE",
    "SD15_TEXT",
    "SD21_TEXT",
    "SDXL_TEXT_2",
    "CLIP_L_VISION",
)
TOLERANCE = 2e-4
PIXELS, LATENTS, TOKENS = 256, 32, 77


def inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random inputs of a network, in our layout."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    kind = kind_of(config)
    if kind == "CLIPVisionModel":
        return {"pixels": normal(1, 224, 224, 3)}
    if kind == "CLIPTextModel":
        ids = rng.integers(0, 49406, (2, TOKENS))
        ids[:, 0], ids[0, 9:], ids[1, 40:] = 49406, 49407, 49407
        return {"ids": ids.astype(np.int32)}
    picture = rng.random((1, PIXELS, PIXELS, 3), np.float32)
    if kind == "AutoencoderKL":
        return {"image": 2.0 * picture - 1.0, "latents": normal(1, LATENTS, LATENTS, config["latent_channels"])}
    if kind == "T2IAdapter":
        return {"condition": picture}
    width = config["cross_attention_dim"]
    found = {
        "latents": normal(1, LATENTS, LATENTS, config["in_channels"]),
        "timesteps": np.array([481], np.int32),
        "text": normal(1, TOKENS, width),
    }
    if kind == "ControlNetModel":
        found["condition"] = picture
    if config.get("addition_embed_type"):
        ids = (config["projection_class_embeddings_input_dim"] - 1280) // config["addition_time_embed_dim"]
        found |= {"text_embeds": normal(1, 1280), "time_ids": np.full((1, ids), 256.0, np.float32)}
    return found


def kind_of(config: dict[str, Any]) -> str:
    """The class of a config, with or without projection alike."""
    name = config.get("_class_name") or config["architectures"][0]
    return name.removesuffix("WithProjection")


def run_ours(folder: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of this package's network, by name, images and latents in torch's layout."""
    import jax

    from fairhuman_jax.weights import load_model

    module, params = load_model(folder, dtype="float32")
    network: Any = module

    def call(*arguments: Any, **options: Any) -> Any:
        method = options.pop("method", None)
        program = jax.jit(lambda p, a, o: network.apply({"params": p}, *a, **o, method=method))
        return program(params, arguments, options)

    kind = type(module).__name__
    if kind in ("CLIPText", "CLIPVision"):
        outputs = dict(call(*given.values()))
    elif kind == "AutoencoderKL":
        mean, logvar = call(given["image"], method=network.encode)
        outputs = {"mean": mean, "logvar": logvar, "image": call(given["latents"], method=network.decode)}
    elif kind == "T2IAdapter":
        outputs = {f"feature {i}": feature for i, feature in enumerate(call(given["condition"]))}
    else:
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given} or None
        main = (given["latents"], given["timesteps"], given["text"])
        if kind == "ControlNet":
            down, mid = call(*main, given["condition"], 1.0, added)
            outputs = {f"residual {i}": array for i, array in enumerate((*down, mid))}
        else:
            outputs = {"prediction": call(*main, added)}
    arrays = {name: np.asarray(array) for name, array in outputs.items()}
    return {name: array.transpose(0, 3, 1, 2) if array.ndim == 4 else array for name, array in arrays.items()}


def run_torch(folder: Path, config: dict[str, Any], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of diffusers' or transformers' network under the names of `run_ours`."""
    import diffusers
    import torch
    import transformers

    name = config.get("_class_name") or config["architectures"][0]
    library = diffusers if "_class_name" in config else transformers
    network: Any = getattr(library, name).from_pretrained(folder, torch_dtype=torch.float32)
    tensors = {
        key: torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array))
        for key, array in given.items()
    }
    kind = kind_of(config)
    with torch.no_grad():
        if kind in ("CLIPTextModel", "CLIPVisionModel"):
            first = next(iter(tensors.values()))
            output = network(first.long() if kind == "CLIPTextModel" else first, output_hidden_states=True)
            outputs = {"last_hidden_state": output.last_hidden_state, "penultimate": output.hidden_states[-2]}
            if not name.endswith("WithProjection"):
                outputs["pooled"] = output.pooler_output
            elif kind == "CLIPTextModel":
                outputs["pooled"] = output.text_embeds
            else:
                outputs["image_embeds"] = output.image_embeds
        elif kind == "AutoencoderKL":
            posterior = network.encode(tensors["image"]).latent_dist
            image = network.decode(tensors["latents"]).sample
            outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "image": image}
        elif kind == "T2IAdapter":
            outputs = {f"feature {i}": feature for i, feature in enumerate(network(tensors["condition"]))}
        else:
            added = {key: tensors[key] for key in ("text_embeds", "time_ids") if key in tensors} or None
            options = {"added_cond_kwargs": added, "return_dict": False}
            main = (tensors["latents"], tensors["timesteps"], tensors["text"])
            if kind == "ControlNetModel":
                down, mid = network(*main, tensors["condition"], **options)
                outputs = {f"residual {i}": array for i, array in enumerate((*down, mid))}
            else:
                outputs = {"prediction": network(*main, **options)[0]}
    return {key: array.numpy() for key, array in outputs.items()}


def compare(preset: str, scratch: Path) -> dict[str, str]:
    """One row of the table."""
    config = getattr(presets, preset)
    folder = scratch / preset
    write_random_model(config, folder)
    for side in ("torch", "ours"):
        subprocess.run([sys.executable, __file__, preset, "--side", side, "--folder", str(folder)], check=True)
    ours, theirs = (dict(np.load(folder / f"{side}.npz")) for side in ("ours", "torch"))
    shared = theirs.keys() & ours.keys()
    assert len(shared) == len(theirs), f"{preset}: {sorted(theirs)} against {sorted(ours)}"
    errors = {key: float(np.abs(ours[key] - theirs[key]).max() / theirs[key].std()) for key in shared}
    worst = max(errors, key=errors.__getitem__)
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, framework="numpy") as file:
        sizes = [np.prod(file.get_slice(key).get_shape()) for key in list(file.keys())]
    for path in folder.iterdir():
        path.unlink()
    return {
        "network": preset,
        "parameters": f"{int(sum(sizes)):,}",
        "tensors": str(len(sizes)),
        "worst output": worst,
        "max error / std": f"{errors[worst]:.1e}",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--scratch", type=Path, default=None, help="where the models are written")
    parser.add_argument("--side", choices=["ours", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        config = getattr(presets, options.networks[0])
        given = inputs(config)
        run = run_ours(options.folder, given) if options.side == "ours" else run_torch(options.folder, config, given)
        np.savez(options.folder / f"{options.side}.npz", **run)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for preset in options.networks:
            rows.append(compare(preset, Path(scratch)))
            print("| " + " | ".join(rows[-1].values()) + " |", flush=True)
    print("\n| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    print("\n".join("| " + " | ".join(row.values()) + " |" for row in rows))
    if any(float(row["max error / std"]) > TOLERANCE for row in rows):
        sys.exit(f"above {TOLERANCE}")


if __name__ == "__main__":
    main()
