"""ResidualDroppath: drop paths, then train only the dropped ones. Source: arXiv 2411.09475.

    pair = residual_droppath_step(net, optimizer, loss_fn, p=0.2, generator=masks)

Stage 1 is an ordinary step with some branches dropped. Stage 2 runs the whole net and updates
the dropped branches alone: everything else is frozen, and gradients flow through it. Together
they update each branch exactly once. The control arms of `ARMS` take one part away each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from . import known, require
from .shortcuts import device_of, path_mask, paths, restoring

Rates = float | Sequence[float] | Tensor
Loss = Callable[[], Tensor]


class Pair(NamedTuple):
    """Detached losses of the two stages (stage2 is None if it was left out) and the mask [L]."""

    stage1: Tensor
    stage2: Tensor | None
    mask: Tensor


def sample_mask(p: Tensor, generator: Generator, samples: int | None = None) -> Tensor:
    """One bit a path: 0 drops path l with probability p[l], 1 keeps it; [L] to float32 [L].

    With `samples` every sample of a batch has bits of its own, [L, samples]: plain DropPath.
    """
    rates = p if samples is None else p[:, None].expand(-1, samples)
    return (torch.rand(rates.shape, generator=generator) >= rates).float()


def residual_droppath_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Loss,
    p: Rates,
    generator: Generator,
    *,
    scale: str = "inverse",
    freeze: str = "complement",
    micro_batches: int = 1,
    clip: float | None = None,
    scaler: Any = None,
    skip: bool | None = None,
) -> Pair:
    """One pair of updates: with paths dropped, then of the dropped paths (algorithm 1).

    `loss_fn()` runs the model and returns a loss; it may draw a fresh batch, and is called
    `micro_batches` times a stage. `p` is one rate or one for each path. `scale="inverse"`
    multiplies kept branches by 1 / (1 - p) in stage 1, "none" does not. `clip` bounds the norm of
    the gradients that are used; `scaler` is a GradScaler.
    `freeze` says what stage 2 leaves as it is. "complement" is the method: all that stage 1 ran,
    stem and head too. "random": the complement of a new mask. "none": nothing. "all": everything,
    so that plain DropPath is left. A stage with nothing to update is left out.
    `skip` does not even run dropped branches: the default, except under torch.compile and in
    several processes, where a mask multiplies them so that the graph stays one and the same.
    Raises ValueError for rates outside [0, 1], an unknown scale or freeze, fewer than one
    micro-batch, a clip that is not positive, a net without paths, and for processes that draw
    different masks.
    """
    known("freeze", freeze, ("complement", "random", "none", "all"))
    rates, skip = _rates(p, model), _can_skip(model) if skip is None else skip
    update = partial(
        _update, model, optimizer, micro_batches=micro_batches, clip=clip, scaler=scaler, skip=skip
    )
    mask = _drawn(rates, generator, model)
    with _dropped(model, mask, rates, scale, skip):
        first = update(loss_fn, _parameters(model, mask == 1, outside=True))
    second = mask if freeze == "complement" else torch.full_like(mask, freeze == "all")
    if freeze == "random":
        second = _drawn(rates, generator, model)
    trained = _parameters(model, second == 0, outside=freeze == "none")
    return Pair(first, update(loss_fn, trained) if trained else None, mask)


def mixture_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Loss,
    p: float,
    generator: Generator,
    *,
    scale: str = "inverse",
    skip: bool | None = None,
    **options: Any,
) -> Pair:
    """One update on (loss with paths dropped) + p (loss of the whole net); nothing is frozen.

    To first order in the learning rate it moves each branch as a pair of the two-stage step does
    on average: what is left between the two is the freezing. The other arguments are those of
    `residual_droppath_step`, without `freeze`; `p` is one number.
    """
    rates, skip = _rates(p, model), _can_skip(model) if skip is None else skip
    require("p", p, torch.as_tensor(p).ndim == 0, "be one rate in the mixture")
    mask, parts = _drawn(rates, generator, model), []

    def both() -> Tensor:
        with _dropped(model, mask, rates, scale, skip):
            dropped = loss_fn()
        full = loss_fn()
        parts.append(torch.stack([dropped.detach(), full.detach()]))
        return dropped + p * full

    _update(model, optimizer, both, list(model.parameters()), skip=skip, **options)
    first, second = torch.stack(parts).mean(0)
    return Pair(first, second, mask)


# Step, and its cost in block-units for each path and call at drop rate p where dropped branches
# are skipped: a forward pass, a gradient of activations or one of weights is 1 unit.
ARMS: dict[str, tuple[Callable[..., Pair], Callable[[float], float]]] = {
    "droppath": (partial(residual_droppath_step, freeze="all"), lambda p: 3 * (1 - p)),
    "two-stage": (residual_droppath_step, lambda p: 5 - 2 * p),
    "random-freeze": (partial(residual_droppath_step, freeze="random"), lambda p: 5 - 2 * p),
    "no-freeze": (partial(residual_droppath_step, freeze="none"), lambda p: 6 - 3 * p),
    "mixture": (mixture_step, lambda p: 6 - 3 * p),
}


def _update(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Loss,
    trained: Sequence[nn.Parameter],
    *,
    micro_batches: int = 1,
    clip: float | None = None,
    scaler: Any = None,
    skip: bool = False,
) -> Tensor:
    """One optimizer step for `trained` and for nothing else; returns the mean loss.

    Frozen parameters have no gradient at all. With a gradient of zeros, momentum and weight decay
    would still move them; with `requires_grad` off, torch.compile would start again.
    """
    require("micro_batches", micro_batches, micro_batches >= 1, "be at least 1")
    require("clip", clip, clip is None or clip > 0, "be above 0")
    trained = [parameter for parameter in trained if parameter.requires_grad]
    model.zero_grad(set_to_none=True)
    scaler, losses = scaler or GradScaler(enabled=False), []
    for _ in range(micro_batches):
        loss = loss_fn() / micro_batches
        losses.append(loss.detach())
        if trained:
            scaler.scale(loss).backward(inputs=trained if skip else None)
    for parameter in set(model.parameters()) - set(trained):
        parameter.grad = None
    used = [q for group in optimizer.param_groups for q in group["params"] if q.grad is not None]
    if used:  # a GradScaler fails where there is nothing to step
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(used, clip)
        scaler.step(optimizer)
        scaler.update()
    return torch.stack(losses).sum()


def _rates(p: Rates, model: nn.Module) -> Tensor:
    depth, rates = len(paths(model)), torch.as_tensor(p, dtype=torch.float32)
    require("model", type(model).__name__, depth > 0, "have Residual blocks to drop")
    require("p", p, rates.shape in ((), (depth,)), f"be one rate or one for each of {depth} paths")
    require("p", p, ((rates >= 0) & (rates <= 1)).all(), "lie in [0, 1]")
    return rates.expand(depth)


def _drawn(rates: Tensor, generator: Generator, model: nn.Module) -> Tensor:
    """A mask that is the same in every process: with different ones weights drift apart."""
    mask = sample_mask(rates, generator)
    if torch.distributed.is_initialized():
        both = torch.stack([mask, -mask]).to(device_of(model))
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        if (both[0] != -both[1]).any():
            raise ValueError("generator must have the same seed in every process")
    return mask


@contextmanager
def _dropped(
    model: nn.Module, mask: Tensor, rates: Tensor, scale: str, skip: bool
) -> Iterator[None]:
    """Branches scaled or dropped as in stage 1; BatchNorm keeps its running statistics out."""
    if known("scale", scale, ("inverse", "none")) == "inverse":
        mask = mask / torch.where(rates < 1, 1 - rates, 1)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with restoring(norms, "momentum"), path_mask(model, mask, skip=skip):
        for norm in norms:
            norm.momentum = 0.0
        yield


def _parameters(model: nn.Module, chosen: Tensor, outside: bool) -> list[nn.Parameter]:
    """Parameters of the chosen paths and, if asked for, of all that lies outside every path."""
    owned = [list(block.parameters()) for block in paths(model)]
    inside = {id(parameter) for own in owned for parameter in own}
    rest = [q for q in model.parameters() if id(q) not in inside] if outside else []
    return [q for own, wanted in zip(owned, chosen, strict=True) if wanted for q in own] + rest


def _can_skip(model: nn.Module) -> bool:
    """Whether a graph that depends on the mask costs nothing: eager mode, one process."""
    compiled = any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )
    return not compiled and not torch.distributed.is_initialized()
