"""Timestep weights, the losses of the published trainers and options that contradict each other."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import control_batch, fairhuman, quick_jit, random_network, small_pipeline

from fairhuman_jax.config import apply_overrides, from_dict, to_dict
from fairhuman_jax.diffusion import to_x0
from fairhuman_jax.systems.fairhuman.system import FairHuman, FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable, ControlNetTrainable, LoraTrainable

KEY = jax.random.key(4)
CONTROLNET, ADAPTER = ControlNetTrainable(widths=(4, 8)), AdapterTrainable(num_res_blocks=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Echo(FairHuman):
    """The system with a denoiser that answers what it was given."""

    def denoise(self, params, latents, timesteps, conditioning, lora=None):
        return {"noisy": latents, "timesteps": timesteps}


def echoed(trainable, pipeline=None, **config):
    """Prediction of a network that answers its noisy input, with timesteps."""
    system = fairhuman(pipeline or small_pipeline(), Echo, trainable=trainable, **config)
    batch = control_batch(8)
    prediction = quick_jit(lambda: system.predict(random_network(system), system.pipeline.params, batch, KEY))()
    noisy, timesteps = prediction["output"]["noisy"], prediction["output"]["timesteps"]
    return system, prediction | {"output": noisy}, timesteps


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_weight_adds_the_error_of_the_x0_estimate(kind):
    """The weight of the x0 error is that of the published formula, for every kind of prediction."""
    schedule = dataclasses.replace(small_pipeline().schedule, prediction_type=kind)
    pipeline = dataclasses.replace(small_pipeline(), schedule=schedule)
    _, prediction, timesteps = echoed(CONTROLNET, pipeline, x0_weight=math.inf)
    noisy, output, target = (prediction[name] for name in ("output", "output", "target"))
    own = jnp.mean(jnp.square(output - target), (1, 2, 3))
    x0, estimate = (to_x0(schedule, each, noisy, timesteps) for each in (target, output))
    both = own + jnp.mean(jnp.square(estimate - x0), (1, 2, 3))
    np.testing.assert_allclose(prediction["weight"] * own, both, rtol=2e-4)
    clamped = echoed(CONTROLNET, pipeline, x0_weight=1.5)[1]["weight"]
    np.testing.assert_allclose(clamped, np.minimum(prediction["weight"], 1.5), rtol=1e-6)


def test_reference_losses_of_each_trainer():
    """Under compat each trainable has the losses of its published trainer, scales and weights included."""
    batch = control_batch(8)

    def losses(trainable, **config):
        system, prediction, timesteps = echoed(trainable, compat="reference", **config)
        square = np.square(np.asarray(prediction["output"] - prediction["target"]))
        alphas = np.asarray(system.pipeline.schedule.alphas_cumprod)[timesteps]
        found = {name: float(loss) for name, loss in system.objectives(prediction, batch).items()}
        return found, square, 1.0 / alphas, np.asarray(prediction["weight"])

    face = batch["face_mask"][:, ::2, ::2]
    found, square, _, weight = losses(LoraTrainable(rank=2), snr_gamma=5.0)
    assert found["face"] == pytest.approx(25 * (square * face).mean(), rel=1e-5)
    assert found["global"] == pytest.approx((weight * square.mean((1, 2, 3))).mean(), rel=1e-5)
    found, square, inverse, _ = losses(CONTROLNET)
    assert found["face"] == pytest.approx((inverse * (square * face).mean((1, 2, 3))).mean(), rel=1e-4)
    found, square, _, _ = losses(ADAPTER)
    assert found["face"] == pytest.approx((square * face).mean(), rel=1e-5)
    assert found["global"] == pytest.approx(square.mean(), rel=1e-5)


def test_reference_adapter_favours_noise():
    batch = control_batch(8)
    times = [np.asarray(echoed(trainable, compat="reference")[2]) for trainable in (CONTROLNET, ADAPTER)]
    assert len(batch["position"]) == 8 and times[0].mean() < times[1].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": "reference", "normalize": "area"}, "compat='reference' fixes normalize = 'pixels'"),
        ({"compat": "reference", "local_scale": 2.0}, "compat='reference' fixes local_scale = 25.0"),
        ({"compat": "published"}, "compat is 'published'; known"),
        ({"snr_gamma": 5.0, "x0_weight": 20.0}, "set one of them"),
        ({"control_dropout": 0.3}, "a LoRA reads no condition image"),
        ({"trainable": CONTROLNET, "control_dropout": 3.0}, "it is a probability"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FairHumanConfig(**options)


def test_trainables_are_set_from_the_command_line_and_stored():
    config = FairHumanConfig(trainable=LoraTrainable(rank=8))
    changed = apply_overrides(config, ["trainable.rank=4", "trainable.text_targets=q_proj,v_proj", "x0_weight=20"])
    assert changed.trainable == LoraTrainable(rank=4, text_targets=("q_proj", "v_proj")) and changed.x0_weight == 20.0
    for trainable in (changed.trainable, CONTROLNET, ADAPTER):
        stored = dataclasses.replace(config, trainable=trainable)
        assert from_dict(FairHumanConfig, to_dict(stored)) == stored
