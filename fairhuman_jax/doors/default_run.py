"""The default run: a fair LoRA on the shipped people model, on whatever device there is.

python train.py
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import LoraTrainable
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PROMPTS = (
    "an upper body photo of a young woman with long blond hair wearing a red t-shirt, waving, smiling, "
    "white background",
    "a close-up photo of a young man with buzzed black hair wearing a yellow t-shirt, showing an open hand, "
    "grey background",
    "a portrait of an old man with short grey hair wearing a white shirt, looking at the camera, beige background",
    "an upper body photo of a woman with bob brown hair wearing a blue sweater, showing a peace sign, smiling, "
    "pink background",
)


def config() -> RunConfig:
    """Three objectives (global, face, hand) under the fair rule."""
    return RunConfig(
        system=FairHumanConfig(base="people", trainable=LoraTrainable(rank=16)),
        output="runs/people_lora",
        data=DataConfig(length=1_536, held_out=128, resolution=64, seed=1),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=10),
        train=TrainConfig(steps=120, batch_size=16, ema_decay=0.98, checkpoint_every=40),
        preview=PreviewConfig(prompts=PROMPTS, steps=30, guidance=3.0),
    )
