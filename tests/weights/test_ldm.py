"""Single files: what is recognised in them, what configs their shapes imply, what they are refused for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ldm_pipelines import arrays_of, assert_holds, pipeline, write
from tiny_models import assert_trees_equal, tiny_tokenizer

from fairhuman_jax.weights import save_tokenizer
from fairhuman_jax.weights.ldm import load_component, load_single_file, open_single_file
from fairhuman_jax.weights.ldm.configs import SD1, SD2, XL
from fairhuman_jax.weights.ldm.names import with_dots
from fairhuman_jax.weights.ldm.writing import networks, save_single_file

UNET, VAE, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
FAMILIES = (SD1, SD2, XL)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Family -> the tensors of its pipeline's file, whose metadata say nothing."""
    folder = tmp_path_factory.mktemp("ldm")
    return {
        family: arrays_of(save_single_file(pipeline(family), folder / f"{i}.safetensors"))
        for i, family in enumerate(FAMILIES)
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny_tokenizer(), folder)
    return folder


def part(arrays, prefix, *, bare=False):
    return {name.removeprefix(prefix) if bare else name: a for name, a in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_without_metadata_is_the_pipeline_it_was_written_from(family, files, tokenizer, tmp_path):
    path = write(tmp_path / "model.safetensors", files[family])
    single = open_single_file(path, prediction_type=pipeline(family).schedule.prediction_type)
    assert single.kind == family
    loaded = load_single_file(
        path, host=True, tokenizer=tokenizer, prediction_type=pipeline(family).schedule.prediction_type
    )
    assert networks(loaded) == networks(pipeline(family))
    assert loaded.schedule == pipeline(family).schedule
    assert_trees_equal(loaded.params, pipeline(family).params)


def test_sd2_v_prediction_is_told_by_a_bias_and_overruled(files, tmp_path):
    arrays = dict(files[SD2])
    name = f"{UNET}output_blocks.3.1.transformer_blocks.0.norm1.bias"
    found = {}
    for spread in (0.05, 0.15):
        arrays[name] = spread * np.sign(np.arange(64) % 2 - 0.5).astype(np.float32)
        single = open_single_file(write(tmp_path / "model.safetensors", arrays))
        found[single.scheduler_config["prediction_type"]] = single.components["unet"].config["sample_size"]
    assert found == {"epsilon": 64, "v_prediction": 96}
    path = write(tmp_path / "model.safetensors", arrays, {"modelspec.prediction_type": "epsilon"})
    assert open_single_file(path).scheduler_config["prediction_type"] == "epsilon"
    chosen = open_single_file(path, prediction_type="v_prediction")
    assert chosen.scheduler_config["prediction_type"] == "v_prediction"


def test_the_marks_of_sdxl_v_prediction_are_read(files, tmp_path):
    empty = {name: np.zeros(0, np.float32) for name in ("v_pred", "ztsnr")}
    scheduler = open_single_file(write(tmp_path / "model.safetensors", files[XL] | empty)).scheduler_config
    assert scheduler["prediction_type"] == "v_prediction"
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")


@pytest.mark.parametrize(
    ("family", "channels", "kind"),
    [(SD1, 9, "SD 1.5 inpainting"), (SD2, 9, "SD 2.1 inpainting"), (SD2, 8, "HumanSD"), (XL, 9, "SDXL inpainting")],
)
def test_the_first_convolution_tells_inpainting_and_humansd(family, channels, kind, files, tmp_path):
    arrays = dict(files[family])
    arrays[f"{UNET}input_blocks.0.0.weight"] = np.zeros((64, channels, 3, 3), np.float32)
    arrays |= {f"mmpose_model.{i}": np.zeros(1, np.float32) for i in range(2)}
    single = open_single_file(write(tmp_path / "model.safetensors", arrays))
    assert single.kind == kind
    assert single.components["unet"].config["in_channels"] == channels
    assert single.scheduler_config["prediction_type"] == "epsilon"


def test_averages_are_passed_over_unless_they_are_all_there_is(files, tmp_path):
    unet = part(files[SD1], UNET)
    averaged = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": 2 * a for name, a in unet.items()}
    averaged["model_ema.decay"] = np.zeros((), np.float32)
    for arrays, factor in ((unet | averaged, 1), (averaged, 2)):
        component = open_single_file(write(tmp_path / "model.safetensors", arrays)).components["unet"]
        assert_holds(component, jax.tree.map(lambda leaf, f=factor: f * np.asarray(leaf), pipeline(SD1).params["unet"]))


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.10.0.in_layers.0.weight",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias",
        "output_blocks.11.1.transformer_blocks.10.ff.net.0.proj.weight",
        "output_blocks.2.1.conv.weight",
        "input_blocks.3.0.op.bias",
        "label_emb.0.2.weight",
        "middle_block.1.proj_in.weight",
        "out.2.bias",
        "time_embed.0.weight",
        "output_blocks.4.0.skip_connection.weight",
    ],
)
def test_averages_get_their_dots_back(name):
    assert with_dots(name.replace(".", "")) == name


