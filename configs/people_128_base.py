"""The 128-px base: draws people of 128 px from captions, in diffusers' layout. It goes on from the 64-px base.

python train.py configs/people_128_base.py, after the autoencoder (configs/people_128_vae.py, docs/people_128.md)
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.shipped.text_to_image import TextToImageConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

TEXT_WIDTH = 192
FRAMINGS = (
    ("full body", 0.05),
    ("half body", 0.12),
    ("upper body", 0.21),
    ("portrait", 0.32),
    ("close-up of a hand", 0.12),
    ("close-up of a hand and the face", 0.18),
)
UNET = {
    "sample_size": 16,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": [64, 128, 192],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": [2, 4, 6],
    "use_linear_projection": True,
    "cross_attention_dim": TEXT_WIDTH,
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 837,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 48,
    "hidden_act": "quick_gelu",
    "bos_token_id": 835,
    "eos_token_id": 836,
    "pad_token_id": 836,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
PROMPTS = (
    "a portrait of a young woman with long blond hair wearing a red t-shirt, looking at the camera, smiling, "
    "white background",
    "a portrait of an old man with short grey hair wearing a white shirt, looking at the camera, beige background",
    "a portrait of a woman with bob brown hair wearing a striped blue sweater, with a hand on the cheek, "
    "pink background",
    "an upper body photo of a man with short black hair wearing a green sweater, waving, dark background",
    "an upper body photo of a woman with curly red hair wearing a black dress, showing a peace sign, smiling, "
    "blue background",
    "a close-up photo of a young man with buzzed black hair wearing a yellow t-shirt, showing an open hand, "
    "grey background",
    "a close-up photo of a woman wearing a purple shirt, showing a thumbs up, green background",
    "a half body photo of a heavyset man with short brown hair wearing an orange tank top and black shorts, "
    "with raised arms, green background",
)


def config() -> RunConfig:
    """Denoiser and text encoder of the 64-px base, trained on with latents of 128-px people."""
    return RunConfig(
        system=TextToImageConfig(
            vae="fairhuman_jax/assets/people-128/vae",
            tokenizer="fairhuman_jax/assets/people-base/tokenizer",
            unet=UNET,
            text_encoder=TEXT_ENCODER,
            scheduler=SCHEDULER,
            start="people",
        ),
        output="runs/people_128_base",
        data=DataConfig(
            length=23_872,
            held_out=128,
            resolution=128,
            framings=FRAMINGS,
            caption_dropout=0.1,
            cache_latents=True,
        ),
        optimizer=OptimizerConfig(
            learning_rate=8e-4, schedule="cosine", warmup_steps=50, final_fraction=0.05, b2=0.99, weight_decay=0.01
        ),
        train=TrainConfig(
            steps=1_200, batch_size=32, ema_decay=0.99, log_every=10, validate_every=200, checkpoint_every=100
        ),
        preview=PreviewConfig(prompts=PROMPTS, steps=40, guidance=3.0),
    )
