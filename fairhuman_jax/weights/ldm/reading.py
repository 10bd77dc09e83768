"""Single-file checkpoints: Stable Diffusion 1.x, 2.x and XL, ControlNets, autoencoders, FastComposer's in one file.

The file is recognised by the names of its tensors and each network in it is shown in the names of diffusers or
transformers, with the config that its shapes imply. Nothing is read before a network is built.
Source: the key names of CompVis' and Stability's checkpoints; the prediction type as ComfyUI tells it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fairhuman_jax.diffusion import NoiseSchedule
from fairhuman_jax.models import presets
from fairhuman_jax.weights.diffusers import NETWORKS, params_from
from fairhuman_jax.weights.ldm import configs as ldm_configs
from fairhuman_jax.weights.ldm import slots as ldm_slots
from fairhuman_jax.weights.ldm.configs import REFINER, SD1, SD2, XL
from fairhuman_jax.weights.ldm.names import diffusers_layout
from fairhuman_jax.weights.ldm.recognition import (
    CLIP,
    DIFFUSERS,
    OPENCLIP,
    OPENCLIP_PROJECTED,
    V_MARK,
    ZERO_SNR_MARK,
    Group,
    groups_of,
    listed,
)
from fairhuman_jax.weights.ldm.tokenizer import CLIP_PAD, OPENCLIP_PAD, clip_tokenizer
from fairhuman_jax.weights.ldm.views import Slot, View
from fairhuman_jax.weights.pipeline import Pipeline, vae_dtype
from fairhuman_jax.weights.placement import Placement
from fairhuman_jax.weights.tensors import Tensors, open_tensors

PyTree = Any
Config = dict[str, Any]

CONFIGS = "fairhuman_jax.configs"  # metadata of files that `save_single_file` wrote
SCHEDULER, OPTIONS = "scheduler", "options"
REFINER_OPTIONS = {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
SD2_BASE_STEP = "875000"  # global step of the published 512-pixel SD 2.0, the one with epsilon in diffusers' eyes
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
# Of the bias that the statistic below is taken of: 768-pixel SD 2.x models, trained on v, lie above.
V_PREDICTION_SPREAD = 0.09
TEXT_PRESETS = {CLIP: presets.SD15_TEXT, OPENCLIP: presets.SD21_TEXT, OPENCLIP_PROJECTED: presets.SDXL_TEXT_2}


@dataclass(frozen=True, eq=False)
class Component:
    """One network of a file: its `config.json` and its tensors in the names of diffusers or transformers."""

    config: Config
    tensors: Tensors


@dataclass(frozen=True, eq=False)
class SingleFile:
    """A recognised file. `kind`, as "SD 1.5 inpainting", names the published model whose shapes or family it has.

    components: by name, of unet, vae, text_encoder, text_encoder_2, controlnet, image_encoder, postfuse those that the
    file holds.
    scheduler_config: that of the published model; empty without a UNet. options: fields of `Pipeline` that are not
    the published SDXL's.
    """

    label: str
    kind: str
    components: dict[str, Component]
    scheduler_config: Config
    options: dict[str, bool]


def open_single_file(
    path: str | Path, *, prediction_type: str | None = None, scaling_factor: float | None = None
) -> SingleFile:
    """Recognise a .safetensors, .ckpt, .pt or .pth file; read no tensor but one bias of SD 2.x.

    Read: SD 1.x, 2.x, XL base and refiner, with 4, 8 (HumanSD) or 9 input channels; ControlNets, alone or beside the
    model (HandRefiner); UNets and autoencoders alone; each in LDM naming, and single networks in diffusers' too;
    the models of FastComposer and Face-diffuser, with and without subjects, in their flat naming.
    prediction_type: epsilon or v_prediction. None: what the file says of itself (`modelspec` metadata, `v_pred`, the
    global step of SD 2.0 base); other SD 2.x with 4 channels by the spread of a bias in their last attention, as
    ComfyUI does, since no name or shape differs between v and epsilon; else epsilon.
    scaling_factor: of the autoencoder. None: 0.13025 in SDXL files, else 0.18215, which is wrong for an SDXL
    autoencoder in a file of its own: its shapes are those of the others.
    Raises: ValueError, one line each: a file that cannot be read; none of these; tensors that no rule covers, listed.
    """
    return recognise(open_tensors(Path(path)), prediction_type=prediction_type, scaling_factor=scaling_factor)


def recognise(
    tensors: Tensors, *, prediction_type: str | None = None, scaling_factor: float | None = None
) -> SingleFile:
    """`open_single_file` of tensors that are open already; arguments and errors are the same."""
    if prediction_type is not None and prediction_type not in PREDICTIONS.values():
        raise ValueError(f"prediction_type is {prediction_type!r}; it must be epsilon or v_prediction")
    groups = groups_of(tensors)
    views = {name: _view(tensors, name, group) for name, group in groups.items()}
    family = next((ldm_configs.unet_family(views[name]) for name in ("unet", "controlnet") if name in views), None)
    written: dict[str, Config] = json.loads(tensors.metadata.get(CONFIGS, "{}"))
    scheduler: Config = {}
    if family is not None and "unet" in views:
        predicted = _prediction_type(tensors, views["unet"], family)
        scheduler = ldm_configs.scheduler_config(family, predicted, zero_snr=ZERO_SNR_MARK in tensors.names())
        scheduler = written.get(SCHEDULER, scheduler)
        scheduler = scheduler | {"prediction_type": prediction_type or scheduler["prediction_type"]}
    components = {}
    for name, view in views.items():
        config = written.get(name) or _config(name, view, groups[name].naming, family)
        if name == "unet" and name not in written and (family, scheduler["prediction_type"]) == (SD2, "epsilon"):
            config = config | {"sample_size": presets.HUMANSD_UNET["sample_size"]}
        if name == "vae" and scaling_factor is not None:
            config = config | {"scaling_factor": scaling_factor}
        components[name] = Component(config, view)
    options = written.get(OPTIONS, REFINER_OPTIONS if family == REFINER else {})
    return SingleFile(tensors.label, _kind(components, family), components, scheduler, options)


def load_component(
    path: str | Path,
    name: str,
    dtype: jnp.dtype | str | None = None,
    *,
    host: bool = False,
    sharding: Placement = None,
    **runtime: Any,
) -> tuple[nn.Module, PyTree]:
    """Network `name` of a single file, one of its `SingleFile.components`, and its parameters.

    dtype, host, sharding and runtime as in `load_model`. Raises: ValueError, as `open_single_file`; a component that
    the file does not hold; tensors that are missing or misshaped.
    """
    single = open_single_file(path)
    if name not in single.components:
        raise ValueError(f"{single.label} ({single.kind}) has no {name}, only {', '.join(single.components)}")
    return _build(single.components[name], dtype, host, sharding, runtime)


def load_single_file(
    path: str | Path,
    dtype: jnp.dtype | str | None = None,
    *,
    host: bool = False,
    sharding: Placement = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    **runtime: Any,
) -> Pipeline:
    """The whole pipeline in a single file; dtype, host, sharding and runtime as in `load_pipeline`.

    tokenizer: where CLIP's vocabulary is, see `clip_tokenizer`. prediction_type: see `open_single_file`. A ControlNet
    beside the model is left to `load_component`, what reads subjects to `load_subject_model`. Raises: ValueError, one
    line each: those of both; a file without autoencoder or text encoder; a tokenizer of another size.
    """
    single = open_single_file(path, prediction_type=prediction_type)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in single.components]
    wanted = ["unet", "vae", *(encoders or ["text_encoder"])]
    if missing := [name for name in wanted if name not in single.components]:
        raise ValueError(
            f"{single.label} ({single.kind}) is no whole pipeline: it has no {', '.join(missing)}; "
            f"load_component reads {', '.join(single.components)}"
        )
    tokenizers = []
    for name in encoders:
        config = single.components[name].config
        pad = CLIP_PAD if config["hidden_act"] == presets.SD15_TEXT["hidden_act"] else OPENCLIP_PAD
        tokenizers.append(clip_tokenizer(tokenizer, pad=pad))
        if len(tokenizers[-1]) != config["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {len(tokenizers[-1])} tokens, the {name} of {single.label} {config['vocab_size']}"
            )
    modules, params = {}, {}
    for name in wanted:
        component = single.components[name]
        kind = vae_dtype(component.config, dtype) if name == "vae" else dtype
        modules[name], params[name] = _build(component, kind, host, sharding, runtime)
    return Pipeline(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[name] for name in encoders),
        tokenizers=tuple(tokenizers),
        schedule=NoiseSchedule.from_config(single.scheduler_config),
        params=params,
        **single.options,
    )


def _build(
    component: Component, dtype: jnp.dtype | str | None, host: bool, sharding: Placement, runtime: dict[str, Any]
) -> tuple[nn.Module, PyTree]:
    config = component.config
    name = config.get("_class_name") or config["architectures"][0]
    if dtype is not None:
        runtime = runtime | {"dtype": jnp.dtype(dtype)}
    module = NETWORKS[name].from_config(config, **runtime)
    return module, params_from(component.tensors, module, dtype, host=host, sharding=sharding)


def _view(tensors: Tensors, component: str, group: Group) -> View:
    stored, unknown = group.stored, []
    if group.naming == DIFFUSERS:
        slots = {name: Slot((source,)) for name, source in stored.items()}
    elif group.naming == CLIP:
        slots, unknown = ldm_slots.clip_slots(stored)
    elif group.naming in (OPENCLIP, OPENCLIP_PROJECTED):
        slots, unknown = ldm_slots.openclip_slots(stored, projected=group.naming == OPENCLIP_PROJECTED)
    elif component == "vae":
        slots, unknown = ldm_slots.vae_slots(stored)
    else:
        slots, unknown = ldm_slots.unet_slots(stored)
    if unknown:
        raise ValueError(f"{tensors.label}: {len(unknown)} tensors of its {component} are unknown ({listed(unknown)})")
    return View(tensors, slots)


def _config(component: str, view: View, naming: str, family: str | None) -> Config:
    if component == "unet":
        return ldm_configs.unet_config(view)
    if component == "controlnet":
        return ldm_configs.controlnet_config(view)
    if component == "vae":
        return ldm_configs.vae_config(view, xl=family in (XL, REFINER))
    if component == "image_encoder":
        return ldm_configs.vision_config(view)
    if component == "postfuse":
        return ldm_configs.postfuse_config(view)
    return ldm_configs.text_config(view, TEXT_PRESETS[naming])


def _prediction_type(tensors: Tensors, unet: View, family: str) -> str:
    if V_MARK in tensors.names():
        return "v_prediction"
    for key in PREDICTION_KEYS:
        if (said := PREDICTIONS.get(tensors.metadata.get(key, ""))) is not None:
            return said
    if family != SD2 or unet.shape("conv_in.weight")[1] != 4 or tensors.metadata.get("global_step") == SD2_BASE_STEP:
        return "epsilon"
    up = diffusers_layout(unet.names()).up
    last = f"up_blocks.{len(up) - 1}.attentions.{len(up[-1].attentions) - 1}.transformer_blocks.0.norm1.bias"
    if last not in unet.names():
        return "v_prediction"
    spread = float(np.std(unet.read(last).astype(np.float32)))
    return "v_prediction" if spread > V_PREDICTION_SPREAD else "epsilon"


def _kind(components: dict[str, Component], family: str | None) -> str:
    if family is None:
        return "autoencoder" if "vae" in components else "text encoder"
    plain = family.removesuffix(" base")
    if "unet" not in components:
        return f"ControlNet {plain}"
    channels = components["unet"].config["in_channels"]
    kind = {4: family, 8: "HumanSD" if family == SD2 else f"{plain}, 8 channels", 9: f"{plain} inpainting"}.get(
        channels, f"{plain}, {channels} channels"
    )
    if len(components) == 1:
        return f"UNet of {kind}"
    if "postfuse" in components:
        return f"{kind} with subjects"
    if "controlnet" in components:
        return "HandRefiner" if (family, channels) == (SD1, 9) else f"{kind} with ControlNet"
    return kind
