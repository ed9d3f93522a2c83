"""Named experiments: what is run, from which source, with which expectation and at what cost.

An experiment is a recipe per tier. Arms of one study differ in one field, which `diff` shows.
This file and the command line are the only ones that know models, data and measures together.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import results, reuse
from .cnn import ResidualCNN
from .data import Batches, ImageSet, flip, load, shift, to_float
from .shortcuts import known
from .toy import accuracy, seeded_nets, spiral, train_together
from .train import (
    TrainState,
    cosine_schedule,
    fit,
    load_checkpoint,
    loss_step,
    make_state,
    seed_everything,
)

TIERS = ("cpu", "t4", "full")


@dataclass(frozen=True)
class SpiralRecipe:
    """A residual net on the spiral: full batch, Adam; 400 points to train, 2000 to test."""

    depth: int = 32
    width: int = 32
    activation: str = "relu"
    residual: bool = True
    steps: int = 1000
    lr: float = 1e-3


@dataclass(frozen=True)
class ImageRecipe:
    """A residual CNN on images: AdamW, cosine schedule, shifts of 2 pixels (and flips)."""

    data: str = "cifar10"
    images: int = 10_000
    epochs: int = 8
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 3
    flips: bool = True
    measured: int = 2000  # images that the diagnosis looks at


@dataclass(frozen=True)
class Experiment:
    """One arm of a study. `minutes` and `memory_gib` were measured on two CPU cores (tier t4)."""

    study: str
    arm: str
    tiers: Mapping[str, SpiralRecipe | ImageRecipe]
    source: str
    expects: str
    minutes: float
    memory_gib: float
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the command line calls it: study-arm."""
        return f"{self.study}-{self.arm}"


def _spiral(arm: str, recipe: SpiralRecipe, expects: str) -> Experiment:
    return Experiment(
        "spiral", arm, dict.fromkeys(TIERS, recipe), "arXiv 2411.09475, figures 1 to 4",
        expects, 0.2, 0.6, (0, 1, 2, 3, 4),
    )  # fmt: skip


def _images(data: str, flips: bool, minutes: float) -> Experiment:
    t4 = ImageRecipe(data=data, flips=flips)
    tiers = {
        "cpu": replace(t4, images=1000, epochs=2, measured=500),
        "t4": t4,
        "full": replace(t4, images=50_000, epochs=50, widths=(32, 64, 128)),
    }
    return Experiment(
        "reuse", data, tiers, "arXiv 2411.09475, figure 3, on real images",
        "rule fixed before the runs: training raises the rebound if the debiased CKA rebound is "
        "above the untrained net's in all three seeds; else it does not at this scale",
        minutes, 1.5, (0, 1, 2),
    )  # fmt: skip


_RESIDUAL = SpiralRecipe()
EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        _spiral("relu", _RESIDUAL, "accuracy above 0.99; CKA rebound above the untrained net's"),
        _spiral("tanh", replace(_RESIDUAL, activation="tanh"), "CKA rebound below untrained"),
        _spiral("plain", replace(_RESIDUAL, residual=False), "does not learn: accuracy 0.5"),
        _spiral(
            "small",
            replace(_RESIDUAL, depth=6, width=6, steps=2000, lr=1e-2),
            "no effect of training on the rebound",
        ),
        _images("fashion-mnist", flips=False, minutes=8),
        _images("cifar10", flips=True, minutes=10),
    )
}


def get(name: str) -> Experiment:
    """The experiment of that name. Raises ValueError with the nearest name for a typo."""
    return EXPERIMENTS[known("experiment", name, EXPERIMENTS)]


def recipe_of(experiment: Experiment, tier: str, changes: Sequence[str] = ()) -> Any:
    """The recipe of a tier with `key=value` changes; values keep the type of the field.

    Raises ValueError for an unknown tier or key, or a value of another type.
    """
    recipe = experiment.tiers[known("tier", tier, TIERS)]
    for change in changes:
        key, _, text = change.partition("=")
        old = getattr(recipe, known("set", key, [field.name for field in fields(recipe)]))
        recipe = replace(recipe, **{key: _parse(key, text, old)})
    return recipe


