"""LoRA, ControlNet and T2I-Adapter as trainables: starts, what they refuse, condition images, weights, bases, files."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    SIZE,
    WIDTH,
    assert_trees_close,
    assert_trees_equal,
    control_batch,
    fairhuman,
    quick_jit,
    random_batch,
    random_network,
    random_params,
    small_pipeline,
    tiny_pipeline,
    tiny_xl_pipeline,
    trained_lora,
)

from fairhuman_jax.contract import Parts, PreviewConfig, WholePhase
from fairhuman_jax.models import UNet2DCondition, presets
from fairhuman_jax.systems.fairhuman.system import FairHuman
from fairhuman_jax.systems.fairhuman.trainables import AdapterTrainable, ControlNetTrainable, LoraTrainable
from fairhuman_jax.training.objectives import task_gradients
from fairhuman_jax.weights import expected_params, save_model

KEY = jax.random.key(4)
CONTROLNET, ADAPTER = ControlNetTrainable(widths=(4, 8)), AdapterTrainable(num_res_blocks=1)
TEXT_LORA = LoraTrainable(rank=2, text_targets=("q_proj", "v_proj"))
SDXL_BLOCKS = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}


@functools.cache
def sdxl_pipeline():
    """The tiny SDXL pipeline with SDXL's order of blocks and a middle block, predicting noise."""
    pipeline = tiny_xl_pipeline()
    config = pipeline.unet.to_config() | SDXL_BLOCKS | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    unet = UNet2DCondition.from_config({key: value for key, value in config.items() if value is not None})
    params = pipeline.params | {"unet": random_params(unet, 9)}
    return dataclasses.replace(pipeline, unet=unet, params=params)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked(FairHuman):
    """The system with its denoiser's conditioning in place of its answer."""

    def denoise(self, params, latents, timesteps, conditioning, lora=None):
        return conditioning


# ---- starts ----------------------------------------------------------------------------------------------------------


def test_a_new_controlnet_changes_nothing_is_a_copy_and_has_gradients():
    base, system = fairhuman(small_pipeline()), fairhuman(small_pipeline(), trainable=CONTROLNET)
    trainable, frozen = system.init(KEY)
    batch = control_batch()
    plain = quick_jit(lambda: base.predict({}, frozen, batch, KEY))()

    @quick_jit
    def slope(tree):
        def loss(tree):
            prediction = system.predict(tree, frozen, batch, KEY)
            return system.objectives(prediction, batch)["global"], prediction

        return jax.grad(loss, has_aux=True)(tree)

    gradients, steered = slope(trainable)
    np.testing.assert_allclose(steered["output"], plain["output"], atol=1e-5)
    moved = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), gradients["controlnet"])
    assert moved["controlnet_mid_block"]["kernel"] > 0 and moved["controlnet_down_blocks.0"]["kernel"] > 0
    assert moved["conv_in"]["kernel"] == 0  # the way in is closed until the zero convolutions have moved
    jax.tree.map(lambda leaf: leaf.delete(), trainable)  # as a train step that is given them does
    assert float(jnp.sum(frozen["unet"]["conv_in"]["kernel"])) != 0.0


def gradient(system, trainable, batch):
    return task_gradients(WholePhase(system=system), Parts(trainable, {}, frozen_of(system)), batch, KEY)


def test_trainables_are_float32_over_a_half_precision_base():
    pipeline = small_pipeline()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pipeline.params)
    unet = pipeline.unet.clone(dtype=jnp.bfloat16)
    pipeline = dataclasses.replace(pipeline, unet=unet, params=half)
    for trainable in (LoraTrainable(rank=2), CONTROLNET, ADAPTER):
        system = fairhuman(pipeline, trainable=trainable)
        tree, _ = jax.eval_shape(system.init, KEY)
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
        for network in (*system.controlnets, *system.adapters):
            assert network.dtype == jnp.bfloat16


def test_a_new_adapter_fits_its_base_and_disturbs_it():
    small, large = (fairhuman(p, trainable=AdapterTrainable()) for p in (tiny_pipeline(), sdxl_pipeline()))
    (plain,), (xl,) = small.adapters, large.adapters
    assert (plain.adapter_type, plain.channels, plain.downscale_factor) == ("full_adapter", (16, 32), 2)
    assert (xl.adapter_type, xl.channels, xl.downscale_factor) == ("full_adapter_xl", (8, 8, 16, 16), 4)
    tree, _ = large.init(KEY)
    given = large.condition_images(control_batch())
    features = quick_jit(lambda tree: large.adapter_features(tree, given, (jnp.float32(1.0),)))(tree)
    assert min(float(jnp.abs(feature).max()) for feature in features) > 1e-3
    kernel = tree["adapter"]["adapter"]["conv_in"]["kernel"]
    bound = math.prod(kernel.shape[:-1]) ** -0.5
    assert 0.9 * bound < float(jnp.abs(kernel).max()) <= bound


