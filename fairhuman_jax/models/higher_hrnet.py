"""HigherHRNet: a bottom-up pose network whose outputs are heat maps and grouping tags of all joints of all people.

Sources: Sun et al. 2019 (HRNet); Cheng et al. 2020 (HigherHRNet), section 3. Module names are those of mmpose's
checkpoints.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairhuman_jax.models.layers import Conv, Dtype
from fairhuman_jax.resizing import resize_aligned

EPSILON = 1e-5  # of every batch norm; no config key sets it
EXPANSION = 4  # a bottleneck's output channels over its middle ones


class BatchNorm(nn.Module):
    """Normalisation by moments over batch and space: the stored ones of `batch_stats`, or this batch's own.

    Moments are float32, the variance biased. The batch's own need no `batch_stats`; where that collection is mutable
    they are left there as they are, with no memory of what was stored.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        wide = x.astype(jnp.float32)
        if use_running_average:
            mean, variance = (variable.value.astype(jnp.float32) for variable in self._stored(shape))
        else:
            mean = wide.mean(axis=(0, 1, 2))
            variance = jnp.square(wide - mean).mean(axis=(0, 1, 2))
            if self.is_mutable_collection("batch_stats"):
                for variable, moment in zip(self._stored(shape), (mean, variance), strict=True):
                    variable.value = moment
        gain = jax.lax.rsqrt(variance + EPSILON) * scale.astype(jnp.float32)
        return ((wide - mean) * gain + bias.astype(jnp.float32)).astype(self.dtype)

    def _stored(self, shape: tuple[int, ...]) -> tuple[nn.Variable, nn.Variable]:
        return (
            self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
            self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
        )


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm; `0` and `1` are their names, as in a sequence of torch."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, average: bool) -> jax.Array:
        return _conv_norm(self, x, average, ("0", "1"), self.features, self.kernel_size, self.strides)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms around a residual: [B, H, W, C] -> same."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, average: bool) -> jax.Array:
        hidden = nn.relu(_conv_norm(self, x, average, ("conv1", "bn1"), x.shape[-1]))
        return nn.relu(x + _conv_norm(self, hidden, average, ("conv2", "bn2"), x.shape[-1]))


