"""Files of FastComposer and Face-diffuser: where tensors land, names at published size, refusals; our own exports."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ldm_pipelines import CLIP, arrays_of, pipeline
from safetensors.numpy import save_file
from tiny_models import assert_trees_equal, random_params, tiny_tokenizer

from fairhuman_jax.models import CLIPVision, Postfuse, presets
from fairhuman_jax.weights import (
    expected_params,
    load_component,
    load_pipeline,
    load_single_file,
    load_subject_model,
    open_single_file,
    save_flat_file,
    save_single_file,
    save_subject_model,
    save_tokenizer,
)
from fairhuman_jax.weights.keys import canonical_names, leaves
from fairhuman_jax.weights.ldm.configs import SD1, XL
from fairhuman_jax.weights.ldm.reading import recognise
from fairhuman_jax.weights.ldm.writing import networks
from fairhuman_jax.weights.recognition import looks_like
from fairhuman_jax.weights.tensors import ParamTensors, open_tensors

torch = pytest.importorskip("torch")

VISION = CLIP | {"num_hidden_layers": 3, "projection_dim": 64, "image_size": 12, "patch_size": 4}
IMAGE_ENCODER = CLIPVision.from_config(presets.CLIP_L_VISION | VISION)
POSTFUSE = Postfuse(width=64)
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
TRAINED = ("unet.", "postfuse_module.", "image_encoder.vision_model.encoder.layers.1.", "layers.2.")


def old_names(name: str) -> str:
    """A name of diffusers' autoencoder as version 0.16 has it."""
    for current, old in OLD.items():
        name = name.replace(f"attentions.0.{current}.", f"attentions.0.{old}.")
    return name


@pytest.fixture(scope="module")
def params():
    """Parameters of all five networks in float32; those of frozen ones lose nothing in bfloat16."""
    found = pipeline(SD1).params | {
        "image_encoder": random_params(IMAGE_ENCODER, 5),
        "postfuse": random_params(POSTFUSE, 6),
    }
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16).astype(np.float32), found)
    return rounded | {name: found[name] for name in ("unet", "postfuse")}


