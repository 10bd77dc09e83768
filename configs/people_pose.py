"""The shipped pose network: finds the 17 joints of COCO in 64-px people.

python train.py configs/people_pose.py
"""

from __future__ import annotations

from fairhuman_jax.systems.shipped.pose_network import PoseNetworkConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

NETWORK = {
    "joints": 17,
    "stem_channels": 16,
    "widths": [12, 24, 48],
    "bottlenecks": 2,
    "stage_modules": [1, 2],
    "blocks": 2,
    "head_blocks": 2,
}


def config() -> RunConfig:
    """Large batches, whose moments the batch norms take; the first held-out one gives the running statistics."""
    return RunConfig(
        system=PoseNetworkConfig(network=NETWORK),
        output="runs/people_pose",
        data=DataConfig(length=4_608, held_out=128, resolution=64, keypoints=True),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", warmup_steps=50, final_fraction=0.02, weight_decay=0.0
        ),
        train=TrainConfig(
            steps=900, batch_size=32, ema_decay=0.99, log_every=20, checkpoint_every=300, preview_every=300
        ),
    )
