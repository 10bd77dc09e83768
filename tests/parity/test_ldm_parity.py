"""LDM files against diffusers' own converters: at full size by name, and whole small pipelines by value.

Full-size networks are torch models on the meta device, and their tensors one number each, stretched to shape.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from ldm_pipelines import arrays_of, assert_holds, pipeline

from fairhuman_jax.models import AutoencoderKL, UNet2DCondition, presets
from fairhuman_jax.models.controlnet import ControlNet
from fairhuman_jax.weights import save_pipeline
from fairhuman_jax.weights.ldm import open_single_file, save_single_file
from fairhuman_jax.weights.ldm.configs import SD1, SD2, XL
from fairhuman_jax.weights.ldm.reading import recognise
from fairhuman_jax.weights.ldm.slots import ldm_openclip_slots, ldm_unet_slots, ldm_vae_slots

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_utils as oracle  # noqa: E402

UNET, VAE, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
UNETS = {
    "SD 1.5": presets.SD15_UNET,
    "SD 1.5 inpainting": presets.SD15_INPAINT_UNET,
    "SD 2.1": presets.SD21_UNET,
    "HumanSD": presets.HUMANSD_UNET,
    "SDXL base": presets.SDXL_UNET,
    "SDXL refiner": presets.SDXL_REFINER_UNET,
}
CONTROLNETS = {
    "ControlNet SD 1.5": presets.SD15_CONTROLNET,
    "ControlNet SD 2.1": presets.SD21_CONTROLNET,
    "ControlNet SDXL": presets.SDXL_CONTROLNET,
}


class Ghosts:
    """`Tensors` of any size in no memory: each is one number."""

    label, metadata = "ghost.safetensors", {}

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.tags = {name: np.float32(i) for i, name in enumerate(shapes)}

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        return np.broadcast_to(self.tags[name], self.shapes[name])

    def for_torch(self) -> dict:
        return {name: torch.tensor(self.tags[name]).expand(shape) for name, shape in self.shapes.items()}


@functools.cache
def network_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a full-size network of diffusers."""
    config = dict({**UNETS, **CONTROLNETS, "vae": presets.SD_VAE}[kind])
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def ldm_file(slots, shapes) -> Ghosts:
    """The LDM file that `slots` make of a network: shapes as LDM stores them."""
    found = {}
    for name, slot in slots.items():
        shape = shapes[slot.stored[0]]
        found[name] = (*shape, *(1,) * (slot.ndim - len(shape))) if slot.ndim else shape
    return Ghosts(found)


def assert_same(component, converted, shapes):
    """Ours, the oracle's and the network's own tensors have the same names, shapes and origins."""
    assert set(component.tensors.names()) == set(converted) == set(shapes)
    for name, tensor in converted.items():
        ours = component.tensors.read(name)
        assert ours.shape == tuple(tensor.shape) == component.tensors.shape(name), name
        assert ours.flat[0] == tensor.flatten()[0].item(), name


@pytest.mark.parametrize("kind", UNETS)
def test_full_size_unets_are_those_of_the_converter(kind):
    config, shapes = UNETS[kind], network_shapes(kind)
    file = ldm_file(ldm_unet_slots(shapes, UNET, linear=config.get("use_linear_projection", False)), shapes)
    assert len(file.names()) == {"SDXL base": 1680, "SDXL refiner": 1220}.get(kind, 686)
    prediction = "v_prediction" if kind == "SD 2.1" else None
    single = recognise(file, prediction_type=prediction)
    assert single.kind == f"UNet of {kind}"
    assert_same(single.components["unet"], oracle.convert_ldm_unet_checkpoint(file.for_torch(), config), shapes)
    found = UNet2DCondition.from_config(single.components["unet"].config)
    assert found == UNet2DCondition.from_config(config)


@pytest.mark.parametrize("prefix", [CONTROL, ""])
@pytest.mark.parametrize("kind", ["ControlNet SD 1.5", "ControlNet SD 2.1"])
def test_full_size_controlnets_are_those_of_the_converter(kind, prefix):
    config, shapes = CONTROLNETS[kind], network_shapes(kind)
    file = ldm_file(ldm_unet_slots(shapes, prefix, linear=config["use_linear_projection"]), shapes)
    assert len(file.names()) == 340
    single = recognise(file)
    assert single.kind == kind
    assert_same(single.components["controlnet"], oracle.convert_controlnet_checkpoint(file.for_torch(), config), shapes)
    assert ControlNet.from_config(single.components["controlnet"].config) == ControlNet.from_config(config)


@pytest.mark.parametrize("kind", [*UNETS, *CONTROLNETS])
def test_full_size_networks_in_diffusers_naming_need_no_config(kind):
    published, file = (UNETS | CONTROLNETS)[kind], Ghosts(network_shapes(kind))
    single = recognise(file, prediction_type="v_prediction" if kind == "SD 2.1" else None)
    assert single.kind == kind if kind in CONTROLNETS else f"UNet of {kind}"
    name, network = ("controlnet", ControlNet) if kind in CONTROLNETS else ("unet", UNet2DCondition)
    assert set(single.components[name].tensors.names()) == set(file.names())
    assert network.from_config(single.components[name].config) == network.from_config(published)


