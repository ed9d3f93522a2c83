"""Named experiments: what is run, from which source, with which expectation and at what cost.

An experiment is a recipe per tier. Arms of one study differ in one field, which `diff` shows.
This file and the command line are the only ones that know models, data and measures together.
"""

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import StackDataset, Subset

from . import known, require, results, reuse
from .cnn import ResidualCNN
from .data import Batches, ImageSet, crop, flip, load, sha256, shift, to_float, write_whole
from .diffusion import Diffusion
from .droppath import ARMS
from .evaluate import (
    Probe,
    fine_tuning_groups,
    frechet_distance,
    knn_accuracy,
    linear_probe,
    overlap,
    standardised,
)
from .mae import MAE
from .shortcuts import (
    alpha_schedule,
    decay_groups,
    device_of,
    effective_alpha,
    gain_groups,
    rescale_norms,
    suggest_alpha_min,
)
from .toy import ResidualMLP, accuracy, seeded_nets, spiral, train_together
from .train import (
    Step,
    TrainState,
    bar,
    cosine_schedule,
    fit,
    load_checkpoint,
    loss_step,
    make_state,
    rows,
)
from .uvit import UViT
from .vit import Classifier, ViT, export_plain

TIERS = ("cpu", "t4", "full")
MOST_KEPT = 5_000_000  # bytes of what is kept beside a record
LEVELS = (50, 100, 300, 600)  # of noise, at which a denoiser's features are read
PLAIN = ("plain", "plain-half", "plain-eq")  # no path is dropped; see `_length`


