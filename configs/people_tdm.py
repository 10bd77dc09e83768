"""Face-diffuser's scene model on the shipped people model: captions alone, scenes of one and of two people.

python train.py configs/people_tdm.py

Minutes on a CPU, no download; its data are those of people_sdm.py.
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.data.subject_transforms import SubjectConfig
from fairhuman_jax.systems.facediffuser.scene_model import SceneModelConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PEOPLE = SubjectConfig(max_objects=2, object_resolution=48, identities=768, references=4, pairs=0.25, augment=False)
PROMPTS = (
    "a photo of a woman wearing a red t-shirt, white background",
    "a photo of a man wearing a green sweater, dark background",
    "a photo of a man and a woman",
    "a photo of a woman and a woman",
)


def config() -> RunConfig:
    """All of the denoiser, at a rate that keeps what it knows of single people."""
    return RunConfig(
        system=SceneModelConfig(base="people"),
        output="runs/people_tdm",
        data=DataConfig(length=3_072, held_out=128, resolution=64, seed=3, subjects=PEOPLE),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=20),
        train=TrainConfig(steps=400, batch_size=16, ema_decay=0.98, checkpoint_every=100),
        preview=PreviewConfig(prompts=PROMPTS, steps=30, guidance=3.0),
    )
