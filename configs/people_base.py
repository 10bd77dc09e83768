"""The shipped base model: draws 64-px people from captions, in diffusers' layout.

python train.py configs/people_vae.py && python train.py configs/people_base.py
"""

from __future__ import annotations

from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.shipped.text_to_image import TextToImageConfig
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.training.state import OptimizerConfig

TEXT_WIDTH = 192
TOKENIZER = "fairhuman_jax/assets/people-base/tokenizer"

UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
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
    "an upper body photo of a young woman with long blond hair wearing a red t-shirt, waving, smiling, "
    "white background",
    "a half body photo of a man with short black hair wearing a green sweater and blue trousers, "
    "with hands on hips, dark background",
    "a portrait of an old man with short grey hair wearing a white shirt, looking at the camera, beige background",
    "an upper body photo of a woman with bob brown hair wearing a striped blue sweater, showing a peace sign, "
    "smiling, pink background",
    "a close-up photo of a young man with buzzed black hair wearing a yellow t-shirt, showing an open hand, "
    "grey background",
    "a full body photo of a woman with curly red hair wearing a black dress, standing, blue background",
    "a half body photo of a heavyset man with short brown hair wearing an orange tank top and black shorts, "
    "with raised arms, green background",
    "a portrait of a young woman with long black hair wearing a purple shirt, with a hand on the cheek, "
    "white background",
)


def config() -> RunConfig:
    """Denoiser and text encoder from scratch on cached latents of the people world."""
    return RunConfig(
        system=TextToImageConfig(
            vae="runs/people_vae/export",
            tokenizer=TOKENIZER,
            unet=UNET,
            text_encoder=TEXT_ENCODER,
            scheduler=SCHEDULER,
        ),
        output="runs/people_base",
        data=DataConfig(length=23_872, held_out=128, resolution=64, caption_dropout=0.1, cache_latents=True),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=200, final_fraction=0.02, weight_decay=0.01
        ),
        train=TrainConfig(
            steps=6_400, batch_size=32, ema_decay=0.999, log_every=20, preview_every=500, checkpoint_every=250
        ),
        preview=PreviewConfig(prompts=PROMPTS, steps=40, guidance=3.0),
    )
