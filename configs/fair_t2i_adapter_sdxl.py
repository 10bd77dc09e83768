"""FairHuman's T2I-Adapter on SDXL at 1024 px: full_adapter_xl from scratch, under the fair rule.

python train.py configs/fair_t2i_adapter_sdxl.py --set data.folder=FOLDER

Needs: a folder with metadata.jsonl, masks and condition images (skeletons; `python -m fairhuman_jax.data check FOLDER`
reads it), and SDXL with its repaired autoencoder from the hub (about 7 GB, read once). Values are those of the
published script, in bfloat16 instead of float16. Memory before activations: 6.9 GB of frozen weights; 79 million
trainables in float32 with two moments and three gradients (1.9 GB).
As published: --set system.compat=reference --set fair.method=sum
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PROMPTS = (
    "a person in a garden, realistic, high quality, 8k",
    "a person in front of a brick wall, realistic, high quality, 8k",
)


def config() -> RunConfig:
    """The values of train_t2iadapter_sdxl_mpd_fair.sh; 16 pictures a step in four micro-batches."""
    return RunConfig(
        system=FairHumanConfig(
            base="stabilityai/stable-diffusion-xl-base-1.0",
            vae="madebyollin/sdxl-vae-fp16-fix",
            trainable=AdapterTrainable(adapter_type="full_adapter_xl"),
            timestep_mode="cubic",
            control_dropout=0.3,
            remat="full",
            dtype="bfloat16",
        ),
        output="runs/fair_t2i_adapter_sdxl",
        data=DataConfig(folder="dataset", held_out=32, resolution=1024, workers=2),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.01, clip_norm=1.0),
        train=TrainConfig(
            steps=51_000,
            batch_size=16,
            accumulate=4,
            seed=42,
            checkpoint_every=10_000,
            keep_checkpoints=3,
            preview_every=1_000,
        ),
        preview=PreviewConfig(prompts=PROMPTS, steps=20, guidance=7.5),
    )
