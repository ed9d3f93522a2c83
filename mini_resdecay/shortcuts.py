"""The heart: how much of the old state a block keeps, and the one block that all nets share.

Both papers of this book are two knobs on the same line `x + branch(norm(x))`:
a weight `alpha` on the shortcut (arXiv 2404.10947) and a mask on the branch (arXiv 2411.09475).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from .data import known

Branch = Callable[[Tensor], Tensor]

RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


def alpha_schedule(
    depth: int, alpha_min: float, kind: str = "linear", per: str = "sublayer"
) -> tuple[float, ...]:
    """Factors on the shortcut, from 1 at the first layer down to `alpha_min` at the last.

    A transformer block has two sub-layers (attention, MLP): `per="sublayer"` gives `2 * depth`
    factors, `per="block"` gives `depth`; one factor alone is 1.0. `kind` is "linear" or "cosine".
    Raises ValueError for depth < 1, alpha_min outside (0, 1], an unknown kind or per.
    Source: arXiv 2404.10947, alpha_k = 1 - (1 - alpha_min) k / (n - 1), as in the authors' code.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if not 0 < alpha_min <= 1:
        raise ValueError(f"alpha_min must lie in (0, 1], got {alpha_min}")
    ramp = RAMPS[known("kind", kind, RAMPS)]
    n = depth * {"sublayer": 2, "block": 1}[known("per", per, ("sublayer", "block"))]
    return tuple(alpha_min + (1 - alpha_min) * ramp(k / max(n - 1, 1)) for k in range(n))


def effective_alpha(alphas: Sequence[float]) -> float:
    """Product of the factors: the share of the first state that is left in the last one."""
    return math.prod(alphas)


def suggest_alpha_min(
    depth: int, target: float = 10**-2.5, kind: str = "linear", per: str = "sublayer"
) -> float:
    """The `alpha_min` whose schedule has the product `target`.

    The paper finds its best features with a product in [1e-3, 1e-2); the default is the centre.
    Raises ValueError for a target outside (0, 1], or if there is only one factor (always 1).
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must lie in (0, 1], got {target}")
    if len(alpha_schedule(depth, 1.0, kind, per)) == 1:
        raise ValueError('depth must be at least 2 for per="block": one factor alone is 1')

    def excess(alpha_min: float) -> float:
        return effective_alpha(alpha_schedule(depth, alpha_min, kind, per)) - target

    return float(brentq(excess, 1e-300, 1.0, xtol=1e-14))


class Plain(nn.Module):
    """The residual block of every pre-norm net. Source: arXiv 1603.05027."""

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        return x + branch(norm(x))


class Decay(nn.Module):
    """A shortcut that keeps the share `alpha`; with alpha = 1 it is `Plain`, graph and all.

    Source: arXiv 2404.10947, x_{l+1} = alpha_l x_l + f_l(x_l).
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        kept = x if self.alpha == 1 else self.alpha * x
        return kept + branch(norm(x))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.6g}"


class PostNorm(nn.Module):
    """The order of the first transformer: add, then normalise. Source: arXiv 1706.03762."""

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        return norm(x + branch(x))


class NoShortcut(nn.Module):
    """A feed-forward net: nothing is kept. What `Decay` tends to as alpha goes to 0."""

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        return branch(norm(x))


SHORTCUTS: dict[str, type[nn.Module]] = {
    "plain": Plain,
    "decay": Decay,
    "post-norm": PostNorm,
    "none": NoShortcut,
}


def make_rules(shortcut: str, alphas: Sequence[float]) -> list[nn.Module]:
    """One rule a layer. Factors below 1 turn the default "plain" into "decay".

    Raises ValueError for an unknown name, and for a rule that has no factor to set.
    """
    name = known("shortcut", shortcut, SHORTCUTS)
    if min(alphas) == 1:
        return [SHORTCUTS[name]() for _ in alphas]
    if name not in ("plain", "decay"):
        raise ValueError(f'alpha_min must be 1 for shortcut="{name}", got {min(alphas)}')
    return [Decay(alpha) for alpha in alphas]


class Residual(nn.Module):
    """The one block of this book: `rule(x, branch, norm)`, with a mask on the branch.

    branch: module whose output has the shape of its input, [B, ..., D] (or [B, D, H, W]);
    norm: identity unless given; rule: `Plain` unless given, see `SHORTCUTS`. Further arguments
    of `forward` go to the branch. `mask` is None (branch as it is) or a float tensor that
    multiplies the branch's output, `skipped` leaves the branch out; `path_mask` sets both.
    """

    mask: Tensor | None
    skipped = False

    def __init__(
        self, branch: nn.Module, norm: nn.Module | None = None, rule: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.branch = branch
        self.norm = nn.Identity() if norm is None else norm
        self.rule = Plain() if rule is None else rule
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.skipped and isinstance(self.rule, Plain):
            return x  # the norm is not needed either

        def branch(z: Tensor) -> Tensor:
            if self.skipped:
                return torch.zeros_like(z, dtype=x.dtype)
            out = self.branch(z, *args, **kwargs)
            return out if self.mask is None else self.mask.to(out.dtype) * out

        return self.rule(x, branch, self.norm)


def paths(model: nn.Module) -> list[Residual]:
    """Every `Residual` of a net in module order: entry l of a path mask switches path l."""
    return [module for module in model.modules() if isinstance(module, Residual)]


@contextmanager
def path_mask(
    model: nn.Module, mask: Tensor | Sequence[float], skip: bool = False
) -> Iterator[None]:
    """Inside the `with` block, branch l of `model` is multiplied by `mask[l]`.

    mask: [L], 1 keeps a branch, 0 drops it; other values scale it, as 1 / (1 - p) does in
    training with dropped paths. An entry may have axes of its own ([L, B, 1, 1]: a mask for
    each sample). With `skip` a branch whose entry is 0 is not even run: faster, but the graph then
    depends on the mask. What was there before comes back at the end, after an error too.
    Raises ValueError if the mask does not have one entry a path.
    """
    blocks = paths(model)
    if not (isinstance(mask, Tensor) and mask.is_floating_point()):
        mask = torch.as_tensor(mask, dtype=torch.float64)
    if mask.shape[:1] != (len(blocks),):
        raise ValueError(
            f"mask must have one entry for each of the {len(blocks)} paths, "
            f"got shape {tuple(mask.shape)}"
        )
    before = [(block.mask, block.skipped) for block in blocks]
    unused = [skip and not entry.any() for entry in mask]
    try:
        for block, value, none in zip(blocks, mask.to(device_of(model)), unused, strict=True):
            block.mask, block.skipped = value, none
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            block.mask, block.skipped = old


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a net without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
