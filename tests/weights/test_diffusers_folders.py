"""load_model and save_model: round trips, shards, dtypes, and every way in which a folder can be wrong."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from fairhuman_jax.models import AutoencoderKL, CLIPText, UNet2DCondition
from fairhuman_jax.weights import expected_params, load_model, save_model

UNET = {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
}
CLIP = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
    "bos_token_id": 18,
    "eos_token_id": 19,
}
NETWORKS = {"unet": (UNet2DCondition, UNET), "vae": (AutoencoderKL, VAE), "clip": (CLIPText, CLIP)}


def random_params(module):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), expected_params(module))


@pytest.fixture(params=list(NETWORKS))
def saved(request, tmp_path):
    network, config = NETWORKS[request.param]
    module = network.from_config(config)
    params = random_params(module)
    save_model(module, params, tmp_path / "model")
    return module, params, tmp_path / "model"


def assert_equal_trees(a, b):
    flat_a, flat_b = flatten_dict(a), flatten_dict(b)
    assert flat_a.keys() == flat_b.keys()
    for path, leaf in flat_a.items():
        np.testing.assert_array_equal(leaf, flat_b[path], err_msg=".".join(path))


def test_what_is_saved_loads_again(saved):
    module, params, folder = saved
    again, loaded = load_model(folder, remat="full")
    assert again.remat == "full"
    assert again.to_config() == module.to_config()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert_equal_trees(params, loaded)


def test_unrolled_network_reads_and_writes_the_same_file(saved, tmp_path):
    _, _, folder = saved
    unrolled, params = load_model(folder, scan=False, host=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert not any(part in ("transformer_blocks", "layers") for path in flatten_dict(params) for part in path)
    save_model(unrolled, params, tmp_path / "again")
    (name,) = [path.name for path in folder.glob("*.safetensors")]
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_dtype_casts_parameters_and_computation(saved):
    module, params, folder = saved
    save_model(module, params, folder, dtype="float16")
    _, half = load_model(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float16")}
    again, cast = load_model(folder, dtype="bfloat16")
    assert again.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}
    largest = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b, np.float32)).max()), params, half)
    assert 0 < max(jax.tree.leaves(largest)) < 4e-3


def test_shards_and_half_precision_names_are_found(tmp_path):
    module = AutoencoderKL.from_config(VAE)
    params = random_params(module)
    folder = tmp_path / "vae"
    save_model(module, params, folder)
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    renamed = whole.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_equal_trees(params, load_model(folder)[1])
    index.unlink()
    assert_equal_trees(params, load_model(folder)[1])
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors does not exist"):
        load_model(folder)
    assert renamed.is_file()


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def clip_folder(tmp_path):
    module = CLIPText.from_config(CLIP)
    save_model(module, random_params(module), tmp_path / "clip")
    return tmp_path / "clip"


def test_all_wrong_tensors_are_in_one_error(clip_folder):
    def change(tensors):
        del tensors["text_model.final_layer_norm.bias"]
        del tensors["text_model.encoder.layers.1.mlp.fc1.weight"]
        tensors["text_model.extra"] = np.zeros(3, np.float32)
        tensors["text_model.encoder.layers.0.mlp.fc2.weight"] = np.zeros((8, 13), np.float32)

    rewrite(clip_folder, change)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit its config \(CLIPText\)") as error:
        load_model(clip_folder)
    message = str(error.value)
    assert "2 missing (text_model.encoder.layers.1.mlp.fc1.weight, text_model.final_layer_norm.bias)" in message
    assert "1 unknown (text_model.extra)" in message
    assert "text_model.encoder.layers.0.mlp.fc2.weight [8, 13] for [8, 12]" in message
    assert message.endswith("; it looks like a CLIP text encoder (width 8)")
    assert "\n" not in message


def test_long_lists_are_cut(clip_folder):
    rewrite(clip_folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    with pytest.raises(ValueError, match=r"8 missing \((\S+, ){4}\.\.\.\)"):
        load_model(clip_folder)


def test_dialects_of_one_network_load(clip_folder, tmp_path):
    expected = load_model(clip_folder)[1]

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("text_model.")] = tensors.pop(name)

    rewrite(clip_folder, strip)
    assert_equal_trees(expected, load_model(clip_folder)[1])
    vae = AutoencoderKL.from_config(VAE)
    params = random_params(vae)
    save_model(vae, params, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        renamed = name
        for new_name, old_name in old.items():
            renamed = renamed.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        as_conv = "query.weight" in renamed
        tensors[renamed] = tensor[:, :, None, None] if as_conv else tensor
    save_file(tensors, path)
    assert any("proj_attn" in name for name in tensors)
    assert_equal_trees(params, load_model(tmp_path / "vae")[1])


def test_wrong_folders_say_what_would_be_right(clip_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; a model folder holds config\.json"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="subfolder='unet'"):
        load_model(tmp_path)
    (clip_folder / "model.safetensors").rename(clip_folder / "flax_model.msgpack")
    with pytest.raises(FileNotFoundError, match=r"and no model\.safetensors; it holds flax_model\.msgpack"):
        load_model(clip_folder)
    (clip_folder / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="is for BertModel; known networks: AutoencoderKL"):
        load_model(clip_folder)


def test_variants_and_full_precision_first(clip_folder):
    full = load_model(clip_folder)[1]
    with pytest.raises(FileNotFoundError, match=r"no weights of the variant 'fp16'; it holds model\.safetensors"):
        load_model(clip_folder, variant="fp16")
    half = {name: tensor.astype(np.float16) for name, tensor in load_file(clip_folder / "model.safetensors").items()}
    save_file(half, clip_folder / "model.fp16.safetensors")
    assert_equal_trees(full, load_model(clip_folder)[1])
    chosen = jax.tree.leaves(load_model(clip_folder, variant="fp16")[1])
    assert {leaf.dtype for leaf in chosen} == {jnp.dtype(jnp.float16)}
    shards = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(sorted(half))}
    for shard in shards:
        save_file({name: half[name] for name in half if weight_map[name] == shard}, clip_folder / shard)
    (clip_folder / "model.fp16.safetensors").unlink()
    index = clip_folder / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for ours, again in zip(chosen, jax.tree.leaves(load_model(clip_folder, variant="fp16")[1]), strict=True):
        np.testing.assert_array_equal(ours, again)
    save_file({"final_layer_norm.bias": half["text_model.final_layer_norm.bias"]}, clip_folder / shards[0])
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="shards lie beside their index"):
        load_model(clip_folder, variant="fp16")


def test_layers_of_different_types_take_the_wider(clip_folder):
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    rewrite(clip_folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    path = ("text_model", "encoder", "layers", "mlp", "fc1", "kernel")
    assert flatten_dict(load_model(clip_folder)[1])[path].dtype == jnp.float32
    rewrite(clip_folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float64)}))
    assert flatten_dict(load_model(clip_folder)[1])[path].dtype == jnp.float32


def test_network_out_of_a_single_file(tmp_path):
    """A file holding one network is opened as that; one of a kind that is not known is refused."""
    module = AutoencoderKL.from_config(VAE | {"block_out_channels": [32, 32], "norm_num_groups": 32})
    params = random_params(module)
    save_model(module, params, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    assert_equal_trees(params, load_model(path)[1])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors .* has no unet, only vae"):
        load_model(path, "unet")


def test_foreign_parameters_are_not_saved(clip_folder):
    module, params = load_model(clip_folder)
    params["text_model"]["surprise"] = {"bias": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"1 parameters are not those of CLIPText: text_model\.surprise\.bias"):
        save_model(module, params, clip_folder)