@dataclass(frozen=True)
class Recipe:
    """What all recipes have in common: counts are at least 1, or 0 where that is the default.

    A drop rate, and the end of a ramp where it does what one would do (`…_as`), lie in [0, 1].
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int:
                default = getattr(type(self), name)
                require(name, value, value >= min(1, default), f"be at least {min(1, default)}")
            if name == "p" or name.endswith("_as"):
                require(name, value, 0 <= value <= 1, "lie in [0, 1]")
            if name == "lr":
                require(name, value, 0 < value < math.inf, "be above 0 and finite")


@dataclass(frozen=True)
class SpiralRecipe(Recipe):
    """A residual net on the spiral: full batch, Adam; 400 points to train, 2000 to test."""

    depth: int = 32
    width: int = 32
    activation: str = "relu"
    residual: bool = True
    steps: int = 1000
    lr: float = 1e-3
    arm: str = "plain"
    p: float = 0.2


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """A classifier of images: AdamW, cosine schedule, shifts of 2 pixels (and flips).

    The residual CNN has `blocks` blocks of each width; a ViT has width `widths[0]`, depth
    `blocks`, 4 heads and patches of 4 pixels. `epochs` counts the batches of the plain arm.
    """

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
    net: str = "cnn"
    arm: str = "plain"
    p: float = 0.2


@dataclass(frozen=True)
class MaskedRecipe(Recipe):
    """A masked autoencoder: AdamW (0.9, 0.95), cosine schedule, random crops and flips.

    In arch "paper" the encoder has no final norm.
    `rates_as`, `taps_as` and `norms_as` give the encoder what a ramp down to that `alpha_min`
    does apart from its shortcuts: the rates of the output projections (`gain_groups`, of plain
    shortcuts only), the size of the taps, the eps of the norms (1: as in a plain net). 0 leaves
    them. All ramps are of one `kind`. `zero_init` is that of the decoder, too, its skips and head.
    `precision` "half": fp16 on GPUs without bf16, else bf16; the record's device says which.
    `tuned_images`: of the train split, on which copies of the encoder are fine-tuned, before the
    training (from scratch, that is) and after it; 0 leaves it out. Not a part of `repr`, since
    no training differs by it.
    """

    data: str = "cifar10"
    images: int = 20_000
    epochs: int = 30
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    patch: int = 4
    dim: int = 96
    depth: int = 6
    heads: int = 3
    decoder_dim: int = 64
    decoder_depth: int = 3
    decoder_heads: int = 2
    mask_ratio: float = 0.75
    arch: str = "standard"
    shortcut: str = "plain"
    alpha_min: float = 1.0
    zero_init: bool = True
    precision: str = "half"
    measured: int = 10_000  # images in the bank of the neighbours, and at most in the test
    kind: str = "linear"
    rates_as: float = 0.0
    taps_as: float = 0.0
    norms_as: float = 0.0
    tuned_images: int = field(default=0, repr=False)


@dataclass(frozen=True)
class DiffusionRecipe(Recipe):
    """A U-ViT that denoises images as they are: AdamW (0.9, 0.95), cosine rate, mean weights.

    `labelled`: the class is told, but for a tenth of the images; else never. `rates_as`: of all
    sub-layers, as in `MaskedRecipe`; the long skips keep their weight, which decay lets grow
    against the stream's. `taps_as`: the taps are as loud as that ramp, folded into a plain net,
    makes them: by the factors that each goes round.
    `samples` are drawn by DDIM and judged, the first `guided` of them at each of `guidances`.
    `measured` images are the bank of the neighbours, half as many are asked.
    The last tenth of `images`, at most 1000, is not trained on: rates are chosen by the loss there.
    """

    data: str = "fashion-mnist"
    images: int = 60_000
    epochs: int = 7
    batch: int = 32
    lr: float = 4e-3
    weight_decay: float = 0.03
    patch: int = 4
    dim: int = 64
    depth: int = 4
    heads: int = 4
    labelled: bool = True
    long_skips: bool = True
    shortcut: str = "plain"
    alpha_min: float = 1.0
    kind: str = "linear"
    zero_init: bool = True
    schedule: str = "linear"
    target: str = "eps"
    ema: float = 0.999
    precision: str = "half"
    samples: int = 2000
    sampling_steps: int = 50
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    guided: int = 400
    measured: int = 4000
    rates_as: float = 0.0
    taps_as: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fits, wanted in (
            # Later a run needs two images for an FD, and 20 neighbours in nine tenths of the bank.
            ("images", self.images >= 40, "be at least 40"),
            ("samples", self.samples >= 20, "be at least 20"),
            ("guided", 2 <= self.guided <= self.samples, f"be in 2…samples = {self.samples}"),
            ("measured", self.measured >= 40, "be at least 40"),
            ("sampling_steps", self.sampling_steps <= 1000, "be in 1…1000"),
            # Without mean weights the net itself would be measured, which autocasts.
            ("ema", 0 < self.ema < 1, "lie in (0, 1)"),
            ("taps_as", self.long_skips or not self.taps_as, "be 0 without long skips"),
        ):
            require(name, getattr(self, name), fits, wanted)


@dataclass(frozen=True)
class Experiment:
    """One arm of a study, which runs in the order of `turn`.

    `minutes` and `memory_gib`: about what tier t4 takes on two CPU cores that do nothing else.
    Most records were made beside other work and took longer, up to five times.
    `keeps`: of seed 0 the encoder, or the classifier, or 64 samples stay beside the record:
    `results.kept_tensors` opens them.
    """

    study: str
    arm: str
    tiers: Mapping[str, Recipe]
    source: str
    expects: str
    minutes: float
    memory_gib: float
    seeds: tuple[int, ...]
    turn: int = 0
    keeps: bool = False

    @property
    def name(self) -> str:
        """What the command line calls it: study-arm."""
        return f"{self.study}-{self.arm}"


def _spiral(
    arm: str, expects: str, source: str = "arXiv 2411.09475, figures 1 to 4", /, **changes: Any
) -> Experiment:
    return Experiment(
        "spiral", arm, dict.fromkeys(TIERS, SpiralRecipe(**changes)), source, expects,
        0.2, 0.6, (0, 1, 2, 3, 4),
    )  # fmt: skip


def _by_tier(t4: Recipe, cpu: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Recipe]:
    """The recipe of the middle tier, and what the others change in it."""
    return {"cpu": replace(t4, **cpu), "t4": t4, "full": replace(t4, **full)}


def _reuse(data: str, flips: bool, minutes: float) -> Experiment:
    return Experiment(
        "reuse", data,
        _by_tier(
            ImageRecipe(data=data, flips=flips),
            {"images": 1000, "epochs": 2, "measured": 500},
            {"images": 50_000, "epochs": 50, "widths": (32, 64, 128)},
        ),
        "arXiv 2411.09475, figure 3, on real images",
        "rule fixed before the runs: training raises the rebound if the debiased CKA rebound is "
        "above the untrained net's in all three seeds; else it does not at this scale",
        minutes, 1.5, (0, 1, 2),
    )  # fmt: skip


def _droppath(data: str, net: str, arm: str, p: float, seeds: int, few: bool = False) -> Experiment:
    """A cell of the study of chapter 4. Its rule: accuracy, paired over seeds, five of them.

    `few`: a tenth of the images, seen ten times as often, where plain nets overfit.
    """
    of_vit: dict[str, Any] = {"lr": 5e-4, "widths": (64,), "blocks": 6} if net == "vit" else {}
    t4 = ImageRecipe(
        data=data, images=500 if few else 5000, epochs=195 if few else 15, weight_decay=0.0,
        flips=data == "cifar10", measured=500, net=net, arm=arm, p=p, **({"lr": 1e-3} | of_vit),
    )  # fmt: skip
    return Experiment(
        "droppath",
        f"{data}-{net}-{arm}" + ("" if p == 0.2 else f"-p{round(100 * p)}") + "-few" * few,
        _by_tier(
            t4,
            {"images": 512, "epochs": 1, "measured": 100},
            {
                "images": 2 * t4.images,
                "measured": 2000,
                "widths": t4.widths if of_vit else (32, 64, 128),
            },
        ),
        "arXiv 2411.09475, its table (unread), on other images",
        "rule fixed before the runs: two-stage helps where the 95 % interval of its accuracy minus "
        "plain-eq's is above 0; freezing matters where two-stage minus mixture excludes 0",
        4, 1.5, tuple(range(seeds)),
    )  # fmt: skip


def _judge_of(data: str) -> Experiment:
    """The classifier by whose features all samples of a set are judged."""
    return Experiment(
        "judge", data,
        _by_tier(
            ImageRecipe(
                data=data, images=60_000, epochs=4, blocks=2, flips=data != "fashion-mnist",
                measured=500,
            ),
            {"images": 1000, "epochs": 2},
            {"epochs": 40},
        ),
        "a net as in arXiv 1603.05027, whose features stand in for Inception",
        "no rule: it is trained once, before the study, and its kept bytes are the measure",
        10, 1.5, (0,), keeps=True,
    )  # fmt: skip


_SIZES = {
    "cpu": MaskedRecipe(images=1000, measured=500),
    "t4": MaskedRecipe(),
    "full": MaskedRecipe(
        images=50_000, batch=1024, lr=2e-3, dim=192, depth=12, heads=6,
        decoder_dim=128, decoder_depth=4, decoder_heads=4,
    ),
}  # fmt: skip
WINDOW = "window"  # of an arm's `alpha_min`: where the product of its depth is 10^-2.5
_window = cache(lambda depth: round(suggest_alpha_min(depth), 4))


def _tiers(
    sizes: Mapping[str, Any],
    epochs: Sequence[int],
    changes: Mapping[str, Any],
    deeper: int = 1,
    wider: int = 1,
    rate: float = 1.0,
    split: int = 1,
) -> dict[str, Recipe]:
    """What an arm changes in each tier, with the window of its depth where it asks for that."""
    tiers = {}
    for (tier, size), length in zip(sizes.items(), epochs, strict=True):
        depth, dim, heads = deeper * size.depth, wider * size.dim, wider * size.heads
        # A denoiser has one more block, in the middle.
        window = _window(depth + isinstance(size, DiffusionRecipe))
        told = {name: window if value == WINDOW else value for name, value in changes.items()}
        tiers[tier] = replace(
            size, epochs=length, depth=depth, dim=dim, heads=heads, lr=rate * size.lr,
            batch=size.batch // split, **told,
        )  # fmt: skip
    return tiers


_SKIPS: dict[str, Any] = {"arch": "paper"}
_RAMP, _NORMS = _SKIPS | {"alpha_min": WINDOW}, _SKIPS | {"norms_as": WINDOW}
# What an arm of chapter 9 changes in `MaskedRecipe`.
_ARMS: dict[str, dict[str, Any]] = {
    "standard": {},
    "skips-only": _SKIPS,
    "decay": _RAMP,
    "standard-xavier": {"zero_init": False},
    "scaled-sum": _SKIPS | {"shortcut": "scaled-sum"},
    "constant": _RAMP | {"kind": "constant"},
    # Decay as rates and as taps of plain shortcuts: 2 x 2, all with the norms of decay.
    "rates": _NORMS | {"rates_as": WINDOW},
    "taps": _NORMS | {"taps_as": WINDOW},
    "rates-taps": _NORMS | {"rates_as": WINDOW, "taps_as": WINDOW},
    "norms": _NORMS,
    "standard-decay": {"alpha_min": WINDOW},
    "branch-scaled": _SKIPS | {"shortcut": "branch-scaled"},
    "learned": _SKIPS | {"shortcut": "learned"},
    "learned-ramp": _RAMP | {"shortcut": "learned"},
    "cosine": _RAMP | {"kind": "cosine"},
    "attention-only": _RAMP | {"kind": "attention"},
    "mlp-only": _RAMP | {"kind": "mlp"},
    "identity-drop": _RAMP | {"shortcut": "identity-drop"},
    "skips-only-xavier": _SKIPS | {"zero_init": False},
    "decay-xavier": _RAMP | {"zero_init": False},
    **{f"alpha-{a}": _SKIPS | {"alpha_min": a} for a in (0.1, 0.2, 0.5, 0.7, 0.85, 0.95)},
}
RULED = ("standard", "skips-only", "decay")
CELLS = ("rates", "taps", "rates-taps", "norms")
LEARNED = ("learned", "learned-ramp")
SCHEDULES = ("cosine", "attention-only", "mlp-only", "identity-drop")
SWEEP = tuple(arm for arm in _ARMS if arm.startswith("alpha"))
UNDAMPED = ("decay", *SWEEP[:2])  # also run with the norms' eps of a plain net
_FIRST = (*RULED, "standard-xavier", "scaled-sum", "constant", *CELLS)
# Arms whose trial another rate won than the usual one, with its factor: by `knn_held` of seed 0,
# tier t4. A new entry makes the queue longer: stop all parts of it before.
TUNED: dict[str, float] = {"decay": 0.25}

# What is asked of kNN accuracy at the last block, by arm or by group of arms.
_EXPECTS = {
    **dict.fromkeys(
        (*RULED, "standard-xavier"),
        "rule fixed before the runs: decay is shown to help if its kNN accuracy at the last block "
        "is above that of standard and skips-only, each at the rate of its trial, and of "
        "standard-xavier, in all seeds, by 1 point and 2 pooled deviations on average; else not at "
        "this scale. A gap at the last block that the best block has not is one of place. (When "
        "seed 0 of six arms at the usual rate had been read, 1/4 was added to the trials of rates, "
        "and that of standard-xavier, declared before, was dropped.)",
    ),
    "mae": "rule fixed before the runs: decay helps here if its kNN accuracy at the last block is "
    "above that of standard and of skips-only in all seeds, by 1 point and 2 pooled deviations "
    "on average; the best block is reported beside it",
    "sizes": "rule fixed before the runs: decay helps at this size or length if its kNN accuracy "
    "at the last block is above that of standard and of skips-only here, in all seeds, by 1 point "
    "and 2 pooled deviations on average: all at one rate",
    "beside": "no rule: it is reported beside long-decay, and decides nothing",
    "trial": "rule fixed before the runs: an arm takes that of 1/4, 1/2, 1 and 2 times the rate "
    "whose knn_held is highest in seed 0; no test image has a say. (1/4 was added when seed 0 of "
    "six arms at the usual rate had been read.)",
    "trial of a denoiser": "rule fixed before the runs: an arm takes that of 1/2, 1 and 2 times "
    "the rate whose held_loss is lowest in seed 0; no test image has a say",
    "diffusion": "rule fixed before the runs: fd is that of 2000 samples, 50 DDIM steps from the "
    "mean weights without guidance, to 10 000 test images, by the features of one fixed "
    "classifier. Intervals are 95 % t intervals of differences paired over seeds 0, 1, 2. (1) "
    "decay minus plain, each at the rate of its trial. Below 0: decay lowers FD here; 0 inside: "
    "that is falsified at this scale; above 0: so it is, and decay harms. (2) no-skips minus "
    "plain, at the usual rate. Above 0: long skips lower FD here; 0 inside: not shown; below 0: "
    "they harm. (3) decay minus rates, beside decay minus plain, all at the usual rate. If decay "
    "minus plain has 0 inside, there is nothing to explain. Else half of its mean is the bound: "
    "step sizes explain decay if all of the interval of decay minus rates is nearer to 0 than "
    "that; they do not if all of it is farther, on the side of decay's effect; else this is open. "
    "Added while the first two nets trained, before any was read: none of it is read unless the "
    "judge finds the class that was asked for in half of plain's samples, without guidance, on "
    "average over seeds, since nets that draw nothing yet tell nothing; for CIFAR-10 likewise of "
    "cifar10-plain's samples; added before any of its runs. "
    "Of all other arms the intervals are reported, and decide nothing",
    "taps of a denoiser": "rule fixed before these runs, when all other arms on Fashion-MNIST but "
    "alpha-0.9 and two seeds of alpha-0.7 had been read: louder taps explain decay if the 95 % "
    "interval of decay minus taps, in fd, paired over seeds 0, 1, 2, at the usual rate, is all "
    "nearer to 0 than half of the mean of decay minus plain; they do not if it is all farther, on "
    "the side of decay's effect; else this is open. Likewise alpha-0.5 by taps-0.5",
    "not run": "not run: for those with a GPU. Minutes and memory are estimates; there is no rule, "
    "intervals would be reported and decide nothing",
    "sweep": "rule fixed before the runs: the product is the knob if decay, whose product is in "
    "[1e-3, 1e-2), is above every other alpha_min by the 95 % interval over paired seeds; eps is "
    "at work where that of undamped minus damped excludes 0",
    **dict.fromkeys(
        CELLS,
        "rule fixed before the runs, but for seed 0 of decay, rates, taps and rates-taps over 15 "
        "epochs, which had begun under another (a half within 2 pooled deviations of decay "
        "explains it): rates-taps is decay to rounding and must not differ from it; the effect of "
        "an arm is its distance from norms, the fourth cell; decay is more than step sizes if its "
        "effect exceeds that of rates, and more than weaker skips if it exceeds that of taps, each "
        "by the 95 % interval over paired seeds",
    ),
    **dict.fromkeys(
        ("decay-xavier", "skips-only-xavier"),
        "rule fixed before the runs: the zero start is not what makes decay harm if decay-xavier "
        "is below skips-only-xavier by the 95 % interval over paired seeds; it is at work if decay "
        "minus skips-only is below that difference by the interval",
    ),
    **dict.fromkeys(
        ("branch-scaled", "scaled-sum"),
        "the shortcut matters, not the branch, if scaled-sum is above branch-scaled and above "
        "skips-only by the 95 % interval over paired seeds",
    ),
    "constant": "the ramp matters, not its product alone, if decay is above this by the 95 % "
    "interval over paired seeds",
    "standard-decay": "decay needs long skips if it harms without them, and more than with them, "
    "each by the 95 % interval over paired seeds",
    **dict.fromkeys(
        LEARNED,
        "fixed factors are best if decay is above both arms with learned ones by the 95 % interval "
        "over paired seeds",
    ),
    **dict.fromkeys(SCHEDULES, "no rule: intervals are reported and decide nothing"),
}


def _masked(
    name: str,
    arm: str,
    turn: int,
    expects: str = "",
    *,
    study: str = "decay",
    also: Mapping[str, Any] | None = None,
    epochs: tuple[int, int, int] = (2, 15, 200),
    deeper: int = 1,
    wider: int = 1,
    rate: float = 1.0,
    split: int = 1,
    minutes: float = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
    keeps: bool = False,
) -> Experiment:
    """An arm of `_ARMS`, under a name that says in what it is special; `also`: what else changes.

    `epochs` are those of the three tiers; `deeper`, `wider` and `rate` are factors: of the depth,
    of width and heads, and of the learning rate. `split`: into how many a batch is split.
    """
    # Another set than CIFAR-10 is one of larger images, which take a GiB more.
    return Experiment(
        study, name.format(arm),
        _tiers(_SIZES, epochs, _ARMS[arm] | dict(also or {}), deeper, wider, rate, split),
        "arXiv 2404.10947, masked autoencoders, on other images",
        _EXPECTS[expects or arm],
        minutes, 1.5 + 2 * deeper * wider + ("data" in (also or {})), seeds, turn, keeps,
    )  # fmt: skip


def _trial_seeds(tuned: Mapping[str, float], arm: str, rate: float) -> tuple[int, ...]:
    """Three for the rate that won an arm's trial, one for the others."""
    return (0, 1, 2) if tuned.get(arm) == rate else (0,)


