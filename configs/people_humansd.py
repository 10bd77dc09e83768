"""HumanSD on the shipped people model: it reads skeletons as latents. About 10 minutes on a CPU, no download.

python train.py configs/people_humansd.py

People then stand where skeletons say (docs/benchmarks.md has figures and a sheet); poses are rough, as 64 pixels are.
Other losses: --set system.pose_network=people --set system.loss=intent, reference (as published) or fair (the pose term
as a second objective).
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.humansd.system import HumanSDConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

# They leave pose and framing to the skeletons of the held-out pictures.
PROMPTS = (
    "a photo of a woman with long blond hair wearing a red t-shirt, white background",
    "a photo of a man with short black hair wearing a green sweater, dark background",
    "a photo of a woman with bob brown hair wearing a blue sweater, pink background",
    "a photo of a man with buzzed black hair wearing a yellow t-shirt, grey background",
)


def config() -> RunConfig:
    """All of the denoiser; the kernel that reads skeletons starts at zero and moves ten times as fast as the rest."""
    return RunConfig(
        system=HumanSDConfig(base="people", pose_dropout=0.1),
        output="runs/people_humansd",
        data=DataConfig(length=3_072, held_out=128, resolution=64, seed=1, conditioning="humansd", caption_dropout=0.1),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=20, rate_scales=(("pose_kernel", 10.0),)
        ),
        train=TrainConfig(steps=700, batch_size=16, ema_decay=0.98, checkpoint_every=100),
        preview=PreviewConfig(prompts=PROMPTS, steps=30, guidance=3.0),
    )
