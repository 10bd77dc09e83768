"""FairHuman: LoRA at the start and after export, objectives and their options, held-out losses, SDXL, sampling."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    SIZE,
    assert_trees_equal,
    fairhuman,
    quick_jit,
    random_batch,
    tiny_pipeline,
    tiny_xl_pipeline,
    trained_lora,
)

from fairhuman_jax.contract import Parts, WholePhase
from fairhuman_jax.diffusion import snr
from fairhuman_jax.diffusion.schedule import coefficients
from fairhuman_jax.drawing.requests import make_request
from fairhuman_jax.losses import min_snr_weight
from fairhuman_jax.systems.fairhuman.system import FairHuman, FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import LoraTrainable
from fairhuman_jax.training.held_out import make_held_out_losses
from fairhuman_jax.training.objectives import task_gradients
from fairhuman_jax.weights import load_lora

KEY = jax.random.key(4)
TIMES = np.array([0.1, 0.35, 0.6, 0.9], np.float32)


@pytest.fixture(scope="module")
def system():
    return fairhuman()


# ---- the LoRA --------------------------------------------------------------------------------------------------------


def test_initial_lora_changes_nothing(system):
    frozen, batch = system.pipeline.params, random_batch(4)
    adapted = quick_jit(lambda lora: system.noisy_prediction(frozen, batch, KEY, lora)[0]["output"])
    plain = quick_jit(lambda: system.noisy_prediction(frozen, batch, KEY)[0]["output"])()
    trainable, same = system.init(jax.random.key(0))
    assert same is frozen and set(trainable) == {"unet"}
    np.testing.assert_allclose(adapted(trainable), plain, atol=1e-6)
    assert np.abs(adapted(trained_lora(system)) - plain).max() > 0.01


def test_strength_is_alpha_over_rank(system):
    trainable = trained_lora(system)
    assert_trees_equal(system.part.applied(trainable)[1], trainable)
    half = fairhuman(trainable=LoraTrainable(rank=2, alpha=1.0))
    halved = half.part.applied(trainable)[1]["unet"]["down_blocks.0"]["attentions.0"]
    before = trainable["unet"]["down_blocks.0"]["attentions.0"]
    to_q, expected = (tree["transformer_blocks"]["attn1"]["to_q"] for tree in (halved, before))
    np.testing.assert_array_equal(to_q["up"], 0.5 * expected["up"])
    np.testing.assert_array_equal(to_q["down"], expected["down"])


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_exported_lora_loads_as_it_was_applied(tmp_path, alpha):
    system = fairhuman(trainable=LoraTrainable(rank=2, alpha=alpha))
    trainable = trained_lora(system)
    path = system.export(Parts(trainable, {}, system.pipeline.params), tmp_path, {})
    assert path.name == "pytorch_lora_weights.safetensors"
    loaded = load_lora(path, system.pipeline.unet)
    assert_trees_equal(loaded, jax.device_get(system.part.applied(trainable)[1]["unet"]))


def test_a_missing_base_is_one_clear_line():
    with pytest.raises(FileNotFoundError, match=r"base model nowhere: no such folder"):
        FairHumanConfig(base="nowhere").build()


# ---- objectives ------------------------------------------------------------------------------------------------------


def objectives(face, hand=None, error=0.5, **config):
    """Losses of a constant error, with masks [4, 4] (of 2 x 2 latents each way) for two samples."""
    batch = {"face_mask": np.stack([face] * 2)[..., None]}
    if hand is not None:
        batch["hand_mask"] = np.stack([hand] * 2)[..., None]
    target = jnp.zeros((2, 2, 2, 4))
    prediction = {"output": target + error, "target": target, "weight": jnp.ones(2)}
    losses = fairhuman(**config).objectives(prediction, batch)
    assert tuple(losses) == ("global", "face", "hand")
    return {name: float(loss) for name, loss in losses.items()}


QUARTER = np.zeros((4, 4), np.uint8)
QUARTER[:2, 2:] = 1


def test_local_losses_hold_their_share_of_the_area():
    """A region's loss is divided by all latents, so it holds its share of the area."""
    assert objectives(QUARTER) == {"global": 0.25, "face": 0.0625, "hand": 0.0}
    both = objectives(QUARTER, np.ones_like(QUARTER))
    assert both["hand"] == both["global"] == 0.25
    scaled = objectives(QUARTER, QUARTER, local_scale=25.0)
    assert scaled == {"global": 0.25, "face": 25 * 0.0625, "hand": 25 * 0.0625}
    assert objectives(QUARTER, normalize="area")["face"] == 0.25


def test_mask_method_decides_about_small_regions():
    corner, speck = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    corner[1, 1] = speck[0, 0] = 1
    assert objectives(corner, speck, mask_method="stride") == {"global": 0.25, "face": 0.0, "hand": 0.0625}
    assert objectives(corner, speck, mask_method="area") == {"global": 0.25, "face": 0.0625, "hand": 0.0625}
    for option in ("mask_method", "normalize"):
        with pytest.raises(ValueError, match=f"{'unknown method' if 'mask' in option else 'unknown normalize'} 'x'"):
            objectives(corner, **{option: "x"})


@dataclass(frozen=True, eq=False)
class Echo(FairHuman):
    """The system with a denoiser that answers what it was given."""

    def denoise(self, params, latents, timesteps, text, time_ids, lora=None):
        return latents


def echoed(times=TIMES, **config):
    system = fairhuman(kind=Echo, **config)
    batch = random_batch(4) | ({} if times is None else {"times": times})
    return quick_jit(lambda: system.predict({}, system.pipeline.params, batch, KEY))()


