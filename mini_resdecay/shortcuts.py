"""The heart: how much of the old state a block keeps, and the one block that all nets share.

Both papers of this book are two knobs on the same line `x + branch(norm(x))`:
a weight `alpha` on the shortcut (arXiv 2404.10947) and a mask on the branch (arXiv 2411.09475).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, SupportsIndex

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from . import known, require

Branch = Callable[[Tensor], Tensor]

RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
ONLY = ("attention", "mlp")  # sub-layers 0, 2, 4, ... and 1, 3, 5, ...
KINDS = (*RAMPS, "constant", *ONLY)


def alpha_schedule(
    depth: int, alpha_min: float, kind: str = "linear", per: str = "sublayer"
) -> tuple[float, ...]:
    """Factors on the shortcut, from 1 at the first layer down to `alpha_min` at the last.

    A transformer block has two sub-layers (attention, MLP): `per="sublayer"` gives `2 * depth`
    factors, `per="block"` gives `depth`; one factor alone is 1.0. `kind` is "linear" or "cosine";
    "attention" or "mlp", the linear ramp for sub-layers of that kind and 1 for the others; or
    "constant", equal factors with the product of the linear ramp.
    Raises ValueError for a depth that is not whole or < 1, alpha_min outside (0, 1], an unknown
    kind or per, and for attention or MLP alone where blocks are not divided.
    Source: arXiv 2404.10947, alpha_k = 1 - (1 - alpha_min) k / (n - 1), as in the authors' code.
    """
    fits = isinstance(depth, SupportsIndex) and depth >= 1
    require("depth", repr(depth), fits, "be a whole number, at least 1")
    _share("alpha_min", alpha_min)
    known("kind", kind, KINDS)
    known("per", per, ("sublayer", "block"))
    n = 2 * depth if per == "sublayer" else depth
    ramp = RAMPS.get(kind, RAMPS["linear"])
    alphas = tuple(alpha_min + (1 - alpha_min) * ramp(k / max(n - 1, 1)) for k in range(n))
    if kind == "constant":
        return (effective_alpha(alphas) ** (1 / n),) * n
    if kind not in ONLY:
        return alphas
    require("per", f'"{per}"', per == "sublayer", f'be "sublayer" for kind="{kind}"')
    return tuple(a if kind == ONLY[k % 2] else 1.0 for k, a in enumerate(alphas))


def _share(name: str, value: float) -> float:
    require(name, value, 0 < value <= 1, "lie in (0, 1]")
    return value


def effective_alpha(alphas: Sequence[float]) -> float:
    """Product of the factors: the share of the first state that is left in the last one."""
    return math.prod(alphas)


def branch_gains(alphas: Sequence[float], branch: float = 1.0) -> tuple[float, ...]:
    """Gains g_k with which a plain net computes what shortcuts `alphas` compute.

    x_{k+1} = a_k x_k + b f_k(LN(x_k)) becomes y_{k+1} = y_k + g_k f_k(LN(y_k)) for the states
    y_k = x_k / (a_0 ... a_{k-1}), where g_k = b / (a_0 ... a_k) and b is `branch`. The equality
    is exact once the norms are rescaled too: `rescale_norms`. Factors above 1 are allowed here.
    Raises ValueError for a factor that is not above 0 and finite.
    """
    require("alphas", alphas, all(0 < a < math.inf for a in alphas), "be above 0 and finite")
    return tuple(branch / kept for kept in accumulate(alphas, lambda kept, alpha: kept * alpha))


def suggest_alpha_min(
    depth: int, target: float = 10**-2.5, kind: str = "linear", per: str = "sublayer"
) -> float:
    """The `alpha_min` whose schedule has the product `target`.

    The paper finds its best features with a product in [1e-3, 1e-2); the default is the centre.
    Raises ValueError for a target outside (0, 1] or below what any `alpha_min` gives, as it is
    for attention alone in a few blocks, or if there is only one factor (always 1).
    """
    _share("target", target)
    if len(alpha_schedule(depth, 1.0, kind, per)) == 1:
        raise ValueError('depth must be at least 2 for per="block": one factor alone is 1')

    def excess(alpha_min: float) -> float:
        return effective_alpha(alpha_schedule(depth, alpha_min, kind, per)) - target

    if (lowest := excess(1e-300)) > 0:
        raise ValueError(f"target must be at least {target + lowest:.3g} here, got {target}")
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
        self.alpha = _share("alpha", alpha)

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        kept = x if self.alpha == 1 else self.alpha * x
        return kept + branch(norm(x))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.6g}"


class Learned(nn.Module):
    """`Decay` whose factor, one number a layer, starts at `alpha` and is trained.

    Source: an ablation of arXiv 2404.10947, which finds it worse than a fixed ramp.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(_share("alpha", alpha))))

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        return self.alpha * x + branch(norm(x))


