"""The toy of arXiv 2411.09475: two spiral arms and a net of linear layers with shortcuts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .data import known
from .shortcuts import Residual, alpha_schedule, make_rules

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # a step of the toy is bound by memory, not by sums
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def spiral(n: int = 400, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two spiral arms inside the unit disc, half of the `n` points on each.

    Returns x [n, 2] float32 and y [n] int64 (0, then 1). Along a ray the arms alternate every
    0.4, so that the gap between them is 8 standard deviations of the default noise.
    Raises ValueError for n < 2 or negative noise.
    Source: arXiv 2411.09475, figure 2 (400 points, two classes; formula and noise are ours).
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    generator = np.random.default_rng(seed)
    angle = 2 * np.pi * np.sqrt(generator.random(n))
    radius = (2 * angle + np.pi) / (5 * np.pi)
    y = (np.arange(n) >= n / 2).astype(np.int64)
    arm = np.stack([np.cos(angle), np.sin(angle)], axis=1) * ((1 - 2 * y) * radius)[:, None]
    x = arm + noise * generator.standard_normal((n, 2))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


class ResidualMLP(nn.Module):
    """Linear stem, `depth` blocks `h + act(W h + b)`, linear head: [B, 2] to logits [B, 2].

    `residual=False` takes the shortcuts away and leaves all else as it is, weights included.
    Raises ValueError for depth or width < 1, an unknown activation or shortcut, or an
    `alpha_min` that the shortcut cannot use.
    Source: arXiv 2411.09475, figures 1 to 4 (depth 32 x width 32; depth 6 x width 6).
    """

    def __init__(
        self,
        depth: int,
        width: int,
        activation: str = "relu",
        residual: bool = True,
        shortcut: str = "plain",
        alpha_min: float = 1.0,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if not residual and shortcut != "plain":
            raise ValueError(f'shortcut must be "plain" if residual=False, got "{shortcut}"')
        act = ACTIVATIONS[known("activation", activation, ACTIVATIONS)]
        alphas = alpha_schedule(depth, alpha_min, per="block")
        rules = make_rules(shortcut if residual else "none", alphas)
        self.stem = nn.Linear(2, width)
        self.blocks = nn.ModuleList(
            Residual(nn.Sequential(nn.Linear(width, width), act()), rule=rule) for rule in rules
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def seeded_nets(seeds: Sequence[int], *args: object, **kwargs: object) -> list[ResidualMLP]:
    """One `ResidualMLP(*args, **kwargs)` for each seed of its initial weights."""
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(ResidualMLP(*args, **kwargs))  # type: ignore[arg-type]
    return nets


class StackedLinear(nn.Module):
    """S linear layers of one shape in one product: [S, n, d_in] to [S, n, d_out]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(len(self.weight), -1, -1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


def stack(nets: Sequence[nn.Module]) -> nn.Module:
    """A copy of the first net in which every linear layer holds the weights of all S nets."""
    stacked = copy.deepcopy(nets[0])
    for name, module in nets[0].named_modules():
        if isinstance(module, nn.Linear):
            layers = [cast(nn.Linear, net.get_submodule(name)) for net in nets]
            stacked.set_submodule(name, StackedLinear(layers))
    return stacked


@torch.no_grad()
def unstack(stacked: nn.Module, nets: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Write the weights of a stacked net back into its S `nets`, and return them."""
    for name, weights in stacked.named_parameters():
        for net, weight in zip(nets, weights, strict=True):
            net.get_parameter(name).copy_(weight)
    return nets


def train_together(
    nets: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    steps: int = 1000,
    lr: float = 1e-3,
    snapshots: Sequence[int] = (),
) -> tuple[Tensor, dict[int, Sequence[nn.Module]]]:
    """Train S nets of one shape at once, each as if it were alone: Adam on all points.

    Small nets spend their time on overhead, so every operation is done once for all of them.
    Changes `nets` in place. Returns the losses [steps, S] in nats, loss t measured before
    update t, and copies of the nets after each number of updates in `snapshots`.
    Raises ValueError for nets of different shape or rule, and if a loss is not finite.
    """
    if len(shapes := {str(net) for net in nets}) != 1:
        raise ValueError(f"nets must be of one architecture, got {len(shapes)}")
    stacked = stack(nets)
    optimizer = torch.optim.Adam(stacked.parameters(), lr=lr, foreach=True)
    labels = repeat(y, "n -> s n", s=len(nets))
    losses, taken = torch.empty(steps, len(nets)), {}
    for step in tqdm(range(steps + 1), disable=None, delay=5):  # None: on a terminal only
        if step in snapshots:
            taken[step] = unstack(stacked, copy.deepcopy(list(nets)))
        if step == steps:
            break
        logits = rearrange(stacked(x), "s n c -> s c n")
        loss = F.cross_entropy(logits, labels, reduction="none").mean(1)
        losses[step] = loss.detach()
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"lr must keep the loss finite, got lr={lr}: not finite at step {first}")
    unstack(stacked, nets)
    return losses, taken


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the points whose largest logit is that of their class, in [0, 1]."""
    return (model(x).argmax(-1) == y).double().mean().item()
