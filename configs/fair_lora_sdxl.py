"""FairHuman's LoRA on SDXL at 1024 px: rank 256 on every attention of the UNet, under the fair rule.

python train.py configs/fair_lora_sdxl.py --set data.folder=FOLDER

Needs: a folder with metadata.jsonl and masks (`python -m fairhuman_jax.data check FOLDER` reads it), and SDXL with its
repaired autoencoder from the hub (about 7 GB, read once). Values are those of the published script, in bfloat16
instead of float16. Memory before activations: 6.9 GB of frozen weights; 371.6 million trainables in float32 with two
moments (4.5 GB) and three gradients (4.5 GB; 1.5 GB with fair.gradients=replay).
As published: --set system.compat=reference
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import LoraTrainable
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PROMPTS = (
    "a portrait of a woman with both hands on her cheeks, realistic, high quality, 8k",
    "a man playing the guitar on a bench, realistic, high quality, 8k",
)


def config() -> RunConfig:
    """The values of train_lora_sdxl_mpd_fair.sh; image and masks are flipped and cropped together."""
    return RunConfig(
        system=FairHumanConfig(
            base="stabilityai/stable-diffusion-xl-base-1.0",
            vae="madebyollin/sdxl-vae-fp16-fix",
            trainable=LoraTrainable(rank=256),
            remat="full",
            dtype="bfloat16",
        ),
        output="runs/fair_lora_sdxl",
        data=DataConfig(folder="dataset", held_out=32, resolution=1024, crop="random", flip=0.5, workers=2),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.01, clip_norm=1.0),
        train=TrainConfig(steps=20_000, batch_size=1, seed=42, checkpoint_every=10_000, preview_every=1_000),
        preview=PreviewConfig(prompts=PROMPTS, steps=30, guidance=7.5),
    )
