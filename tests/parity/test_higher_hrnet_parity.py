"""HigherHRNet against the same network in torch, through a checkpoint with mmpose's names."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.models import HigherHRNet, presets, stage_mean
from fairhuman_jax.weights import load_model, save_model
from fairhuman_jax.weights.mmpose import load_pose_network

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch_twins import nchw, normal  # noqa: E402

TOLERANCE = 1e-4
TINY = {
    "joints": 3,
    "stem_channels": 8,
    "widths": [8, 12, 16, 20],
    "bottlenecks": 1,
    "stage_modules": [1, 2, 1],
    "blocks": 1,
    "head_blocks": 1,
}


def conv(inputs, outputs, kernel=3, stride=1, bias=False):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)


def conv_bn(inputs, outputs, kernel=3, stride=1, *after):
    return nn.Sequential(conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), *after)


class Basic(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Bottle(nn.Module):
    def __init__(self, inputs, middle):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, middle, 1), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(middle, middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv(middle, 4 * middle, 1), nn.BatchNorm2d(4 * middle)
        self.downsample = conv_bn(inputs, 4 * middle, 1) if inputs != 4 * middle else None

    def forward(self, x):
        hidden = torch.relu(self.bn1(self.conv1(x)))
        hidden = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(hidden)))))
        return torch.relu(hidden + (x if self.downsample is None else self.downsample(x)))


class Exchange(nn.Module):
    def __init__(self, widths, blocks, outputs):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(Basic(w) for _ in range(blocks))) for w in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self.path(widths, j, i) for j in range(len(widths))) for i in range(outputs)
        )

    def path(self, widths, source, target):
        if source == target:
            return None
        if source > target:
            up = nn.Upsample(scale_factor=2 ** (source - target), mode="nearest")
            return conv_bn(widths[source], widths[target], 1, 1, up)
        inner = [conv_bn(widths[source], widths[source], 3, 2, nn.ReLU()) for _ in range(target - source - 1)]
        return nn.Sequential(*inner, conv_bn(widths[source], widths[target], 3, 2))

    def forward(self, branches):
        branches = [branch(x) for branch, x in zip(self.branches, branches, strict=True)]
        return [
            torch.relu(sum(x if path is None else path(x) for path, x in zip(row, branches, strict=True)))
            for row in self.fuse_layers
        ]


class TorchBackbone(nn.Module):
    def __init__(self, stem_channels, widths, bottlenecks, stage_modules, blocks):
        super().__init__()
        self.conv1, self.bn1 = conv(3, stem_channels, 3, 2), nn.BatchNorm2d(stem_channels)
        self.conv2, self.bn2 = conv(stem_channels, stem_channels, 3, 2), nn.BatchNorm2d(stem_channels)
        wide = 4 * stem_channels
        self.layer1 = nn.Sequential(*(Bottle(wide if k else stem_channels, stem_channels) for k in range(bottlenecks)))
        previous, self.stages = [wide], len(stage_modules)
        for stage, modules in enumerate(stage_modules, 1):
            kept = [None if w == p else conv_bn(p, w, 3, 1, nn.ReLU()) for p, w in zip(previous, widths, strict=False)]
            new = nn.Sequential(conv_bn(previous[-1], widths[stage], 3, 2, nn.ReLU()))
            setattr(self, f"transition{stage}", nn.ModuleList([*kept, new]))
            previous = widths[: stage + 1]
            outputs = [stage + 1] * modules
            if stage == self.stages:
                outputs[-1] = 1
            setattr(self, f"stage{stage + 1}", nn.Sequential(*(Exchange(previous, blocks, n) for n in outputs)))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        branches = [self.layer1(torch.relu(self.bn2(self.conv2(x))))]
        for stage in range(1, self.stages + 1):
            coarsest = branches[-1]
            layers = getattr(self, f"transition{stage}")
            branches = [
                layer(coarsest) if i == len(branches) else branches[i] if layer is None else layer(branches[i])
                for i, layer in enumerate(layers)
            ]
            branches = getattr(self, f"stage{stage + 1}")(branches)
        return branches[0]


class TorchHead(nn.Module):
    def __init__(self, width, joints, blocks):
        super().__init__()
        self.final_layers = nn.ModuleList([conv(width, 2 * joints, 1, bias=True), conv(width, joints, 1, bias=True)])
        up = nn.ConvTranspose2d(width + 2 * joints, width, 4, 2, 1, bias=False)
        rest = [nn.Sequential(Basic(width)) for _ in range(blocks)]
        self.deconv_layers = nn.ModuleList([nn.Sequential(nn.Sequential(up, nn.BatchNorm2d(width), nn.ReLU()), *rest)])

    def forward(self, x):
        coarse = self.final_layers[0](x)
        return coarse, self.final_layers[1](self.deconv_layers[0](torch.cat([x, coarse], 1)))


class TorchHigherHRNet(nn.Module):
    def __init__(self, joints, head_blocks, widths, **backbone):
        super().__init__()
        self.backbone = TorchBackbone(widths=widths, **backbone)
        self.keypoint_head = TorchHead(widths[0], joints, head_blocks)

    def forward(self, x):
        return self.keypoint_head(self.backbone(x))


@pytest.fixture(scope="module")
def twin():
    """A torch network whose norms, running ones included, all matter."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = TorchHigherHRNet(**TINY)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                noise = torch.randn(tensor.shape, generator=generator)
                if name.endswith("running_var"):
                    tensor.copy_(torch.exp(0.3 * noise))
                else:
                    tensor.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
    return model