class IdentityDrop(nn.Module):
    """`Decay` by chance: in training each sample keeps its whole state with probability `alpha`.

    In evaluation it is `Decay`, which is its mean where branches are linear. Drawn, as dropout
    is, from torch's global generator of each process and device: unlike batches and mask noise,
    the draws depend on the number of processes.
    Source: a question in the reviews of arXiv 2404.10947.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = _share("alpha", alpha)

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        share = x.new_full((len(x),) + (1,) * (x.dim() - 1), self.alpha)
        return (share.bernoulli() if self.training else share) * x + branch(norm(x))


class ScaledSum(nn.Module):
    """The form without a number to choose: a sum of equal variances keeps it (arXiv 2011.13456)."""

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        return math.sqrt(0.5) * (x + branch(norm(x)))


class BranchScaled(nn.Module):
    """The control of `ScaledSum`: a weaker branch beside a whole shortcut (arXiv 2404.10947)."""

    def forward(self, x: Tensor, branch: Branch, norm: nn.Module) -> Tensor:
        return x + math.sqrt(0.5) * branch(norm(x))


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
    "learned": Learned,
    "identity-drop": IdentityDrop,
    "scaled-sum": ScaledSum,
    "branch-scaled": BranchScaled,
    "post-norm": PostNorm,
    "none": NoShortcut,
}


def make_rules(shortcut: str, alphas: Sequence[float]) -> list[nn.Module]:
    """One rule a layer. Factors below 1 turn the default "plain" into "decay".

    Raises ValueError for an unknown name, and for a rule that has no factor to set.
    """
    rule = SHORTCUTS[known("shortcut", shortcut, SHORTCUTS)]
    if rule is Plain and min(alphas) < 1:
        rule = Decay
    if rule in (Decay, Learned, IdentityDrop):
        return [rule(alpha) for alpha in alphas]
    require("alpha_min", min(alphas), min(alphas) >= 1, f'be 1 for shortcut="{shortcut}"')
    return [rule() for _ in alphas]


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
    wanted = f"have one entry for each of the {len(blocks)} paths"
    require("mask", f"shape {tuple(mask.shape)}", mask.shape[:1] == (len(blocks),), wanted)
    unused = [skip and not entry.any() for entry in mask]
    with restoring(blocks, "mask", "skipped"):
        for block, value, none in zip(blocks, mask.to(device_of(model)), unused, strict=True):
            block.mask, block.skipped = value, none
        yield


@contextmanager
def restoring(modules: Sequence[nn.Module], *names: str) -> Iterator[None]:
    """What the `with` block does to these attributes of `modules` is undone, after an error too."""
    before = [[getattr(module, name) for name in names] for module in modules]
    try:
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(module, name, value)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a net without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# ---- A decayed net as a plain one: its gains in weights, norms and the optimizer -------------


def output_projections(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that write into the stream: of attention and MLP in turn, `[2 * depth]`.

    `model` is a plain pre-norm transformer, known by its structure and not by names. In our nets
    it is the last linear layer of each `Residual`. In any other (ViT and ViTMAE of Hugging Face,
    encoder layers of torch with norm_first) a block is a module with two LayerNorms of its own;
    the last of its linear layers closes the MLP, and the third last the attention.
    Raises ValueError, naming what is missing, for other nets.
    """
    found: list[nn.Linear] = []
    for block in model.modules():
        linears, norms = _inside(block, nn.Linear), _inside(block, nn.LayerNorm)
        if isinstance(block, Residual):
            if not (linears and norms and isinstance(block.rule, Plain)):
                raise ValueError(f"paths must have rule Plain, LayerNorm, linear layers: {block}")
            found.append(linears[-1])
        elif sum(norm in norms for norm in block.children()) == 2:
            same = len(linears) > 2 and linears[-1].out_features == linears[-3].out_features
            if not same or not getattr(block, "norm_first", True):
                raise ValueError(
                    "blocks must have their norms first (norm_first=True) and end in attention "
                    f"and a two-layer MLP: {block}"
                )
            found += linears[-3::2]
    require(
        "model", type(model).__name__, found,
        "have Residual paths, or blocks with two LayerNorms (before attention, before the MLP)",
    )  # fmt: skip
    return found