def test_sdxl_sizes_without_weights():
    """On SDXL a LoRA, a ControlNet and an adapter have the published numbers of parameters."""
    unet = UNet2DCondition.from_config(presets.SDXL_UNET)
    params = {"unet": expected_params(unet)}
    pipeline = dataclasses.replace(tiny_xl_pipeline(), unet=unet, params=params)
    lora = fairhuman(pipeline, trainable=LoraTrainable(rank=256)).part
    tree = jax.eval_shape(lambda key: lora.init(params, key), KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 371_589_120
    vae = tiny_xl_pipeline().vae
    assert vae.downscale == 2
    adapter = AdapterTrainable().build(dataclasses.replace(pipeline, vae=_EightfoldVae())).network
    assert adapter.to_config() == {
        "_class_name": "T2IAdapter",
        "in_channels": 3,
        "channels": [320, 640, 1280, 1280],
        "num_res_blocks": 2,
        "downscale_factor": 16,
        "adapter_type": "full_adapter_xl",
    }
    shapes = expected_params(adapter)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 79_028_160
    image = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)
    features = jax.eval_shape(lambda tree, x: adapter.apply({"params": tree}, x), shapes, image)
    assert [feature.shape[1:] for feature in features] == [
        (64, 64, 320),
        (64, 64, 640),
        (32, 32, 1280),
        (32, 32, 1280),
    ]


@dataclasses.dataclass(frozen=True)
class _EightfoldVae:
    """All that an adapter asks of an autoencoder."""

    downscale: int = 8


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_a_lora_goes_on_from_its_file(tmp_path, alpha):
    trainable = dataclasses.replace(TEXT_LORA, alpha=alpha)
    system = fairhuman(small_pipeline(), trainable=trainable)
    tree = trained_lora(system)
    path = system.export(Parts(tree, {}, {}), tmp_path, {})
    again = fairhuman(small_pipeline(), trainable=dataclasses.replace(trainable, start=str(path)))
    assert_trees_close(again.init(KEY)[0], tree, 1e-6)
    for wrong in ({"rank": 3}, {"text_targets": ()}):
        with pytest.raises(ValueError, match=r"trainable.start=.*: (unet|text_encoder)\..* is \(.*rank and targets"):
            fairhuman(small_pipeline(), trainable=dataclasses.replace(trainable, start=str(path), **wrong))


@pytest.mark.parametrize("trainable", [CONTROLNET, ADAPTER])
def test_a_network_goes_on_from_its_folder(tmp_path, trainable):
    system = fairhuman(small_pipeline(), trainable=trainable)
    tree = random_network(system)
    folder = system.export(Parts(tree, {}, {}), tmp_path / "net", {})
    start = type(trainable)(start=str(folder))
    again = fairhuman(small_pipeline(), trainable=start)
    assert_trees_equal(again.init(KEY)[0], tree)
    assert again.controlnets == system.controlnets and again.adapters == system.adapters
    other = ADAPTER if trainable is CONTROLNET else CONTROLNET
    with pytest.raises(ValueError, match=r"trainable.start=.* is a \w+, not a \w+"):
        fairhuman(small_pipeline(), trainable=type(other)(start=str(folder)))
    with pytest.raises(ValueError, match=r"(but the base has|but this base needs)"):
        fairhuman(sdxl_pipeline(), trainable=start)


def test_networks_that_do_not_fit_are_refused(tmp_path):
    pipeline = small_pipeline()
    with pytest.raises(ValueError, match="shrinks the condition image 8 times, but the autoencoder 2 times"):
        fairhuman(pipeline, trainable=ControlNetTrainable(widths=(4, 8, 8, 8)))
    with pytest.raises(ValueError, match=r"widths \(4,\), but the base has \(16,\)"):
        fairhuman(pipeline, trainable=AdapterTrainable(channels=(4,)))
    save_model(pipeline.unet, pipeline.params["unet"], tmp_path)
    with pytest.raises(ValueError, match="is a UNet2DCondition, not a ControlNet"):
        fairhuman(pipeline, trainable=ControlNetTrainable(start=str(tmp_path)))


# ---- condition images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [CONTROLNET, ADAPTER])
def test_data_without_condition_images_is_one_clear_line(trainable):
    system = fairhuman(small_pipeline(), trainable=trainable)
    with pytest.raises(ValueError, match=r"a (ControlNet|T2IAdapter) reads conditioning_image, which the batches lack"):
        jax.eval_shape(lambda tree: system.predict(tree, system.pipeline.params, random_batch(2), KEY), {})
    with pytest.raises(ValueError, match="reads conditioning_image"):
        system.preview(PreviewConfig(prompts=("a face",), steps=2), random_batch(2))


def conditions(batch, key=KEY, **config):
    """The condition images that reach the network, and the batch's in [0, 1]."""
    system = fairhuman(small_pipeline(), trainable=CONTROLNET, **config)
    (found,) = system._conditions(batch, key)
    return np.asarray(found), batch["conditioning_image"] / np.float32(255.0)


