"""HumanSD: its widened denoiser, its four losses, skeletons while training and sampling, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    QUICK,
    SIZE,
    assert_trees_close,
    control_batch,
    quick_jit,
    random_params,
    small_pipeline,
    tiny_pipeline,
)
from tiny_pose import THRESHOLD, Spots, humansd, spots_variables, widened

from fairhuman_jax.bases.conditioning import Conditioning
from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.config import load_config
from fairhuman_jax.contract import Parts, PreviewConfig, WholePhase
from fairhuman_jax.devices.sharding import make_mesh
from fairhuman_jax.diffusion import NoiseSchedule, ddim_humansd, sample
from fairhuman_jax.drawing.requests import draw_latents, make_request
from fairhuman_jax.losses import heatmap_mask
from fairhuman_jax.models import HigherHRNet, UNet2DCondition, presets, stage_mean
from fairhuman_jax.systems.humansd.system import HumanSD, HumanSDConfig, joined, with_pose_channels
from fairhuman_jax.training.combining import FairConfig
from fairhuman_jax.training.objectives import linearise
from fairhuman_jax.training.program_cost import flops
from fairhuman_jax.training.state import init_state
from fairhuman_jax.training.step import make_train_step
from fairhuman_jax.weights import load_pipeline, save_model
from fairhuman_jax.weights.ldm import open_single_file, save_single_file

CONFIGS = Path(__file__).parents[3] / "configs"
KEY = jax.random.key(4)
SD = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class PictureLatents(HumanSD):
    """The system with smaller pictures for latents."""

    def encode_posterior(self, params, image, noise):
        small = jnp.pad(image[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 1)))
        return small if noise is None else small + noise


def predicted(system, batch):
    trainable, frozen = system.init(KEY)
    return quick_jit(lambda batch: system.predict(trainable, frozen, batch, KEY))(batch)


@functools.cache
def prediction_of(loss):
    return predicted(humansd(loss=loss), control_batch())


# ---- the denoiser ----------------------------------------------------------------------------------------------------


def test_the_widened_denoiser_answers_as_the_base_whatever_the_pose():
    base = small_pipeline()
    system = HumanSDConfig().attach(base)
    kernel = system.pipeline.params["unet"]["conv_in"]["kernel"]
    assert kernel.shape == (3, 3, 8, 16) and not kernel[:, :, 4:].any()
    np.testing.assert_array_equal(kernel[:, :, :4], base.params["unet"]["conv_in"]["kernel"])
    rng = np.random.default_rng(0)
    latents, *poses = rng.normal(size=(3, 2, 8, 8, 4)).astype(np.float32)
    text, times = rng.normal(size=(2, 6, 8)).astype(np.float32), jnp.array([3, 700])
    plain = Conditioning(text, text[:, 0])
    denoise = quick_jit(system.denoise)
    first, second = (
        denoise(system.pipeline.params, latents, times, dataclasses.replace(plain, extra=pose)) for pose in poses
    )
    np.testing.assert_array_equal(first, second)
    expected = quick_jit(LatentDiffusion(base).denoise)(base.params, latents, times, plain)
    np.testing.assert_allclose(first, expected, atol=1e-5)


def test_at_full_size_it_has_the_published_shapes():
    base = open_base("stabilityai/stable-diffusion-2-1-base", shapes=True)
    unet = HumanSDConfig().attach(base).pipeline
    assert unet.unet.to_config() == UNet2DCondition.from_config(presets.HUMANSD_UNET).to_config()
    sizes = [leaf.size for leaf in jax.tree.leaves(unet.params["unet"])]
    assert sum(sizes) == 865_922_244
    assert unet.params["unet"]["conv_in"]["kernel"].shape == (3, 3, 8, 320)


def test_a_base_that_reads_something_else_is_refused():
    pipeline = small_pipeline()
    inpainting = dataclasses.replace(pipeline, unet=pipeline.unet.clone(in_channels=9))
    with pytest.raises(ValueError, match="the base's denoiser reads 9 channels; HumanSD starts from 4"):
        with_pose_channels(inpainting)
    wide = widened(pipeline)
    assert with_pose_channels(wide) is wide


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["reference", "intent", "fair"])
def test_the_loss_is_weighted_by_what_the_pose_network_sees(loss):
    system, prediction = humansd(loss=loss), prediction_of("intent" if loss == "fair" else loss)
    error = np.asarray(prediction["output"] - prediction["target"])
    losses = system.objectives(prediction, control_batch())
    weight = np.asarray(prediction["weight"])
    assert weight.shape == (*error.shape[:3], 4 if loss == "reference" else 1) and np.ptp(weight) > 0.1
    if loss == "fair":
        assert list(losses) == ["denoising", "pose"]
        expected = {"denoising": np.mean(error**2), "pose": np.mean(error**2 * weight)}
    else:
        expected = {"denoising": np.mean(error**2 * (1.0 + 0.1 * weight))}
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_the_mask_is_that_of_the_noise_whatever_is_predicted():
    """A velocity's error is the noise's divided by the signal; the pose network sees the noise's."""
    system = humansd(widened(tiny_pipeline()), loss="intent")
    batch = control_batch() | {"times": np.array([0.1, 0.5, 0.7, 0.9], np.float32)}
    prediction = predicted(system, batch)
    signal = system.pipeline.schedule.signal[(batch["times"] * 1000).astype(int)].reshape(-1, 1, 1, 1)
    params = system.init(KEY)[1]
    expected = heatmap_mask(
        signal * prediction["output"],
        signal * prediction["target"],
        vae_decode=quick_jit(functools.partial(system.decode_unscaled, params)),
        pose_heatmap_fn=lambda pictures: stage_mean(*Spots().apply(spots_variables(), Spots.normalise(pictures))),
        latent_scale=0.5,
        heat_threshold=THRESHOLD,
    )
    assert 0.1 < expected.mean() < 0.9
    np.testing.assert_allclose(prediction["weight"], expected, atol=1e-6)


