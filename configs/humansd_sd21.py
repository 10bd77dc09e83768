"""HumanSD on Stable Diffusion 2.1: the denoiser reads skeletons as latents, under the published heatmap-guided loss.

python train.py configs/humansd_sd21.py --set data.folder=DATASETS/mapping_train.json \
    --set system.pose_network=higherhrnet_w48_humanart_512x512_udp.pth

Needs: a mapping file of Laion-Human or Human-Art with its pictures and poses, Stable Diffusion 2.1 base from the hub or
a folder (about 5 GB, read once), and HigherHRNet-W48 as HumanSD's authors give it (mmpose's checkpoint). Values are
those of configs/humansd/humansd-finetune.yaml for two devices: AdamW at a constant 5e-6 times the batch, no average, no
warm-up, no clip, no empty captions; in bfloat16 instead of float16. --set system.loss=plain
is the published ablation.
What the original lacks: --set train.ema_decay=0.9999, optimizer.warmup_steps=1000, data.caption_dropout=0.1;
system.compat=null with system.loss=intent (or fair), system.pose_latent=mode and system.pose_dropout=0.1.
Memory before activations: 3.5 GB of the denoiser with two moments (7 GB) and a gradient (3.5 GB).
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.humansd.system import HumanSDConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

BASE_RATE = 5e-6
DEVICES, BATCH = 2, 4

PROMPTS = (
    "oil painting of girls dancing on the stage",
    "sketch of a dancing couple",
    "a portrait of a young man",
    "a basketball dancer, shadow play",
)


def config() -> RunConfig:
    """Published training; its number of steps is that of the checkpoint that the published evaluation names."""
    return RunConfig(
        system=HumanSDConfig(
            base="stabilityai/stable-diffusion-2-1-base",
            loss="reference",
            pose_network="humansd_data/checkpoints/higherhrnet_w48_humanart_512x512_udp.pth",
            compat="reference",
            remat="full",
            dtype="bfloat16",
        ),
        output="runs/humansd_sd21",
        data=DataConfig(
            folder="humansd_data/datasets/mapping_train.json",
            conditioning="humansd",
            compat="reference",
            held_out=128,
            resolution=512,
            workers=2,
        ),
        optimizer=OptimizerConfig(
            learning_rate=BASE_RATE * DEVICES * BATCH,
            schedule="constant",
            b1=0.9,
            b2=0.999,
            weight_decay=0.01,
            clip_norm=None,
        ),
        train=TrainConfig(steps=54_400, batch_size=DEVICES * BATCH, seed=23, checkpoint_every=1_000, preview_every=200),
        preview=PreviewConfig(prompts=PROMPTS, steps=50, guidance=5.0),
    )
