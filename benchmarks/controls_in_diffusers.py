"""Draws with exported ControlNets and T2I-Adapters in diffusers: one sheet of conditions, pictures and the truth.

    python train.py configs/people_controlnet.py
    python train.py configs/people_t2i_adapter.py
    python benchmarks/controls_in_diffusers.py --out controls.png

Rows: the conditions of held-out people, the base alone, the base with the ControlNet, the base with the T2I-Adapter
(the same captions and noise in all three), the pictures that the conditions were made from.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from fairhuman_jax.config import load_config
from fairhuman_jax.training.datasets import open_data

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "fairhuman_jax" / "assets" / "people-base"
STEPS, GUIDANCE, SHOWN = 30, 3.0, 128


def row(pictures: list[np.ndarray]) -> np.ndarray:
    """uint8 pictures side by side, each SHOWN pixels wide."""
    shown = [Image.fromarray(picture).resize((SHOWN, SHOWN), Image.Resampling.NEAREST) for picture in pictures]
    return np.concatenate([np.asarray(picture) for picture in shown], axis=1)


def draw(pipeline: Any, samples: list[dict[str, Any]], conditioned: bool) -> np.ndarray:
    """The row of one pipeline: each caption (with its condition) from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for sample in samples:
        condition = {"image": Image.fromarray(sample["conditioning_image"])} if conditioned else {}
        height, width = sample["image"].shape[:2]
        noise = torch.Generator().manual_seed(1)
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": height, "width": width}
        (picture,) = pipeline(sample["caption"], generator=noise, **settings, **condition).images
        pictures.append(np.asarray(picture))
    return row(pictures)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controlnet", default="runs/people_controlnet/export")
    parser.add_argument("--adapter", default="runs/people_t2i_adapter/export")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 5, 9, 11, 14, 17, 20, 23], help="held-out ones")
    parser.add_argument("--out", type=Path, default=Path("controls.png"))
    options = parser.parse_args()

    _, held_out = open_data(load_config(ROOT / "configs" / "people_controlnet.py").data)
    samples: list[Any] = [held_out[index] for index in options.samples]
    load: dict[str, Any] = {"torch_dtype": torch.float32}
    base = diffusers.StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, **load)
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    parts["requires_safety_checker"] = False
    controlnet = diffusers.ControlNetModel.from_pretrained(options.controlnet, **load)
    adapter = diffusers.T2IAdapter.from_pretrained(options.adapter, **load)
    rows = [
        row([sample["conditioning_image"] for sample in samples]),
        draw(base, samples, conditioned=False),
        draw(diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=controlnet), samples, conditioned=True),
        draw(diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter), samples, conditioned=True),
        row([sample["image"] for sample in samples]),
    ]
    Image.fromarray(np.concatenate(rows)).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