@pytest.fixture(scope="module")
def loaded(twin, tmp_path_factory):
    path = tmp_path_factory.mktemp("mmpose") / "higherhrnet.pth"
    torch.save({"meta": {"epoch": 300}, "state_dict": twin.state_dict(), "optimizer": {"lr": torch.ones(1)}}, path)
    return load_pose_network(path)


@pytest.mark.parametrize("average", [True, False], ids=["eval", "batch_stats"])
def test_both_outputs(twin, loaded, average):
    module, variables = loaded
    assert module == HigherHRNet.from_config(presets.HIGHER_HRNET_W48 | TINY)
    images = normal(2, 64, 96, 3, seed=1)
    twin.train(not average)
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    with torch.no_grad():
        expected = twin(nchw(images))
    twin.load_state_dict(state)  # torch has moved its running statistics
    used = variables if average else {"params": variables["params"]}
    found = quick_jit(lambda tree: module.apply(tree, images, use_running_average=average))(used)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = np.moveaxis(theirs.numpy(), 1, -1)
        assert ours.shape == theirs.shape and theirs.std() > 0.1
        assert np.abs(ours - theirs).max() <= TOLERANCE * theirs.std()


def test_stage_mean():
    """The coarse map is stretched from corner to corner, as mmpose does it."""
    coarse, fine = normal(2, 4, 6, 6, seed=2), normal(2, 8, 12, 3, seed=3)
    up = torch.nn.functional.interpolate(nchw(coarse[..., :3]), size=(8, 12), mode="bilinear", align_corners=True)
    expected = (np.moveaxis(up.numpy(), 1, -1) + fine) / 2
    np.testing.assert_allclose(stage_mean(jax.numpy.asarray(coarse), jax.numpy.asarray(fine)), expected, atol=1e-6)


def test_a_folder_of_ours_holds_the_tensors_of_torch(twin, loaded, tmp_path):
    from safetensors.torch import load_file

    module, variables = loaded
    save_model(module, variables, tmp_path)
    expected = {name: t for name, t in twin.state_dict().items() if not name.endswith("num_batches_tracked")}
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    again, read = load_model(tmp_path)
    assert again == module
    assert jax.tree.all(jax.tree.map(np.array_equal, read, variables))
