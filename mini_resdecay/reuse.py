"""The diagnosis: what do the layers of a net share, and what does each of them add?

All measures take features `[n, ..., d]`, row i of every layer belonging to the same input, and
compute in float64 on the CPU. Show each beside the same measure of the untrained net.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from . import known, require
from .shortcuts import device_of, path_mask, paths, restoring

# ---- Features of any net ---------------------------------------------------------------------


@torch.no_grad()
def layer_features(
    model: nn.Module,
    *inputs: Tensor,
    modules: Sequence[str] | None = None,
    pool: str | None = None,
    batch: int = 512,
) -> list[Tensor]:
    """Outputs of the layers of `model`, one `[n, ..., d]` a layer, on the CPU.

    For the nets of this book: the stem, then each block. For any other net `modules` names the
    layers, as `model.named_modules()` does; of an output that is a tuple the first entry counts.
    Images `[n, C, H, W]` become `[n, H, W, C]`. `pool="mean"` averages over all positions or
    tokens, `pool="patches"` over all tokens but the first, which `pool="cls"` takes. The net is
    run in evaluation mode, `batch` inputs at a time, and left as it was.
    Raises ValueError for unknown modules or pool, and for a module that does not run just once.
    """
    fits = inputs and all(isinstance(x, Tensor) for x in inputs)
    require("inputs", [type(x).__name__ for x in inputs], fits, "be tensors")
    known("pool", str(pool), ("None", "mean", "patches", "cls"))
    require("modules", f'"{modules}"', not isinstance(modules, str), "be a list of names")
    require("batch", batch, batch >= 1, "be at least 1")
    names = list(modules or ["stem", *(f"blocks.{i}" for i in range(len(_blocks(model))))])
    layers = dict(model.named_modules())
    taken: dict[str, list[Tensor]] = {known("modules", name, layers): [] for name in names}
    device, starts = device_of(model), range(0, len(inputs[0]), batch)
    with evaluating(model), ExitStack() as hooks:
        for name, outputs in taken.items():
            take = partial(_take, outputs, pool)
            hooks.enter_context(layers[name].register_forward_hook(take))
        for start in starts:
            model(*(x[start : start + batch].to(device) for x in inputs))
    for name, outputs in taken.items():
        require(
            "modules",
            f'"{name}", which ran {len(outputs)} times in {len(starts)} passes',
            len(outputs) == len(starts),
            "name layers that run once a pass",
        )
    return [torch.cat(outputs) for outputs in taken.values()]


def _blocks(model: nn.Module) -> nn.ModuleList:
    require(
        "modules",
        None,
        isinstance(getattr(model, "blocks", None), nn.ModuleList) and hasattr(model, "stem"),
        "name the layers of a net without .stem and .blocks, for instance "
        f"{[name for name, _ in model.named_modules()][1:4]}",
    )
    return model.blocks  # type: ignore[return-value]


def _take(outputs: list[Tensor], pool: str | None, layer: Any, args: Any, output: Any) -> None:
    """A forward hook: keep the output of a layer, pooled."""
    x: Tensor = output if isinstance(output, Tensor) else output[0]
    require(
        "pool",
        tuple(x.shape),
        x.dim() == 3 or pool in (None, "mean"),
        'be "mean" without tokens [n, t, d]',
    )
    if x.dim() == 4:
        x = rearrange(x, "n c h w -> n h w c")
    if pool == "mean" and x.dim() > 2:
        x = reduce(x, "n ... d -> n d", "mean")
    if pool in ("cls", "patches"):
        x = x[:, 0] if pool == "cls" else x[:, 1:].mean(1)
    outputs.append(x.to("cpu", copy=True))  # the net may go on and write into its own output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the net is in evaluation mode; afterwards as it was."""
    with restoring(list(model.modules()), "training"):
        model.eval()
        yield


# ---- Similarity of two layers ----------------------------------------------------------------