def test_noise_offset_shifts_whole_channels():
    schedule = tiny_pipeline().schedule
    plain, shifted = echoed(), echoed(noise_offset=0.5)
    signal, spread = coefficients(schedule, (TIMES * 1000).astype(int), 4)
    shift = (shifted["output"] - plain["output"]) / spread  # of the noise that was added
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-4)
    assert 0.1 < float(jnp.std(shift[:, 0, 0])) < 1.5
    np.testing.assert_allclose(shifted["target"] - plain["target"], signal * shift, atol=1e-4)


def test_snr_gamma_weighs_all_three_losses():
    schedule = tiny_pipeline().schedule
    expected = min_snr_weight(snr(schedule, (TIMES * 1000).astype(int)), 5.0, "v_prediction")
    prediction = echoed(snr_gamma=5.0)
    np.testing.assert_allclose(prediction["weight"], expected, rtol=1e-6)
    np.testing.assert_array_equal(echoed()["weight"], np.ones(4))
    losses = fairhuman().objectives(prediction, {"face_mask": np.ones((4, SIZE, SIZE, 1), np.uint8)})
    square = np.square(prediction["output"] - prediction["target"]).mean((1, 2, 3))
    assert float(losses["face"]) == pytest.approx(float((expected * square).mean()), rel=1e-5)
    assert float(losses["global"]) == pytest.approx(float(losses["face"]), rel=1e-6)


def test_cubic_times_favour_noise():
    """P(t >= 500) is 0.79 instead of one half: for these keys, later times on the whole."""
    uniform, cubic = (echoed(times=None, timestep_mode=mode, snr_gamma=5.0) for mode in ("uniform", "cubic"))
    assert float(cubic["weight"].mean()) < float(uniform["weight"].mean())


# ---- held-out losses -------------------------------------------------------------------------------------------------


def test_held_out_losses_are_the_same_twice(system):
    frozen, trained = system.pipeline.params, trained_lora(system)
    batch = random_batch(4) | {"times": TIMES}
    losses = make_held_out_losses(system, [batch, batch], KEY)
    first = losses(Parts(trained, {}, frozen))
    assert set(first) == {"global", "face", "hand"} and min(first.values()) > 0
    assert losses(Parts(trained, {}, frozen)) == first
    start, _ = system.init(jax.random.key(0))
    assert losses(Parts(start, {}, frozen))["global"] != first["global"]
    # Each batch has noise of its own, so the same one twice is not the same as once.
    alone = make_held_out_losses(system, [batch], KEY)(Parts(trained, {}, frozen))
    assert alone["global"] != first["global"]


# ---- SDXL ------------------------------------------------------------------------------------------------------------


def test_sdxl_trains_a_step():
    system = fairhuman(tiny_xl_pipeline())
    assert system.pipeline.is_xl
    ids = system.tokenize(["two hands"])
    assert set(ids) == {"input_ids", "input_ids_2"} and ids["input_ids"].dtype == np.int32
    trainable, frozen = system.init(jax.random.key(0))
    batch = random_batch(4, xl=True)
    step = quick_jit(lambda tree, batch: task_gradients(WholePhase(system=system), Parts(tree, {}, frozen), batch, KEY))
    gradients, losses = step(trainable, batch)
    slopes = jax.tree.leaves_with_path(jax.tree.map(lambda leaf: float(jnp.abs(leaf[0]).max()), gradients))
    assert all((slope > 0) == (path[-1].key == "up") for path, slope in slopes)  # up is 0 at first, so down has none
    for name, other in (("time_ids", batch["time_ids"] * 3), ("input_ids_2", batch["input_ids"])):
        changed = step(trainable, batch | {name: other})[1]
        assert float(changed["global"]) != float(losses["global"]), name


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler(system):
    """`draw(prompts, seeds, guidance)` by one program a shape, and the list of its traces."""
    traces = []
    trainable, frozen = trained_lora(system), system.pipeline.params

    @quick_jit
    def program(request):
        traces.append(request.seeds.shape)
        return system.sample(trainable, frozen, request, KEY)

    def draw(prompts, seeds, guidance=3.0):
        return program(make_request(system, prompts, seeds, steps=2, guidance=guidance, size=(SIZE, SIZE)))

    return draw, traces


def test_an_image_depends_on_its_seed_alone_and_one_program_serves_all(sampler):
    draw, traces = sampler
    prompts, seeds = ["a face", "two hands", "a face"], [3, 11, 5]
    together = draw(prompts, seeds)
    assert together.shape == (3, SIZE, SIZE, 3) and float(jnp.abs(together).max()) <= 1.0
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        np.testing.assert_allclose(draw([prompt], [seed])[0], together[index], atol=1e-4)
    assert np.abs(together[0] - together[2]).max() > 0.05  # another seed
    other = [draw(["two hands"], [3]), draw(["a face"], [3], guidance=6.0)]
    for image in other:
        assert np.abs(image[0] - together[0]).max() > 1e-3
    assert traces == [(3,), (1,)]


def test_given_latents_take_the_place_of_the_seeds(sampler, system):
    draw, _ = sampler
    request = make_request(system, ["a face"], [3], steps=2, guidance=3.0, size=(SIZE, SIZE))
    first = jax.random.split(jax.random.fold_in(KEY, 9), 4)[0]
    noise = jax.random.normal(first, (SIZE // 2, SIZE // 2, 4))
    given = quick_jit(lambda r: system.sample(trained_lora(system), system.pipeline.params, r, KEY))
    np.testing.assert_allclose(given(request.replace(latents=noise[None])), draw(["a face"], [9]), atol=1e-4)
