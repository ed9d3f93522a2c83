"""The toy of arXiv 2411.09475: two spiral arms and a net of linear layers with shortcuts."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

from . import known, require
from .shortcuts import (
    Decay,
    NoShortcut,
    Plain,
    PostNorm,
    Residual,
    alpha_schedule,
    make_rules,
    paths,
)

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
    require("n", n, n >= 2, "be at least 2")
    require("noise", noise, noise >= 0, "be at least 0")
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
        require("width", width, width >= 1, "be at least 1")
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


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the points whose largest logit is that of their class, in [0, 1]."""
    return (model(x).argmax(-1) == y).double().mean().item()


# ---- many nets at once: what each learns alone, but faster; on a first reading, skip it ----


class StackedLinear(nn.Module):
    """S linear layers of one shape in one product: [S, n, d_in] to [S, n, d_out]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(len(self.weight), -1, -1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


# In place, and what its backward pass makes of a gradient and the output, into `out`.
_IN_PLACE: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    nn.ReLU: (
        torch.relu_,
        lambda g, z, out: torch.ops.aten.threshold_backward.grad_input(g, z, 0, grad_input=out),
    ),
    nn.Tanh: (
        torch.tanh_,
        lambda g, z, out: torch.ops.aten.tanh_backward.grad_input(g, z, grad_input=out),
    ),
    nn.Identity: (lambda z: z, lambda g, z, out: out.copy_(g)),
}


class _Blocks(torch.autograd.Function):
    """All blocks `keep h + act(W h + b)` of S nets, with the backward pass written out.

    Every step works in the same memory, `nets.memory`, for the states and the branches of all
    layers, [L, S, n, d] each: such small nets wait for memory, not for sums.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, nets: "StackedNets") -> Tensor:
        states, branches = [h, *nets.memory[0]], nets.memory[1]
        ctx.nets, ctx.states = nets, states
        for k, (w, b) in enumerate(zip(weight, bias, strict=True)):
            nets.act(torch.baddbmm(b, states[k], w.mT, out=branches[k]))
            torch.add(branches[k], states[k], alpha=nets.keep[k], out=states[k + 1])
        return states[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        nets, gradient = ctx.nets, gradients[0].clone()
        states, branches = ctx.states, nets.memory[1]
        inner, weights = torch.empty_like(gradient), torch.empty_like(nets.weight)
        biases = torch.empty_like(nets.bias)
        for k in reversed(range(len(weights))):
            nets.backward_act(gradient, branches[k], inner)
            torch.bmm(inner.mT, states[k], out=weights[k])
            torch.sum(inner, 1, keepdim=True, out=biases[k])
            gradient.baddbmm_(inner, nets.weight[k], beta=nets.keep[k])
        return gradient, weights, biases, None


class StackedNets(nn.Module):
    """S `ResidualMLP`s of one shape as one net: [n, 2] to logits [S, n, 2]."""

    def __init__(self, nets: Sequence[ResidualMLP], n: int) -> None:
        super().__init__()
        self.stem = StackedLinear([net.stem for net in nets])
        self.head = StackedLinear([net.head for net in nets])
        layers = StackedLinear([layer for net in nets for layer in _linears(net)])
        sort = partial(rearrange, pattern="(s l) i j -> l s i j", s=len(nets))
        self.weight = nn.Parameter(sort(layers.weight.detach()).contiguous())
        self.bias = nn.Parameter(sort(layers.bias[:, None].detach()).contiguous())
        blocks = paths(nets[0])
        self.keep = [_share_kept(block.rule) for block in blocks]
        self.act, self.backward_act = _IN_PLACE[type(blocks[0].branch.get_submodule("1"))]
        self.memory = self.weight.new_empty(2, len(blocks), len(nets), n, self.weight.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Blocks.apply(self.stem(x), self.weight, self.bias, self))

    @torch.no_grad()
    def write_to(self, nets: Sequence[ResidualMLP]) -> Sequence[ResidualMLP]:
        """Put the weights back into the S nets, and return them."""
        for s, net in enumerate(nets):
            for ours, layer in ((self.stem, net.stem), (self.head, net.head)):
                layer.weight.copy_(ours.weight[s])
                layer.bias.copy_(ours.bias[s])
            for k, layer in enumerate(_linears(net)):
                layer.weight.copy_(self.weight[k, s])
                layer.bias.copy_(self.bias[k, s, 0])
        return nets


def _linears(net: ResidualMLP) -> list[nn.Linear]:
    return [cast(nn.Linear, block.branch.get_submodule("0")) for block in paths(net)]


def _share_kept(rule: nn.Module) -> float:
    if not isinstance(rule, (Plain, Decay, PostNorm, NoShortcut)):
        raise ValueError(f"nets that train together must be plain or decay, got {rule}")
    return 0.0 if isinstance(rule, NoShortcut) else getattr(rule, "alpha", 1.0)


def train_together(
    nets: Sequence[ResidualMLP],
    x: Tensor,
    y: Tensor,
    steps: int = 1000,
    lr: float = 1e-3,
    snapshots: Sequence[int] = (),
    eps: float = 1e-8,
) -> tuple[Tensor, dict[int, Sequence[ResidualMLP]]]:
    """Train S nets of one shape at once, each as if it were alone: Adam on all points.

    Small nets spend their time on overhead, so every operation is done once for all of them.
    `eps` is Adam's: gradients far below it are damped.
    Changes `nets` in place. Returns the losses [steps, S] in nats, loss t measured before
    update t, and copies of the nets after each number of updates in `snapshots`.
    Raises ValueError for nets of different shape or rule, with other branches than `ResidualMLP`
    has, or under a path mask, and if a loss is not finite.
    """
    shapes = {str(net) for net in nets}
    require("nets", len(shapes), len(shapes) == 1, "be of one architecture")
    if any(block.mask is not None for net in nets for block in paths(net)):
        raise ValueError("nets must be without a path mask: all paths are trained here")
    for block in paths(nets[0]):
        kinds = [type(part) for part in block.branch.children()]
        fits = len(kinds) == 2 and kinds[0] is nn.Linear and kinds[1] in _IN_PLACE
        require(
            "nets", block.branch, fits, "have branches of a linear layer and ReLU, tanh or none"
        )
    stacked = StackedNets(nets, len(x))
    optimizer = torch.optim.Adam(stacked.parameters(), lr=lr, eps=eps, foreach=True)
    labels = repeat(y, "n -> s n", s=len(nets))
    losses, taken = torch.empty(steps, len(nets)), {}
    for step in tqdm(range(steps + 1), disable=None, delay=5):  # None: on a terminal only
        if step in snapshots:
            taken[step] = stacked.write_to(copy.deepcopy(list(nets)))
        if step == steps:
            break
        logits = rearrange(stacked(x), "s n c -> s c n")
        loss = nn.functional.cross_entropy(logits, labels, reduction="none").mean(1)
        losses[step] = loss.detach()
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"lr must keep the loss finite, got lr={lr}: not finite at step {first}")
    stacked.write_to(nets)
    return losses, taken
