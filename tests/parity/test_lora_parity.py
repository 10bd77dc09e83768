"""LoRA files against diffusers and peft: what is saved here acts the same there, and their files act the same here."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import quick_jit

from fairhuman_jax.models import CLIPText, UNet2DCondition, init_lora
from fairhuman_jax.models.lora import concatenate_lora, merge_lora, scale_lora
from fairhuman_jax.weights import expected_params, save_model
from fairhuman_jax.weights.lora import load_loras, save_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
Loader = diffusers.StableDiffusionPipeline

UNET = UNet2DCondition.from_config(
    {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
        "sample_size": 8,
    }
)
CLIP = CLIPText.from_config(
    {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": 19,
    }
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERY_LAYER = (
    *ATTENTION,
    *("net.0.proj", "net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2"),
)
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RNG = np.random.default_rng(2)
LATENTS = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
TEXT = RNG.normal(size=(2, 5, 8)).astype(np.float32)
TIMES = np.array([3, 500])
IDS = np.array([[3, 7, 1, 19], [18, 2, 5, 19]], np.int32)


def random_like(shapes, seed, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * scale).astype(np.float32), shapes)


def random_lora(params, targets, rank, seed):
    shapes = jax.eval_shape(lambda key: init_lora(key, params, rank, targets), jax.random.key(0))
    return random_like(shapes, seed)


@pytest.fixture(scope="module")
def params():
    return {"unet": random_like(expected_params(UNET), 0), "text_encoder": random_like(expected_params(CLIP), 1)}


@pytest.fixture(scope="module")
def loras(params):
    return {
        "unet": random_lora(params["unet"], EVERY_LAYER, 2, 4),
        "text_encoder": random_lora(params["text_encoder"], TEXT_LAYERS, 2, 5),
    }


@pytest.fixture
def networks(params, tmp_path):
    """The two networks in torch."""
    save_model(UNET, params["unet"], tmp_path / "unet")
    save_model(CLIP, params["text_encoder"], tmp_path / "text")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    return unet, transformers.CLIPTextModel.from_pretrained(tmp_path / "text")


_unet = quick_jit(lambda variables: UNET.apply(variables, LATENTS, TIMES, TEXT))
_text = quick_jit(lambda variables: CLIP.apply(variables, IDS)["last_hidden_state"])


_merge = quick_jit(merge_lora)


def live(params, loras):
    return (
        _unet({"params": params["unet"], "lora": loras["unet"]}),
        _text({"params": params["text_encoder"], "lora": loras["text_encoder"]}),
    )


def merged(params, loras):
    kernels = {name: _merge(params[name], lora) for name, lora in loras.items()}
    return _unet({"params": kernels["unet"]}), _text({"params": kernels["text_encoder"]})


def theirs(networks):
    unet, text = networks
    with torch.no_grad():
        output = unet(torch.from_numpy(LATENTS.transpose(0, 3, 1, 2)), torch.from_numpy(TIMES), torch.from_numpy(TEXT))
        hidden = text(torch.from_numpy(IDS).long()).last_hidden_state
    return output.sample.numpy().transpose(0, 2, 3, 1), hidden.numpy()


def load_there(path, networks):
    """As `load_lora_weights` of a pipeline does; every tensor of the file must find its layer."""
    unet, text = networks
    state, alphas, metadata = Loader.lora_state_dict(str(path), unet_config=unet.config, return_lora_metadata=True)
    Loader.load_lora_into_unet(state, alphas, unet, adapter_name="ours", metadata=metadata)
    Loader.load_lora_into_text_encoder(state, alphas, text, adapter_name="ours", metadata=metadata)
    found = sum("lora_" in name for network in networks for name in network.state_dict())
    assert found == sum(not name.endswith(".alpha") for name in load_file(path))


def assert_close(ours, expected):
    for mine, reference in zip(ours, expected, strict=True):
        assert np.abs(np.asarray(mine) - reference).max() <= 2e-4 * reference.std()


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_saved_here_acts_the_same_there(params, loras, networks, tmp_path, dialect):
    stronger = {name: scale_lora(lora, 1.5) for name, lora in loras.items()}
    ours = live(params, stronger)
    for plain, moved in zip(theirs(networks), ours, strict=True):
        assert np.abs(moved - plain).max() > 0.05 * plain.std()
    load_there(save_lora(loras, tmp_path, rank=2, alpha=3.0, dialect=dialect), networks)
    assert_close(ours, theirs(networks))
    assert_close(merged(params, stronger), theirs(networks))


def original(name):
    """A kohya name with the original block numbers of UNET (one resnet a down block)."""
    for ours, numbered in (
        ("down_blocks_0_resnets_0", "input_blocks_1_0"),
        ("down_blocks_0_attentions_0", "input_blocks_1_1"),
        ("down_blocks_0_downsamplers_0_conv", "input_blocks_2_0_op"),
        ("down_blocks_1_resnets_0", "input_blocks_3_0"),
        ("mid_block_resnets_0", "middle_block_0"),
        ("mid_block_attentions_0", "middle_block_1"),
        ("mid_block_resnets_1", "middle_block_2"),
        ("up_blocks_0_resnets_0", "output_blocks_0_0"),
        ("up_blocks_0_resnets_1", "output_blocks_1_0"),
        ("up_blocks_1_resnets_0", "output_blocks_2_0"),
        ("up_blocks_1_attentions_0", "output_blocks_2_1"),
        ("up_blocks_1_resnets_1", "output_blocks_3_0"),
        ("up_blocks_1_attentions_1", "output_blocks_3_1"),
        ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
        ("lora_unet_conv_out", "lora_unet_out_2"),
        ("time_embedding_linear_1", "time_embed_0"),
        ("time_embedding_linear_2", "time_embed_2"),
        ("conv_shortcut", "skip_connection"),
        ("conv1", "in_layers_2"),
        ("conv2", "out_layers_3"),
        ("time_emb_proj", "emb_layers_1"),
    ):
        name = name.replace(ours, numbered)
    return name


def test_kohya_files_act_the_same_in_both(params, loras, networks, tmp_path):
    """Original block numbers, convolutions, an alpha of its own for each layer outside attention.

    diffusers does not read an upsampler's original name where its block has no attention, and
    alphas that differ between layers of attention or of a text encoder. So those are left out, or are all the same.
    """
    tensors = load_file(save_lora(loras, tmp_path, dialect="kohya"))
    tensors = {original(name): tensor for name, tensor in tensors.items() if "upsamplers" not in name}
    rng = np.random.default_rng(8)
    for name in filter(lambda name: name.endswith(".alpha"), tensors):
        own = not re.search("attn|lora_te", name)
        tensors[name] = np.array(rng.uniform(0.5, 4) if own else 3.0, np.float32)
    path = tmp_path / "original.safetensors"
    save_file(tensors, path)
    ours = load_loras([(path, 1.0)], params)
    load_there(path, networks)
    assert_close(merged(params, ours), theirs(networks))


def test_several_ranks_in_one_file_act_the_same_there(params, loras, networks, tmp_path):
    both = {
        "unet": concatenate_lora([loras["unet"], random_lora(params["unet"], ATTENTION, 3, 6)]),
        "text_encoder": concatenate_lora([loras["text_encoder"], random_lora(params["text_encoder"], ("fc1",), 1, 7)]),
    }
    path = save_lora(both, tmp_path)
    load_there(path, networks)
    assert_close(merged(params, both), theirs(networks))
    assert_close(merged(params, load_loras([(path, 1.0)], params)), theirs(networks))


def test_saved_there_with_its_settings_acts_the_same_here(params, networks, tmp_path):
    """Ranks and alphas by pattern and alpha / sqrt(rank), which only the file's header tells."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet, text = networks
    torch.manual_seed(0)
    patterns = {"rank_pattern": {"attn2.to_k": 4}, "alpha_pattern": {"attn2.to_k": 1, "mid_block.resnets.0.conv1": 6}}
    targets = ["to_k", "to_out.0", "conv1", "conv_in", "proj_out"]
    settings = LoraConfig(
        r=2, target_modules=targets, lora_alpha=3, use_rslora=True, init_lora_weights=False, **patterns
    )
    unet.add_adapter(settings)
    text_settings = LoraConfig(r=2, target_modules=["q_proj", "fc2"], lora_alpha=5, init_lora_weights=False)
    text.add_adapter(text_settings)
    Loader.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text, adapter_name="default"),
        unet_lora_adapter_metadata=settings.to_dict(),
        text_encoder_lora_adapter_metadata=text_settings.to_dict(),
    )
    assert_close(merged(params, load_loras([(tmp_path, 1.0)], params)), theirs(networks))
