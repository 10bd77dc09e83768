"""The shipped image encoder of drawn people: knows a person again in other clothes, poses and light.

python train.py configs/people_identity.py
"""

from __future__ import annotations

from fairhuman_jax.data.subject_transforms import SubjectConfig
from fairhuman_jax.systems.shipped.identity_encoder import IdentityEncoderConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

SIDE = 48
NETWORK = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
    "projection_dim": 192,
}
PEOPLE = SubjectConfig(
    max_objects=1,
    object_resolution=SIDE,
    identities=1_600,
    references=3,
    pairs=0.25,
    uncondition_prob=0.0,
    augment=False,
)


def config() -> RunConfig:
    """Large batches: a person is told from all the others in one."""
    return RunConfig(
        system=IdentityEncoderConfig(network=NETWORK),
        output="runs/people_identity",
        data=DataConfig(length=3_072, held_out=128, resolution=64, seed=4, subjects=PEOPLE),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=50, final_fraction=0.02),
        train=TrainConfig(
            steps=900, batch_size=64, ema_decay=0.99, log_every=20, checkpoint_every=300, preview_every=300
        ),
    )