@pytest.mark.parametrize("prefix", [VAE, ""])
def test_the_full_size_autoencoder_is_that_of_the_converter(prefix):
    shapes = network_shapes("vae")
    file = ldm_file(ldm_vae_slots(shapes, prefix), shapes)
    assert len(file.names()) == 248
    assert file.shape(f"{prefix}decoder.mid.attn_1.q.weight") == (512, 512, 1, 1)
    single = recognise(file)
    assert_same(single.components["vae"], oracle.convert_ldm_vae_checkpoint(file.for_torch(), presets.SD_VAE), shapes)
    assert AutoencoderKL.from_config(single.components["vae"].config) == AutoencoderKL.from_config(presets.SD_VAE)


@pytest.mark.parametrize(
    ("prefix", "published", "count"),
    [
        ("cond_stage_model.model.", presets.SD21_TEXT, 23 * 12 + 4),
        ("conditioner.embedders.1.model.", presets.SDXL_TEXT_2, 32 * 12 + 5),
    ],
)
def test_openclip_towers_of_all_layers_are_those_of_the_converter(prefix, published, count):
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "projection_dim": 8, "vocab_size": 99}
    network = getattr(transformers, published["architectures"][0])
    config = transformers.CLIPTextConfig(**published | sizes)
    with torch.device("meta"):
        model = network(config)
    shapes = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    slots = ldm_openclip_slots(shapes, prefix)
    file = Ghosts(
        {
            name: (len(slot.stored) * shapes[slot.stored[0]][0], *shapes[slot.stored[0]][1:])
            for name, slot in slots.items()
        }
    )
    assert len(file.names()) == count
    rng = np.random.default_rng(0)
    file.tags = {name: rng.normal(size=shape).astype(np.float32) for name, shape in file.shapes.items()}
    (component,) = recognise(file).components.values()
    converted = oracle.convert_open_clip_checkpoint(
        model, {name: torch.tensor(file.read(name)) for name in slots}, prefix
    )
    assert set(component.tensors.names()) == set(converted) == set(shapes)
    for name, tensor in converted.items():
        np.testing.assert_array_equal(component.tensors.read(name), tensor.numpy())
    assert component.config["num_hidden_layers"] == published["num_hidden_layers"]


def test_handrefiner_is_its_four_networks():
    groups = {
        UNET: ldm_unet_slots(network_shapes("SD 1.5 inpainting"), UNET, linear=False),
        CONTROL: ldm_unet_slots(network_shapes("ControlNet SD 1.5"), CONTROL, linear=False),
        VAE: ldm_vae_slots(network_shapes("vae"), VAE),
    }
    kinds = {UNET: "SD 1.5 inpainting", CONTROL: "ControlNet SD 1.5", VAE: "vae"}
    shapes = {}
    for prefix, slots in groups.items():
        shapes |= ldm_file(slots, network_shapes(kinds[prefix])).shapes
    single = recognise(Ghosts(shapes | {"logvar": (1000,), "betas": (1000,)}))
    assert single.kind == "HandRefiner"
    sizes = {
        name: sum(int(np.prod(component.tensors.shape(tensor))) for tensor in component.tensors.names())
        for name, component in single.components.items()
    }
    assert sizes == {"unet": 859_535_364, "vae": 83_653_863, "controlnet": 361_279_120}


@pytest.mark.parametrize("family", [SD1, SD2, XL])
def test_diffusers_reads_the_pipelines_that_are_written(family, tmp_path):
    path = save_single_file(pipeline(family), tmp_path / "model.safetensors")
    save_pipeline(pipeline(family), tmp_path / "folder")
    loader = diffusers.StableDiffusionXLPipeline if family == XL else diffusers.StableDiffusionPipeline
    expected = loader.from_pretrained(tmp_path / "folder", local_files_only=True)
    found = loader.from_single_file(path, config=str(tmp_path / "folder"), local_files_only=True)
    for name in pipeline(family).params:
        theirs, ours = getattr(expected, name).state_dict(), getattr(found, name).state_dict()
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            np.testing.assert_array_equal(ours[key].numpy(), tensor.numpy(), err_msg=f"{name} {key}")


def test_a_torch_checkpoint_is_read_like_the_safetensors_file(tmp_path):
    path = save_single_file(pipeline(SD2), tmp_path / "model.safetensors")
    state = {name: torch.tensor(array) for name, array in arrays_of(path).items()}
    state["model_ema.decay"] = torch.tensor(0.9999)
    torch.save({"state_dict": state, "global_step": 875000, "epoch": 1}, tmp_path / "model.ckpt")
    single = open_single_file(tmp_path / "model.ckpt")
    assert single.kind == SD2
    for name, component in single.components.items():
        assert_holds(component, pipeline(SD2).params[name])