def cosine(x: Tensor, y: Tensor, centre: bool = False) -> float:
    """Mean over rows of the cosine between x_i and y_i, in [-1, 1]; x and y are `[n, ..., d]`.

    Sees rotations, and sees little else when all rows share an offset: use `centre=True` then.
    Rows shorter than 1e-12 are left out, with a warning that counts them.
    Raises ValueError for different shapes, values that are not finite, or no row left.
    """
    require("y", tuple(y.shape), x.shape == y.shape, f"have the shape of x, {tuple(x.shape)}")
    return _only(_cosine_map([_centred(x), _centred(y)] if centre else [x, y]))


def centred_cosine(x: Tensor, y: Tensor) -> float:
    """`cosine` of features whose column means were subtracted: `[n, ..., d]` to [-1, 1]."""
    return cosine(x, y, centre=True)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Similarity of two feature sets in [0, 1]; 1 when equal up to rotation, shift and scale.

    x is `[n, ..., p]` and y `[n, ..., q]`. Independent noise does not give 0, see `cka_null`.
    Raises ValueError for different row counts, or features that are constant or not finite.
    Source: arXiv 1905.00414, Sec. 3 (linear kernel).
    """
    return _only(_cka_map([x, y]))


def debiased_cka(x: Tensor, y: Tensor) -> float:
    """CKA whose mean for independent features is 0; may fall below 0 or rise above 1.

    Raises ValueError as `linear_cka` does, and for n < 5; warns below n = 50.
    Source: Song et al., JMLR 2012 (the unbiased HSIC); arXiv 2010.15327 for CKA.
    """
    return _only(_debiased_cka_map([x, y]))


def cka_null(n: int, p: int, q: int) -> float:
    """What `linear_cka` gives for independent Gaussian features [n, p] and [n, q]."""
    return math.sqrt(p * q / ((n + p) * (n + q)))


def similarity_map(
    features: Sequence[Tensor], measure: Callable[[Tensor, Tensor], float] = linear_cka
) -> Tensor:
    """`measure` between all pairs of L layers: a map `[L, L]` in float64.

    The four measures of this file are computed for all pairs at once, any other one pair by
    pair. A cell is NaN where a layer is constant, or where a cosine meets two widths.
    """
    require("features", "none", len(features) > 0, "hold at least one layer")
    if measure in _MAPS:
        return _MAPS[measure](features)
    return torch.tensor([[measure(x, y) for y in features] for x in features], dtype=torch.float64)


def _cosine_map(features: Sequence[Tensor]) -> Tensor:
    layers = _same_rows([_rows(x) for x in features])
    norms = [x.norm(dim=1, keepdim=True) for x in layers]
    valid = torch.stack([norm.squeeze(1) >= 1e-12 for norm in norms]).double()
    if short := int((valid == 0).sum()):
        warnings.warn(f"{short} rows are shorter than 1e-12 and left out", stacklevel=3)
    units = [x / norm.clamp(min=1e-12) for x, norm in zip(layers, norms, strict=True)]
    result = torch.full((len(layers), len(layers)), math.nan, dtype=torch.float64)
    for width in {x.shape[1] for x in units}:
        group = torch.tensor([i for i, x in enumerate(units) if x.shape[1] == width])
        flat = torch.stack([units[i].flatten() for i in group]) * valid[group].repeat_interleave(
            width, dim=1
        )
        result[group[:, None], group] = (flat @ flat.T) / (valid[group] @ valid[group].T)
    return result


def _cka_map(features: Sequence[Tensor]) -> Tensor:
    return _normalised(_overlaps([_centred(x) for x in features]))


def _debiased_cka_map(features: Sequence[Tensor]) -> Tensor:
    """The unbiased HSIC without any n x n matrix.

    After centring, K 1 = 0 for K = X X^T. With k = diag(K), the three terms of the estimator
    become |X^T Y|^2 - k.l, sum(k) sum(l) / ((n-1)(n-2)) and 2 k.l / (n-2).
    """
    layers = [_centred(x) for x in features]
    n = len(layers[0])
    require("debiased CKA", n, n >= 5, "have at least 5 rows")
    if n < 50:
        warnings.warn(f"debiased CKA is noisy below 50 rows, got {n}", stacklevel=3)
    overlaps = _overlaps(layers)
    k = torch.stack([x.square().sum(1) for x in layers])
    sums = k.sum(1)
    hsic = overlaps - n / (n - 2) * (k @ k.T) + sums.outer(sums) / ((n - 1) * (n - 2))
    return _normalised(hsic)


_MAPS: dict[Callable[..., float], Callable[[Sequence[Tensor]], Tensor]] = {
    cosine: _cosine_map,
    centred_cosine: lambda features: _cosine_map([_centred(x) for x in features]),
    linear_cka: _cka_map,
    debiased_cka: _debiased_cka_map,
}


def _overlaps(layers: Sequence[Tensor]) -> Tensor:
    """|X_l^T X_m|_F^2 for all pairs, by the cheaper of its two forms: features or Gram."""
    _same_rows(layers)
    widths = torch.tensor([x.shape[1] for x in layers])
    if widths.sum() > 4 * len(layers[0]):
        grams = torch.stack([(x @ x.T).flatten() for x in layers])
        return grams @ grams.T
    owner = F.one_hot(torch.arange(len(layers)).repeat_interleave(widths)).double()
    both = torch.cat(list(layers), dim=1)
    return owner.T @ (both.T @ both).square() @ owner


def _normalised(hsic: Tensor) -> Tensor:
    own = hsic.diagonal()
    own = torch.where(own > 0, own, math.nan).sqrt()  # a constant layer has no similarity
    return hsic / own.outer(own)


def _only(pair: Tensor) -> float:
    require("x and y", "constant or zero features", not pair.isnan().any(), "vary over their rows")
    return pair[0, 1].item()


def _rows(x: Tensor) -> Tensor:
    require("features", type(x).__name__, isinstance(x, Tensor), "be tensors")
    x = x.detach().to("cpu", torch.float64)
    require("features", tuple(x.shape), x.dim() >= 2, "have the shape [n, ..., d]")
    require("features", "NaN or infinity", x.isfinite().all(), "be finite")
    return rearrange(x, "... d -> (...) d")


def _centred(x: Tensor) -> Tensor:
    rows = _rows(x)
    centred = rows - rows.mean(0)
    # What rounding leaves of constant columns is no variation: make it zero.
    return centred * (centred.abs().amax(0) > 1e-12 * rows.abs().amax(0))


def _same_rows(layers: Sequence[Tensor]) -> Sequence[Tensor]:
    counts = sorted({len(x) for x in layers})
    told = f'{counts}; pool="mean" in layer_features makes them equal for images'
    require("features", told, len(counts) <= 1, "have the same number of rows")
    return layers


# ---- Leaving and returning -------------------------------------------------------------------


def rebound(profile: Tensor | Sequence[float]) -> float:
    """The largest rise after a low: max_k (r(k) - min_{j<=k} r(j)), 0 if r never rises."""
    r = torch.as_tensor(profile, dtype=torch.float64)
    require("profile", r.tolist(), len(r) > 0 and r.isfinite().all(), "hold finite values")
    return (r - r.cummin(0).values).max().item()


def map_rebound(similarity: Tensor) -> float:
    """Mean rebound of the profiles S[i, i:] over all anchors i but the last; S is `[L, L]`."""
    last = len(similarity) - 1
    require("similarity", len(similarity), last >= 1, "be of at least 2 layers")
    return sum(rebound(similarity[i, i:]) for i in range(last)) / last


def node_distance(features: Sequence[Tensor]) -> Tensor:
    """Wasserstein-1 distance between the z-scored values of a node in two layers.

    L layers of `[n, d]` give `[d, L, L]`. A statement about histograms: permuting the points of
    a layer changes nothing. NaN for a dead node (standard deviation below 1e-6).
    """
    ordered = torch.stack([_z_scored(x.sort(dim=0).values).T for x in features], dim=1)
    return torch.cdist(ordered, ordered, p=1) / ordered.shape[2]


def node_correlation(features: Sequence[Tensor]) -> Tensor:
    """Pearson correlation over points of a node in two layers: `[d, L, L]`, NaN if dead."""
    z = torch.stack([_z_scored(x) for x in features])
    return torch.einsum("lnd,mnd->dlm", z, z) / z.shape[1]


def returning_nodes(
    features: Sequence[Tensor], near: float = 0.089, far: float = 0.3, rho: float | None = None
) -> Tensor:
    """Nodes with the same histogram in layers l < k and another one in between: bool `[d]`.

    "The same" is W1 < `near`, "another" is W1 > `far`. Two normal samples of 400 differ by 0.089
    on average, and by 0.058 once they are standardised as here: `near` is generous.
    With `rho`, the values must also correlate over the points by more than that.
    """
    distance = node_distance(features)  # NaN for dead nodes: neither near nor far
    later = torch.ones(len(features), len(features)).triu(1).bool()
    widest = torch.where(later, distance.nan_to_num(), 0).cummax(-1).values
    back = later & (distance < near) & (widest > far)
    if rho is not None:
        back &= node_correlation(features) > rho
    return back.flatten(1).any(1)


def _z_scored(x: Tensor) -> Tensor:
    centred = _centred(x)
    deviation = centred.square().mean(0).sqrt()
    return centred / torch.where(deviation >= 1e-6, deviation, math.nan)


# ---- Dimensions ------------------------------------------------------------------------------


def rank_entropy(x: Tensor, centre: bool = False) -> float:
    """Entropy in nats of the singular values of `[n, ..., d]`, scaled to sum to 1.

    Source: arXiv 2404.10947 (its rank measure); Roy and Vetterli, EUSIPCO 2007.
    """
    values = _singular_values(x, centre)
    return torch.special.entr(values / values.sum()).sum().item()


def effective_rank(x: Tensor, centre: bool = False) -> float:
    """Exponential of `rank_entropy`: r for r equal singular values, between 1 and min(n, d)."""
    return math.exp(rank_entropy(x, centre))


def participation_ratio(x: Tensor, centre: bool = False) -> float:
    """(sum of eigenvalues)^2 / sum of their squares; eigenvalues = squared singular values."""
    power = _singular_values(x, centre).square()
    return (power.sum().square() / power.square().sum()).item()


def remove_top_component(x: Tensor) -> Tensor:
    """Centred features `[n, d]` without their first principal component.

    One dominant direction makes any two layers look alike (arXiv 2010.15327).
    """
    centred = _centred(x)
    top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return centred - (centred @ top).outer(top)


def _singular_values(x: Tensor, centre: bool) -> Tensor:
    values = torch.linalg.svdvals(_centred(x) if centre else _rows(x))
    require("x", "none", values[0] > 0, "hold a value that is not 0 (after centring, if asked for)")
    return values


# ---- What a block adds -----------------------------------------------------------------------


def block_influence(features: Sequence[Tensor]) -> Tensor:
    """1 - cos(h_{l-1}, h_l) of each block, `[L]`; 0 keeps the direction, 2 turns it round.

    Small influence does not prove a block useless: see `skip_one`. Source: arXiv 2403.03853.
    """
    return torch.tensor([1 - cosine(x, y) for x, y in pairwise(features)], dtype=torch.float64)


def residual_norm(features: Sequence[Tensor]) -> Tensor:
    """|H_l - H_{l-1}| / |H_{l-1}| (Frobenius) of each block, `[L]`."""
    return torch.stack([(y - x).norm() / x.norm() for x, y in pairwise(map(_rows, features))])


@torch.no_grad()
def skip_one(model: nn.Module, score: Callable[[], float]) -> Tensor:
    """How much `score()` falls when one path is switched off: `[L]`, full - skipped.

    `score` takes nothing, runs the model and returns a number (accuracy, or minus the loss).
    Source: the lesion study of arXiv 1605.06431.
    """
    masks = 1 - torch.eye(_path_count(model))
    with evaluating(model):
        return score() - _scores(model, score, masks)


@torch.no_grad()
def keep_random(
    model: nn.Module, score: Callable[[], float], keep: float = 0.5, draws: int = 20, seed: int = 0
) -> Tensor:
    """`score()` of random sub-nets, each path kept with probability `keep`: `[draws]`."""
    require("keep", keep, 0 <= keep <= 1, "lie in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(draws, _path_count(model), generator=generator) < keep).float()
    with evaluating(model):
        return _scores(model, score, masks)


def _path_count(model: nn.Module) -> int:
    if count := len(paths(model)):
        return count
    raise ValueError(f"model must have Residual blocks to switch off, got {type(model).__name__}")


def _scores(model: nn.Module, score: Callable[[], float], masks: Tensor) -> Tensor:
    scores = []
    for mask in masks:
        with path_mask(model, mask):
            scores.append(score())
    return torch.tensor(scores, dtype=torch.float64)


def path_share(depth: int, shortest: int, longest: int) -> float:
    """Share of the 2^depth paths through a residual net that use shortest..longest branches."""
    return sum(math.comb(depth, k) for k in range(shortest, longest + 1)) / 2**depth


def mean_path_length(depth: int, weight: float) -> float:
    """Mean number of branches on a path if each multiplies its share by `weight`."""
    return depth * weight / (1 + weight)


# ---- Reading the labels ----------------------------------------------------------------------


def probe_weights(x: Tensor, y: Tensor) -> Tensor:
    """Least squares from [x, 1] to +-1 targets, one column a class: `[d + 1, classes]`.

    x is `[n, d]`, y `[n]` int64. A ridge of 1e-6 of the mean power keeps it solvable.
    """
    rows, target = _rows(x), 2 * F.one_hot(y).double() - 1
    centred = rows - rows.mean(0)
    ridge = 1e-6 * rows.square().sum() / rows.shape[1]
    gram = centred.T @ centred + ridge * torch.eye(rows.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (target - target.mean(0)))
    return torch.cat([weight, target.mean(0, keepdim=True) - rows.mean(0, keepdim=True) @ weight])


def probe_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Share of test rows whose class a linear read-out, fitted on the train rows, finds."""
    weight = probe_weights(train_x, train_y)
    scores = F.pad(_rows(test_x), (0, 1), value=1.0) @ weight
    last_of_the_best = scores.shape[1] - 1 - scores.flip(1).argmax(1)  # sign(0) counts as +1
    return (last_of_the_best == test_y).double().mean().item()


