"""The autoencoder of the shipped base: 64-px people to 16 x 16 x 8 latents.

python train.py configs/people_vae.py
"""

from __future__ import annotations

from fairhuman_jax.systems.shipped.autoencoder import AutoencoderConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": [24, 48, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}


def config() -> RunConfig:
    """Face and hand pixels weigh more than the rest, because the latents must keep them."""
    return RunConfig(
        system=AutoencoderConfig(vae=VAE),
        output="runs/people_vae",
        data=DataConfig(length=23_872, held_out=128, resolution=64),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, schedule="cosine", warmup_steps=50, final_fraction=0.02, weight_decay=0.0
        ),
        train=TrainConfig(
            steps=1_500, batch_size=8, ema_decay=0.995, log_every=20, checkpoint_every=250, preview_every=250
        ),
    )