def _inside(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, kind)]


def rescale_norms(model: nn.Module, alphas: Sequence[float]) -> None:
    """Divide the eps of LayerNorm k by (a_0 ... a_{k-1})^2, in place; that of a last one too.

    LN_eps(c y) is LN_{eps / c^2}(y), and the states of the plain net are larger by that product.
    Raises ValueError unless there is a LayerNorm for each factor and at most one more.
    """
    norms = _inside(model, nn.LayerNorm)
    if len(norms) - len(alphas) not in (0, 1):
        raise ValueError(f"alphas must be one a LayerNorm, {len(norms)}, got {len(alphas)}")
    for norm, gain in zip(norms, (1.0, *branch_gains(alphas)), strict=False):
        norm.eps *= gain**2


@torch.no_grad()
def fold_gains(model: nn.Module, alphas: Sequence[float]) -> None:
    """Make a plain net with the weights of a decayed one compute what that one does, in place.

    Output projections (weight and bias) are multiplied by their `branch_gains`, and the norms
    rescaled. A last LayerNorm then gives the same features; without one they are larger by
    1 / (a_0 ... a_{n-1}). A net whose projections start at zero stays as it is, but for its eps.
    Raises ValueError as `output_projections` and `rescale_norms` do.
    """
    gains = _gains(model, alphas)
    rescale_norms(model, alphas)  # what refuses a net comes before what changes it
    for parameter, gain in gains.items():
        parameter.mul_(gain)


def _gains(model: nn.Module, alphas: Sequence[float]) -> dict[nn.Parameter, float]:
    layers = output_projections(model)
    require("alphas", len(alphas), len(layers) == len(alphas), f"be one a sub-layer, {len(layers)}")
    pairs = zip(layers, branch_gains(alphas), strict=True)
    return {parameter: gain for layer, gain in pairs for parameter in layer.parameters()}


def gain_groups(
    model: nn.Module,
    alphas: Sequence[float],
    lr: float,
    weight_decay: float,
    eps: float = 1e-8,
    power: int = 1,
    within: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW with which a plain net is trained as if its shortcuts were `alphas`.

    The output projection of sub-layer k has lr * g_k, weight_decay / g_k and eps / g_k; all else
    is as in `decay_groups`. Start from `fold_gains(model, alphas)`: the losses are then those of
    the decayed net to rounding, which grows with the steps. `power=2` is for SGD, whose steps
    need lr * g_k^2. Clipping the gradient norm breaks it. `within` is the part that has the
    sub-layers, for instance the encoder of an autoencoder; the whole model if not given.
    Raises ValueError as `output_projections` does, and if `alphas` do not count its layers.
    """
    return [
        {"params": params, "lr": lr * gain**power, "eps": eps / gain}
        | {"weight_decay": weight_decay / gain**power if decayed else 0.0}
        for (gain, decayed), params in _split(model, _gains(within or model, alphas)).items()
    ]


def decay_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    factors: Mapping[nn.Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW: weights and tokens decay; biases and what has one axis do not.

    `factors` are of the learning rate of single parameters, 1 unless given. Frozen parameters
    are in no group. Source: the code of arXiv 2111.06377 and 2404.10947.
    """
    return [
        {"params": params, "lr": lr * factor, "weight_decay": weight_decay if decayed else 0.0}
        for (factor, decayed), params in _split(model, factors or {}).items()
    ]


def _split(
    model: nn.Module, factors: Mapping[nn.Parameter, float]
) -> dict[tuple[float, bool], list[nn.Parameter]]:
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() > 1 and not name.endswith("bias")
            groups.setdefault((factors.get(parameter, 1.0), decayed), []).append(parameter)
    return groups
