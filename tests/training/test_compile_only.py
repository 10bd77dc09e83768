"""compile_only: the trainer's step for TPUs and GPUs that are not there, and what is refused before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_cuda, needs_libtpu
from jax.sharding import PartitionSpec
from tiny_models import SMALL_UNET, random_params, tiny_pipeline

from fairhuman_jax.config import load_config
from fairhuman_jax.contract import System, SystemConfig
from fairhuman_jax.devices.sharding import AXES, make_mesh
from fairhuman_jax.models import UNet2DCondition
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import ControlNetTrainable, LoraTrainable
from fairhuman_jax.training import compile_only as module
from fairhuman_jax.training.compile_only import StepReport, compile_only, compile_step, describe_report
from fairhuman_jax.training.program_cost import Traffic
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig
from fairhuman_jax.weights import save_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline folder whose UNet has one resolution."""
    unet = UNet2DCondition.from_config(SMALL_UNET)
    pipeline = tiny_pipeline()
    pipeline = dataclasses.replace(pipeline, unet=unet, params=pipeline.params | {"unet": random_params(unet, 0)})
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(pipeline, folder)
    return str(folder)


@dataclasses.dataclass(frozen=True)
class Brightness(System, SystemConfig):
    """A system of one number, and its own configuration."""

    def build(self, shapes=False):
        return self

    def init(self, key):
        return {"scale": jax.random.normal(key)}, {}

    def predict(self, trainable, frozen, batch, key):
        return {"output": trainable["scale"] * batch["image"].astype(jnp.float32)}

    def objectives(self, prediction, batch):
        return {"global": prediction["output"].mean()}


CONFIGS = Path(__file__).parents[2] / "configs"
LORA = LoraTrainable(rank=2)


def run_config(base, *, trainable=LORA, batch_size=8, cache_latents=True, **train):
    return RunConfig(
        system=FairHumanConfig(base=base, trainable=trainable),
        output="unused",
        data=DataConfig(resolution=16, cache_latents=cache_latents),
        train=TrainConfig(batch_size=batch_size, **train),
    )


# ---- on the TPU's compiler -------------------------------------------------------------------------------------------


@needs_libtpu
def test_a_step_compiles_for_four_chips(base):
    report = compile_step(run_config(base, batch_size=8), "v5e:2x2")
    assert (report.chips, report.mesh, report.samples, report.kind) == (4, (4, 1), 2, "TPU v5 lite")
    assert report.fits
    assert report.hbm is not None
    assert 0 < report.arguments < report.peak < report.hbm
    # The gradients' and that of the Gram matrix with the losses; the TPU compiler may join the first into fewer.
    assert report.traffic["all-reduce"].count >= 2
    text = describe_report(report)
    assert text.startswith("v5e:2x2: 4 chips (TPU v5 lite), mesh data 4 x fsdp 1, 2 samples a chip\n")
    assert "of 15.75 GiB: fits" in text


@needs_libtpu
def test_what_does_not_fit_is_said_in_the_compilers_figures():
    train = TrainConfig(batch_size=2**22)  # 48 GiB of pictures
    config = RunConfig(system=Brightness(), output="unused", train=train)  # pyright: ignore[reportArgumentType]
    report = compile_step(config, "v5e:1x1")
    assert not report.fits
    assert report.needed is not None
    assert float(report.needed.removesuffix("GiB")) >= 48
    assert f"does not fit: {report.needed} needed of 15.75 GiB" in describe_report(report)


# ---- on XLA's for GPUs -----------------------------------------------------------------------------------------------


@needs_cuda
def test_a_step_compiles_for_two_gpus(base):
    report = compile_step(run_config(base, batch_size=8), "h100:2")
    assert (report.chips, report.mesh, report.samples, report.kind) == (2, (2, 1), 4, "NVIDIA H100 80GB HBM3")
    assert report.fits
    assert 0 < report.arguments < report.peak
    assert report.traffic["all-reduce"].count >= 2
    assert "of 75.15 GiB: fits\n" in describe_report(report)