_long, _TUNE = partial(_masked, turn=5, epochs=(12, 90, 800), minutes=45), {"tuned_images": 1200}
_DENOISERS = {
    "cpu": DiffusionRecipe(images=1000, samples=100, sampling_steps=10, guided=50, measured=200),
    "t4": DiffusionRecipe(),
    "full": DiffusionRecipe(
        batch=256, lr=5e-4, dim=256, depth=12, heads=8, ema=0.9999, samples=10_000, guided=2000,
    ),
}  # fmt: skip
# What an arm of chapter 12 changes in `DiffusionRecipe`, by turns; turn 1 is that of the trials.
_GENERATORS: dict[int, dict[str, dict[str, Any]]] = {
    0: {"plain": {}, "no-skips": {"long_skips": False}, "decay": {"alpha_min": WINDOW}},
    2: {
        "scaled-sum": {"shortcut": "scaled-sum"},
        "rates": {"rates_as": WINDOW},
        **{f"alpha-{a}": {"alpha_min": a} for a in (0.5, 0.7, 0.9)},
    },
    3: {
        "unconditional-plain": {"labelled": False},
        "unconditional-decay": {"labelled": False, "alpha_min": WINDOW},
        "cifar10-plain": {"data": "cifar10"},
        "cifar10-decay": {"data": "cifar10", "alpha_min": WINDOW},
    },
    4: {"taps": {"taps_as": WINDOW}, "taps-0.5": {"taps_as": 0.5}},
}
# As `TUNED`, for denoisers: by `held_loss`.
TUNED_DENOISERS: dict[str, float] = {"plain": 2.0}