def test_control_dropout_is_by_sample_and_by_step_and_blind_to_devices():
    batch = control_batch(64)
    found, given = conditions(batch, control_dropout=0.3)
    black = ~found.any((1, 2, 3))
    np.testing.assert_allclose(found[~black], given[~black], atol=1e-6)
    assert 8 <= black.sum() <= 32
    other = ~conditions(batch, jax.random.key(5), control_dropout=0.3)[0].any((1, 2, 3))
    assert (other != black).any()
    half = {name: value[32:] for name, value in batch.items()}  # the second of two devices
    np.testing.assert_array_equal(conditions(half, control_dropout=0.3)[0], found[32:])
    assert conditions(batch)[0].any((1, 2, 3)).all()
    held_out = batch | {"times": np.linspace(0, 0.99, 64, dtype=np.float32)}
    assert conditions(held_out, control_dropout=1.0)[0].any((1, 2, 3)).all()


def test_the_published_trainer_flips_one_coin_a_batch():
    batch, coins = control_batch(8), []
    for seed in range(20):
        found, _ = conditions(batch, jax.random.key(seed), control_dropout=0.5, compat="reference")
        black = ~found.any((1, 2, 3))
        assert black.all() or not black.any()
        coins.append(black[0])
    assert 4 <= sum(coins) <= 16


@pytest.mark.parametrize("trainable", [CONTROLNET, ADAPTER])
def test_previews_show_the_held_out_conditions(trainable):
    system = fairhuman(small_pipeline(), trainable=trainable)
    batch = control_batch(2)
    request, titles = system.preview(PreviewConfig(prompts=("a face",) * 3, steps=2), batch)
    np.testing.assert_allclose(request.conditions[0], batch["conditioning_image"][[0, 1, 0]] / 255.0, atol=1e-6)
    assert len(titles) == 3
    tree = random_network(system)
    draw = quick_jit(lambda request: system.sample(tree, system.pipeline.params, request, KEY))
    images = draw(request)
    assert images.shape == (3, SIZE, SIZE, 3)
    blank = draw(dataclasses.replace(request, conditions=(jnp.zeros_like(request.conditions[0]),)))
    assert np.abs(images - blank).max() > 1e-3


# ---- training --------------------------------------------------------------------------------------------------------

BASES = {"SD 1.5": small_pipeline, "SD 2.1": tiny_pipeline, "SDXL": sdxl_pipeline}


@pytest.mark.parametrize(
    ("base", "trainable"),
    [
        ("SD 1.5", ADAPTER),
        ("SD 2.1", CONTROLNET),
        ("SDXL", TEXT_LORA),
        ("SDXL", CONTROLNET),
        ("SDXL", ADAPTER),
    ],
)
def test_every_trainable_has_three_gradients_on_every_base(base, trainable):
    system = fairhuman(BASES[base](), trainable=trainable)
    batch = control_batch(2, cached=False, xl=system.pipeline.is_xl)
    tree, frozen = jax.eval_shape(system.init, KEY)
    gradients, losses = jax.eval_shape(
        lambda tree: task_gradients(WholePhase(system=system), Parts(tree, {}, frozen_of(system)), batch, KEY), tree
    )
    assert tuple(losses) == ("global", "face", "hand")
    assert jax.tree.map(lambda leaf: (3, *leaf.shape), tree) == jax.tree.map(lambda leaf: leaf.shape, gradients)
    assert jax.tree.structure(frozen) == jax.tree.structure(frozen_of(system))


def frozen_of(system):
    return system.pipeline.params


def test_cached_text_takes_the_place_of_token_ids():
    system = fairhuman(tiny_xl_pipeline(), Asked)
    frozen = frozen_of(system)
    ids = random_batch(4, xl=True)
    from_ids = quick_jit(lambda: system.predict({}, frozen, ids, KEY)["output"])()
    cached = control_batch(width=2 * WIDTH, xl=True)
    from_cache = quick_jit(lambda: system.predict({}, frozen, cached, KEY)["output"])()
    np.testing.assert_array_equal(from_cache.hidden, cached["text_hidden"])
    np.testing.assert_array_equal(from_cache.pooled, cached["text_pooled"])
    assert jax.tree.map(jnp.shape, from_cache) == jax.tree.map(jnp.shape, from_ids)
    trains_text = fairhuman(tiny_xl_pipeline(), trainable=TEXT_LORA)
    with pytest.raises(ValueError, match="a LoRA on text_encoder needs input_ids in the batch"):
        jax.eval_shape(lambda tree: trains_text.predict(tree, frozen, cached, KEY), trained_lora(trains_text))


def test_a_text_lora_covers_every_encoder():
    system = fairhuman(sdxl_pipeline(), trainable=TEXT_LORA)
    tree, _ = system.init(KEY)
    assert set(tree) == {"unet", "text_encoder", "text_encoder_2"}
    first, second = (tree[name]["text_model"]["encoder"]["layers"] for name in ("text_encoder", "text_encoder_2"))
    downs = [layers["self_attn"]["q_proj"]["down"] for layers in (first, second)]
    assert downs[0].shape == downs[1].shape and np.abs(downs[0] - downs[1]).max() > 0.1  # keys of their own
