"""What trains beside a frozen text-to-image model: a LoRA, a ControlNet or a T2I-Adapter.

A configuration (`LoraTrainable`, `ControlNetTrainable`, `AdapterTrainable`) builds the part of a system that knows
about the difference: how it starts, what it adds to the frozen networks, how it is written.
Source: Hu et al. 2021 (LoRA); Zhang et al. 2023 (ControlNet); Mou et al. 2023 (T2I-Adapter).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from fairhuman_jax.losses.regions import REFERENCE_LOCAL_SCALE
from fairhuman_jax.models import ControlNet, T2IAdapter, controlnet_from_unet, init_lora, scale_lora
from fairhuman_jax.models.lora import UNET_TARGETS
from fairhuman_jax.models.t2i_adapter import FULL, FULL_XL, LIGHT
from fairhuman_jax.weights import Pipeline, expected_params, load_loras, load_model, save_lora, save_model

PyTree = Any
Params = dict[str, PyTree]
N = TypeVar("N", ControlNet, T2IAdapter)
# Widths of a ControlNet's condition embedding; each after the first halves the picture.
CONDITION_WIDTHS = (16, 32, 96, 256)


class TrainedPart(Protocol):
    """The trainables of a system and how they meet its frozen networks."""

    def init(self, params: Params, key: jax.Array) -> Params:
        """Trainables in float32 for a base with these parameters."""
        ...

    def applied(self, trainable: Params) -> tuple[Params, Params]:
        """(parameters of further networks, LoRA trees) by the names that `LatentDiffusion` reads."""
        ...

    def networks(self) -> dict[str, tuple[Any, ...]]:
        """The further networks as fields of `LatentDiffusion`: controlnets or adapters."""
        ...

    def export(self, trainable: Params, folder: Path) -> Path:
        """Writes what diffusers reads; returns the file or folder."""
        ...


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraTrainable:
    """A LoRA on the UNet and, with `text_targets`, on all text encoders; its strength is alpha / rank."""

    rank: Annotated[int, "rank of the updates"] = 16
    alpha: Annotated[float | None, "alpha of the strength alpha / rank; None is the rank"] = None
    targets: Annotated[tuple[str, ...], "names of the UNet's layers that are adapted"] = UNET_TARGETS
    text_targets: Annotated[tuple[str, ...], "names of the text encoders' layers that are adapted, as q_proj"] = ()
    start: Annotated[str | None, "LoRA file or folder of the same rank and layers to continue from"] = None

    # What the published trainer does where a configuration could ask for something else.
    REFERENCE: ClassVar[dict[str, Any]] = {
        "local_scale": REFERENCE_LOCAL_SCALE,
        "normalize": "pixels",
        "mask_method": "stride",
        "x0_weight": None,
        "timestep_mode": "uniform",
    }
    OPTION: ClassVar[str] = "lora"  # of sample.py, which draws with it
    CONDITIONED: ClassVar[bool] = False
    WEIGHT_ON_GLOBAL_ONLY: ClassVar[bool] = True

    def build(self, pipeline: Pipeline) -> LoraPart:
        """Reads `start`. Raises: ValueError for a LoRA file that cannot be read, or of another rank or other layers."""
        targets = {"unet": self.targets}
        if self.text_targets:
            targets |= dict.fromkeys(pipeline.text_encoder_names, self.text_targets)
        part = LoraPart(self.rank, self.alpha, targets)
        if self.start is None:
            return part
        strength = 1.0 if self.alpha is None else self.alpha / self.rank
        loaded = load_loras([(self.start, 1.0)], pipeline.params)
        wanted = jax.eval_shape(lambda key: part.init(pipeline.params, key), jax.random.key(0))
        found, asked = (flatten_dict(jax.tree.map(jnp.shape, tree)) for tree in (loaded, wanted))
        if different := sorted(path for path in found.keys() | asked.keys() if found.get(path) != asked.get(path)):
            name = ".".join(different[0])
            raise ValueError(
                f"trainable.start={self.start}: {name} is {found.get(different[0], 'absent')} there, but rank and "
                f"targets of this run make it {asked.get(different[0], 'absent')}"
            )
        start = {name: scale_lora(tree, 1.0 / strength) for name, tree in loaded.items()}
        return LoraPart(self.rank, self.alpha, targets, start)


@dataclass(frozen=True, eq=False)
class LoraPart:
    """Low-rank updates by network; `start` holds them without their strength."""

    rank: int
    alpha: float | None
    targets: dict[str, tuple[str, ...]]
    start: Params | None = None

    def init(self, params: Params, key: jax.Array) -> Params:
        if self.start is not None:
            return _masters(self.start)
        keys = [key, *(jax.random.fold_in(key, i) for i in range(1, len(self.targets)))]
        return {
            name: init_lora(network_key, params[name], self.rank, layers)
            for network_key, (name, layers) in zip(keys, self.targets.items(), strict=True)
        }

    def applied(self, trainable: Params) -> tuple[Params, Params]:
        strength = 1.0 if self.alpha is None else self.alpha / self.rank
        return {}, {name: scale_lora(tree, strength) for name, tree in trainable.items()}

    def networks(self) -> dict[str, tuple[Any, ...]]:
        return {}

    def export(self, trainable: Params, folder: Path) -> Path:
        """Writes `pytorch_lora_weights.safetensors` in diffusers' naming, text encoders included."""
        return save_lora(trainable, folder, rank=self.rank, alpha=self.alpha)


