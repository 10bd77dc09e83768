"""FairHuman's ControlNet on SDXL at 1024 px: started from the UNet's encoder, under the fair rule.

python train.py configs/fair_controlnet_sdxl.py --set data.folder=FOLDER

Needs: a folder with metadata.jsonl, masks and condition images (skeletons; `python -m fairhuman_jax.data check FOLDER`
reads it), and SDXL with its repaired autoencoder from the hub (about 7 GB, read once). Values are those of the
published script, in bfloat16 instead of float16; there the ControlNet went on from one that is not published, here
--set system.trainable.start=FOLDER does that. Memory before activations: 6.9 GB of frozen weights; 1,251 million
trainables in float32 with two moments (15 GB) and three gradients (15 GB); with train.accumulate=1 and
fair.gradients=replay one (5 GB). train.fsdp=8 splits all but the frozen weights over eight devices.
As published: --set system.x0_weight=inf --set system.compat=reference --set fair.method=sum
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import ControlNetTrainable
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

PROMPTS = (
    "a person in a garden, realistic, high quality, 8k",
    "a person in front of a brick wall, realistic, high quality, 8k",
)


def config() -> RunConfig:
    """The values of train_controlnet_sdxl_mpd_fair.sh; 16 pictures a step in four micro-batches.

    The weight of the x0 error is bounded by 20, about its mean over time: unbounded, it reaches 215 and the noisiest
    steps are all that counts.
    """
    return RunConfig(
        system=FairHumanConfig(
            base="stabilityai/stable-diffusion-xl-base-1.0",
            vae="madebyollin/sdxl-vae-fp16-fix",
            trainable=ControlNetTrainable(),
            x0_weight=20.0,
            control_dropout=0.3,
            remat="full",
            dtype="bfloat16",
        ),
        output="runs/fair_controlnet_sdxl",
        data=DataConfig(folder="dataset", held_out=32, resolution=1024, workers=2),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.01, clip_norm=1.0),
        fair=FairConfig(gradients="sequential"),
        train=TrainConfig(
            steps=51_000, batch_size=16, accumulate=4, seed=42, checkpoint_every=10_000, preview_every=1_000
        ),
        preview=PreviewConfig(prompts=PROMPTS, steps=20, guidance=7.5),
    )