def _diffusion(
    arm: str,
    turn: int,
    changes: Mapping[str, Any],
    rate: float = 1.0,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> Experiment:
    """An arm of `_GENERATORS`, or its trial with a factor of the learning rate."""
    return Experiment(
        "diffusion", arm,
        _tiers(_DENOISERS, (1, 5 if "data" in changes else 7, 200), changes, rate=rate),
        "arXiv 2404.10947, U-ViT, on other images and smaller",
        _EXPECTS[
            "taps of a denoiser" if "taps_as" in changes
            else "diffusion" if rate == 1 else "trial of a denoiser"
        ],
        15, 2.5, seeds, turn, keeps=True,
    )  # fmt: skip


_DECIDING = ("plain-eq", "droppath", "two-stage", "mixture")
_CONTROLS = ("plain", "plain-half", "no-freeze", "random-freeze")
_NETS = ("cnn", "vit")
# What decides comes first: a study is run by turns, in each seed by seed in this order.
EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        _spiral("relu", "accuracy above 0.99; CKA rebound above the untrained net's"),
        _spiral("tanh", "CKA rebound below untrained", activation="tanh"),
        _spiral("plain", "does not learn: accuracy 0.5", residual=False),
        _spiral(
            "small", "no effect of training on the rebound", depth=6, width=6, steps=2000, lr=1e-2
        ),
        *(
            _spiral(
                f"{act}-{arm}",
                "after dropping, a skipped block costs less; two-stage is within mixture's spread",
                "arXiv 2411.09475, figure 5 and algorithm 1",
                activation=act,
                arm=arm,
            )
            for act in ("relu", "tanh")
            for arm in (*_DECIDING, *_CONTROLS[1:])
        ),
        _reuse("fashion-mnist", flips=False, minutes=10),
        _reuse("cifar10", flips=True, minutes=15),
        *(_droppath("fashion-mnist", n, a, 0.2, 5) for n in _NETS for a in _DECIDING),
        *(_droppath("cifar10", n, a, 0.2, 5) for n in _NETS for a in _DECIDING),
        *(_droppath("fashion-mnist", n, a, 0.2, 3) for n in _NETS for a in _CONTROLS),
        *(_droppath("fashion-mnist", "cnn", a, 0.2, 3, few=True) for a in _DECIDING),
        *(
            _droppath("fashion-mnist", n, a, p, 3)
            for p in (0.1, 0.5)
            for n in _NETS
            for a in ("two-stage", "mixture")
        ),
        *(
            _masked("{}", a, 0, "mae", study="mae", epochs=(2, 30, 200), minutes=15, keeps=True)
            for a in RULED
        ),
        # Turn 0 is what the rule and the 2 x 2 compare. Trials of rates come before all that is
        # longer and takes the rate that won, but not first: seed 0 of an arm is its own trial at
        # the usual rate, at which all arms are compared anyway. A rate that wins gets more seeds.
        # *rates-taps* is decay in other words: where the two differ, it is by rounding.
        *(
            _masked("{}", a, 0, seeds=tuple(range(5 if a in (*RULED, "rates-taps") else 3)))
            for a in _FIRST
        ),
        *(
            _masked(f"{{}}-lr-{r:g}", a, 1, "trial", rate=r, seeds=_trial_seeds(TUNED, a, r))
            for a in RULED
            for r in (0.25, 0.5, 2.0)
        ),
        *(_masked("{}", a, 2) for a in _ARMS if a not in (*_FIRST, *SWEEP)),
        *(_masked("{}", a, 3, "sweep") for a in SWEEP),
        *(_masked("{}-undamped", a, 3, "sweep", also={"norms_as": 1.0}) for a in UNDAMPED),
        *(
            of(a, 4, "sizes")
            for of in (
                partial(_masked, "deep-{}", deeper=2, minutes=12),
                partial(_masked, "tiny-{}", also={"data": "tiny-imagenet-100", "patch": 8}),
                partial(_masked, "steps-{}", split=4, rate=0.5),
                partial(_masked, "wide-{}", wider=2, minutes=20),
                partial(_masked, "mask-{}", also={"mask_ratio": 0.9}),
            )
            for a in RULED
        ),
        # Where the sign may turn, and the square, where nets have left the plateau.
        *(
            _masked("steps-{}", a, 4, a if a in CELLS else "sizes", split=4, rate=0.5)
            for a in (*SWEEP[3:], *CELLS)
        ),
        # At one rate; beside them decay at the one that won its trial of 15 epochs.
        *(_long("long-{}", a, expects="sizes", keeps=True, also=_TUNE) for a in RULED),
        *(
            _long("long-{}", a, expects=a if a in CELLS else "sizes")
            for a in ("scaled-sum", *CELLS)
        ),
        _long("long-{}-lr-0.25", "decay", expects="beside", also=_TUNE, rate=0.25, seeds=(0,)),
        # Two descriptions of one net: do they still differ where rounding is finer?
        *(
            _masked("float32-{}", a, 6, "rates-taps", also={"precision": "no"}, minutes=20)
            for a in ("decay", "rates-taps")
        ),
        *(_judge_of(data) for data in ("fashion-mnist", "cifar10")),
        *(
            _diffusion(arm, turn, changes)
            for turn, arms in _GENERATORS.items()
            for arm, changes in arms.items()
        ),
        *(
            _diffusion(
                f"{a}-lr-{r:g}", 1, _GENERATORS[0][a], r, _trial_seeds(TUNED_DENOISERS, a, r)
            )
            for a in ("plain", "decay")
            for r in (0.5, 2.0)
        ),
        # A study of its own, so that the other need not wait for this judge.
        *(
            replace(one, study=study, expects=_EXPECTS["not run"], minutes=45, memory_gib=5)
            for study, arms in {
                "judge": [_judge_of("tiny-imagenet-100")],
                "diffusion64": [
                    _diffusion(arm, 0, changes | {"data": "tiny-imagenet-100", "patch": 8})
                    for arm, changes in _GENERATORS[0].items()
                ],
            }.items()
            for one in arms
        ),
    )
}


def get(name: str) -> Experiment:
    """The experiment of that name. Raises ValueError with the nearest name for a typo."""
    return EXPERIMENTS[known("experiment", name, EXPERIMENTS)]


def recipe_of(experiment: Experiment, tier: str, changes: Sequence[str] = ()) -> Any:
    """The recipe of a tier with `key=value` changes; values keep the type of the field.

    Raises ValueError for an unknown tier or key, or a value of another type.
    """
    recipe, given = experiment.tiers[known("tier", tier, TIERS)], {}
    for change in changes:
        key, equals, text = change.partition("=")
        require("set", repr(change), bool(equals), "be key=value")
        old = getattr(recipe, known("set", key, [field.name for field in fields(recipe)]))
        given[key] = _parse(key, text, old)
    return replace(recipe, **given)  # at once: what fits only together may be given together


def _parse(key: str, text: str, old: Any) -> Any:
    many = isinstance(old, tuple)
    wanted, read = _WORDS[type(old[0] if many else old)]
    try:
        return tuple(map(read, text.split(","))) if many else read(text)
    except (KeyError, ValueError):
        raise ValueError(
            f"{key} must be {wanted}{', or several with commas between' * many}, got {text!r}"
        ) from None


_WORDS: dict[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("a whole number", int),
    float: ("a number", float),
    str: ("text", str),
}


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two recipes differ, with both values."""
    pairs = {n: (getattr(a, n, None), getattr(b, n, None)) for n in {**vars(a), **vars(b)}}
    return {name: pair for name, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def queue(
    study: str,
    out: str | Path,
    part: int = 1,
    parts: int = 1,
    tier: str = "t4",
    changes: Sequence[str] = (),
) -> list[tuple[Experiment, int]]:
    """What of a study is not recorded in `out` yet, by turns and seeds: what decides comes first.

    Of the whole study, part p of P has every P-th run: parts started at any time do not meet.
    Raises ValueError for an unknown study, if `out` holds one of these runs with other settings,
    and if a judge that a run needs is not there.
    """
    known("study", study, {experiment.study for experiment in EXPERIMENTS.values()})
    runs = sorted(
        ((one, seed) for one in EXPERIMENTS.values() if one.study == study for seed in one.seeds),
        key=lambda run: (run[0].turn, run[1]),
    )
    done = [
        _is_recorded(_record(one, seed, out), _plain(recipe_of(one, tier, changes), tier))
        for one, seed in runs
    ]
    left = [runs[k] for k in range(part - 1, len(runs), parts) if not done[k]]
    recipes = {recipe_of(one, tier, changes) for one, _ in left}
    for data in sorted({one.data for one in recipes if isinstance(one, DiffusionRecipe)}):
        _kept_judge(data)
    return left


def _record(experiment: Experiment, seed: int, out: str | Path) -> Path:
    return Path(out) / experiment.study / f"{experiment.arm}-s{seed}.json"


def _is_recorded(path: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the record is there; a ValueError if it has other settings than are asked for."""
    old = _settings(results.read(path)) if path.exists() else {}
    pairs = {k: (old[k], asked.get(k)) for k in old if old[k] != asked.get(k)}
    require(
        "out",
        f"{path} with {pairs}, recorded and asked for: give those of the record, or another out",
        not pairs,
        "not hold this run with other settings",
    )
    return bool(old)


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
    on images that was stopped goes on from its checkpoint in `out/unfinished`; without, a line
    says that a record will be replaced. A UserWarning says so if the book's runs with these
    settings saw other images.
    Raises ValueError for unknown names and values, and if `out` holds this run with another
    recipe or takes no files.
    """
    require("seed", seed, seed >= 0, "be at least 0")
    experiment = get(name)
    recipe = recipe_of(experiment, tier, changes)
    described = _plain(recipe, tier)
    path = _record(experiment, seed, out)
    if _is_recorded(path, described):
        if resume:
            return path
        PartialState().print(f"{path} is there and will be replaced; --resume keeps it", flush=True)
    try:  # now, not after hours of training
        write_whole(path.with_suffix(".tmp"), b"")
        path.with_suffix(".tmp").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder to write in, got {out} ({error})") from error
    work = Path(out) / f"unfinished/{name}-s{seed}-{sha256(repr(described).encode())[:8]}"
    keep = path.with_suffix(".safetensors") if seed == 0 and experiment.keeps else None
    outcome = (
        _run_spiral(recipe, seed)
        if isinstance(recipe, SpiralRecipe)
        else _run_images(recipe, seed, data, work, resume, keep)
    )
    where = results.environment(gpu=not isinstance(recipe, SpiralRecipe))
    where["device"] += outcome.pop("precision", "")
    record = results.Run(
        experiment.study, experiment.arm, seed, recipe=described, **outcome, **where
    )
    if PartialState().is_main_process:
        results.write(record, out)
        shutil.rmtree(work, ignore_errors=True)
        if not isinstance(recipe, SpiralRecipe):
            _compare_images(record)
    return path


def _compare_images(run: results.Run) -> None:
    """Warn if the book has a run with the same settings, but on other images."""
    with contextlib.suppress(ValueError, OSError):  # it has none, or is out of reach
        for other in results.load_runs(run.study, run.arm):
            if made_with(other) == made_with(run):
                results.check_fingerprint(other, run.fingerprint)


def made_with(run: results.Run) -> str:
    """The tier of a record and each setting that is not that tier's: "tier=cpu, depth=4"."""
    usual = _plain(recipe_of(get(f"{run.study}-{run.arm}"), run.recipe.get("tier", ""))).items()
    return ", ".join(f"{k}={v}" for k, v in _settings(run).items() if (k, v) not in usual)


