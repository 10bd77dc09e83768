"""Face-diffuser's subject model on the shipped people model: pictures of drawn people become part of the text.

python train.py configs/people_sdm.py

Minutes on a CPU, no download; the image encoder is that of people_identity.py. A person's pictures show the same body,
face and hair as the scene does, in other clothes, poses and light.
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.data.subject_transforms import SubjectConfig
from fairhuman_jax.systems.facediffuser.subject_model import SubjectModelConfig
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

# What people look like is for their pictures to tell. These are others than the scene, so nothing can be copied, and
# colours stay as they are.
PEOPLE = SubjectConfig(
    max_objects=2, object_resolution=48, identities=768, references=4, pairs=0.25, augment=False, looks=False
)
PROMPTS = (
    "a photo of a woman <|image|> wearing a red t-shirt, white background",
    "a photo of a man <|image|> wearing a green sweater, dark background",
    "a photo of a man <|image|> and a woman <|image|>",
    "a photo of a woman <|image|> and a woman <|image|>",
)


def config() -> RunConfig:
    """Denoising and localization are summed.

    The encoder hardly moves and the fusion slowly: at the denoiser's rate, as long as it does not listen, both learn
    to say the same of everybody.
    """
    return RunConfig(
        system=SubjectModelConfig(
            base="people",
            image_encoder="people",
            image_layers=1,
            max_objects=2,
            localization_weight=0.02,
            localization_normalize=True,
        ),
        output="runs/people_sdm",
        data=DataConfig(length=3_072, held_out=128, resolution=64, seed=3, subjects=PEOPLE),
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            schedule="cosine",
            warmup_steps=20,
            rate_scales=(("image_encoder", 0.1), ("postfuse", 0.3)),
        ),
        fair=FairConfig(method="sum"),
        train=TrainConfig(steps=600, batch_size=16, ema_decay=0.98, checkpoint_every=100),
        preview=PreviewConfig(prompts=PROMPTS, steps=30, guidance=3.0),
    )
