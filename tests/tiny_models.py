"""The smallest pipelines with every part of a real one, random batches for them, and comparisons of trees."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fairhuman_jax.contract import Parts, WholePhase
from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.systems.fairhuman.system import FairHuman, FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import LoraTrainable
from fairhuman_jax.training.objectives import task_gradients
from fairhuman_jax.weights import Pipeline, build_small_clip_tokenizer, expected_params

SIZE, TOKENS, WIDTH = 16, 6, 8
# Compiling takes the time of these tests, not running.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
CAPTIONS = ("a person waves", "two hands", "a face", "a person smiles")
UNET = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": None,
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "sample_size": SIZE // 2,
}
SMALL_UNET = UNET | {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "transformer_layers_per_block": 1,
}
VAE = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
    "scaling_factor": 0.5,
    "sample_size": SIZE,
}
CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
}
SCHEDULE = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


@functools.cache
def tiny_tokenizer():
    """A tokenizer in which every word of CAPTIONS is one token."""
    with tempfile.TemporaryDirectory() as folder:
        return build_small_clip_tokenizer(CAPTIONS, folder, model_max_length=TOKENS)


def clip_config(**changes) -> dict:
    size = len(tiny_tokenizer())
    return CLIP | {"vocab_size": size, "eos_token_id": size - 1} | changes


def random_params(module, seed: int):
    """Parameters with the spread of an initialised network, but no zeros; drawn without compiling anything."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "scale":
            return jnp.asarray(1.0 + 0.1 * values, jnp.float32)
        fan_in = np.prod(leaf.shape[-4:-1]) if leaf.ndim >= 4 else leaf.shape[-2] if leaf.ndim > 1 else 100.0
        return jnp.asarray(values / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map_with_path(draw, expected_params(module))


@functools.cache
def tiny_pipeline(scan: bool = True, remat: str = "none") -> Pipeline:
    """A Stable Diffusion pipeline: two resolutions, a scanned stack of two blocks, an autoencoder of factor 2."""
    runtime = {"scan": scan, "remat": remat}
    unet = UNet2DCondition.from_config(UNET, **runtime)
    vae = AutoencoderKL.from_config(VAE, remat=remat)
    encoder = CLIPText.from_config(clip_config(), **runtime)
    networks = {"unet": unet, "vae": vae, "text_encoder": encoder}
    params = {name: random_params(network, i) for i, (name, network) in enumerate(networks.items())}
    return Pipeline(unet, vae, (encoder,), (tiny_tokenizer(),), NoiseSchedule.from_config(SCHEDULE), params)


@functools.cache
def tiny_xl_pipeline() -> Pipeline:
    """One resolution, with SDXL's two text encoders and its conditioning on pooled text and sizes."""
    first = CLIPText.from_config(clip_config())
    second = CLIPText.from_config(clip_config(architectures=["CLIPTextModelWithProjection"], projection_dim=WIDTH))
    unet = UNet2DCondition.from_config(
        SMALL_UNET
        | {
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        }
    )
    vae = AutoencoderKL.from_config(VAE)
    networks = {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}
    params = {name: random_params(network, i) for i, (name, network) in enumerate(networks.items())}
    tokenizers = (tiny_tokenizer(), tiny_tokenizer())
    return Pipeline(unet, vae, (first, second), tokenizers, NoiseSchedule.from_config(SCHEDULE), params)


@functools.cache
def small_pipeline() -> Pipeline:
    """Stable Diffusion 1's: one resolution, a middle block, noise prediction."""
    unet = UNet2DCondition.from_config(SMALL_UNET | {"mid_block_type": "UNetMidBlock2DCrossAttn"})
    params = tiny_pipeline().params | {"unet": random_params(unet, 8)}
    schedule = NoiseSchedule.from_config(SCHEDULE | {"prediction_type": "epsilon"})
    return dataclasses.replace(tiny_pipeline(), unet=unet, params=params, schedule=schedule)


def with_middle(pipeline: Pipeline) -> Pipeline:
    """The same around a denoiser with a middle block, which diffusers' ControlNets and LDM files cannot do without."""
    unet = UNet2DCondition.from_config(pipeline.unet.to_config() | {"mid_block_type": "UNetMidBlock2DCrossAttn"})
    return dataclasses.replace(pipeline, unet=unet, params=pipeline.params | {"unet": random_params(unet, 8)})


def fairhuman(pipeline: Pipeline | None = None, kind: type[FairHuman] = FairHuman, **config) -> FairHuman:
    """The system around the tiny pipeline, with a LoRA of rank 2 unless another `trainable` is given."""
    return FairHumanConfig(**{"trainable": LoraTrainable(rank=2)} | config).attach(pipeline or tiny_pipeline(), kind)


def trained_lora(system: FairHuman, seed: int = 7):
    """Trainables whose `up` is not zero any more."""
    shapes = jax.eval_shape(system.init, jax.random.key(0))[0]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def random_batch(count: int = 8, *, seed: int = 0, xl: bool = False, position: bool = True) -> dict:
    """A batch of noise pictures with one face and one hand box each."""
    rng = np.random.default_rng(seed)
    batch = {"image": rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)}
    for name in ("face_mask", "hand_mask"):
        batch[name] = np.zeros((count, SIZE, SIZE, 1), np.uint8)
        for row in range(count):
            top, left = rng.integers(0, SIZE - 8, 2)
            batch[name][row, top : top + 6, left : left + 8] = 1
    ids = rng.integers(1, len(tiny_tokenizer()) - 1, (count, TOKENS)).astype(np.int32)
    ids[:, -1] = len(tiny_tokenizer()) - 1
    batch["input_ids"] = ids
    if xl:
        batch["input_ids_2"] = ids[:, ::-1].copy()
        batch["time_ids"] = np.tile(np.array([SIZE, SIZE, 0, 0, SIZE, SIZE], np.float32), (count, 1))
    if position:
        batch["position"] = np.arange(count, dtype=np.int32)
    return batch