def _settings(run: results.Run) -> dict[str, Any]:
    """All of a record's recipe, the tier first; a field that came later had its default then."""
    return _plain(type(get(f"{run.study}-{run.arm}").tiers["t4"])()) | run.recipe


# ---- the spiral ------------------------------------------------------------------------------


def _run_spiral(recipe: SpiralRecipe, seed: int) -> dict[str, Any]:
    (x, y), test = spiral(), spiral(n=2000, seed=12345)
    net = _spiral_net(recipe, seed)
    before = _diagnose_spiral(net, x, y, *test)
    start = time.perf_counter()
    losses = _train_spiral(recipe, net, seed)
    seconds = round(time.perf_counter() - start, 1)
    steps = list(range(0, len(losses), max(1, len(losses) // 50)))
    return {
        "data": {"name": "spiral", "train": 400, "test": 2000, "noise": 0.05},
        "metrics": {"init": before, "trained": _diagnose_spiral(net, x, y, *test)},
        "curve": {"step": steps, "loss": [losses[step] for step in steps]},
        "seconds": seconds,
        "fingerprint": sha256(x.numpy().tobytes())[:16],
        "first_losses": first_losses(recipe, seed),
    }


def _spiral_net(recipe: SpiralRecipe, seed: int) -> ResidualMLP:
    return seeded_nets([seed], recipe.depth, recipe.width, recipe.activation, recipe.residual)[0]


def _train_spiral(recipe: SpiralRecipe, net: ResidualMLP, seed: int) -> list[float]:
    """Full-batch Adam, by one of the arms; the loss of each call (of its first stage)."""
    x, y = spiral()
    calls, _ = _length(recipe, recipe.steps)
    if recipe.arm in PLAIN:
        return train_together([net], x, y, calls, recipe.lr)[0][:, 0].tolist()
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr)
    step = partial(ARMS[recipe.arm][0], net, optimizer, lambda: F.cross_entropy(net(x), y))
    masks, losses = torch.Generator().manual_seed(10_000 + seed), []
    for call in bar(range(calls)):
        losses.append(step(recipe.p, masks).stage1.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss is {losses[-1]} at step {call + 1}, lr={recipe.lr}")
    return losses


def _diagnose_spiral(
    net: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor
) -> dict[str, Any]:
    features, test = reuse.layer_features(net, x), reuse.layer_features(net, test_x)
    score = partial(accuracy, net, test_x, test_y)
    with torch.no_grad():
        losses = [F.cross_entropy(net(a), b).item() for a, b in ((x, y), (test_x, test_y))]
    return {
        "accuracy": score(),
        "loss": losses[1],
        "train_loss": losses[0],
        "probe": reuse.probe_layers(features, y, test, test_y),
        "returning": int(reuse.returning_nodes(features).sum()),
        "returning_paired": int(reuse.returning_nodes(features, rho=0.9).sum()),
        **reuse.diagnose(net, features, score),
    }


# ---- images ----------------------------------------------------------------------------------


def _run_images(
    recipe: ImageRecipe | MaskedRecipe | DiffusionRecipe,
    seed: int,
    data: str | None,
    work: Path,
    resume: bool,
    keep: Path | None,
) -> dict[str, Any]:
    prepare, diagnose, look, finish = _HOW[type(recipe)]
    resume = resume and (work / "checkpoint.json").exists()
    PartialState().print(
        f"loads {recipe.data}, measures the untrained net, then "
        f"{'goes on from its checkpoint' if resume else 'trains'}",
        flush=True,
    )
    train, test = (load(recipe.data, split, data) for split in ("train", "test"))
    train = _few(train, recipe.images, 0)
    state, batches, step = prepare(recipe, seed, train)
    looked_at = state.ema or state.net, recipe, seed, train, test
    before = diagnose(*looked_at)
    precision = state.accelerator.mixed_precision
    judge = [_judge(recipe, test)[1]] if isinstance(recipe, DiffusionRecipe) else []
    key = sha256(repr((recipe, precision, seed, train.fingerprint, *judge)).encode())
    if resume:
        load_checkpoint(work, state, key)
    if look:
        step = _watched(step, len(batches), lambda: look(*looked_at))
    fit(state, batches, step, checkpoint=work, checkpoint_every=100, fingerprint=key)
    more, kept = finish(*looked_at)
    metrics = {"init": before, "trained": diagnose(*looked_at) | more}
    logged = [line for line in state.history if "loss" in line]
    if looks := [line for line in state.history if "loss" not in line]:
        metrics["over_time"] = {name: [line[name] for line in looks] for name in looks[0]}
    if keep and state.accelerator.is_main_process:
        content = safetensors.torch.save(kept)
        if len(content) <= MOST_KEPT:
            write_whole(keep, content)
            metrics["encoder"] = {"sha256": sha256(content)}
    return {
        "data": {"name": recipe.data, "train": len(train), "test": len(test)},
        "precision": "" if precision == "no" else f", {precision}",
        "metrics": metrics,
        "curve": {k: [line[k] for line in logged] for k in ("step", "loss")},
        "seconds": round(state.seconds, 1),
        "fingerprint": train.fingerprint,
        "first_losses": first_losses(recipe, seed, train),
    }


def _few(images: ImageSet, most: int, seed: int = 1) -> ImageSet:
    return images.subset(min(most, len(images)), seed)


def _weights(net: Any, *_: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Nothing more to measure; what is kept: of an MAE its encoder, and the rest as "mae.…"."""
    kept = net.state_dict() | {name: value.half() for name, value in net.named_parameters()}
    if isinstance(net, MAE):
        kept = {f"mae.{name}".removeprefix("mae.encoder."): value for name, value in kept.items()}
    return {}, kept


def _watched(step: Step, steps: int, look: Callable[[], dict[str, Any]]) -> Step:
    """`step` that looks at the net after an eighth, a quarter, a half and all of the steps.

    A look draws nothing: the run is the same with and without it.
    """
    points = {steps >> k for k in range(4)}

    def watched(state: TrainState, batch: Any) -> dict[str, Any]:
        metrics = step(state, batch)
        if state.step + 1 in points:
            state.history.append({"step": state.step + 1, **look()})
        return metrics

    return watched


def _image_training(recipe: ImageRecipe, seed: int, train: ImageSet, cpu: bool = False) -> Any:
    """The state, batches and step of a run: what `fit` takes."""
    set_seed(seed)
    model = _image_net(recipe, train)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    steps, draws = _length(recipe, _batches_seen(recipe, train))
    # Masks have a generator of their own, so that all arms see the same batches.
    state = make_state(
        model, optimizer, scheduler=cosine_schedule(optimizer, steps, round(0.08 * steps)),
        seed=10_000 + seed, cpu=cpu,
    )  # fmt: skip
    batches: Any = Batches(
        train, recipe.batch, draws * steps, seed,
        lambda x, g: flip(shift(x, 2, g), g) if recipe.flips else shift(x, 2, g),
    )  # fmt: skip
    if draws == 2:
        batches = StackDataset(*(Subset(batches, range(k, 2 * steps, 2)) for k in range(2)))
    return (
        state,
        batches,
        partial(_arm_step, recipe) if recipe.arm in ARMS else loss_step(_classify),
    )


def _image_net(recipe: ImageRecipe, train: ImageSet) -> nn.Module:
    (_, channels, side, _), classes = train.images.shape, len(train.classes)
    if known("net", recipe.net, ("cnn", "vit")) == "cnn":
        return ResidualCNN(channels, classes, recipe.widths, recipe.blocks)
    return Classifier(ViT(side, 4, recipe.widths[0], recipe.blocks, 4, channels), classes)


def _batches_seen(recipe: Any, train: ImageSet) -> int:
    most = len(train) // (2 if recipe.epochs == 1 else 1)
    require(
        "batch",
        recipe.batch,
        recipe.batch <= most,
        f"be at most {most} for two batches of {len(train)} images (epochs={recipe.epochs})",
    )
    return recipe.epochs * (len(train) // recipe.batch)


def _length(recipe: SpiralRecipe | ImageRecipe, iterations: int) -> tuple[int, int]:
    """Calls of the step, and batches a call, where the plain arm has `iterations` batches.

    A pair takes two batches. `plain-half` has as many updates a block as the pairs have,
    `plain-eq` as much compute.
    """
    known("arm", recipe.arm, (*PLAIN, *ARMS))
    return {
        "plain": (iterations, 1),
        "droppath": (iterations, 1),
        "plain-half": (iterations // 2, 1),
        "plain-eq": (round(iterations / 2 * ARMS["two-stage"][1](recipe.p) / 3), 1),
    }.get(recipe.arm, (iterations // 2, 2))


def _arm_step(recipe: ImageRecipe, state: TrainState, batch: Any) -> dict[str, Any]:
    fresh = iter(batch if isinstance(batch[0], tuple) else [batch])

    def loss_fn() -> Tensor:
        with state.accelerator.autocast():
            return _classify(state, next(fresh))

    step, optimizer = ARMS[recipe.arm][0], state.optimizer.optimizer  # type: ignore[attr-defined]
    pair = step(
        state.net, optimizer, loss_fn, recipe.p, state.generator, scaler=state.accelerator.scaler
    )
    return {"loss": pair.stage1} | ({} if pair.stage2 is None else {"full_loss": pair.stage2})


def _classify(state: TrainState, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(state.model(to_float(images)), labels)


def _diagnose_images(
    net: nn.Module, recipe: ImageRecipe, _: int, train: ImageSet, test: ImageSet
) -> dict[str, Any]:
    net.eval()
    fitted, probed = (_few(part, recipe.measured) for part in (train, test))
    x, y = to_float(probed.images), probed.labels
    features, bank = (
        reuse.layer_features(getattr(net, "vit", net), to_float(part.images), pool="mean")
        for part in (probed, fitted)
    )
    return {
        **_quality(_logits(net, to_float(test.images)), test.labels),
        "probe": reuse.probe_layers(bank, fitted.labels, features, y),
        **reuse.diagnose(net, features, lambda: _share_right(_logits(net, x), y)),
    }


@torch.no_grad()
def _logits(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(part.to(device_of(net))).cpu() for part in x.split(100)])


def _share_right(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).double().mean().item()


def _quality(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, cross-entropy in nats, and expected calibration error over 15 bins."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return {
        "accuracy": _share_right(logits, y),
        "loss": F.cross_entropy(logits.double(), y).item(),
        "calibration_error": multiclass_calibration_error(
            logits.softmax(1), y, logits.shape[1], n_bins=15
        ).item(),
    }


# ---- masked autoencoders ---------------------------------------------------------------------


def _masked_training(recipe: MaskedRecipe, seed: int, train: ImageSet, cpu: bool = False) -> Any:
    """The state, batches and step of a run: what `fit` takes."""
    set_seed(seed)
    net = _mae_of(recipe, train.images.shape[2], train.images.shape[1])
    return _generative_training(
        recipe, seed, train, cpu, net, net.encoder, _reconstruct,
        _crop_and_flip,
    )  # fmt: skip


def _crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    return flip(crop(images, generator=generator), generator)


def _generative_training(
    recipe: Any,
    seed: int,
    train: ImageSet,
    cpu: bool,
    net: nn.Module,
    body: Any,
    loss: Callable[[TrainState, Any], Tensor],
    augment: Any = None,
) -> Any:
    """What both kinds of net that make images share; `body` is the part that decays."""
    rule = f"{recipe.shortcut} with alpha_min {recipe.alpha_min:g}"
    require(
        "shortcut", rule, rule == "plain with alpha_min 1" or not recipe.rates_as + recipe.taps_as,
        "be plain with alpha_min 1 where rates_as or taps_as is above 0",
    )  # fmt: skip
    ramp = alpha_schedule(len(body.blocks) // 2, recipe.rates_as or 1.0, recipe.kind)
    groups = (
        gain_groups(net, ramp, recipe.lr, recipe.weight_decay, within=body)
        if recipe.rates_as
        else decay_groups(net, recipe.lr, recipe.weight_decay)
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    steps = _batches_seen(recipe, train)
    state = make_state(
        net, optimizer, scheduler=cosine_schedule(optimizer, steps, round(0.05 * steps)),
        ema_decay=getattr(recipe, "ema", 0.0), seed=10_000 + seed, precision=recipe.precision,
        cpu=cpu,
    )  # fmt: skip
    return state, Batches(train, recipe.batch, steps, seed, augment), loss_step(loss)


def encoder_of(recipe: MaskedRecipe, side: int, channels: int) -> ViT:
    """The untrained encoder of a recipe, for square images of `side` pixels."""
    encoder = ViT(
        side, recipe.patch, recipe.dim, recipe.depth, recipe.heads, channels, recipe.shortcut,
        recipe.alpha_min, recipe.zero_init, final_norm=recipe.arch != "paper", kind=recipe.kind,
    )  # fmt: skip
    ends = recipe.norms_as or recipe.alpha_min, recipe.alpha_min
    ramps = (alpha_schedule(recipe.depth, end, recipe.kind) for end in ends)
    rescale_norms(encoder, [wanted / own for wanted, own in zip(*ramps, strict=True)])
    return encoder


def _mae_of(recipe: MaskedRecipe, side: int, channels: int) -> MAE:
    net = MAE(
        encoder_of(recipe, side, channels),
        recipe.decoder_dim,
        recipe.decoder_depth,
        recipe.decoder_heads,
        recipe.mask_ratio,
        arch=recipe.arch,
    )
    shares = alpha_schedule(recipe.depth, recipe.taps_as or 1.0, recipe.kind)
    net.tap_scales = tuple(effective_alpha(shares[: 2 * tap + 2]) for tap in net.taps)
    return net


def kept_mae(run: results.Run, root: str | Path | None = None) -> MAE:
    """The masked autoencoder that seed 0 of an arm kept, encoder and decoder, as trained.

    Raises ValueError if the run kept none, as those of study `mae`, which kept the encoder alone.
    """
    kept = results.kept_tensors(run, root)
    require("run", f"{run.study}-{run.arm}", "mae.token" in kept, "have kept its decoder")
    recipe = MaskedRecipe(**{k: v for k, v in run.recipe.items() if k != "tier"})
    patches, pixels = len(kept["stem.positions"]) - 1, kept["stem.embed.weight"].shape[1]
    net = _mae_of(recipe, recipe.patch * math.isqrt(patches), pixels // recipe.patch**2)
    net.load_state_dict({
        k.removeprefix("mae.") if k.startswith("mae.") else f"encoder.{k}": v
        for k, v in kept.items()
    })  # fmt: skip
    return net.eval()


def _reconstruct(state: TrainState, batch: tuple[Tensor, Tensor]) -> Tensor:
    # Drawn for the whole batch, of which this process has its rows: see `rows`.
    whole = len(batch[0]) * state.accelerator.num_processes
    patches = len(state.net.get_buffer("positions")) - 1
    noise = rows(state, torch.rand(whole, patches, generator=state.generator))
    return state.model(to_float(batch[0]), noise).loss


def _see_masked(
    net: MAE, recipe: MaskedRecipe, _: int, train: ImageSet, test: ImageSet
) -> dict[str, float]:
    """Of few images, of the train split alone."""
    few = _few(train, 2400)
    y, cut = few.labels, 2 * len(few) // 3
    read = reuse.layer_features(net.encoder, to_float(few.images), pool="patches")
    knn = [_neighbours(x[:cut], y[:cut], x[cut:], y[cut:]) for x in read[2::2]]
    return {
        "knn_last": knn[-1],
        "knn_best": max(knn),
        "probe_last": reuse.probe_accuracy(read[-1][:cut], y[:cut], read[-1][cut:], y[cut:]),
        "rank_entropy_last": reuse.rank_entropy(read[-1]),
        "rank_entropy_centred_last": reuse.rank_entropy(read[-1], centre=True),
    }


def _diagnose_masked(
    net: MAE, recipe: MaskedRecipe, seed: int, train: ImageSet, test: ImageSet
) -> dict[str, Any]:
    """Features are means over patches after the stem and each block; standardised but for ranks."""
    bank, asked = (_few(part, recipe.measured) for part in (train, test))
    labels = bank.labels, asked.labels
    pixels, others = (to_float(part.images).flatten(1) for part in (bank, asked))
    read = partial(reuse.layer_features, net.encoder, pool="patches")
    # A block is two sub-layers: every second state is the end of a block.
    layers = list(zip(*(read(to_float(part.images))[::2] for part in (bank, asked)), strict=True))
    held, noise = to_float(asked.images[:1000]), torch.Generator().manual_seed(0)
    with reuse.evaluating(net), torch.no_grad():  # of the class: accelerate's own is in bf16
        loss = MAE.forward(net, held.to(device_of(net)), generator=noise).loss
    knn = [_neighbours(a, bank.labels, b, asked.labels) for a, b in layers]
    best = _probe(layers[1:], *labels)  # of the block that a held-out tenth of the bank chooses
    last = best if int(best.source) == len(layers) - 2 else _probe(layers[-1:], *labels)
    return {
        "loss": loss.item(),
        "knn_pixels": _neighbours(pixels, bank.labels, others, asked.labels),
        "knn": knn,
        "knn_last": knn[-1],
        "knn_best": max(knn[1:]),
        "knn_held": _held(layers[-1][0], bank.labels),
        "probe_last": last.accuracy,
        "probe_best": best.accuracy,
        "probe_block": 1 + int(best.source),
        "rank_entropy": [reuse.rank_entropy(seen[:2048]) for _, seen in layers],
        "rank_entropy_centred": [reuse.rank_entropy(s[:2048], centre=True) for _, s in layers],
        **(_fine_tuned(net.encoder, recipe, seed, train, asked) if recipe.tuned_images else {}),
    }


def _fine_tuned(
    encoder: ViT, recipe: MaskedRecipe, seed: int, train: ImageSet, test: ImageSet
) -> dict[str, float]:
    """Accuracy of a copy of the encoder, and of its export if it decays, trained with a new head.

    Ten epochs of few images, for all arms of a seed the same, at a rate chosen for `skips-only` on
    other images of the train split. An encoder without a final norm gets one, or the scale of its
    features would decide; until it is trained the export then has the same logits. The encoder and
    the random state of the run are left as they were.
    """
    few = _few(train, recipe.tuned_images, seed)
    size = min(128, len(few))
    steps = 10 * (len(few) // size)
    vit = copy.deepcopy(encoder)
    if not isinstance(vit.norm, nn.LayerNorm):
        vit.norm = nn.LayerNorm(recipe.dim, eps=vit.eps)
    decays, found = recipe.shortcut == "plain" and recipe.alpha_min < 1, {}
    exported = {"fine_tuned_exported": export_plain(vit)} if decays else {}
    for name, body in ({"fine_tuned": vit} | exported).items():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = Classifier(body, len(few.classes))
            optimizer = torch.optim.AdamW(fine_tuning_groups(net, lr=3e-3))
            state = make_state(
                net, optimizer, scheduler=cosine_schedule(optimizer, steps, round(0.05 * steps)),
                precision=recipe.precision,
            )  # fmt: skip
            fit(state, Batches(few, size, steps, seed, _crop_and_flip), loss_step(_classify))
        found[name] = _share_right(_logits(net.eval(), to_float(test.images)), test.labels)
    return found


def _neighbours(bank: Tensor, bank_labels: Tensor, asked: Tensor, labels: Tensor) -> float:
    bank, asked = standardised(bank, asked)
    return knn_accuracy(bank, bank_labels, asked, labels)


def _held(bank: Tensor, labels: Tensor) -> float:
    """Mean over tenths of the bank, each asked of the other nine: what rates are chosen by."""
    n = len(labels) // 10
    turned = ((bank.roll(k * n, 0), labels.roll(k * n)) for k in range(10))
    return mean(_neighbours(x[n:], y[n:], x[:n], y[:n]) for x, y in turned)


def _probe(layers: Sequence[Any], bank_labels: Tensor, labels: Tensor) -> Probe:
    """A linear probe of the best of some layers, each a pair (bank, asked)."""
    bank, asked = ({str(k): layer[part] for k, layer in enumerate(layers)} for part in (0, 1))
    return linear_probe(bank, bank_labels, asked, labels)


# ---- diffusion -------------------------------------------------------------------------------


def _diffusion_training(
    recipe: DiffusionRecipe, seed: int, train: ImageSet, cpu: bool = False
) -> Any:
    """The state, batches and step of a run: what `fit` takes."""
    set_seed(seed)
    _, channels, side, _ = train.images.shape
    net = UViT(
        side, recipe.patch, recipe.dim, recipe.depth, recipe.heads, channels, len(train.classes),
        recipe.shortcut, recipe.alpha_min, recipe.long_skips, recipe.zero_init, kind=recipe.kind,
    )  # fmt: skip
    ramp, taps = alpha_schedule(recipe.depth + 1, recipe.taps_as or 1.0, recipe.kind), net.skips
    net.tap_scales = tuple(
        1 / effective_alpha(ramp[2 * k + 2 : 2 * (recipe.depth - k)]) for k in range(len(taps))
    )
    return _generative_training(
        recipe, seed, _apart(train)[0], cpu, net, net, partial(_denoise, recipe, _process(recipe))
    )


def _apart(train: ImageSet) -> list[ImageSet]:
    """What a denoiser is trained on, and what is held out of the train split: the last of it."""
    cut = len(train) - min(1000, len(train) // 10)
    return [
        replace(train, images=train.images[part], labels=train.labels[part])
        for part in (slice(cut), slice(cut, None))
    ]


def _process(recipe: DiffusionRecipe) -> Diffusion:
    return Diffusion(1000, recipe.schedule, recipe.target)


def _denoise(
    recipe: DiffusionRecipe, process: Diffusion, state: TrainState, batch: tuple[Tensor, Tensor]
) -> Tensor:
    x0, labels = to_float(batch[0]), batch[1]
    # Drawn for the whole batch, as masks are, and by arms without classes too: the same for all.
    whole, draw = len(x0) * state.accelerator.num_processes, state.generator
    t = rows(state, torch.randint(process.steps, (whole,), generator=draw))
    noise = rows(state, torch.randn(whole, *x0.shape[1:], generator=draw)).to(x0)
    dropped = rows(state, torch.rand(whole, generator=draw) < 0.1).to(x0.device)
    y = torch.where(dropped, -1, labels) if recipe.labelled else None
    return process.loss(state.model, x0, y, t, noise, drop_label=0.0)


def _draw(net: UViT, recipe: DiffusionRecipe, seed: int, n: int, guidance: float = 1.0) -> Tensor:
    """`n` samples, of each class in turn, from noise that all arms of a seed share."""
    noise = torch.randn(
        max(n, recipe.samples), *net.stem.shape,
        generator=torch.Generator().manual_seed(20_000 + seed),
    )[:n].split(128)  # fmt: skip
    y = (torch.arange(n) % net.stem.classes).split(128)
    return torch.cat([
        _process(recipe).sample(
            net, x.shape, "ddim", recipe.sampling_steps, y=c if recipe.labelled else None,
            guidance=guidance, clip=1.0, noise=x,
        ).cpu()
        # On the line of the bar of `fit`, in which some are drawn.
        for x, c in bar([*zip(noise, y, strict=True)], desc="samples", position=0, leave=False)
    ])  # fmt: skip


def _kept_judge(data: str) -> tuple[results.Run, dict[str, Tensor]]:
    """Record and weights of the fixed classifier by which all runs on a data set are judged.

    They are those of the book: the same bytes for all. Raises ValueError, with the command that
    makes them, if they are not there or are others than recorded.
    """
    try:
        run = results.load_runs("judge", data)[0]
        return run, results.kept_tensors(run)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"samples of {data} need their judge, made once in a checkout of the repository by: "
            f"python -m mini_resdecay run judge-{data} --tier t4 --out "
            f"'{results.checkout() or 'book/results'}' ({error})"
        ) from error


@lru_cache(1)
def _judge(recipe: DiffusionRecipe, test: ImageSet) -> tuple[Any, str, Tensor]:
    """The fixed classifier, the hash of its file, and its features of the test images."""
    run, weights = _kept_judge(recipe.data)
    with torch.device("meta"):  # draws no numbers
        judge = _image_net(
            ImageRecipe(**{k: v for k, v in run.recipe.items() if k != "tier"}), test
        )
    judge.load_state_dict(weights, assign=True)
    return (
        judge,
        run.metrics["encoder"]["sha256"],
        _features(judge, to_float(_few(test, 5 * recipe.samples).images)),
    )


def _features(judge: nn.Module, images: Tensor) -> Tensor:
    """What the judge's head sees, [n, d]."""
    return torch.cat([
        reuse.layer_features(judge, x, modules=["norm"])[0].relu().mean((1, 2))
        for x in images.split(500)
    ])  # fmt: skip


@torch.no_grad()
def _see_denoiser(
    net: UViT, recipe: DiffusionRecipe, seed: int, train: ImageSet, test: ImageSet
) -> dict[str, float]:
    """Loss on images that it does not train on, with fixed noise; FD of a tenth of the samples."""
    found = {}
    for name, held in (("held_loss", _apart(train)[1]), ("test_loss", _few(test, 1000))):
        x, labels = (part.to(device_of(net)) for part in (to_float(held.images), held.labels))
        found[name] = _process(recipe).loss(
            net, x, labels if recipe.labelled else None, drop_label=0.0,
            generator=torch.Generator().manual_seed(0),
        ).item()  # fmt: skip
    judge, _, real = _judge(recipe, test)
    few = _features(judge, _draw(net, recipe, seed, recipe.samples // 10))
    return found | {"fd_few": frechet_distance(few, real)}


def _diagnose_denoiser(
    net: UViT, recipe: DiffusionRecipe, seed: int, train: ImageSet, test: ImageSet
) -> dict[str, Any]:
    """By noise level: features as in `_diagnose_masked`, of noisy images without their class.

    The best block and level are those that a held-out tenth of the bank chooses. Beside them
    neighbours by the pixels of the same noisy images, which keep their places.
    """
    bank, asked = _few(train, recipe.measured), _few(test, recipe.measured // 2)
    y, n, fixed = bank.labels, len(bank) // 10, torch.Generator().manual_seed(0)
    noisy = {str(t): [_noisy(recipe, x.images, t, fixed) for x in (bank, asked)] for t in LEVELS}
    read = {
        t: list(zip(*(_inside(net, x, int(t)) for x in pair), strict=True))
        for t, pair in noisy.items()
    }
    found: dict[str, Any] = {
        "rank_entropy": {t: [reuse.rank_entropy(b[:2048]) for _, b in read[t]] for t in read},
        "pixels": {
            t: _neighbours(a.flatten(1), y, b.flatten(1), asked.labels)
            for t, (a, b) in noisy.items()
        },
    }
    for name, score in (("knn", _neighbours), ("probe", reuse.probe_accuracy)):
        found[name] = {t: [score(a, y, b, asked.labels) for a, b in read[t]] for t in read}
        held = {
            (t, k): score(a[n:], y[n:], a[:n], y[:n])
            for t in read
            for k, (a, _) in enumerate(read[t])
            if k  # not of the stem
        }
        t, k = max(held, key=lambda place: held[place])
        found |= {f"{name}_best": found[name][t][k], f"{name}_place": {"t": int(t), "block": k}}
    return found | _see_denoiser(net, recipe, seed, train, test)


def _noisy(recipe: DiffusionRecipe, images: Tensor, level: int, fixed: torch.Generator) -> Tensor:
    x0, t = to_float(images), torch.full((len(images),), level)
    return _process(recipe).q_sample(x0, t, torch.randn(x0.shape, generator=fixed))


def _inside(net: UViT, noisy: Tensor, level: int) -> list[Tensor]:
    """Means over patches after the stem and each block, of images with noise of a level."""
    parts = [
        [x[:, net.stem.extra :].mean(1) for x in reuse.layer_features(net, *pair)[::2]]
        for pair in ((x, torch.full((len(x),), level)) for x in noisy.split(500))
    ]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def _judged(
    net: UViT, recipe: DiffusionRecipe, seed: int, train: ImageSet, test: ImageSet
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """FD of the samples and what to read it by, precision to coverage, guidance; what is kept.

    The floor is that of as many train images, another that of half of them, on which the judge
    was trained; `fd_floor_test` is that of one half of the test images to the other. Each FD has
    a name with the number of images that it is of. `far` is the median distance in pixels of 500
    samples to their nearest training images, `far_test` that of test images.
    """
    judge, digest, real = _judge(recipe, test)
    n, read = recipe.samples, partial(_features, judge)
    made, seen = _draw(net, recipe, seed, n), to_float(train.images)
    features, floor = read(made), read(seen[: len(seen) // 2])
    noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    clouds = {
        "fd": (features, real), "fd_floor": (floor[:n], real), "fd_floor_half": (floor, real),
        "fd_floor_test": real.tensor_split(2), "fd_noise": (read(noise), real),
    }  # fmt: skip
    sizes = {name: len(cloud) for name, (cloud, _) in clouds.items()} | {"fd_few": n // 10}
    found: dict[str, Any] = {
        "fd_name": {name: f"FD_judge-{recipe.data}@{size}" for name, size in sizes.items()},
        "judge": digest,
        **{name: frechet_distance(*pair) for name, pair in clouds.items()},
        **overlap(real[:n], features)._asdict(),
        **{
            name: torch.cdist(x[:500].flatten(1), seen.flatten(1)).min(1).values.median().item()
            for name, x in (("far", made), ("far_test", to_float(test.images[:500])))
        },
    }
    if recipe.labelled:
        y = torch.arange(recipe.guided) % net.stem.classes
        guided = [
            features[: len(y)] if w == 1 else read(_draw(net, recipe, seed, len(y), w))
            for w in recipe.guidances
        ]
        found["guidance"] = {
            "scale": list(recipe.guidances),
            "fd_name": f"FD_judge-{recipe.data}@{recipe.guided}",
            "fd": [frechet_distance(cloud, real) for cloud in guided],
            "agreement": [_share_right(judge.head(cloud), y) for cloud in guided],
        }
    return found, {"samples": ((made[:64] + 1) * 127.5).round().byte()}


# How a recipe becomes a training (state, batches, step), what is measured of the net before and
# after it, what on the way, and what is measured and kept at the end alone.
_HOW: dict[type, tuple[Any, Any, Any, Any]] = {
    ImageRecipe: (_image_training, _diagnose_images, None, _weights),
    MaskedRecipe: (_masked_training, _diagnose_masked, _see_masked, _weights),
    DiffusionRecipe: (_diffusion_training, _diagnose_denoiser, _see_denoiser, _judged),
}


def first_losses(recipe: Any, seed: int, train: ImageSet | None = None) -> list[float]:
    """The first five losses of a run, in float32 on the CPU: what a test replays."""
    if isinstance(recipe, SpiralRecipe):
        return _train_spiral(
            replace(recipe, steps=min(10, recipe.steps)), _spiral_net(recipe, seed), seed
        )[:5]
    exact = {"precision": "no"} if hasattr(recipe, "precision") else {}
    state, batches, step = _HOW[type(recipe)][0](replace(recipe, **exact), seed, train, cpu=True)
    state.scheduler = None  # all at the rate of the first
    fit(state, batches, step, until=5, every=1, quiet=True)
    return [line["loss"] for line in state.history]


def _plain(recipe: Recipe, tier: str = "") -> dict[str, Any]:
    """A recipe as a record has it: the tier first, lists for tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in {"tier": tier, **asdict(recipe)}.items()
    }