class Bottleneck(nn.Module):
    """1x1 to `features`, 3x3, 1x1 to four times as many, around a residual that is projected where widths differ."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, average: bool) -> jax.Array:
        wide = EXPANSION * self.features
        hidden = nn.relu(_conv_norm(self, x, average, ("conv1", "bn1"), self.features, 1))
        hidden = nn.relu(_conv_norm(self, hidden, average, ("conv2", "bn2"), self.features))
        hidden = _conv_norm(self, hidden, average, ("conv3", "bn3"), wide, 1)
        if x.shape[-1] != wide:
            x = ConvNorm(wide, 1, dtype=self.dtype, name="downsample")(x, average)
        return nn.relu(x + hidden)


class HRModule(nn.Module):
    """Parallel branches, each of half the resolution of the one before, then `outputs` sums over all of them."""

    blocks: int
    outputs: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, branches: list[jax.Array], average: bool) -> list[jax.Array]:
        branches = list(branches)
        for i in range(len(branches)):
            for k in range(self.blocks):
                branches[i] = BasicBlock(self.dtype, name=f"branches.{i}.{k}")(branches[i], average)
        return [self._fuse(branches, i, average) for i in range(self.outputs)]

    def _fuse(self, branches: list[jax.Array], target: int, average: bool) -> jax.Array:
        width = branches[target].shape[-1]
        parts = [self._to(x, source, target, width, average) for source, x in enumerate(branches)]
        return nn.relu(functools.reduce(jnp.add, parts))

    def _to(self, x: jax.Array, source: int, target: int, width: int, average: bool) -> jax.Array:
        """Branch `source` in the shape of branch `target`: nearest upsampling or a chain of stride-2 convolutions."""
        name = f"fuse_layers.{target}.{source}"
        if source == target:
            return x
        if source > target:
            factor = 2 ** (source - target)
            x = ConvNorm(width, 1, dtype=self.dtype, name=name)(x, average)
            return x.repeat(factor, axis=1).repeat(factor, axis=2)
        last = target - source - 1
        for k in range(last + 1):
            features = width if k == last else x.shape[-1]
            x = ConvNorm(features, strides=2, dtype=self.dtype, name=f"{name}.{k}")(x, average)
            x = x if k == last else nn.relu(x)
        return x


class Backbone(nn.Module):
    """HRNet: [B, H, W, 3] -> features of its finest branch [B, H / 4, W / 4, widths[0]]."""

    stem_channels: int
    widths: tuple[int, ...]
    bottlenecks: int
    stage_modules: tuple[int, ...]
    blocks: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, average: bool) -> jax.Array:
        for k in (1, 2):
            x = nn.relu(_conv_norm(self, x, average, (f"conv{k}", f"bn{k}"), self.stem_channels, strides=2))
        for k in range(self.bottlenecks):
            x = Bottleneck(self.stem_channels, self.dtype, name=f"layer1.{k}")(x, average)
        branches = [x]
        for stage, modules in enumerate(self.stage_modules, start=1):
            branches = self._transition(stage, branches, average)
            for k in range(modules):
                last = stage == len(self.stage_modules) and k == modules - 1
                module = HRModule(self.blocks, 1 if last else stage + 1, self.dtype, name=f"stage{stage + 1}.{k}")
                branches = module(branches, average)
        return branches[0]

    def _transition(self, stage: int, branches: list[jax.Array], average: bool) -> list[jax.Array]:
        """One more branch, from the coarsest; the others are convolved only where their width changes."""
        name, out = f"transition{stage}", list(branches)
        for i, x in enumerate(branches):
            if x.shape[-1] != self.widths[i]:
                out[i] = nn.relu(ConvNorm(self.widths[i], dtype=self.dtype, name=f"{name}.{i}")(x, average))
        new = ConvNorm(self.widths[stage], strides=2, dtype=self.dtype, name=f"{name}.{stage}.0")
        return [*out, nn.relu(new(branches[-1], average))]


class ConvTranspose(nn.Module):
    """Transposed convolution without bias that doubles the resolution: kernel 4, stride 2, padding 1.

    Its leaf `transposed_kernel` [4, 4, in, out] is that of the equal convolution of the input with zeros between its
    pixels, so torch's with both spatial axes turned round.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (4, 4, x.shape[-1], self.features)
        kernel = self.param("transposed_kernel", nn.initializers.lecun_normal(), shape)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1, 1),
            padding=((2, 2), (2, 2)),
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Head(nn.Module):
    """Features [B, h, w, C] -> heat maps and tags [B, h, w, 2 J], heat maps [B, 2h, 2w, J]; float32."""

    joints: int
    blocks: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, average: bool) -> tuple[jax.Array, jax.Array]:
        width = x.shape[-1]
        coarse = Conv(2 * self.joints, 1, padding=0, dtype=self.dtype, name="final_layers.0")(x)
        x = jnp.concatenate([x, coarse], axis=-1)
        x = ConvTranspose(width, self.dtype, name="deconv_layers.0.0.0")(x)
        x = nn.relu(BatchNorm(self.dtype, name="deconv_layers.0.0.1")(x, average))
        for k in range(self.blocks):
            x = BasicBlock(self.dtype, name=f"deconv_layers.0.{k + 1}.0")(x, average)
        fine = Conv(self.joints, 1, padding=0, dtype=self.dtype, name="final_layers.1")(x)
        return coarse.astype(jnp.float32), fine.astype(jnp.float32)


