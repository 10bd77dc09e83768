"""Staged sampling against the published loop, in torch: diffusers' PNDM, two UNets, pooling, resize and argmax."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SMALL_UNET, TOKENS, WIDTH, quick_jit

from fairhuman_jax.diffusion import NoiseSchedule, staged_sample
from fairhuman_jax.models.unet import UNet2DCondition

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from torch_twins import nchw, normal, randomised, to_flax  # noqa: E402

STEPS, SCALE, SIZE = 50, 5.0, (5, 7)
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks as small as these spend their time on waiting for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torch_unet(seed: int):
    """A UNet that answers its text strongly, so that few pixels are decided by a hair."""
    torch.manual_seed(seed)
    model = randomised(diffusers.UNet2DConditionModel(**SMALL_UNET), seed)
    with torch.no_grad():
        model.conv_out.weight.mul_(4.0)
    return model


def saliency(response):
    """[B, 4, h, w] -> [B, h, w]."""
    pooled = torch.nn.functional.avg_pool2d(response.abs(), 4, stride=1, padding=1)
    resized = torch.nn.functional.interpolate(pooled, size=response.shape[-2:], mode="bilinear", align_corners=False)
    return resized.mean(1)


def softmax(field):
    return field.flatten(1).softmax(1).reshape(field.shape)


def margin(omegas) -> float:
    """The smallest difference of both log Omega, by which a pixel is decided."""
    return float((omegas[0].log() - omegas[1].log()).abs().min())


def torch_run(scene, subject, latents, null, text, augmented, start, final):
    """(latents, share of the subject in each fused row, smallest margin)."""
    scheduler = diffusers.PNDMScheduler(**SCHEDULER)
    scheduler.set_timesteps(STEPS)
    shares, smallest = [], np.inf

    def predict(network, x, t, first, second):
        output = network(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([first, second])).sample
        base, given = output.chunk(2)
        return base + SCALE * (given - base), SCALE * (given - base)

    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            if index <= final or index <= start:
                of_scene, response_t = predict(scene, latents, t, null, text)
            if index > start:
                of_subject, response_s = predict(subject, latents, t, text, augmented)
            if index <= start:
                noise = of_scene
            elif index <= final:
                both = torch.stack([softmax(saliency(response_t)), softmax(saliency(response_s))])
                mask, smallest = both.argmax(0)[:, None], min(smallest, margin(both))
                shares.append(float(mask.float().mean()))
                noise = torch.where(mask == 1, of_subject, of_scene)
            else:
                noise = of_subject
            latents = scheduler.step(noise, t, latents).prev_sample
    return latents, shares, smallest


@pytest.fixture(scope="module")
def ours():
    """Our sampler of (latents, boundaries) with the weights of both torch networks; one program for every boundary."""
    module = UNet2DCondition.from_config(dict(torch_unet(0).config))
    weights = [to_flax(torch_unet(seed).state_dict(), module) for seed in (0, 1)]
    schedule = NoiseSchedule.from_config(SCHEDULER | {"_class_name": "PNDMScheduler"})

    @quick_jit
    def run(weights, latents, conditions, start, final):
        def network(params):
            return lambda x, t, text: module.apply({"params": params}, x, t, text)

        null, text, augmented = conditions
        return staged_sample(
            *map(network, weights),
            latents,
            None,
            schedule,
            STEPS,
            null=null,
            text=text,
            augmented=augmented,
            scale_t=SCALE,
            start_merge_step=start,
            final_step=final,
        )

    return lambda latents, conditions, *boundaries: run(weights, latents, conditions, *map(jnp.int32, boundaries))


@pytest.mark.parametrize("boundaries", [(15, 30), (10, 40), (-1, 50), (50, 50)])
def test_published_loop(ours, boundaries):
    latents = normal(1, *SIZE, 4, seed=8)
    conditions = [normal(1, TOKENS, WIDTH, seed=seed) for seed in (3, 4, 5)]
    networks = [torch_unet(seed) for seed in (0, 1)]
    expected, shares, smallest = torch_run(*networks, nchw(latents), *map(torch.from_numpy, conditions), *boundaries)
    found = ours(latents, conditions, *boundaries)
    np.testing.assert_allclose(found, np.moveaxis(expected.numpy(), 1, -1), rtol=0, atol=1e-3)
    assert len(shares) == {(15, 30): 15, (10, 40): 30, (-1, 50): 51, (50, 50): 0}[boundaries]
    assert all(0.2 < share < 0.8 for share in shares)
    assert smallest > 1e-5, "no pixel may be decided by rounding"