# ---- networks that read a condition image ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NetworkPart:
    """A whole network, `controlnet` or `adapter`; `start(params, key)` makes its first parameters."""

    name: str
    network: ControlNet | T2IAdapter
    start: Callable[[Params, jax.Array], PyTree]

    def init(self, params: Params, key: jax.Array) -> Params:
        return {self.name: _masters(self.start(params, key))}

    def applied(self, trainable: Params) -> tuple[Params, Params]:
        return trainable, {}

    def networks(self) -> dict[str, tuple[Any, ...]]:
        return {f"{self.name}s": (self.network,)}

    def export(self, trainable: Params, folder: Path) -> Path:
        """Writes a folder that diffusers' class of that network loads."""
        save_model(self.network, trainable[self.name], folder)
        return folder


@dataclass(frozen=True)
class ControlNetTrainable:
    """A ControlNet: all its parameters, in float32.

    Each width after the first halves the picture, so their number follows from the autoencoder's factor.
    """

    start: Annotated[str | None, "ControlNet to continue from; None copies the UNet's encoder, residuals zero"] = None
    widths: Annotated[
        tuple[int, ...] | None, "widths of the condition embedding; None takes as many of 16, 32, 96, 256 as fit"
    ] = None

    REFERENCE: ClassVar[dict[str, Any]] = {
        "local_scale": 1.0,
        "normalize": "pixels",
        "mask_method": "stride",
        "snr_gamma": None,
        "x0_weight": math.inf,
        "timestep_mode": "uniform",
        "noise_offset": 0.0,
    }
    OPTION: ClassVar[str] = "controlnet"  # of sample.py, which draws with it
    CONDITIONED: ClassVar[bool] = True
    WEIGHT_ON_GLOBAL_ONLY: ClassVar[bool] = False

    def build(self, pipeline: Pipeline) -> NetworkPart:
        """Reads `start`.

        Raises: ValueError for a network of another class or for another base; widths that do not fit.
        """
        if self.start is not None:
            if self.widths is not None:
                raise ValueError("trainable.widths is for a new ControlNet; that of trainable.start has its own")
            network, params = _open_start(self.start, ControlNet, pipeline)
            _check_controlnet(f"trainable.start={self.start}", network, pipeline)
            return NetworkPart("controlnet", network, lambda *_: params)
        factor = pipeline.vae.downscale
        widths = self.widths or CONDITION_WIDTHS[: factor.bit_length()]
        unet, fields = pipeline.unet, {"conditioning_embedding_out_channels": widths}
        network, _ = controlnet_from_unet(unet, pipeline.params["unet"], jax.random.key(0), **fields)
        _check_controlnet(f"trainable.widths={widths}", network, pipeline)

        def start(params: Params, key: jax.Array) -> PyTree:
            return controlnet_from_unet(unet, params["unet"], key, **fields)[1]

        return NetworkPart("controlnet", network, start)


