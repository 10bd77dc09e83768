"""HumanSD on the shipped people model: it reads skeletons as latents. Minutes on a CPU, no download.

In these 400 steps it does not learn to follow them (docs/benchmarks.md).

python train.py configs/people_humansd.py

Other losses: --set system.loss=reference (as published), fair (the pose term as a second objective) or plain.
"""

from __future__ import annotations

from fairhuman_jax.systems.contract import PreviewConfig
from fairhuman_jax.systems.humansd import HumanSDConfig
from fairhuman_jax.training.config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

# They leave pose and framing to the skeletons of the held-out pictures.
PROMPTS = (
    "a photo of a woman with long blond hair wearing a red t-shirt, white background",
    "a photo of a man with short black hair wearing a green sweater, dark background",
    "a photo of a woman with bob brown hair wearing a blue sweater, pink background",
    "a photo of a man with buzzed black hair wearing a yellow t-shirt, grey background",
)


def config() -> RunConfig:
    """All of the denoiser; its error counts more where the shipped pose network sees joints in it."""
    return RunConfig(
        system=HumanSDConfig(base="people", loss="intent", pose_network="people", pose_dropout=0.1),
        output="runs/people_humansd",
        data=DataConfig(length=1_536, held_out=128, resolution=64, seed=1, conditioning="humansd", caption_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=20),
        train=TrainConfig(steps=400, batch_size=16, ema_decay=0.98, checkpoint_every=100),
        preview=PreviewConfig(prompts=PROMPTS, steps=30, guidance=3.0),
    )