def control_batch(count: int = 4, *, cached: bool = True, width: int = WIDTH, xl: bool = False) -> dict:
    """A batch with condition images; with `cached` latents and text, which spares compiling their encoders."""
    rng = np.random.default_rng(5)
    batch = random_batch(count, xl=xl)
    batch["conditioning_image"] = rng.integers(1, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    if not cached:
        return batch
    batch = {name: value for name, value in batch.items() if name != "image" and not name.startswith("input_ids")}
    shapes = {
        "latent_mean": (SIZE // 2, SIZE // 2, 4),
        "latent_logvar": (SIZE // 2, SIZE // 2, 4),
        "text_hidden": (TOKENS, width),
        "text_pooled": (WIDTH,),
    }
    return batch | {name: rng.normal(size=(count, *shape)).astype(np.float32) for name, shape in shapes.items()}


def random_network(system: FairHuman, seed: int = 3) -> dict:
    """Trainables of a ControlNet or adapter without zeros."""
    networks = {"controlnet": system.controlnets, "adapter": system.adapters}
    return {name: random_params(nets[0], seed) for name, nets in networks.items() if nets}


def assert_trees_close(found, expected, tolerance: float = 1e-5) -> None:
    """Every leaf within `tolerance` of the largest entry of the expected one."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, ours), theirs in pairs:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        bound = tolerance * max(np.abs(theirs).max(), 1e-12)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def assert_trees_equal(found, expected) -> None:
    """Bit for bit, dtypes included; keys are compared by their data."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@functools.cache
def tiny_gradients():
    """(gradients, losses) of three objectives for `random_batch()` at `trained_lora`, with the key of a first step."""
    system = fairhuman()
    key = jax.random.fold_in(jax.random.key(5), 0)
    step = quick_jit(
        lambda tree, batch: task_gradients(
            WholePhase(system=system), Parts(tree, {}, system.pipeline.params), batch, key
        )
    )
    return step(trained_lora(system), random_batch())


def write_folder(root: Path, count: int = 12) -> Path:
    """A FairHuman data folder of random pictures with masks, wider than high."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        layers = {"image": rng.integers(0, 256, (SIZE, SIZE + 4, 3), dtype=np.uint8)}
        for name in ("mask_face", "mask_hand"):
            layers[name] = np.zeros((SIZE, SIZE + 4), np.uint8)
            layers[name][index % 4 : index % 4 + 5, 2:9] = 255
        names = {name: f"{name}_{index}.png" for name in layers}
        for name, array in layers.items():
            root.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / names[name])
        lines.append(json.dumps(names | {"text_english": CAPTIONS[index % len(CAPTIONS)]}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
