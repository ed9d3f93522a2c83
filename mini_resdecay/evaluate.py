"""How good are features? Neighbours, a linear probe, fine-tuning; and how two clouds differ.

    tokens = layer_features(encoder, images)[-1]                       # [n, 1 + N, d]
    knn_accuracy(bank, bank_labels, queries, query_labels)             # features [n, d]
    linear_probe(feature_sources([tokens]), labels, feature_sources([test_tokens]), test_labels)

Whatever can be chosen is chosen on a part of the training set; the test set is read once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import require
from .shortcuts import decay_groups, paths

Features = Tensor | Mapping[str, Tensor]
Cloud = Tensor | tuple[Tensor, Tensor]

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-2)
BATCH, QUERIES, GROUP = 1024, 256, 32  # rows a step, rows at a time, neighbours a group


def feature_sources(layers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Ways to read tokens `[n, 1 + N, d]` as features `[n, d]`: three for each layer k.

    "mean_patch k" is the mean without the class token, "mean_all k" with it, "cls k" that alone.
    """
    ways = [("mean_patch", slice(1, None)), ("mean_all", slice(None)), ("cls", slice(1))]
    return {f"{name} {k}": x[:, s].mean(1) for k, x in enumerate(layers) for name, s in ways}


def standardised(fit: Tensor, *others: Tensor) -> list[Tensor]:
    """Features `[n, d]`, all with the means and deviations of the rows of the first, in float32.

    A feature that is constant in the first becomes 0 in all.
    """
    deviation, centre = torch.std_mean(fit.float(), 0)
    # What rounding leaves of a constant feature is no feature: infinity makes it zero.
    scale = torch.where(deviation > 1e-6 * fit.float().abs().amax(0), deviation, math.inf)
    return [(x.float() - centre) / scale for x in (fit, *others)]