@torch.no_grad()
def logit_lens(head: nn.Module, features: Sequence[Tensor], y: Tensor) -> Tensor:
    """Accuracy of the trained head on each layer's features, without refitting: `[L]`."""
    return torch.stack([(head(x).argmax(-1) == y).double().mean() for x in features])


# ---- All of it -------------------------------------------------------------------------------


def probe_layers(
    train: Sequence[Tensor], train_y: Tensor, test: Sequence[Tensor], test_y: Tensor
) -> list[float]:
    """`probe_accuracy` of every layer, from its features on train and test points."""
    return [probe_accuracy(a, train_y, b, test_y) for a, b in zip(train, test, strict=True)]


def diagnose(
    model: nn.Module, features: Sequence[Tensor], score: Callable[[], float]
) -> dict[str, Any]:
    """The measures that every recorded net gets, as plain numbers and lists.

    map: similarity maps; rebound: their scores; rank: effective rank by layer (centred);
    skip: loss of `score()` by path switched off; half: mean `score()` with half the paths.
    """
    bare = [remove_top_component(x) for x in features]
    maps = {
        "cosine": similarity_map(features, cosine),
        "centred_cosine": similarity_map(features, centred_cosine),
        "cka": similarity_map(features, linear_cka),
        "debiased_cka": similarity_map(features, debiased_cka),
        "cka_without_top": similarity_map(bare, linear_cka),
    }
    full = {name: found for name, found in maps.items() if found.isfinite().all()}
    kept = {name: found.tolist() for name, found in full.items() if name != "centred_cosine"}
    return {
        "map": {k: [[round(v, 4) for v in row] for row in rows] for k, rows in kept.items()},
        "rebound": {name: map_rebound(found) for name, found in full.items()},
        # A layer that maps all inputs to one point spans no dimension.
        "rank": [effective_rank(x, centre=True) if _centred(x).any() else 0.0 for x in features],
        "skip": skip_one(model, score).tolist(),
        "half": keep_random(model, score, draws=10).mean().item(),
    }
