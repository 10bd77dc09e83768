"""The autoencoder of the 128-px base: people of 128 px to 16 x 16 x 16 latents.

It grows out of the 64-px autoencoder: one level more at the outer end, the inner levels taken over, and latents whose
first eight channels stay near those of the 64-px one, so that its denoiser remains a start too. Two phases, crops and
whole pictures; the second one:
python train.py configs/people_128_vae.py --set system.start=runs/people_128_vae/export --set system.crop=0 \\
    --set system.anchor_weight=0.1 --set train.batch_size=8 --set train.steps=900 --set output=runs/people_128_vae_whole
"""

from __future__ import annotations

from fairhuman_jax.systems.shipped.autoencoder import AutoencoderConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

FRAMINGS = (
    ("full body", 0.05),
    ("half body", 0.12),
    ("upper body", 0.21),
    ("portrait", 0.32),
    ("close-up of a hand", 0.12),
    ("close-up of a hand and the face", 0.18),
)
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [8, 24, 48, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 128,
}


def config() -> RunConfig:
    """Crops of 64 px, most of them around a face or hand: a quarter of the work, spent where the detail is."""
    return RunConfig(
        system=AutoencoderConfig(
            vae=VAE,
            loss="pyramid",
            crop=64,
            start="fairhuman_jax/assets/people-base/vae",
            anchor_weight=0.3,
            kl_weight=1e-4,
        ),
        output="runs/people_128_vae",
        data=DataConfig(length=23_872, held_out=128, resolution=128, framings=FRAMINGS),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, schedule="cosine", warmup_steps=50, final_fraction=0.05, b2=0.99, weight_decay=0.0
        ),
        train=TrainConfig(
            steps=1_500, batch_size=16, ema_decay=0.99, log_every=20, checkpoint_every=100, preview_every=500
        ),
    )
