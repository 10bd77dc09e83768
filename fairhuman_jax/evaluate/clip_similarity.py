"""How well pictures fit their captions: 100 times CLIP's cosine similarity, at least 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fairhuman_jax.evaluate.batching import in_batches
from fairhuman_jax.models import CLIPText, CLIPVision
from fairhuman_jax.models.clip_vision import PIXEL_MEAN, PIXEL_STD
from fairhuman_jax.weights import load_tokenizer, params_from, tokenize
from fairhuman_jax.weights.folders import read_config, weight_files
from fairhuman_jax.weights.keys import TOWERS
from fairhuman_jax.weights.ldm.views import Slot, View
from fairhuman_jax.weights.tensors import Tensors, open_tensors

PyTree = Any


@dataclass(frozen=True, eq=False)
class CLIP:
    """Both encoders with their projections, {"text", "vision"} of their parameters, and the tokenizer."""

    text: CLIPText
    vision: CLIPVision
    params: dict[str, PyTree]
    tokenizer: Any


def load_clip(folder: str | Path) -> CLIP:
    """A whole CLIP out of a local folder of transformers' `CLIPModel`, such as openai/clip-vit-base-patch16, float32.

    Raises: ValueError, one line each: no such folder; a config that is not of a whole CLIP; tensors missing (a
    projection, say) or of the wrong shape; no tokenizer, or one without a length limit.
    """
    folder = Path(folder)
    config = read_config(folder)
    parts: dict[str, Any] = {key: config.get(f"{key}_config") for key in ("text", "vision")}
    if not all(isinstance(part, dict) for part in parts.values()):
        name = (config.get("architectures") or [config.get("model_type")])[0]
        raise ValueError(f"{folder}/config.json is for {name}; needs a CLIPModel, with text_config and vision_config")
    width = config.get("projection_dim", 512)
    settings = {
        key: {**part, "projection_dim": width, "architectures": [f"CLIP{key.title()}ModelWithProjection"]}
        for key, part in parts.items()
    }
    text, vision = CLIPText.from_config(settings["text"]), CLIPVision.from_config(settings["vision"])
    tensors = open_tensors(weight_files(folder))
    params = {
        key: params_from(_tower(tensors, type(module).__name__), module, jnp.float32)
        for key, module in (("text", text), ("vision", vision))
    }
    return CLIP(text, vision, params, load_tokenizer(folder))


def _tower(tensors: Tensors, network: str) -> View:
    """The tensors of one encoder and its projection."""
    return View(tensors, {name: Slot((name,)) for name in tensors.names() if name.startswith(TOWERS[network])})


def clip_similarities(
    clip: CLIP, pictures: Iterable[np.ndarray], captions: Sequence[str], batch_size: int = 16
) -> np.ndarray:
    """100 max(0, cos(picture, caption)) of each pair, float32 [N]; pictures uint8 [H, W, 3] of any sizes.

    Captions are cut at the tokenizer's limit (77). Source: CLIPScore, Hessel et al. 2021, with 100 in place of 2.5.
    Raises: ValueError for unequal numbers; no pair at all; values that are not finite, which a broken model gives.
    """

    def cosines(params: dict[str, PyTree], pixels: jax.Array, ids: jax.Array) -> jax.Array:
        vision: Any = clip.vision.apply({"params": params["vision"]}, pixels)
        text: Any = clip.text.apply({"params": params["text"]}, ids)
        pair = (vision["image_embeds"], text["pooled"])
        seen, said = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in pair)
        return 100.0 * jnp.maximum((seen * said).sum(-1), 0.0)

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        ids = tokenize(clip.tokenizer, captions) if captions else []
        for picture, row in zip_longest(pictures, ids):
            if picture is None or row is None:
                raise ValueError(f"CLIP similarity: another number of pictures than of captions ({len(captions)})")
            yield clip_pixels(picture, clip.vision.config["image_size"]), row

    run = jax.jit(cosines)
    found = in_batches(lambda pixels, ids: run(clip.params, pixels, ids), rows(), batch_size)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise ValueError(f"CLIP similarity: {len(bad)} of {len(found)} are not finite, first that of pair {bad[0]}")
    return found


def clip_pixels(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] as CLIP sees it, float32 [side, side, 3]: the shorter side brought to `side` by
    Pillow's bicubic filter, the middle of the longer one, normalised by CLIP's mean and deviation.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"CLIP: needs uint8 [H, W, 3], found {picture.dtype} {list(picture.shape)}")
    height, width = (max(side, side * length // min(picture.shape[:2])) for length in picture.shape[:2])
    resized = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    colours = resized[top : top + side, left : left + side].astype(np.float32) / 255.0
    return (colours - PIXEL_MEAN) / PIXEL_STD