# ---- Neighbours ------------------------------------------------------------------------------


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of `queries` [m, d] whose class wins the vote of their k nearest in `bank` [n, d].

    Nearest by cosine; a neighbour has exp(cosine / temperature) votes. In float32 whatever the
    features are: those votes overflow half precision. Memory: a copy of the bank, and 256
    similarities for each of its rows.
    Raises ValueError for shapes that do not fit, features that are not finite, k outside 1…n, or
    a temperature that is not above 0.
    Source: the evaluation of DINO, arXiv 2104.14294.
    """
    _check(bank, bank_labels, queries, query_labels)
    require("k", k, 1 <= k <= len(bank), f"be in 1…{len(bank)}, the rows of bank")
    require("temperature", temperature, temperature > 0, "be above 0")
    size = min(GROUP, len(bank) // k)
    groups = -(-len(bank) // size)
    unit = F.normalize(bank.float()).T
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=bank.device)
    memory = unit.new_full((QUERIES, groups * size), -torch.inf)
    for part, vote in zip(queries.split(QUERIES), votes.split(QUERIES), strict=True):
        near = memory[: len(part)]
        torch.mm(F.normalize(part.float()), unit, out=near[:, : len(bank)])
        # The k nearest lie in the k groups whose best are best: only those are sorted.
        grouped = near.view(len(part), size, groups)
        best = grouped.amax(1).topk(k).indices[:, None].expand(-1, size, -1)
        top, place = grouped.gather(2, best).flatten(1).topk(k)
        rows = torch.arange(size, device=bank.device)[:, None] * groups + best
        chosen = bank_labels[rows.flatten(1).gather(1, place)]
        vote.scatter_add_(1, chosen, ((top - top[:, :1]) / temperature).exp())
    return (votes.argmax(1) == query_labels).double().mean().item()


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    for x, y in ((train_x, train_y), (test_x, test_y)):
        fits = x.dim() == 2 and x.shape[1:] == train_x.shape[1:] and y.shape == x.shape[:1]
        got = f"{list(x.shape)} and {list(y.shape)}"
        require("features and labels", got, fits and len(x), "be [n, d] and [n]")
        finite = torch.stack(x.aminmax()).isfinite().all()  # much faster than all of x
        require("features", "NaN or infinity", finite, "be finite")
        require(
            "labels", f"{y.dtype}, least {y.min()}", y.dtype == torch.int64 and y.min() >= 0,
            "be int64 from 0 on",
        )  # fmt: skip


# ---- A linear probe --------------------------------------------------------------------------


class Probe(NamedTuple):
    """Accuracy on the test rows, and what was chosen without them."""

    accuracy: float
    lr: float
    weight_decay: float
    source: str


@torch.no_grad()
def linear_probe(
    train_x: Features,
    train_y: Tensor,
    test_x: Features,
    test_y: Tensor,
    lrs: Sequence[float] = LRS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    steps: int = 1000,
    seed: int = 0,
) -> Probe:
    """Accuracy of multinomial logistic regression on features `[n, d]`, its settings chosen.

    Every pair of learning rate and weight decay is trained, all pairs at once, on nine tenths of
    the train rows; the one that is best on the last tenth is trained again on all of them, and
    only then are the test rows read. Features given by name (`feature_sources`) are chosen by the
    same tenth. Each feature is standardised by its train rows, so that its scale says nothing.
    Training: AdamW, `steps` batches of at most 1024 rows, cosine down to 0, biases not decayed.
    Raises ValueError for shapes that do not fit, features that are not finite, n < 10, or a grid
    that trains nothing.
    Differs from the probe of arXiv 2404.10947: standardised, no augmentation, a grid for all.
    """
    train, test = (x if isinstance(x, Mapping) else {"": x} for x in (train_x, test_x))
    require(
        "test_x", list(test), train and train.keys() == test.keys(),
        f"have the sources {list(train)}",
    )  # fmt: skip
    for name, x in train.items():
        _check(x, train_y, test[name], test_y)
    grid = [(lr, wd) for lr in lrs for wd in weight_decays]
    fits = steps >= 1 and grid and all(0 < r < math.inf and 0 <= w < math.inf for r, w in grid)
    require(
        "steps", f"{steps}, {lrs}, {weight_decays}", fits,
        "be at least 1, lrs above 0, weight_decays 0 or more, some and finite",
    )  # fmt: skip
    require("train_x", len(train_y), len(train_y) >= 10, "have at least 10 rows")
    odd, last = int(test_y.max()), int(train_y.max())
    require("test_y", odd, odd <= last, f"be classes of train_y, 0…{last}")
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    trials: dict[tuple[str, float, float], tuple[float, ...]] = {}
    for name, x in train.items():
        parts = x[rest], train_y[rest], x[held], train_y[held]
        scores = _fit_and_score(*parts, grid, steps, seed)
        trials |= {(name, *pair): score for pair, score in zip(grid, scores, strict=True)}
    source, lr, wd = max(trials, key=lambda trial: trials[trial])
    parts = train[source], train_y, test[source], test_y
    return Probe(_fit_and_score(*parts, [(lr, wd)], steps, seed)[0][0], lr, wd, source)


def _fit_and_score(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    grid: Sequence[tuple[float, float]],
    steps: int,
    seed: int,
) -> list[tuple[float, ...]]:
    """Accuracy and mean log-likelihood on the test rows, for each pair of the grid."""
    fit, new = (F.pad(x, (0, 1), value=1.0) for x in standardised(train_x, test_x))
    classes = int(max(train_y.max(), test_y.max())) + 1
    weights = _logistic(fit, F.one_hot(train_y, classes).float(), grid, steps, seed)
    scores = []
    for x, y in zip(new.split(BATCH), test_y.split(BATCH), strict=True):
        logits = weights @ x.T
        right = (logits.argmax(1) == y).double()
        scores.append(torch.stack([right, logits.log_softmax(1)[:, y, torch.arange(len(y))]]))
    return [tuple(pair) for pair in torch.cat(scores, 2).mean(2).T.tolist()]


def _logistic(
    x: Tensor, target: Tensor, grid: Sequence[tuple[float, float]], steps: int, seed: int
) -> Tensor:
    """Weights [G, C, d] of one classifier for each pair of the grid, trained in one product.

    x is [n, d], its last column the bias's 1; target [n, C]. AdamW and the gradient of the
    softmax loss are written out.
    """
    lr, decay = torch.tensor(grid, device=x.device).T[:, :, None, None]
    weights = x.new_zeros(len(grid), target.shape[1], x.shape[1])
    mean, power = torch.zeros_like(weights), torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(x))
    for step in range(steps):
        if len(x) > BATCH:
            rows = torch.randint(len(x), (BATCH,), generator=generator)
        batch = x[rows]
        logits = weights.flatten(0, 1) @ batch.T
        error = logits.view(*weights.shape[:2], -1).softmax(1) - target[rows].T
        gradient = (error.flatten(0, 1) @ batch).view_as(weights) / len(rows)
        mean.lerp_(gradient, 0.1)
        power.lerp_(gradient.square(), 0.001)
        now = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        weights[..., :-1] *= 1 - now * decay
        size = (power / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        weights -= now / (1 - 0.9 ** (step + 1)) * mean / size
    return weights


# ---- Fine-tuning -----------------------------------------------------------------------------


def fine_tuning_groups(
    net: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 0.65
) -> list[dict[str, Any]]:
    """Groups for AdamW whose learning rate falls by `layer_decay` a block, from the head down.

    `net` is a `Classifier` on a pretrained ViT, to be trained by `train.fit` with `loss_step`:
    factor 1 for head and last norm, layer_decay for the last block, layer_decay^(depth + 1) for
    the stem. Weight decay as in `decay_groups`.
    Raises ValueError for a net without paths, or layer_decay outside (0, 1].
    Source: the fine-tuning of arXiv 2111.06377; here the class token of the stem is decayed too.
    """
    require("layer_decay", layer_decay, 0 < layer_decay <= 1, "lie in (0, 1]")
    blocks = paths(net)
    normed = blocks and all(isinstance(block.norm, nn.LayerNorm) for block in blocks)
    require(
        "net", type(net).__name__, normed,
        "be a Classifier on a ViT: paths behind a LayerNorm, attention and MLP in turn",
    )  # fmt: skip
    depth = len(blocks) // 2  # attention and MLP are one block here
    factors = {p: layer_decay ** (depth + 1) for n, p in net.named_parameters() if "stem." in n}
    for k, block in enumerate(blocks):
        factors |= dict.fromkeys(block.parameters(), layer_decay ** (depth - k // 2))
    return decay_groups(net, lr, weight_decay, factors)


# ---- Two clouds of features ------------------------------------------------------------------


@torch.no_grad()
def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] (with n - 1) of features that come in batches `[n, d]`.

    For `frechet_distance`, in one pass: `moments(net(images) for images in …)` needs the memory
    of one batch however many there are. In float64, from the first batch's mean, so that a large
    offset costs no digits.
    Raises ValueError for no batch, other shapes, or batches of different widths.
    """
    count = 0
    origin = total = products = torch.zeros(())
    for x in batches:
        require(
            "features", list(x.shape),
            x.dim() == 2 and len(x) and x.shape[1:] == (total.shape or x.shape[1:]),
            "be [n, d] of one width",
        )  # fmt: skip
        if not count:
            origin = x.double().mean(0)
            total, products = torch.zeros_like(origin), torch.zeros_like(origin.outer(origin))
        for rows in x.split(QUERIES):  # so few stay in the cache
            off = rows - origin
            total += off.sum(0)
            products.addmm_(off.T, off)
        count += len(x)
    require("batches", "none", count > 0, "hold at least one batch")
    return origin + total / count, (products - total.outer(total) / count) / (count - 1 or math.nan)


