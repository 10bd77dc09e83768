"""The command lines, end to end on the smallest pipeline, and what they answer to bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from compilers import printed_on_cpu
from PIL import Image

from fairhuman_jax.annotate.bottom_up import BottomUpPoses
from fairhuman_jax.data.people import PeopleDataset
from fairhuman_jax.doors import report, sample_door, train_door
from fairhuman_jax.keypoints.drawing import draw_poses
from fairhuman_jax.keypoints.poses import make_pose
from fairhuman_jax.keypoints.readers import write_poses
from fairhuman_jax.models import ControlNet
from fairhuman_jax.systems.humansd.system import with_pose_channels
from fairhuman_jax.training.loop import Result
from fairhuman_jax.weights import save_lora, save_model, save_pipeline, save_single_file

CONFIG = """
from fairhuman_jax.contract import PreviewConfig
from fairhuman_jax.systems.fairhuman.system import FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import LoraTrainable
from fairhuman_jax.training.run_config import DataConfig, RunConfig, TrainConfig


def config():
    return RunConfig(
        system=FairHumanConfig(base="{base}", trainable=LoraTrainable(rank=2)),
        output="{output}",
        data=DataConfig(length=8, held_out=8, resolution=16),
        train=TrainConfig(steps=2, batch_size=8, checkpoint_every=1),
        preview=PreviewConfig(prompts=("a person waves",), steps=2),
    )
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(tiny_models.tiny_pipeline(), folder)
    return folder


@pytest.fixture
def config(base, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(base.parent / "cache"))
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(base=base, output=tmp_path / "run"))
    return path