def _parse(key: str, text: str, old: Any) -> Any:
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        return tuple(map(int, text.split(","))) if isinstance(old, tuple) else type(old)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{key} must be of type {type(old).__name__}, got {text!r}") from None


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two recipes differ, with both values."""
    left, right = asdict(a), asdict(b)
    names = sorted({*left, *right})
    return {n: (left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)}


def run(
    name: str,
    *,
    tier: str = "cpu",
    seed: int = 0,
    data: str | None = None,
    out: str | Path = "runs",
    resume: bool = False,
    changes: Sequence[str] = (),
) -> Path:
    """Run one seed of an experiment and write its result to `out/<study>/<arm>-s<seed>.json`.

    `data` is the folder of image sets. With `resume`, a recorded run is left as it is, and one
    that was stopped goes on from its checkpoint.
    """
    experiment = get(name)
    recipe = recipe_of(experiment, tier, changes)
    path = Path(out) / experiment.study / f"{experiment.arm}-s{seed}.json"
    if resume and path.exists():
        results.read(path)
        return path
    work = Path("runs") / f"{name}-{tier}-s{seed}"
    if isinstance(recipe, SpiralRecipe):
        outcome = _run_spiral(recipe, seed)
    else:
        outcome = _run_images(recipe, seed, data, work, resume)
    record = results.Run(
        study=experiment.study,
        arm=experiment.arm,
        seed=seed,
        recipe={"tier": tier, **_plain(asdict(recipe))},
        **outcome,
        **results.environment(),
    )
    return results.write(record, out)


# ---- the spiral ------------------------------------------------------------------------------


def _run_spiral(recipe: SpiralRecipe, seed: int) -> dict[str, Any]:
    x, y = spiral()
    test = spiral(n=2000, seed=12345)
    nets = _spiral_nets(recipe, seed)
    before = _diagnose_spiral(nets[0], x, y, *test)
    start = time.perf_counter()
    losses, _ = train_together(nets, x, y, recipe.steps, recipe.lr)
    seconds = round(time.perf_counter() - start, 1)
    steps = list(range(0, recipe.steps, max(1, recipe.steps // 50)))
    return {
        "data": {"name": "spiral", "train": 400, "test": 2000, "noise": 0.05},
        "metrics": {"init": before, "trained": _diagnose_spiral(nets[0], x, y, *test)},
        "curve": {"step": steps, "loss": losses[steps, 0].tolist()},
        "seconds": seconds,
        "fingerprint": hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16],
        "first_losses": first_losses(recipe, seed),
    }


def _spiral_nets(recipe: SpiralRecipe, seed: int) -> list[Any]:
    return seeded_nets([seed], recipe.depth, recipe.width, recipe.activation, recipe.residual)


def _diagnose_spiral(
    net: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor
) -> dict[str, Any]:
    features, test = reuse.layer_features(net, x), reuse.layer_features(net, test_x)
    score = partial(accuracy, net, test_x, test_y)
    return {
        "accuracy": score(),
        "probe": _probes(features, y, test, test_y),
        "returning": int(reuse.returning_nodes(features).sum()),
        "returning_paired": int(reuse.returning_nodes(features, rho=0.9).sum()),
        **_diagnose(net, features, score),
    }


# ---- images ----------------------------------------------------------------------------------


def _run_images(
    recipe: ImageRecipe, seed: int, data: str | None, work: Path, resume: bool
) -> dict[str, Any]:
    train, test = (load(recipe.data, split, data) for split in ("train", "test"))
    sets = train.subset(min(recipe.images, len(train)), 0), test
    state, batches, step = _image_training(recipe, seed, sets[0])
    before = _diagnose_images(state.net, recipe, *sets)
    key = hashlib.sha256(repr((recipe, seed, sets[0].fingerprint)).encode()).hexdigest()
    if resume and (work / "checkpoint.json").exists():
        load_checkpoint(work, state, key)
    fit(state, batches, step, checkpoint=work, checkpoint_every=100, fingerprint=key)
    return {
        "data": {"name": recipe.data, "train": len(sets[0]), "test": len(test)},
        "metrics": {"init": before, "trained": _diagnose_images(state.net, recipe, *sets)},
        "curve": {k: [line[k] for line in state.history] for k in ("step", "loss")},
        "seconds": round(state.seconds, 1),
        "fingerprint": sets[0].fingerprint,
        "first_losses": first_losses(recipe, seed, sets[0]),
    }


def _image_training(recipe: ImageRecipe, seed: int, train: ImageSet, cpu: bool = False) -> Any:
    """The state, batches and step of a run: what `fit` takes."""
    seed_everything(seed)
    channels, classes = train.images.shape[1], len(train.classes)
    model = ResidualCNN(channels, classes, recipe.widths, recipe.blocks)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * (len(train) // recipe.batch)
    schedule = cosine_schedule(optimizer, steps, warmup=min(steps // 10, 50))
    state = make_state(model, optimizer, scheduler=schedule, seed=seed, cpu=cpu)
    augment = partial(_augment, flips=recipe.flips)
    return state, Batches(train, recipe.batch, steps, seed, augment), loss_step(_classify)


def _augment(images: Tensor, generator: torch.Generator, flips: bool) -> Tensor:
    images = shift(images, 2, generator)
    return flip(images, generator) if flips else images


def _classify(state: TrainState, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(state.model(to_float(images)), labels)


def _diagnose_images(
    net: nn.Module, recipe: ImageRecipe, train: ImageSet, test: ImageSet
) -> dict[str, Any]:
    net.eval()
    fitted, probed = train.subset(recipe.measured, 1), test.subset(recipe.measured, 1)
    x, y = to_float(probed.images), probed.labels
    read = partial(reuse.layer_features, net, pool="mean")
    features, bank = read(x), read(to_float(fitted.images))
    score = partial(_image_accuracy, net, x, y)
    return {
        "accuracy": _image_accuracy(net, to_float(test.images), test.labels),
        "probe": _probes(bank, fitted.labels, features, y),
        **_diagnose(net, features, score),
    }


@torch.no_grad()
def _image_accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    device = next(net.parameters()).device
    hits = [
        (net(a.to(device)).argmax(1).cpu() == b).double().sum()
        for a, b in zip(x.split(100), y.split(100), strict=True)
    ]
    return (sum(hits) / len(y)).item()


# ---- both ------------------------------------------------------------------------------------


def _diagnose(net: nn.Module, features: list[Tensor], score: Any) -> dict[str, Any]:
    """The measures that every net gets, as plain numbers and lists."""
    bare = [reuse.remove_top_component(x) for x in features]
    maps = {
        "cosine": reuse.similarity_map(features, reuse.cosine),
        "centred_cosine": reuse.similarity_map(features, reuse.centred_cosine),
        "cka": reuse.similarity_map(features, reuse.linear_cka),
        "debiased_cka": reuse.similarity_map(features, reuse.debiased_cka),
        "cka_without_top": reuse.similarity_map(bare, reuse.linear_cka),
    }
    full = {name: m for name, m in maps.items() if m.isfinite().all()}
    return {
        "map": {name: [[round(v, 4) for v in row] for row in m.tolist()]
                for name, m in full.items() if name != "centred_cosine"},
        "rebound": {name: reuse.map_rebound(m) for name, m in full.items()},
        "rank": [reuse.effective_rank(x, centre=True) for x in features],
        "skip": reuse.skip_one(net, score).tolist(),
        "half": reuse.keep_random(net, score, draws=10).mean().item(),
    }  # fmt: skip


def _probes(train: list[Tensor], y: Tensor, test: list[Tensor], test_y: Tensor) -> list[float]:
    pairs = zip(train, test, strict=True)
    return [reuse.probe_accuracy(a, y, b, test_y) for a, b in pairs]


def first_losses(recipe: Any, seed: int, train: ImageSet | None = None) -> list[float]:
    """The first five losses of a run, in float32 on the CPU: what a test replays."""
    if isinstance(recipe, SpiralRecipe):
        losses, _ = train_together(_spiral_nets(recipe, seed), *spiral(), 5, recipe.lr)
        return losses[:, 0].tolist()
    assert train is not None
    state, batches, step = _image_training(recipe, seed, train, cpu=True)
    return [float(step(state, batches[i])["loss"]) for i in range(5)]


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.items()}