def test_a_pose_network_is_read_and_shown_what_the_loss_asks_for(tmp_path):
    """Raw pictures and, where asked for, the batch's own moments as published; else what it was trained on."""
    network = HigherHRNet(
        stem_channels=4,
        widths=(4, 8),
        bottlenecks=1,
        stage_modules=(1,),
        blocks=1,
        head_blocks=1,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )
    variables = random_params(network, 5)
    variables["batch_stats"] = jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), variables["batch_stats"])
    save_model(network, variables, tmp_path)
    pictures = np.random.default_rng(0).random((2, SIZE, SIZE, 3), np.float32)
    for loss, mode in (("reference", "eval"), ("reference", "batch_stats"), ("intent", "eval")):
        config = HumanSDConfig(loss=loss, pose_network=str(tmp_path), bn_mode=mode)
        system = config.attach(widened(small_pipeline()))
        params = system.init(KEY)[1]
        assert set(params) == {"vae", "text_encoder", "pose_network"}
        shown = pictures if loss == "reference" else network.normalise(jnp.asarray(pictures))
        stages = quick_jit(network.apply, static_argnums=2)(variables, shown, mode == "eval")
        found = quick_jit(system.heatmaps)(params, pictures)
        assert found.shape == (2, SIZE // 2, SIZE // 2, 17)
        np.testing.assert_allclose(found, stage_mean(*stages), rtol=1e-4, atol=1e-5)


def test_the_pose_branch_is_not_differentiated():
    """The pull-back costs what that of the plain loss costs."""
    batch, costs = control_batch(), {}
    for loss in ("plain", "reference"):
        system = humansd(loss=loss)
        trainable, frozen = system.init(KEY)

        def gradient(system=system, trainable=trainable, frozen=frozen):
            return linearise(WholePhase(system=system), Parts(trainable, {}, frozen), batch, KEY).pull_all()

        def forward(system=system, trainable=trainable, frozen=frozen):
            return linearise(WholePhase(system=system), Parts(trainable, {}, frozen), batch, KEY).losses

        costs[loss] = flops(jax.make_jaxpr(gradient)()) - flops(jax.make_jaxpr(forward)())
    assert costs["reference"] == costs["plain"] > 0


def test_skeletons_are_read_dropped_and_sampled():
    batch = control_batch()
    black = batch | {"conditioning_image": np.zeros_like(batch["conditioning_image"])}
    held_out = batch | {"times": np.full(4, 0.5, np.float32)}

    def of(batch, **options):
        """The pose's latents, which is all that the skeleton decides, of an encoder that halves the picture."""
        system = PictureLatents(**vars(humansd(**options)))
        return np.asarray(system.pose_latents({}, batch, KEY))

    mode = of(batch)
    np.testing.assert_allclose(of(batch, pose_dropout=1.0), of(black), atol=1e-6)
    np.testing.assert_array_equal(of(held_out, pose_dropout=1.0), mode)
    assert np.abs(mode - of(black)).max() > 0.1 and np.abs(mode - of(batch, pose_latent="sample")).max() > 0.1
    some = np.abs(of(batch, pose_dropout=0.5) - mode).max((1, 2, 3)) > 0.1
    assert 0 < some.sum() < 4
    with pytest.raises(ValueError, match="HumanSD reads conditioning_image, which the batches lack"):
        del batch["conditioning_image"]
        of(batch)


def test_the_denoiser_alone_trains_and_the_loss_falls():
    system = humansd(loss="intent")
    trainable, frozen = system.init(jax.random.key(0))
    assert set(trainable) == {"unet", "pose_kernel"} and set(frozen) == {"vae", "text_encoder", "pose_network"}
    batch = control_batch() | {"times": np.array([0.2, 0.4, 0.6, 0.8], np.float32)}
    batch.pop("position")
    mesh, rule = make_mesh(devices=jax.devices()[:1]), optax.adam(3e-3)
    state = init_state(jax.tree.map(jnp.copy, trainable), rule, jax.random.key(4), ema=False)
    step = make_train_step(system, rule, mesh, FairConfig(), clip_norm=1.0)
    program = step.lower(state, frozen, batch).compile(QUICK)
    losses = []
    for _ in range(25):
        state, metrics = program(state, frozen, batch)
        losses.append(float(metrics["loss/denoising"]))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]) and state.skipped["all"] == 0
    assert np.abs(state.trainable["pose_kernel"] - trainable["pose_kernel"]).max() > 1e-3