def refused(capsys, door, arguments) -> str:
    """The one line that a door answers with, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        door(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_training_ends_with_table_picture_and_lora(config, tmp_path, capsys):
    train_door([str(config)])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["global", "face", "hand"]
    assert "mean weight" in out and "images/s" in out
    assert (tmp_path / "run/export/pytorch_lora_weights.safetensors").is_file()
    first, both = (Image.open(tmp_path / "run" / n) for n in ("images/sample_0000000.png", "before_after.png"))
    assert both.height > 2 * first.height
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert {"loss/global", "loss/face", "loss/hand", "weight/hand"} <= records[0].keys()

    assert "holds a run at step 2" in refused(capsys, train_door, [str(config)])
    train_door([str(config), "--resume", "--set", "train.steps=3"])
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]


def test_losses_change_by_a_share_or_where_they_are_not_positive_by_an_amount():
    before, after = {"a": 0.2, "b": -0.1, "c": 0.0}, {"a": 0.1, "b": -0.3, "c": 0.0}
    lines = report(Result(before, after, {}, 1.0, 0, Path("export"), None)).splitlines()[2:5]
    assert [line.split()[3] for line in lines] == ["-50.0", "-0.20000", "-"]


def test_a_run_without_prompts_draws_nothing(config, tmp_path, capsys):
    train_door([str(config), "--set", "preview.prompts=()"])
    out = capsys.readouterr().out
    assert "picture:" not in out and "trained:" in out
    assert not list((tmp_path / "run").rglob("sample_*.png"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["missing.py"], "missing.py: no such configuration file"),
        (["CONFIG", "--set", "train.stepz=3"], "has no 'stepz'; did you mean steps?"),
        (["CONFIG", "--set", "train.steps=many"], "train.steps=many: needs int"),
        (["CONFIG", "--set", "system.base=/nowhere"], "base model /nowhere: no such folder"),
        (["CONFIG", "--set", "data.folder=/nowhere"], "/nowhere"),
        (["CONFIG", "--set", "optimizer.schedule=sudden"], "known: constant, linear, cosine"),
        (["CONFIG", "--set", "fair.method=fairest"], "unknown method 'fairest'"),
        (["CONFIG", "--set", "train.batch_size=7"], "a batch of 7 does not divide over 8 devices"),
        (["CONFIG", "--resume"], "no checkpoint to resume from"),
        (["CONFIG", "--resume", "--auto-resume"], "not allowed with argument --resume"),
        (["CONFIG", "--sett", "train.steps=3"], "unrecognized arguments: --sett"),
        (["CONFIG", "--set", "output=CONFIG/run"], "config.py"),
        (["CONFIG", "--set", "train.profile=5"], "train.profile=5: needs tuple[int, int] | None"),
        (["CONFIG", "--coordinator", "here:1"], "--coordinator, --processes and --process go together"),
        (
            ["CONFIG", "--distributed", "--process", "1"],
            "--distributed finds coordinator, processes and process itself",
        ),
    ],
)
def test_training_refuses_in_one_line(config, capsys, arguments, expected):
    arguments = [argument.replace("CONFIG", str(config)) for argument in arguments]
    assert expected in refused(capsys, train_door, arguments)


def test_weights_and_biases_that_is_missing_is_refused_before_training(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    expected = "train.wandb: the package is missing; pip install wandb"
    assert expected in refused(capsys, train_door, [str(config), "--set", "train.wandb=people"])
    assert not (tmp_path / "run").exists()


def test_samples_carry_their_recipe_and_depend_on_seed_alone(base, tmp_path):
    options = ["--base", str(base), "--steps", "2", "--size", "16"]
    sample_door(
        ["a person waves", "two hands", "--number", "2", "--seed", "5", *options, "--output", str(tmp_path / "a")]
    )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["a-person-waves-5.png", "a-person-waves-6.png", "sheet.png", "two-hands-5.png", "two-hands-6.png"]
    picture = Image.open(tmp_path / "a/two-hands-6.png")
    recipe = json.loads(picture.info["parameters"])
    assert recipe["prompt"] == "two hands" and recipe["seed"] == 6 and recipe["steps"] == 2
    sample_door(["two hands", "--seed", "6", *options, "--output", str(tmp_path / "b")])
    again = Image.open(tmp_path / "b/two-hands-6.png")
    assert np.abs(np.asarray(picture, int) - np.asarray(again, int)).max() <= 1


def test_loras_add_up(base, tmp_path):
    system = tiny_models.fairhuman()
    lora = tiny_models.trained_lora(system)
    path = save_lora(lora, tmp_path / "lora")
    options = ["a person waves", "--base", str(base), "--steps", "2", "--size", "16"]
    pictures = []
    for i, entries in enumerate(([], [f"{path}:1.0"], [f"{path}:0.25", f"{path}:0.75"])):
        flags = [flag for entry in entries for flag in ("--lora", entry)]
        sample_door([*options, *flags, "--output", str(tmp_path / str(i))])
        pictures.append(np.asarray(Image.open(tmp_path / str(i) / "a-person-waves-0.png"), int))
    plain, whole, parts = pictures
    assert np.abs(plain - whole).max() > 8
    assert np.abs(whole - parts).max() <= 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture to start from, its mask, a control image of another shape and a mask that does not fit."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    sizes = {"photo": (16, 16, 3), "mask": (16, 16), "pose": (24, 20, 3), "other": (8, 8)}
    for name, shape in sizes.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def controlnet(base, tmp_path_factory):
    """A ControlNet for the tiny base, and one that reads wider text."""
    folder = tmp_path_factory.mktemp("controlnet")
    config = tiny_models.tiny_pipeline().unet.to_config()
    config = {name: value for name, value in config.items() if name in ControlNet.config_fields()}
    for name, width in (("net", tiny_models.WIDTH), ("other", 3)):
        net = ControlNet.from_config(
            config | {"conditioning_embedding_out_channels": (4, 8), "cross_attention_dim": width}
        )
        save_model(net, tiny_models.random_params(net, 5), folder / name)
    return folder


def test_pictures_and_a_mesh_go_through_the_door(base, controlnet, pictures, tmp_path):
    options = ["two hands", "--base", str(base), "--steps", "3", "--seed", "1,4", "--scheduler", "euler_karras"]
    options += ["--controlnet", str(controlnet / "net"), "--condition", str(pictures / "pose.png"), "--long-prompt"]
    options += ["--control-scale", "0.7", "--init-image", str(pictures / "photo.png"), "--strength", "0.7"]
    options += ["--mask", str(pictures / "mask.png"), "--guidance-rescale", "0.3", "--negative", "a face"]
    drawn = []
    for mesh in ("1", "2"):
        sample_door([*options, "--mesh", mesh, "--output", str(tmp_path / mesh)])
        drawn.append(np.stack([np.asarray(Image.open(tmp_path / mesh / f"two-hands-{i}.png"), int) for i in (1, 4)]))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert drawn[0].shape == (2, 16, 16, 3)
    recipe = json.loads(Image.open(tmp_path / "1/two-hands-4.png").info["parameters"])
    assert recipe["seed"] == 4 and recipe["scheduler"] == "euler_karras" and recipe["control_scale"] == [0.7]
    assert recipe["mask"].endswith("mask.png") and recipe["strength"] == 0.7


def test_devices_side_by_side_draw_what_one_draws(tmp_path):
    """The sampler's program is the one whose results XLA's own kernels damage on two CPU devices (porting notes 11)."""
    options = ["a photo of a man wearing a red t-shirt", "--number", "8", "--steps", "6", "--scheduler", "pndm"]
    program = "from fairhuman_jax.doors import sample_door as door; door()"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for mesh in ("1", "2"):
        command = [sys.executable, "-c", program, *options, "--mesh", mesh, "--output", str(tmp_path / mesh)]
        subprocess.run(command, env=environment, capture_output=True, check=True)
    files = sorted(path.name for path in (tmp_path / "1").glob("a-photo*.png"))
    one, two = (np.stack([np.asarray(Image.open(tmp_path / mesh / name), int) for name in files]) for mesh in "12")
    assert len(files) == 8 and np.abs(one - two).max() <= 1


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    """A tiny HumanSD, one person as key points of a picture of twice the size, and the same person drawn."""
    folder = tmp_path_factory.mktemp("humansd")
    pipeline = with_pose_channels(tiny_models.tiny_pipeline())
    unet = tiny_models.random_params(pipeline.unet, 8)
    save_pipeline(dataclasses.replace(pipeline, params=pipeline.params | {"unet": unet}), folder / "base")
    points = np.random.default_rng(4).uniform(1, 15, (17, 2))
    person, found = (make_pose(np.concatenate([scale * points, np.ones((17, 1))], axis=1)) for scale in (1, 2))
    write_poses(folder / "pose.npz", [found], size=(32, 32))
    write_poses(folder / "far.npz", [make_pose(np.add(person.keypoints, (99, 0, 0)))])
    Image.fromarray(draw_poses([person], (16, 16))).save(folder / "drawn.png")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "nobody.png")
    return folder


def test_a_skeleton_is_drawn_from_key_points_and_compared(base, controlnet, skeletons, tmp_path):
    options = ["a person", "--system", "humansd", "--base", str(skeletons / "base"), "--steps", "3"]
    pictures = {}
    for pose in ("pose.npz", "drawn.png", "nobody.png"):
        sample_door([*options, "--size", "16", "--pose", str(skeletons / pose), "--output", str(tmp_path / pose)])
        pictures[pose] = np.asarray(Image.open(tmp_path / pose / "a-person-0.png"), int)
    np.testing.assert_array_equal(pictures["pose.npz"], pictures["drawn.png"])
    assert np.abs(pictures["pose.npz"] - pictures["nobody.png"]).max() > 2

    out = tmp_path / "beside"
    options += ["--size", "16", "--pose", str(skeletons / "pose.npz"), "--output", str(out), "--seed", "0,1"]
    sample_door([*options, "--compare-base", str(base), "--controlnet", str(controlnet / "net")])
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a-person-0.png"), int), pictures["pose.npz"])
    (other,) = (path for path in out.glob("a-person-0-*.png"))
    assert np.abs(np.asarray(Image.open(other), int) - pictures["pose.npz"]).max() > 2
    assert len(list(out.iterdir())) == 5 and Image.open(out / "sheet.png").width == 3 * 128


def test_the_pose_of_a_picture_is_found_by_a_named_network(skeletons, tmp_path, capsys):
    picture = PeopleDataset(64, 1, seed=5, framing="upper body")[0]["image"]
    Image.fromarray(picture).save(tmp_path / "somebody.png")
    options = ["a person", "--base", str(skeletons / "base"), "--size", "16", "--steps", "2", "--output"]
    network = ["--pose-network", "people", "--pose-of"]
    sample_door([*options, str(tmp_path / "found"), *network, str(tmp_path / "somebody.png")])
    write_poses(tmp_path / "same.npz", BottomUpPoses("people").detect(picture), size=(64, 64))
    sample_door([*options, str(tmp_path / "given"), "--pose", str(tmp_path / "same.npz")])
    drawn = [np.asarray(Image.open(tmp_path / name / "a-person-0.png"), int) for name in ("found", "given")]
    np.testing.assert_array_equal(*drawn)
    black = [*options, str(tmp_path), *network, str(skeletons / "nobody.png")]
    assert "nobody.png: nobody is found on it" in refused(capsys, sample_door, black)
    missing = ["a person", "--base", str(skeletons / "base"), *network, str(skeletons / "nobody.png")]
    missing[missing.index("people")] = str(tmp_path / "none.pth")
    assert "none.pth" in refused(capsys, sample_door, missing)


def test_the_published_run_has_its_own_defaults(skeletons, tmp_path):
    options = ["a person", "--base", str(skeletons / "base"), "--size", "16", "--output", str(tmp_path)]
    sample_door([*options, "--pose", str(skeletons / "pose.npz"), "--compat", "reference"])
    (path,) = tmp_path.iterdir()
    recipe = json.loads(Image.open(path).info["parameters"])
    assert (recipe["scheduler"], recipe["steps"], recipe["guidance"]) == ("ddim_humansd", 50, 10.0)
    assert recipe["negative"].startswith("longbody") and recipe["prompt"].startswith("a person, detailed background")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "it needs a pose picture"),
        (["--system", "humansd"], "--system humansd needs --pose or --pose-of"),
        (["--pose", "pose.npz", "--pose-of", "drawn.png"], "--pose and --pose-of: give one of the two"),
        (["--pose", "none.npz"], "none.npz does not exist; expected a file of key points"),
        (["--pose", "far.npz"], "all 1 people lie outside the canvas 16x16"),
        (["--pose", "pose.npz", "--compare-base", "people"], "--compare-base needs --controlnet or --adapter"),
        (
            ["--pose", "drawn.png", "--compare-base", "people", "--adapter", "x"],
            "--compare-base needs key points, but --pose",
        ),
        (["--pose", "pose.npz", "--compare-base", "x", "--adapter", "x", "--condition", "y"], "gives the pose, but 1"),
        (["--compat", "reference"], "--compat needs --pose or --pose-of"),
        (["--pose-size", "64"], "--pose-size needs --pose"),
        (["--pose", "pose.npz", "--pose-network", "people"], "--pose-network needs --pose-of"),
    ],
)
def test_skeletons_that_do_not_fit_are_refused(skeletons, capsys, arguments, expected):
    places = {path.name: str(path) for path in skeletons.iterdir()} | {"none.npz": str(skeletons / "none.npz")}
    arguments = [places.get(argument, argument) for argument in arguments]
    options = ["a person", "--base", str(skeletons / "base"), "--size", "16", *arguments]
    assert expected in refused(capsys, sample_door, options)


def test_a_skeleton_is_for_humansd_alone(base, skeletons, capsys):
    options = ["a person", "--base", str(base), "--size", "16", "--pose", str(skeletons / "pose.npz")]
    assert "a pose picture is for HumanSD" in refused(capsys, sample_door, options)
    assert "is not HumanSD: its denoiser reads 4 channels" in refused(
        capsys, sample_door, [*options, "--system", "humansd"]
    )


def test_a_single_file_draws_what_its_folder_draws(tmp_path):
    pipeline, base = tiny_models.with_middle(tiny_models.tiny_pipeline()), tmp_path / "base"
    save_pipeline(pipeline, base)
    save_single_file(pipeline, tmp_path / "model.safetensors")
    options = ["a face", "--steps", "2", "--size", "16", "--output"]
    sample_door([*options, str(tmp_path / "folder"), "--base", str(base)])
    file = ["--base", str(tmp_path / "model.safetensors"), "--tokenizer", str(base)]
    sample_door([*options, str(tmp_path / "file"), *file])
    pictures = [np.asarray(Image.open(tmp_path / name / "a-face-0.png"), int) for name in ("folder", "file")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--condition", "pose"], "0 of --controlnet and --adapter, but 1 of --condition"),
        (["--controlnet", "net"], "1 of --controlnet and --adapter, but 0 of --condition"),
        (["--controlnet", "other", "--condition", "pose"], "reads text of width 3, but the base has 8"),
        (["--adapter", "net", "--condition", "pose"], "is a ControlNet, not a T2IAdapter"),
        (["--strength", "0.5"], "--strength needs --init-image"),
        (["--mask", "mask"], "--mask needs --init-image"),
        (["--init-image", "photo", "--mask", "other.png"], "is 8x8, but --init-image is 16x16"),
        (["--init-image", "photo", "--strength", "1.5"], "strength is 1.5"),
        (["--mesh", "99"], "--mesh 99: there are 8 devices"),
        (["--scheduler", "fastest"], "invalid choice: 'fastest'"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(base, controlnet, pictures, capsys, arguments, expected):
    places = {name: str(pictures / f"{name}.png") for name in ("pose", "photo", "mask")}
    places |= {name: str(controlnet / name) for name in ("net", "other")} | {"other.png": str(pictures / "other.png")}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert expected in refused(capsys, sample_door, ["a face", "--base", str(base), "--size", "16", *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--base", "/nowhere"], "base model /nowhere: no such folder"),
        (["--base", "BASE", "--size", "17"], "--size 17x17: both sides must be multiples of 2"),
        (["--base", "BASE", "--size", "huge"], "write 64 or 64x96"),
        (["--base", "BASE", "--lora", "/nowhere.safetensors"], "/nowhere.safetensors"),
        (["--base", "BASE", "--number", "0"], "--number 0: at least 1"),
    ],
)
def test_sampling_refuses_in_one_line(base, capsys, arguments, expected):
    arguments = [str(base) if argument == "BASE" else argument for argument in arguments]
    assert expected in refused(capsys, sample_door, ["a person", *arguments])


def test_prompts_come_from_a_file(base, tmp_path, capsys):
    options = ["--base", str(base), "--steps", "1", "--size", "16", "--output", str(tmp_path / "out")]
    assert "nothing to draw" in refused(capsys, sample_door, options)
    assert "none.txt: no such file" in refused(capsys, sample_door, ["--prompts", "none.txt", *options])
    (tmp_path / "prompts.txt").write_text("two hands\n\na face\n")
    sample_door(["--prompts", str(tmp_path / "prompts.txt"), *options])
    assert {"a-face-0.png", "two-hands-0.png", "sheet.png"} == {p.name for p in (tmp_path / "out").iterdir()}


def test_a_prompt_too_long_is_cut_with_a_word(base, tmp_path, capsys):
    options = ["--base", str(base), "--steps", "1", "--size", "16", "--output", str(tmp_path)]
    sample_door(["a person waves two hands a face a person smiles", *options])
    assert "prompt 1 is 6 tokens too long" in capsys.readouterr().err


DOTS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"


@pytest.mark.parametrize(
    ("flags", "devices", "dtype", "own"),
    [
        ("", 1, "float32", True),
        ("", 1, "bfloat16", False),
        (DOTS, 1, "float32", False),
        ("", 2, "float32", False),
        ("--xla_force_host_platform_device_count=2", 1, "float32", False),
    ],
)
def test_own_kernels_are_for_float32_on_one_device(flags, devices, dtype, own):
    code = (
        "from fairhuman_jax.devices.kernels import choose_cpu_kernels as choose, split_cpu\n"
        f"split_cpu({devices})\n"
        f"choose({dtype!r})\n"
        "import jax, jax.numpy as jnp\n"
        "print('ynn' not in jax.jit(lambda x: x @ x).lower(jnp.ones((256, 256))).compile().as_text())"
    )
    assert printed_on_cpu(code, flags)[-1] == str(own)
