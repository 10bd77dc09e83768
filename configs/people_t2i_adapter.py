"""A fair T2I-Adapter on the shipped people model: skeletons steer the pose. Minutes on a CPU, no download.

python train.py configs/people_t2i_adapter.py
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable
from fairhuman_jax.training.combining import FairConfig
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
    """Three objectives (global, face, hand) under the fair rule."""
    return RunConfig(
        system=FairHumanConfig(base="people", trainable=AdapterTrainable(), timestep_mode="cubic", control_dropout=0.1),
        output="runs/people_t2i_adapter",
        data=DataConfig(length=1_536, held_out=128, resolution=64, seed=1, conditioning="fairhuman"),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=10),
        # Pulled back together, three gradients of a convolutional network take XLA's CPU compiler minutes.
        fair=FairConfig(gradients="sequential"),
        train=TrainConfig(steps=120, batch_size=16, ema_decay=0.98, checkpoint_every=40),
        preview=PreviewConfig(prompts=PROMPTS, steps=30, guidance=3.0),
    )
