"""Face-diffuser's subject model on Stable Diffusion 1.5: FastComposer's training, with Face-diffuser's values.

python train.py configs/facediffuser_sdm.py --set data.folder=ffhq_wild_files

Needs: FFHQ in FastComposer's layout (its archive ffhq_fastcomposer.tgz; `python -m fairhuman_jax.data check FOLDER`
reads it), Stable Diffusion 1.5 and CLIP ViT-L/14 from the hub (6 GB, read once). Published: 150,000 steps of 32 on
four GPUs, where FastComposer reports 3.15 s a step of 128 on eight.
As published: --set system.compat=reference --set data.compat=reference
Balanced by the fair rule instead of summed: --set fair.method=mpd
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.data.subject_transforms import SubjectConfig
from fairhuman_jax.systems.facediffuser.subject_model import SubjectModelConfig
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PROMPTS = (
    "a man <|image|> and a man <|image|> are reading book together",
    "a magazine cover of a man <|image|> and a man <|image|> standing next to each other",
)


def config() -> RunConfig:
    """The values of scripts/run_train.sh; denoising and localization are summed."""
    return RunConfig(
        system=SubjectModelConfig(base="runwayml/stable-diffusion-v1-5", remat="full", dtype="bfloat16"),
        output="runs/facediffuser_sdm",
        data=DataConfig(folder="ffhq_wild_files", resolution=512, flip=0.5, workers=4, subjects=SubjectConfig()),
        optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.01, clip_norm=1.0),
        fair=FairConfig(method="sum"),
        train=TrainConfig(steps=150_000, batch_size=32, seed=42, checkpoint_every=2_000, preview_every=2_000),
        preview=PreviewConfig(prompts=PROMPTS, steps=50, guidance=5.0),
    )