class HigherHRNet(nn.Module):
    """Pictures -> heat maps and tags of `joints` joints at a quarter and heat maps at half of their resolution.

    widths: channels of the branches, finest first; stage_modules: exchanges between 2, 3, ... branches; blocks: in
    each branch of an exchange; bottlenecks: before them, stem_channels wide; head_blocks: after the doubling.
    image_mean, image_std: of the pictures in [0, 1] that it was trained on, see `normalise`.
    Sources: Cheng et al. 2020 (HigherHRNet); mmpose 0.29.0, higherhrnet_w48_coco_512x512_udp.py.
    """

    joints: int = 17
    stem_channels: int = 64
    widths: tuple[int, ...] = (48, 96, 192, 384)
    bottlenecks: int = 4
    stage_modules: tuple[int, ...] = (1, 4, 3)
    blocks: int = 4
    head_blocks: int = 4
    image_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    image_std: tuple[float, ...] = (1.0, 1.0, 1.0)
    dtype: Dtype = jnp.float32

    CLASS_NAME: ClassVar[str] = "HigherHRNet"
    CONFIG_FIELDS: ClassVar[tuple[str, ...]] = (
        "joints",
        "stem_channels",
        "widths",
        "bottlenecks",
        "stage_modules",
        "blocks",
        "head_blocks",
        "image_mean",
        "image_std",
    )

    @classmethod
    def from_config(cls, config: dict[str, Any], **runtime: Any) -> HigherHRNet:
        """The network a config describes; runtime: dtype, of computation. Unknown keys are refused by name."""
        if config.get("_class_name", cls.CLASS_NAME) != cls.CLASS_NAME:
            raise ValueError(f"{cls.CLASS_NAME}: this config.json is of class {config['_class_name']!r}")
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(set(settings) - set(cls.CONFIG_FIELDS)):
            raise ValueError(f"{cls.CLASS_NAME}: unknown config keys {', '.join(unknown)}")
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        module = cls(**settings, **runtime)
        if len(module.widths) != len(module.stage_modules) + 1 or min(module.stage_modules, default=0) < 1:
            raise ValueError(
                f"{cls.CLASS_NAME}: widths {list(module.widths)} want one number of at least 1 fewer in "
                f"stage_modules, not {list(module.stage_modules)}"
            )
        return module

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that `from_config` builds this network from."""
        fields = {key: getattr(self, key) for key in self.CONFIG_FIELDS}
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        return {"_class_name": self.CLASS_NAME, **fields}

    def example_inputs(self) -> tuple[jax.Array]:
        """Arguments for `jax.eval_shape(module.init, key, *inputs)`."""
        return (jnp.zeros((1, self.multiple(), self.multiple(), 3)),)

    def multiple(self) -> int:
        """What both sides of a picture must be a multiple of."""
        return 4 * 2 ** (len(self.widths) - 1)

    def normalise(self, images: jax.Array) -> jax.Array:
        """Pictures in [0, 1] as the network was trained on them: less `image_mean`, over `image_std`."""
        return (images - jnp.asarray(self.image_mean)) / jnp.asarray(self.image_std)

    @nn.compact
    def __call__(self, images: jax.Array, use_running_average: bool = True) -> tuple[jax.Array, jax.Array]:
        """RGB [B, H, W, 3] -> y0 [B, H/4, W/4, 2 J] and y1 [B, H/2, W/2, J], float32.

        Channels of y0: J heat maps, then J tags. use_running_average: batch norms by `batch_stats` (evaluation);
        False takes the batch's own moments, for which `params` are enough and which a mutable `batch_stats` receives.
        Raises: ValueError for sides that are no multiple of `multiple()`; another number of channels.
        """
        height, width, channels = images.shape[1:]
        if channels != 3 or height % self.multiple() or width % self.multiple():
            raise ValueError(
                f"{self.CLASS_NAME}: images are {list(images.shape[1:])}, but must have sides that {self.multiple()} "
                "divides and 3 channels"
            )
        backbone = Backbone(
            self.stem_channels,
            self.widths,
            self.bottlenecks,
            self.stage_modules,
            self.blocks,
            self.dtype,
            name="backbone",
        )
        head = Head(self.joints, self.head_blocks, self.dtype, name="keypoint_head")
        return head(backbone(images, use_running_average), use_running_average)


def stage_mean(y0: jax.Array, y1: jax.Array) -> jax.Array:
    """The heat maps of both stages as one: (up(y0[..., :J]) + y1) / 2, fp32 [B, H/2, W/2, J].

    up is bilinear from corner to corner; y0 [B, H/4, W/4, 2 J] and y1 [B, H/2, W/2, J] as `HigherHRNet` gives them.
    Source: mmpose 0.29.0, core/evaluation/bottom_up_eval.py.
    """
    return 0.5 * (resize_aligned(y0[..., : y1.shape[-1]], y1.shape[1:3]) + y1.astype(jnp.float32))


def _conv_norm(
    owner: Any,
    x: jax.Array,
    average: bool,
    names: tuple[str, str],
    features: int,
    kernel_size: int = 3,
    strides: int = 1,
) -> jax.Array:
    """Convolution without bias and batch norm, submodules `names` of `owner`; to be called from its compact method."""
    conv = Conv(
        features, kernel_size, strides, padding=kernel_size // 2, dtype=owner.dtype, use_bias=False, name=names[0]
    )
    return BatchNorm(owner.dtype, name=names[1])(conv(x), average)