@needs_cuda
@pytest.mark.parametrize(
    ("pictures", "said"),
    [(7 * 2**20, "GiB needed of 75.15 GiB"), (5 * 2**20, "fits, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")],
)
def test_memory_of_a_gpu_is_compared_with_what_it_has(pictures, said):
    """84 and 60 GiB of pictures."""
    train = TrainConfig(batch_size=pictures)
    config = RunConfig(system=Brightness(), output="unused", train=train)  # pyright: ignore[reportArgumentType]
    assert said in compile_only(config, "h100:1")


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["pictures", "latents", "encoded"])
@pytest.mark.parametrize("trainable", [LORA, ControlNetTrainable()])
def test_arguments_are_placed_as_the_trainer_places_them(base, trainable, given):
    mesh = make_mesh(4)
    config = run_config(
        base, trainable=trainable, cache_latents=given == "latents", fsdp=4, shard_frozen=True, ema_decay=0.9
    )
    step, (state, frozen, batch) = module.abstract_step(config, mesh, encoded=given == "encoded")
    for leaf in jax.tree.leaves((state, frozen, batch)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert leaf.sharding.mesh == mesh
    assert set(frozen) == {"unet", "vae", "text_encoder"}
    wanted = {
        "pictures": {"image", "input_ids"},
        "latents": {"latent_mean", "latent_logvar", "input_ids"},
        "encoded": {"latent_mean", "latent_logvar", "text_hidden", "text_pooled"},
    }
    assert batch.keys() & set().union(*wanted.values()) == wanted[given]
    assert ("conditioning_image" in batch) == isinstance(trainable, ControlNetTrainable)
    assert {leaf.sharding.spec for leaf in batch.values()} == {PartitionSpec(AXES)}
    new, metrics = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert {"loss/global", "loss/face", "loss/hand"} <= metrics.keys()


@pytest.mark.parametrize("name", ["people_sdm", "people_tdm"])
def test_subject_and_scene_models_have_shapes(name):
    config = load_config(CONFIGS / f"{name}.py", ["train.batch_size=8", "train.accumulate=1"])
    step, (state, frozen, batch) = module.abstract_step(config, make_mesh(2))
    said = config.system.build().tokenize(["a man <|image|> and a woman <|image|> in a garden"] * 8)
    assert {key: (leaf.shape, leaf.dtype) for key, leaf in batch.items() if key in said} == {
        key: (array.shape, array.dtype) for key, array in said.items()
    }
    _, metrics = jax.eval_shape(step, state, frozen, batch)
    assert "loss/denoising" in metrics


def test_published_subject_models_need_no_download():
    config = load_config(CONFIGS / "facediffuser_sdm.py")
    system = config.system.build(shapes=True)
    assert {type(leaf) for leaf in jax.tree.leaves(system.pipeline.params)} == {jax.ShapeDtypeStruct}
    assert system.image_encoder.config["num_hidden_layers"] == 24
    unknown = dataclasses.replace(config.system, image_encoder="somebody/elses")
    with pytest.raises(FileNotFoundError, match=r"somebody/elses: no such folder, nor .*openai/clip-vit-large-patch14"):
        unknown.build(shapes=True)


# ---- reports and refusals --------------------------------------------------------------------------------------------


def test_a_report_is_a_table():
    report = StepReport(
        topology="v5p:2x2x1",
        chips=4,
        kind="TPU v5",
        mesh=(2, 2),
        samples=0.5,
        hbm=95 * 2**30,
        flops=25 * 10**11,
        seconds=61.2,
        arguments=2**30,
        temporaries=2**29,
        peak=3 * 2**29,
        traffic={"all-gather": Traffic(20, 3 * 2**20)},
    )
    lines = describe_report(report).splitlines()
    assert lines[0] == "v5p:2x2x1: 4 chips (TPU v5), mesh data 2 x fsdp 2, 0.5 samples a chip"
    table = {line[:26].strip(): line[26:].strip() for line in lines[3:]}
    assert table == {
        "arguments": "1.00 GiB",
        "outputs": "0.00 GiB",
        "temporaries": "0.50 GiB",
        "code": "0.00 GiB",
        "peak": "1.50 of 95.00 GiB: fits",
        "products and convolutions": "2.5 TFLOP a step",
        "all-gather": "20 a step, 3 MiB of results",
        "compiled in": "61 s",
    }


@needs_libtpu
def test_a_batch_that_does_not_divide_is_refused(base):
    with pytest.raises(ValueError, match=r"train\.batch_size=6 does not divide over the 4 chips of v5e:2x2; make it"):
        compile_only(run_config(base, batch_size=6), "v5e:2x2")
    with pytest.raises(ValueError, match=r"4 chips of v5e:2x2 x 4 micro-batches; make it a multiple of 16"):
        compile_only(run_config(base, batch_size=8, accumulate=4), "v5e:2x2")
