"""pipeline_shapes: the loaded pipeline without its numbers, and published models without their files."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import pytest
from tiny_models import tiny_xl_pipeline

from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.weights import load_pipeline, save_pipeline
from fairhuman_jax.weights.shapes import pipeline_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("xl")
    save_pipeline(tiny_xl_pipeline(), path)
    return path


def outline(params):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_a_folder_of_shapes_is_the_loaded_one_without_its_numbers(folder, dtype):
    loaded, shapes = (read(folder, dtype, remat="full") for read in (load_pipeline, pipeline_shapes))
    assert outline(shapes.params) == outline(loaded.params)
    assert {type(leaf) for leaf in jax.tree.leaves(shapes.params)} == {jax.ShapeDtypeStruct}
    for name in ("unet", "vae", "text_encoders"):
        assert getattr(shapes, name) == getattr(loaded, name)
    assert shapes.schedule.to_config() == loaded.schedule.to_config()


def test_weights_need_not_be_there(folder, tmp_path):
    for config in folder.rglob("*.json"):
        copy = tmp_path / config.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(config.read_text())
    assert outline(pipeline_shapes(tmp_path).params) == outline(pipeline_shapes(folder).params)


@pytest.mark.parametrize(
    ("base", "unet", "prediction", "side"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684, "epsilon", 128),
        ("stabilityai/stable-diffusion-2-1", 865_910_724, "v_prediction", 96),
        ("stabilityai/stable-diffusion-2-1-base", 865_910_724, "epsilon", 64),
    ],
)
def test_published_models_are_known_without_a_download(base, unet, prediction, side):
    pipeline = open_base(base, dtype="bfloat16", shapes=True, remat="full")
    leaves = jax.tree.leaves(pipeline.params["unet"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == unet
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert pipeline.schedule.prediction_type == prediction
    assert pipeline.unet.sample_size == side
    assert pipeline.unet.remat == "full"


def test_what_is_not_known_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"me/model: no such folder, nor a model whose shapes are known.*xl-base"
    ):
        open_base("me/model", shapes=True)
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.safetensors is a single file; shapes are known of folders and of"):
        pipeline_shapes(single)
    (tmp_path / "model_index.json").write_text(json.dumps(json.loads((folder / "model_index.json").read_text())))
    with pytest.raises(FileNotFoundError, match="unet: no such folder"):
        pipeline_shapes(tmp_path)