@pytest.mark.parametrize("bare", [False, True])
def test_an_autoencoder_alone(bare, files, tmp_path):
    arrays = part(files[XL], VAE, bare=bare) | {"loss.logvar": np.zeros((), np.float32)}
    single = open_single_file(write(tmp_path / "vae.safetensors", arrays), scaling_factor=0.13025)
    assert (single.kind, list(single.components)) == ("autoencoder", ["vae"])
    assert single.components["vae"].config["scaling_factor"] == 0.13025
    assert_holds(single.components["vae"], pipeline(XL).params["vae"])
    assert open_single_file(single.label).components["vae"].config["scaling_factor"] == 0.18215


@pytest.mark.parametrize("bare", [False, True])
def test_a_unet_alone(bare, files, tmp_path):
    path = write(tmp_path / "unet.safetensors", part(files[SD1], UNET, bare=bare))
    assert open_single_file(path).kind == "UNet of SD 1.5"
    assert_holds(open_single_file(path).components["unet"], pipeline(SD1).params["unet"])
    with pytest.raises(ValueError, match=r"\(UNet of SD 1.5\) is no whole pipeline: it has no vae, text_encoder"):
        load_single_file(path)
    with pytest.raises(ValueError, match="has no vae, only unet"):
        load_component(path, "vae")


def test_buffers_are_passed_over_and_strangers_are_listed(files, tmp_path):
    scalar = np.zeros((), np.float32)
    buffers = {
        **dict.fromkeys(
            ("betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "logvar", "global_step"), scalar
        ),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.zeros((1, 6), np.int64),
    }
    path = write(tmp_path / "model.safetensors", files[SD1] | buffers)
    assert list(open_single_file(path).components) == ["unet", "vae", "text_encoder"]
    for strange, message in (
        (f"{UNET}label_emb.weight", r"1 tensors of its unet are unknown \(model.diffusion_model.label_emb.weight\)"),
        ("edm_mean", r"1 tensors belong to no network .* \(edm_mean\)"),
    ):
        path = write(tmp_path / "model.safetensors", files[SD1] | {strange: scalar})
        with pytest.raises(ValueError, match=message):
            open_single_file(path)


def test_text_encoder_names_without_their_first_word(files, tmp_path):
    arrays = {name.replace("transformer.text_model.", "transformer."): a for name, a in files[SD1].items()}
    single = open_single_file(write(tmp_path / "model.safetensors", arrays))
    assert_holds(single.components["text_encoder"], pipeline(SD1).params["text_encoder"])


def test_openclip_of_sd2_gives_its_last_layer_and_projection_away(files, tmp_path):
    prefix = "cond_stage_model.model."
    arrays = dict(files[SD2])
    for name, array in part(files[SD2], f"{prefix}transformer.resblocks.1.").items():
        arrays[name.replace("resblocks.1.", "resblocks.2.")] = 3 * array
    arrays[f"{prefix}text_projection"] = np.zeros((64, 64), np.float32)
    arrays[f"{prefix}logit_scale"] = np.zeros((), np.float32)
    single = open_single_file(write(tmp_path / "model.safetensors", arrays))
    assert_holds(single.components["text_encoder"], pipeline(SD2).params["text_encoder"])
    path = write(
        tmp_path / "sgm.safetensors",
        {name.replace(prefix, "conditioner.embedders.0.model."): array for name, array in arrays.items()},
    )
    assert list(open_single_file(path).components) == ["unet", "vae", "text_encoder"]


def test_a_refiner_has_the_second_text_encoder_alone(files, tokenizer, tmp_path):
    arrays = {
        name.replace("conditioner.embedders.1.", "conditioner.embedders.0."): array
        for name, array in files[XL].items()
        if not name.startswith("conditioner.embedders.0.")
    }
    path = write(tmp_path / "model.safetensors", arrays)
    refiner = load_single_file(path, host=True, tokenizer=tokenizer)
    assert refiner.text_encoder_names == ("text_encoder_2",)
    assert refiner.tokenizers[0].pad_token_id == 0
    again = save_single_file(refiner, tmp_path / "again.safetensors")
    assert arrays_of(again).keys() == arrays.keys()
    single = open_single_file(again)
    for name in ("unet", "vae", "text_encoder_2"):
        assert_holds(single.components[name], pipeline(XL).params[name])


def test_half_precision_keeps_an_autoencoder_that_overflows(files, tokenizer, tmp_path):
    path = write(tmp_path / "model.safetensors", files[SD1])
    loaded = load_single_file(path, "float16", host=True, tokenizer=tokenizer)
    assert loaded.params["unet"]["conv_in"]["kernel"].dtype == np.float16
    assert loaded.params["vae"]["decoder"]["conv_in"]["kernel"].dtype == np.float32
    module, params = load_component(path, "vae", "bfloat16")
    assert (module.dtype, params["decoder"]["conv_in"]["kernel"].dtype) == (jnp.bfloat16, jnp.bfloat16)
