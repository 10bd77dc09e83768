"""Face-diffuser's scene model: Stable Diffusion 1.5 trained on FFHQ's captions alone.

python train.py configs/facediffuser_tdm.py --set data.folder=ffhq_wild_files

Needs: FFHQ in FastComposer's layout and Stable Diffusion 1.5 from the hub, which does as a scene model as it is too.
Published: 150,000 steps of 16 on four GPUs.
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.facediffuser.scene_model import SceneModelConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PROMPTS = (
    "a man and a man are reading book together",
    "a magazine cover of a man and a man standing next to each other",
)


def config() -> RunConfig:
    """The values of scripts/run_train_text_only.sh."""
    return RunConfig(
        system=SceneModelConfig(base="runwayml/stable-diffusion-v1-5", remat="full", dtype="bfloat16"),
        output="runs/facediffuser_tdm",
        data=DataConfig(folder="ffhq_wild_files", resolution=512, flip=0.5, caption_dropout=0.1, workers=4),
        optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.01, clip_norm=1.0),
        train=TrainConfig(steps=150_000, batch_size=16, seed=42, checkpoint_every=2_000, preview_every=2_000),
        preview=PreviewConfig(prompts=PROMPTS, steps=50, guidance=5.0),
    )
