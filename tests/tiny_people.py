"""A tiny subject model, a batch for it, and the scene model beside it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from tiny_models import SIZE, TOKENS, WIDTH, random_params, small_pipeline

from fairhuman_jax.models import CLIPVision
from fairhuman_jax.systems.facediffuser.fusion import SCENE, FaceDiffuser
from fairhuman_jax.systems.facediffuser.subject_model import SubjectModel, SubjectModelConfig
from fairhuman_jax.weights import MARKER

# A standing person on 512 x 512, COCO-17.
COCO = np.array(
    [
        (256, 60), (270, 50), (242, 50), (290, 60), (222, 60), (310, 130), (202, 130), (340, 220), (172, 220),
        (360, 300), (152, 300), (290, 300), (222, 300), (295, 400), (217, 400), (300, 490), (212, 490),
    ],
    np.float32,
)  # fmt: skip

SLOTS, PICTURE = 2, 12
VISION = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": WIDTH,
}
ONE, TWO = f"a person{MARKER} waves", f"a person {MARKER} two face{MARKER}"
assert TOKENS == 6


def subject_model(**changes) -> SubjectModel:
    """Around Stable Diffusion 1's tiny twin; one block is watched, of three with cross-attention."""
    settings = {"image_layers": 1, "max_objects": SLOTS, "localization_blocks": 1} | changes
    encoder = CLIPVision.from_config(VISION)
    return SubjectModelConfig(**settings).attach(small_pipeline(), encoder, {"image_encoder": encoder_params()})


@functools.cache
def encoder_params():
    return random_params(CLIPVision.from_config(VISION), 9)


def batch(system: SubjectModel, captions=(ONE, TWO, "two hands", "")) -> dict:
    """A sample for each caption, with pictures and masks of its subjects."""
    rng = np.random.default_rng(3)
    tokens = system.tokenize(list(captions))
    count = np.array([caption.count(MARKER) for caption in captions], np.int32)
    there = np.arange(SLOTS) < count[:, None]
    masks = np.zeros((len(captions), SLOTS, SIZE, SIZE), np.uint8)
    masks[:, 0, :, : SIZE // 2], masks[:, 1, 4:, SIZE // 2 :] = 1, 1
    pictures = rng.integers(0, 256, (len(captions), SLOTS, PICTURE, PICTURE, 3)).astype(np.uint8)
    return tokens | {
        "image": rng.integers(0, 256, (len(captions), SIZE, SIZE, 3)).astype(np.uint8),
        "object_pixels": pictures * there[..., None, None, None],
        "object_masks": masks * there[..., None, None],
        "num_objects": count,
        "position": np.arange(len(captions), dtype=np.int32),
    }


@functools.cache
def face_diffuser() -> tuple[FaceDiffuser, dict]:
    """Both models, with other denoisers than each other, and all their parameters."""
    system = subject_model()
    params = system.joined(*system.init(jax.random.key(0)))
    params |= {SCENE: random_params(system.pipeline.unet, 21)}
    whole = {field.name: getattr(system, field.name) for field in dataclasses.fields(FaceDiffuser)}
    return FaceDiffuser(**whole), params