@pytest.fixture(scope="module")
def state(params):
    """The flat state dict of a subject model: what trained in float32, the rest in bfloat16, buffers in int64."""
    prefixes = {"unet": "unet.", "vae": "vae.", "text_encoder": "text_encoder.", "image_encoder": "image_encoder."}
    found = {}
    for component, tree in params.items():
        tensors = ParamTensors.of(tree, component)
        for name in tensors.names():
            flat = prefixes.get(component, "postfuse_module.") + old_names(name)
            flat = flat.removeprefix("text_encoder.text_model.") if component == "text_encoder" else flat
            flat = f"text_encoder.{flat}" if component == "text_encoder" else flat
            tensor = torch.from_numpy(np.array(tensors.read(name)))
            trains = flat.startswith(TRAINED[:3]) or TRAINED[3] in flat
            found[flat] = tensor if trains else tensor.to(torch.bfloat16)
    found["text_encoder.embeddings.position_ids"] = torch.arange(6)[None]
    found["image_encoder.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny_tokenizer(), folder)
    return folder


def save(state, folder):
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def scene(state):
    """The flat state dict of a scene model."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(("image_", "postfuse"))}


def test_every_tensor_of_a_subject_model_lands_in_its_place(params, state, tokenizer, tmp_path):
    save(state, tmp_path)
    for path in (tmp_path / "pytorch_model.bin", tmp_path):
        model = load_subject_model(path, "float32", tokenizer=tokenizer, host=True)
        assert_trees_equal(model.params, jax.tree.map(np.asarray, params))
    assert (model.image_encoder, model.postfuse) == (IMAGE_ENCODER, POSTFUSE)
    assert networks(model.pipeline) == networks(pipeline(SD1))
    assert model.pipeline.schedule == pipeline(SD1).schedule
    kernel = model.params["postfuse"]["mlp1"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel, state["postfuse_module.mlp1.fc1.weight"].numpy().T)
    kernel = model.params["vae"]["decoder"]["mid_block"]["attentions.0"]["to_out.0"]["kernel"]
    np.testing.assert_array_equal(kernel, state["vae.decoder.mid_block.attentions.0.proj_attn.weight"].float().T)


def test_stored_types_are_kept(state, tokenizer, tmp_path):
    model = load_subject_model(save(state, tmp_path), tokenizer=tokenizer, host=True)
    kinds = {name: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for name, tree in model.params.items()}
    half, full = {"bfloat16"}, {"float32"}
    assert {name: kinds[name] for name in ("unet", "vae", "text_encoder")} == {
        "unet": full,
        "vae": half,
        "text_encoder": half,
    }
    assert (kinds["postfuse"], kinds["image_encoder"]) == (full, half | full)
    vision = model.params["image_encoder"]["vision_model"]
    assert vision["encoder"]["layers"]["mlp"]["fc1"]["kernel"].dtype == np.float32  # of a stack with trained layers


def test_a_scene_model_is_a_pipeline(params, state, tokenizer, tmp_path):
    path = save(scene(state), tmp_path)
    single = open_single_file(path)
    assert (single.kind, list(single.components)) == (SD1, ["unet", "vae", "text_encoder"])
    loaded = load_single_file(path, "float32", tokenizer=tokenizer, host=True)
    assert_trees_equal(loaded.params, {name: jax.tree.map(np.asarray, params[name]) for name in single.components})
    with pytest.raises(ValueError, match="the tokenizer has 49408 tokens"):
        load_pipeline(path)
    with pytest.raises(ValueError, match=r"\(SD 1.5\) has no image_encoder, postfuse; expected the pytorch_model.bin"):
        load_subject_model(path)


def test_one_network_of_a_file(params, state, tmp_path):
    path = save(state, tmp_path)
    assert open_single_file(path).kind == "SD 1.5 with subjects"
    module, loaded = load_component(path, "postfuse", host=True)
    assert module == POSTFUSE
    assert_trees_equal(loaded, jax.tree.map(np.asarray, params["postfuse"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"localization.bias": torch.zeros(1)}, r"1 tensors belong to no network .* \(localization.bias\); it looks"),
        ({"unet.extra.weight": torch.zeros(1)}, r"\(UNet2DCondition\): tensors 1 unknown \(extra.weight\)"),
        ({"postfuse_module.mlp2.fc1.bias": None}, r"\(Postfuse\): tensors 1 missing \(mlp2.fc1.bias\)"),
        ({"postfuse_module.layer_norm.weight": None}, "has no layer_norm.weight"),
        ({"postfuse_module.mlp1.fc1.weight": torch.zeros(64, 64)}, r"wrong shape \(mlp1.fc1.weight \[64, 64\] for"),
        ({"image_encoder.vision_model.post_layernorm.bias": None}, r"missing \(vision_model.post_layernorm.bias\)"),
        ({"vae.decoder.mid_block.attentions.0.query.weight": None}, r"missing \(decoder.*attentions.0.to_q.weight\)"),
        ({"text_encoder.final_layer_norm.bias": None}, r"missing \(text_model.final_layer_norm.bias\)"),
    ],
)
def test_leftover_missing_and_misshapen_tensors_are_named(change, message, state, tokenizer, tmp_path):
    changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_subject_model(save(changed, tmp_path), tokenizer=tokenizer, host=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("projection", [32, 64])
def test_parts_of_unequal_width_are_refused(projection, state, tokenizer, tmp_path):
    tensors = ParamTensors.of(random_params(Postfuse(width=32), 0), "postfuse")
    other = {f"postfuse_module.{name}": torch.from_numpy(np.array(tensors.read(name))) for name in tensors.names()}
    other["image_encoder.visual_projection.weight"] = torch.zeros(projection, 64)
    message = rf"postfuse is 32 wide, the text encoder \[64\] and .* projection {projection};"
    with pytest.raises(ValueError, match=message):
        load_subject_model(save(state | other, tmp_path), tokenizer=tokenizer, host=True)


def test_nothing_in_a_file_is_run(state, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    with pytest.raises(ValueError, match="would run"):
        load_subject_model(save(state | {"trap": Trap()}, tmp_path))
    assert not (tmp_path / "ran").exists()


def test_other_places_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="is no subject model; expected the"):
            load_subject_model(path)


def test_what_the_files_look_like(state, tmp_path):
    assert looks_like(open_tensors(save(state, tmp_path))).startswith("a subject model of FastComposer")
    assert looks_like(open_tensors(save(scene(state), tmp_path))).startswith("a whole model in FastComposer's naming")
    lora = {"unet.conv_in.lora_A.weight": np.ones((4, 4), np.float32)}
    save_file(lora, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="it looks like a LoRA"):
        open_single_file(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def model(state, tokenizer, tmp_path_factory):
    return load_subject_model(save(state, tmp_path_factory.mktemp("sdm")), tokenizer=tokenizer, host=True)


def test_a_folder_keeps_the_model_and_is_a_pipeline_too(model, tmp_path):
    trained = jax.tree.map(lambda leaf: leaf + np.ones((), leaf.dtype), model.params["unet"])
    model = model._replace(params=model.params | {"unet": trained})
    save_subject_model(model, tmp_path)
    again = load_subject_model(tmp_path, host=True)
    assert (again.image_encoder, again.postfuse) == (model.image_encoder, model.postfuse)
    assert networks(again.pipeline) == networks(model.pipeline)
    assert_trees_equal(again.params, model.params)
    assert_trees_equal(load_pipeline(tmp_path, host=True).params, model.pipeline.params | {"unet": trained})
    (tmp_path / "postfuse" / "config.json").write_bytes((tmp_path / "unet" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="does not fit its config"):
        load_subject_model(tmp_path)


def test_a_flat_file_has_the_names_shapes_and_values_of_theirs(model, state, tokenizer, tmp_path):
    for given, expected in ((model, state), (model.pipeline, scene(state))):
        arrays = arrays_of(save_flat_file(given, tmp_path / "model.safetensors"))
        assert arrays.keys() == expected.keys()
        for name, tensor in expected.items():
            assert arrays[name].shape == tuple(tensor.shape), name
            np.testing.assert_array_equal(arrays[name].astype(np.float32), tensor.float(), err_msg=name)
            assert (arrays[name].dtype == np.int64) == name.endswith("position_ids")
    again = load_single_file(tmp_path / "model.safetensors", host=True, tokenizer=tokenizer)
    assert_trees_equal(again.params, model.pipeline.params)


def test_configs_that_shapes_do_not_tell_travel_with_a_flat_file(model, tokenizer, tmp_path):
    """Two heads where the width says one."""
    vision = CLIPVision.from_config(model.image_encoder.to_config() | {"num_attention_heads": 2})
    path = save_flat_file(model._replace(image_encoder=vision), tmp_path / "model.safetensors", "bfloat16")
    again = load_subject_model(path, host=True, tokenizer=tokenizer)
    assert again.image_encoder == vision
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(again.params)} == {"bfloat16"}


def test_what_a_flat_file_cannot_hold_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        save_flat_file(model, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="one text encoder"):
        save_flat_file(pipeline(XL), tmp_path / "model.safetensors")


@dataclasses.dataclass
class Shapes:
    """`Tensors` that have shapes alone."""

    shapes: dict[str, tuple[int, ...]]
    label: str = "shapes"
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def names(self):
        return tuple(self.shapes)

    def shape(self, name):
        return self.shapes[name]


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published subject model: diffusers' and transformers' own, prefixed as in its class."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    with torch.device("meta"):
        networks = {
            "unet.": diffusers.UNet2DConditionModel.from_config(presets.SD15_UNET),
            "vae.": diffusers.AutoencoderKL.from_config(presets.SD_VAE),
            "text_encoder.": transformers.CLIPTextModel(transformers.CLIPTextConfig(**presets.SD15_TEXT)),
            "image_encoder.": transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(**presets.CLIP_L_VISION)
            ),
        }
    found = {}
    for prefix, network in networks.items():
        for name, tensor in network.state_dict().items():
            name = name.removeprefix("text_model.") if prefix == "text_encoder." else old_names(name)
            found[prefix + name] = tuple(tensor.shape)
    found["text_encoder.embeddings.position_ids"] = (1, 77)
    found["image_encoder.vision_model.embeddings.position_ids"] = (1, 257)
    for mlp, into in (("mlp1", 1536), ("mlp2", 768)):
        for name, shape in (("layernorm", (into,)), ("fc1", (768, into)), ("fc2", (768, 768))):
            found[f"postfuse_module.{mlp}.{name}.weight"] = shape
            found[f"postfuse_module.{mlp}.{name}.bias"] = shape[:1]
    return found | {f"postfuse_module.layer_norm.{name}": (768,) for name in ("weight", "bias")}


def test_the_published_size():
    shapes = published_shapes()
    single = recognise(Shapes(shapes))
    presets_of = {
        "unet": presets.SD15_UNET,
        "vae": presets.SD_VAE,
        "text_encoder": presets.SD15_TEXT,
        "image_encoder": presets.CLIP_L_VISION,
        "postfuse": {"_class_name": "Postfuse", "width": 768},
    }
    modules = {name: component_module(name, component.config) for name, component in single.components.items()}
    assert modules == {name: component_module(name, config) for name, config in presets_of.items()}
    assert single.scheduler_config["_class_name"] == "PNDMScheduler"
    counts = {name: len(component.tensors.names()) for name, component in single.components.items()}
    assert counts == {"unet": 686, "vae": 248, "text_encoder": 196, "image_encoder": 392, "postfuse": 14}
    assert sum(counts.values()) == len(shapes) - 2
    sizes = {}
    for name, component in single.components.items():
        module = modules[name]
        wanted = {key: leaf.shape for leaf in leaves(expected_params(module)) for key in leaf.names}
        stored = canonical_names(type(module).__name__, component.tensors.names())
        assert {key: component.tensors.shape(stored[key]) for key in stored} == wanted
        sizes[name] = sum(int(np.prod(shape)) for shape in wanted.values())
    assert sizes == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "image_encoder": 303_179_776 + 786_432,
        "postfuse": 2_958_336,
    }


def component_module(name: str, config: dict):
    classes = {"image_encoder": CLIPVision, "postfuse": Postfuse} | {
        key: type(module) for key, module in networks(pipeline(SD1)).items()
    }
    return classes[name].from_config(config)


def test_files_in_ldm_naming_are_read_as_before(tmp_path):
    path = save_single_file(pipeline(SD1), tmp_path / "model.safetensors")
    assert open_single_file(path).kind == SD1
    assert looks_like(open_tensors(path)).startswith("a whole LDM checkpoint")