# ---- sampling --------------------------------------------------------------------------------------------------------


def request(system, pose, **options):
    settings = {"steps": 4, "guidance": 3.0, "size": (SIZE, SIZE), "pose": pose, "pose_latent": "mode"}
    return make_request(system, ["a face", "two hands"], [0, 1], **settings | options)


def skeleton(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def test_pictures_follow_the_pose_in_both_halves_of_guidance():
    system = LatentDiffusion(widened(small_pipeline()))
    draw = quick_jit(lambda request: draw_latents(system, system.pipeline.params, request, KEY))
    first = draw(request(system, skeleton(0)))
    assert np.abs(first - draw(request(system, skeleton(1)))).max() > 1e-2
    same_text = request(system, skeleton(0), guidance=7.0)
    same_text = dataclasses.replace(same_text, negative_ids=same_text.input_ids)
    without = draw(dataclasses.replace(same_text, guided=False))
    np.testing.assert_allclose(draw(same_text), without, atol=1e-4 * np.abs(without).max())
    assert np.abs(first - without).max() > 1e-2
    sampled = draw(request(system, skeleton(0), pose_latent="sample"))
    assert np.abs(first - sampled).max() > 1e-3


def test_a_preview_draws_held_out_skeletons():
    batch = control_batch(2, cached=False)
    config = PreviewConfig(prompts=("a face", "two hands", "a face"), steps=4)
    asked, titles = humansd().preview(config, batch)
    np.testing.assert_allclose(asked.pose, batch["conditioning_image"][[0, 1, 0]] / 255.0, atol=1e-6)
    assert asked.scheduler is None and asked.pose_latent == "mode" and len(titles) == 3
    published, _ = humansd(compat="reference", heat_threshold=0.05).preview(config, batch)
    assert published.scheduler == "ddim_humansd" and published.pose_latent == "sample"
    assert np.any(published.negative_ids["input_ids"] != asked.negative_ids["input_ids"])


def test_poses_that_do_not_fit_are_refused():
    system, plain = LatentDiffusion(widened(small_pipeline())), LatentDiffusion(small_pipeline())
    for owner, pose, message in (
        (system, None, "it needs a pose picture"),
        (
            plain,
            skeleton(0),
            "a pose picture is for HumanSD, whose denoiser reads its latents; this one has 4 channels",
        ),
        (system, skeleton(0)[:8], r"the pose picture is \[8, 16, 3\], not \[16, 16, 3\] as asked"),
        (system, skeleton(0)[..., :1], r"the pose picture is \[16, 16, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            request(owner, pose)
    with pytest.raises(ValueError, match="pose_latent is 'mean'; known: sample, mode"):
        request(system, skeleton(0), pose_latent="mean")


def test_the_published_schedule_leaves_out_the_first_of_its_steps():
    schedule, asked = NoiseSchedule.from_config(SD), []

    def predict(latents, times):
        jax.debug.callback(lambda t: asked.append(int(t[0])), times, ordered=True)
        return 0.1 * latents

    jax.block_until_ready(sample(predict, jnp.ones((1, 2, 2, 4)), None, schedule, 50, ddim_humansd()))
    assert (len(asked), asked[0], asked[-1]) == (49, 961, 1) and set(np.diff(asked)) == {-20}
    assert schedule.alphas_cumprod64[[0, 1, 961, 981, 999]] == pytest.approx(
        [0.99915, 0.9982960278384514, 0.007281727140942984, 0.005775500139495751, 0.004660098513077238], abs=1e-12
    )
    assert (ddim_humansd().table(schedule, 30)["timestep"] == np.arange(28, -1, -1) * 33 + 1).all()


@pytest.mark.parametrize(
    ("row", "x0", "moved"), [(0, 5.88076760983612, 1.0592382260249622), (-1, 0.980195870451214, 0.9943565783818035)]
)
def test_steps_of_the_published_schedule(row, x0, moved):
    schedule, rule = NoiseSchedule.from_config(SD), ddim_humansd()
    entry = {name: jnp.asarray(column)[row] for name, column in rule.table(schedule, 50).items()}
    found, _ = rule.update(schedule, entry, jnp.ones(1), jnp.full(1, 0.5), (), None)
    assert found.item() == pytest.approx(moved, rel=1e-6)
    assert (1.0 - entry["spread"] * 0.5) / entry["signal"] == pytest.approx(x0, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 9, 27, 36, 37, 1001])
def test_numbers_of_steps_that_the_published_schedule_cannot_take(steps):
    with pytest.raises(ValueError, match=rf"ddim_humansd: .*{steps}"):
        ddim_humansd().table(NoiseSchedule.from_config(SD), steps)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_export_is_a_pipeline_that_reads_poses(tmp_path):
    system = humansd()
    trainable, frozen = system.init(KEY)
    again = load_pipeline(system.export(Parts(trainable, {}, frozen), tmp_path, {}), dtype="float32")
    assert again.reads_pose and not again.inpaints and again.unet.to_config() == system.pipeline.unet.to_config()
    assert_trees_close(again.params["unet"], joined(trainable, frozen)["unet"], 2e-3)
    further = HumanSDConfig(base=str(tmp_path)).build()
    assert_trees_close(further.init(KEY)[0], trainable, 2e-3)


def test_it_travels_through_a_single_file(tmp_path):
    system = humansd()
    path = save_single_file(system.pipeline, tmp_path / "humansd.safetensors")
    found = open_single_file(path).components["unet"]
    assert found.config == system.pipeline.unet.to_config()
    stored = found.tensors.read("conv_in.weight")
    kernel = system.pipeline.params["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(stored, np.asarray(kernel).transpose(3, 2, 0, 1))


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pose_latent": "mean"}, "pose_latent is 'mean'; known: sample, mode"),
        ({"loss": "l1"}, "loss is 'l1'; known: plain, reference, intent, fair"),
        ({"bn_mode": "train"}, "bn_mode is 'train'; known: eval, batch_stats"),
        ({"compat": "paper"}, "compat is 'paper'; known: None, reference"),
        ({"pose_dropout": 1.5}, "pose_dropout is 1.5; it is a probability"),
        ({"loss": "fair", "compat": "reference"}, "knows the losses reference and plain"),
        ({"compat": "reference", "pose_dropout": 0.1}, "compat='reference' fixes pose_dropout = 0.0, but it is 0.1"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HumanSDConfig(**options)


def test_files_that_do_not_fit_are_one_clear_line(tmp_path):
    pipeline = small_pipeline()
    save_model(pipeline.vae, pipeline.params["vae"], tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae is a AutoencoderKL, not a HigherHRNet"):
        HumanSDConfig(loss="intent", pose_network=str(tmp_path / "vae")).attach(pipeline)
    with pytest.raises(ValueError, match="loss 'fair' needs pose_network"):
        HumanSDConfig(loss="fair").attach(pipeline)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        HumanSDConfig(loss="intent", pose_network=str(tmp_path / "none")).attach(pipeline)


def test_the_published_training_is_that_of_its_configuration():
    config = load_config(CONFIGS / "humansd_sd21.py")
    optimizer, train = config.optimizer, config.train
    assert optimizer.learning_rate == pytest.approx(4e-5) and train.batch_size == 8  # 2 devices of 4
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.clip_norm) == ("constant", 0, None)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    assert train.ema_decay is None and config.data.caption_dropout == 0.0
    state = init_state({}, optax.identity(), jax.random.key(0), ema=train.ema_decay is not None)
    assert state.ema is None
