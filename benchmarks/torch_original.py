"""The published scheme of the fair step in torch beside ours, on the shipped model, in turn in one run.

    python benchmarks/torch_original.py                         # a LoRA of rank 16
    python benchmarks/torch_original.py --trainable controlnet
    taskset -c 0 python benchmarks/torch_original.py --threads 1    # one core for both: on a machine with other work,
                                                                    # where torch's threads wait for each other

The published scheme: one forward pass whose graph is kept, a backward pass for each objective, every gradient copied
into its column of a dense float32 matrix of P x 3 that is allocated at each step, the Gram matrix to the host, the
weights by scipy's bounded least squares, the combination copied back, AdamW. Written from the paper and the described
behaviour, on diffusers' networks and peft's LoRA; ours is the trainer's step. Latents and text are encoded beforehand
on both sides. "plain" has the global objective alone. Source: FairHuman (arXiv 2507.02714), section 3.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from fair_step import Plain
from peft import LoraConfig
from scipy.optimize import least_squares
from torch.nn import functional

from fairhuman_jax.bases.opening import open_base
from fairhuman_jax.devices.kernels import choose_cpu_kernels
from fairhuman_jax.devices.sharding import make_mesh
from fairhuman_jax.systems.fairhuman.system import FairHuman, FairHumanConfig
from fairhuman_jax.systems.fairhuman.trainables import ControlNetTrainable, LoraTrainable
from fairhuman_jax.training.combining import FairConfig, init_fair
from fairhuman_jax.training.state import OptimizerConfig, init_state, make_optimizer
from fairhuman_jax.training.step import make_train_step

ALPHA, OBJECTIVES = 2.0, 3
WIDTHS = (16, 32, 96)  # of the ControlNet's condition embedding: the shipped autoencoder halves twice
RATE, DECAY, CLIP = 1e-4, 0.01, 1.0
Arrays = dict[str, np.ndarray]


def random_batch(count: int) -> Arrays:
    """Encoded pictures and captions in the shapes of the shipped model, NHWC, with one face and two hands each."""
    rng = np.random.default_rng(0)
    batch = {
        "latent_mean": rng.standard_normal((count, 16, 16, 8), np.float32),
        "latent_logvar": np.full((count, 16, 16, 8), -8.0, np.float32),
        "text_hidden": rng.standard_normal((count, 48, 192), np.float32),
        "text_pooled": np.zeros((count, 192), np.float32),
        "conditioning_image": rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        "face_mask": np.zeros((count, 64, 64, 1), np.uint8),
        "hand_mask": np.zeros((count, 64, 64, 1), np.uint8),
    }
    batch["face_mask"][:, 8:32, 20:44] = 1
    batch["hand_mask"][:, 40:52, 8:20] = batch["hand_mask"][:, 40:52, 44:56] = 1
    return batch


# ---- torch -----------------------------------------------------------------------------------------------------------


class TorchTrainer:
    """diffusers' networks of the shipped model and what trains on them."""

    def __init__(self, trainable: str, rank: int, batch: Arrays) -> None:
        folder = str(resources.files("fairhuman_jax") / "assets" / "people-base")
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
        self.controlnet = None
        if trainable == "controlnet":
            self.controlnet = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=WIDTHS)
            self.controlnet.requires_grad_(True)
            trained = self.controlnet
        else:
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
            trained = self.unet
        self.params = [p for p in trained.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.params)
        self.optimizer = torch.optim.AdamW(self.params, lr=RATE, weight_decay=DECAY)

        def nchw(name: str) -> torch.Tensor:
            return torch.from_numpy(batch[name]).float().permute(0, 3, 1, 2).contiguous()

        self.mean, self.condition = nchw("latent_mean"), nchw("conditioning_image") / 255.0
        self.spread = torch.exp(0.5 * nchw("latent_logvar"))
        self.masks = [functional.avg_pool2d(nchw(name), 4).ge(0.25).float() for name in ("face_mask", "hand_mask")]
        self.text = torch.from_numpy(batch["text_hidden"])
        alphas = open_base("people", shapes=True).schedule.alphas_cumprod
        self.alphas = torch.from_numpy(np.array(alphas)).float()
        self.random = torch.Generator().manual_seed(0)

    def losses(self) -> list[torch.Tensor]:
        """Global, face and hand loss of one draw of time and noise."""
        shape = self.mean.shape
        clean = self.mean + self.spread * torch.randn(shape, generator=self.random)
        noise = torch.randn(shape, generator=self.random)
        times = torch.randint(0, len(self.alphas), shape[:1], generator=self.random)
        signal = self.alphas[times].sqrt().view(-1, 1, 1, 1)
        spread = (1 - self.alphas[times]).sqrt().view(-1, 1, 1, 1)
        noisy, wanted = signal * clean + spread * noise, signal * noise - spread * clean
        down, mid = None, None
        if self.controlnet is not None:
            down, mid = self.controlnet(noisy, times, self.text, self.condition, return_dict=False)
        output = self.unet(
            noisy, times, self.text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        square = (output - wanted) ** 2
        return [square.mean(), *((square * mask).mean() for mask in self.masks)]

    def plain_step(self) -> None:
        """An ordinary step on the global loss."""
        self.losses()[0].backward()
        self._update()

    def fair_step(self) -> None:
        """The published scheme."""
        losses = self.losses()
        matrix = torch.zeros(self.size, OBJECTIVES)
        for column, loss in enumerate(losses):
            loss.backward(retain_graph=column + 1 < OBJECTIVES)
            start = 0
            for p in self.params:
                if p.grad is not None:
                    matrix[start : start + p.numel(), column] = p.grad.reshape(-1)
                    p.grad = None
                start += p.numel()
        weights = host_weights((matrix.T @ matrix).numpy())
        combined = OBJECTIVES * (matrix @ torch.from_numpy(weights).float())
        for p, part in zip(self.params, combined.split([p.numel() for p in self.params]), strict=True):
            p.grad = part.view_as(p).clone()
        self._update()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def host_weights(gram: np.ndarray) -> np.ndarray:
    """w > 0 with G w = w^(-1/alpha), by scipy's trust-region least squares with its own tolerances."""

    def residual(weights: np.ndarray) -> np.ndarray:
        return gram @ weights - weights ** (-1.0 / ALPHA)

    return least_squares(residual, np.full(len(gram), 1.0 / len(gram)), bounds=(0.0, np.inf)).x


# ---- ours ------------------------------------------------------------------------------------------------------------


def our_step(trainable: str, rank: int, batch: Arrays, *, fair: str | None, remat: str = "none") -> Callable[[], None]:
    """One call is one step of the trainer, by the given way to pull back; None for the global objective alone."""
    part = ControlNetTrainable() if trainable == "controlnet" else LoraTrainable(rank=rank)
    pipeline = open_base("people", remat=remat)
    system = FairHumanConfig(trainable=part).attach(pipeline, FairHuman if fair else Plain)
    config = FairConfig(gradients=fair or "stacked")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=RATE, weight_decay=DECAY), steps=100)
    tree, frozen = system.init(jax.random.key(0))
    fair_state = init_fair(config, OBJECTIVES if fair else 1)
    held: dict[str, Any] = {"state": init_state(tree, optimizer, jax.random.key(1), ema=False, fair=fair_state)}
    step = make_train_step(system, optimizer, make_mesh(devices=jax.devices()[:1]), config, clip_norm=CLIP)
    arrays = jax.device_put(batch)

    def call() -> None:
        held["state"], _ = step(held["state"], frozen, arrays)
        jax.block_until_ready(held["state"])

    return call


def timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainable", choices=["lora", "controlnet"], default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's; XLA takes all cores it is given")
    parser.add_argument("--gradients", nargs="+", default=["stacked", "replay"])
    options = parser.parse_args()
    choose_cpu_kernels()

    torch.set_num_threads(options.threads)
    batch = random_batch(options.batch)
    original = TorchTrainer(options.trainable, options.rank, batch)
    calls = {"torch, plain": original.plain_step, "torch, published scheme": original.fair_step}
    for fair in (None, *options.gradients):
        name = f"ours, {fair or 'plain'}"
        calls[name] = our_step(options.trainable, options.rank, batch, fair=fair)
    for call in calls.values():  # compiles
        call()
    rounds = [{name: timed(call) for name, call in calls.items()} for _ in range(options.rounds)]
    middle = {name: statistics.median(each[name] for each in rounds) for name in calls}

    print(
        f"people, {options.trainable}, {original.size:,} trained parameters, batch {options.batch}, "
        f"{len(os.sched_getaffinity(0))} cores, {options.threads} torch threads, torch {torch.__version__}, "
        f"jax {jax.__version__}\n"
    )
    print("| step | s | over its own plain step |\n| --- | --- | --- |")
    for name, value in middle.items():
        plain = middle[f"{name.split(',')[0]}, plain"]
        print(f"| {name} | {value:.3f} | {value / plain:.2f} |")


if __name__ == "__main__":
    main()