@torch.no_grad()
def frechet_distance(a: Cloud, b: Cloud) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)): how far two normal clouds lie apart.

    Each is features `[n, d]`, or their mean [d] and covariance [d, d] (with n - 1). In float64.
    It falls as n grows: compare at one n, beside the distance of two real sets of that size.
    Name it after the net that made the features; it is FID for one Inception net alone.
    Raises ValueError for what are no tensors, other shapes, n < 2, values that are not finite, or
    a covariance with a negative eigenvalue.
    """
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root("a", a), _mean_and_root("b", b)
    require("b", len(mean_b), mean_a.shape == mean_b.shape, f"have the width of a, {len(mean_a)}")
    # tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2).
    cross = torch.linalg.svdvals(root_a @ root_b).sum()
    spread = root_a.square().sum() + root_b.square().sum()
    # Rounding may go below 0.
    return ((mean_a - mean_b).square().sum() + spread - 2 * cross).clamp(min=0).item()


def _mean_and_root(name: str, cloud: Cloud) -> tuple[Tensor, Tensor]:
    """The mean and the root of the covariance; eigenvalues that rounding made negative are 0."""
    pair = moments([cloud]) if isinstance(cloud, Tensor) else cloud
    two = isinstance(pair, Sequence) and [isinstance(x, Tensor) for x in pair] == [True, True]
    require(name, type(cloud).__name__, two, "be a tensor of features, or a pair of tensors")
    mean, covariance = (part.double() for part in pair)
    fits = covariance.dim() == 2 and covariance.shape == 2 * mean.shape
    whole = fits and torch.stack([x.isfinite().all() for x in (mean, covariance)]).all()
    require(
        name, f"mean {list(mean.shape)} and covariance {list(covariance.shape)}",
        whole and torch.allclose(covariance, covariance.T),
        "be finite features [n, d] with n >= 2, or mean [d], symmetric covariance [d, d]",
    )  # fmt: skip
    values, vectors = torch.linalg.eigh(covariance)
    require(
        "covariance", f"{values[0]:.3g} in {name}", values[0] >= -1e-6 * values.abs().max(),
        "have no negative eigenvalue",
    )  # fmt: skip
    return mean, vectors * values.clamp(min=0).sqrt() @ vectors.T


def fid(inception: nn.Module, real: Iterable[Tensor], made: Iterable[Tensor]) -> float:
    """Fréchet distance of two sets of images, in batches, by torchmetrics and a net that you give.

    What others call FID needs the Inception-v3 of the original release and 50 000 images of each
    set. For any other net write FD, its name and the number, as `frechet_distance` gives it.
    `inception` maps the images to features [n, d], and its `num_features` is d. The original is in
    the package torch-fidelity: `torchmetrics.image.fid.NoTrainInceptionV3("inception-v3-compat",
    ["2048"])` wraps it, takes uint8 images, and is to be given `num_features = 2048`.
    Raises ValueError for a net without `num_features`.
    """
    require(
        "inception", type(inception).__name__, hasattr(inception, "num_features"),
        "have num_features, the width of its features",
    )  # fmt: skip
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=inception)
    for batches, is_real in ((real, True), (made, False)):
        for images in batches:
            metric.update(images, real=is_real)
    return metric.compute().item()


class Overlap(NamedTuple):
    """Shares in [0, 1], but density: about 1 for two samples of one cloud, more in its middle."""

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def overlap(real: Tensor, made: Tensor, k: int = 5) -> Overlap:
    """How much of `made` [m, d] looks real, and how much of `real` [n, d] is reached.

    Around each point lies a ball that reaches its k-th neighbour in its own cloud. precision is
    the share of made points in a ball of real ones, recall the share of real in a ball of made
    ones. density counts the real balls around a made point, over k; coverage is the share of real
    balls with a made point: an outlier with its large ball raises them less. All grow or fall
    with n, m and k: compare at equal ones.
    Memory: for n x n, m x m and m x n distances in float64.
    Raises ValueError for shapes that do not fit, values that are not finite, k outside 1…n - 1.
    Source: arXiv 1904.06991 (precision, recall), arXiv 2002.09797 (density, coverage).
    """
    radii = []
    for name, x in (("real", real), ("made", made)):
        require(
            name, list(x.shape),
            x.dim() == 2 and x.shape[1:] == real.shape[1:] and x.isfinite().all(),
            "be finite features [n, d]",
        )  # fmt: skip
        require("k", k, 1 <= k < len(x), f"be in 1…{len(x) - 1}, the other rows of {name}")
        # The nearest of all is the row itself.
        radii.append(torch.cdist(x.double(), x.double()).kthvalue(k + 1).values)
    distance = torch.cdist(made.double(), real.double())
    inside, reached = distance <= radii[0], distance <= radii[1][:, None]
    shares = inside.any(1), reached.any(0), inside.sum(1) / k, inside.any(0)
    return Overlap(*(share.double().mean().item() for share in shares))