@dataclass(frozen=True)
class AdapterTrainable:
    """A T2I-Adapter: all its parameters, in float32.

    A new one is random and its features are not zero, so the base is disturbed at first, as in the published trainer.
    Its downscale factor is the autoencoder's, twice that for full_adapter_xl.
    """

    start: Annotated[str | None, "adapter to continue from; None begins a random one"] = None
    adapter_type: Annotated[
        str | None, "full_adapter, full_adapter_xl or light_adapter; None takes what fits the UNet"
    ] = None
    channels: Annotated[tuple[int, ...] | None, "widths of its features; None takes the UNet's"] = None
    num_res_blocks: Annotated[int, "residual blocks a resolution"] = 2

    REFERENCE: ClassVar[dict[str, Any]] = {
        "local_scale": 1.0,
        "normalize": "pixels",
        "mask_method": "stride",
        "snr_gamma": None,
        "x0_weight": None,
        "timestep_mode": "cubic",
        "noise_offset": 0.0,
    }
    OPTION: ClassVar[str] = "adapter"  # of sample.py, which draws with it
    CONDITIONED: ClassVar[bool] = True
    WEIGHT_ON_GLOBAL_ONLY: ClassVar[bool] = False

    def build(self, pipeline: Pipeline) -> NetworkPart:
        """Reads `start`.

        Raises: ValueError for a network of another class or for another base; channels that do not fit.
        """
        if self.start is not None:
            network, params = _open_start(self.start, T2IAdapter, pipeline)
            _check_adapter(f"trainable.start={self.start}", network, pipeline)
            return NetworkPart("adapter", network, lambda *_: params)
        # SDXL's first block halves its output and reads no text, which the XL adapter's two equal sizes are made for.
        kind = self.adapter_type or (FULL if "CrossAttn" in pipeline.unet.down_block_types[0] else FULL_XL)
        config = {
            "channels": self.channels or _channels(kind, pipeline.unet.block_out_channels),
            "num_res_blocks": self.num_res_blocks,
            "downscale_factor": _downscale(kind, pipeline),
            "adapter_type": kind,
        }
        network = T2IAdapter.from_config(config, dtype=pipeline.unet.dtype)
        _check_adapter(f"a new {kind}", network, pipeline)
        return NetworkPart("adapter", network, lambda _, key: random_adapter(network, key))


def random_adapter(network: T2IAdapter, key: jax.Array) -> PyTree:
    """Kernels uniform between plus and minus 1 / sqrt(values that a pixel sums), biases zero; one draw for all."""
    kernel = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    shapes, structure = jax.tree.flatten(expected_params(network))

    @jax.jit
    def draw(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return [kernel(k, s.shape) if s.ndim > 1 else jnp.zeros(s.shape) for k, s in zip(keys, shapes, strict=True)]

    return jax.tree.unflatten(structure, draw(key))


def _open_start(path: str, kind: type[N], pipeline: Pipeline) -> tuple[N, PyTree]:
    """A stored network with float32 parameters, which computes as the pipeline's UNet does."""
    unet = pipeline.unet
    network, params = load_model(
        path, dtype="float32", scan=unet.scan, remat=unet.remat, attention=unet.attention, host=True
    )
    if not isinstance(network, kind):
        raise ValueError(f"trainable.start={path} is a {type(network).__name__}, not a {kind.__name__}")
    return network.clone(dtype=unet.dtype), params


def _check_controlnet(what: str, network: ControlNet, pipeline: Pipeline) -> None:
    unet, factor = pipeline.unet, pipeline.vae.downscale
    for name in ("in_channels", "cross_attention_dim", "block_out_channels"):
        if getattr(network, name) != getattr(unet, name):
            raise ValueError(
                f"{what}: its {name} is {getattr(network, name)}, but the base has {getattr(unet, name)}: it was made "
                "for another base"
            )
    if network.condition_factor != factor:
        raise ValueError(
            f"{what} shrinks the condition image {network.condition_factor} times, but the autoencoder {factor} times: "
            f"that needs {factor.bit_length()} widths"
        )


def _check_adapter(what: str, network: T2IAdapter, pipeline: Pipeline) -> None:
    widths = tuple(stage.features for stage in network.stages())
    ours = pipeline.unet.block_out_channels
    if widths[: len(ours)] != ours:
        raise ValueError(f"{what} makes features of widths {widths}, but the base has {ours}")
    factor = _downscale(network.adapter_type, pipeline)
    if network.downscale_factor != factor:
        raise ValueError(f"{what} has downscale_factor {network.downscale_factor}, but this base needs {factor}")


def _channels(kind: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    """An XL adapter has one more feature, for the middle block; a light one repeats its last width by itself."""
    return {FULL_XL: (*widths, widths[-1]), LIGHT: widths[:-1]}.get(kind, widths)


def _downscale(kind: str, pipeline: Pipeline) -> int:
    return pipeline.vae.downscale * (2 if kind == FULL_XL else 1)


def _masters(tree: PyTree) -> PyTree:
    """float32 copies: the train step gives its trainables' buffers away, and the base's must stay."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), tree)
