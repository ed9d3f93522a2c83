"""Write book/evidence.md: every claim of both papers, what was run, and the verdict by its rule.

    python book/_tools/evidence.py                  from book/results
    python book/_tools/evidence.py --results ROOT   from another folder of records
    python book/_tools/evidence.py --out -          to the screen

Claims, comparisons and rules are the data below; every number on the page is computed from the
records. A test writes the page again and compares.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from mini_resdecay import REPO, __version__, results
from mini_resdecay.experiments import (
    CELLS,
    EXPERIMENTS,
    LEARNED,
    SCHEDULES,
    SWEEP,
    TUNED,
    TUNED_DENOISERS,
    UNDAMPED,
)
from mini_resdecay.results import Interval, Run

BOOK = Path(__file__).resolve().parents[1]
HOLDS, NOT_HERE, CONTRADICTED = "holds here", "not at this scale", "contradicted"
PARTLY, MIXED, NOT_RUN, HELD = "holds in part", "mixed", "not yet run", "exact"
FEW_ARMS = "too few arms"  # for a correlation
UNSHOWN = "not read"  # a reading begins so where a condition fails; the condition follows
UNREAD = (NOT_RUN, FEW_ARMS, UNSHOWN)
Runs = Mapping[tuple[str, str], Mapping[int, Run]]  # study and arm, then seed


# ---- what a row is ----


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `control` in one metric, paired by seed; `sign` is the claimed direction.

    `before` is the control's metric where it is another one (the untrained net's). A metric is a
    path as in `results.value`; of a list the mean, max, last or largest fall: "max:trained.skip".
    With a `margin` the claim is that nothing is lost beyond it. With `bases`, one for the arm and
    one for the control, what is compared is what each adds to its own; `absolute`: either way.
    Nothing is read before seed 0 of the arms `after`, its trials, is recorded, nor unless samples
    of the arm `shown` do show their class in half of the cases (`share`).
    """

    label: str
    study: str
    arm: str
    control: str
    metric: str
    sign: int = 1
    before: str = ""
    margin: float = 0.0
    decides: bool = True
    digits: int = 3
    bases: tuple[str, ...] = ()
    absolute: bool = False
    after: tuple[str, ...] = ()
    shown: str = ""

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms whose records it reads."""
        return self.arm, self.control, *self.bases

    def pairs(self, runs: Runs) -> list[tuple[float, float]]:
        """The arm's number and the control's, one pair a seed that both have."""
        if not all(0 in runs.get((self.study, arm), {}) for arm in self.after):
            return []
        if self.shown and self.share(runs) is None:
            return []
        found = [runs.get((self.study, arm), {}) for arm in self.arms]
        seeds = sorted(set.intersection(*map(set, found)))
        for s in seeds:
            if len({repr(seen_by(one[s])) for one in found}) > 1:
                told = f"{self.study}: {' and '.join(self.arms)}, seed {s}"
                raise ValueError(f"{told}, must share tier and data to be compared")
        metrics = self.metric, self.before or self.metric, *[self.metric] * len(self.bases)
        read = [[number(one[s], m) for one, m in zip(found, metrics, strict=True)] for s in seeds]
        if not self.bases:
            return [(arm, control) for arm, control in read]
        added = [(arm - base, control - other) for arm, control, base, other in read]
        return [(abs(a), abs(c)) for a, c in added] if self.absolute else added

    def share(self, runs: Runs) -> float | None:
        """Of samples of `shown` in which the judge finds the class asked for, mean over seeds."""
        recorded = runs.get((self.study, self.shown), {}).values()
        shares = [number(run, "trained.guidance.agreement.0") for run in recorded]
        return mean(shares) if shares else None


def seen_by(run: Run) -> tuple[Any, ...]:
    """What two runs must share for their difference to be that of the arms."""
    return run.recipe.get("tier"), run.data, run.fingerprint


@dataclass(frozen=True)
class Link:
    """Spearman's rank correlation of two metrics over arms, one a seed; compared with 0.

    Fewer than six arms are not read.
    """

    label: str
    study: str
    arms: tuple[str, ...]
    x: str
    y: str
    sign: int = 1
    margin: float = 0.0
    decides: bool = True
    digits: int = 2

    def pairs(self, runs: Runs) -> list[tuple[float, float]]:
        """The correlation and 0, one pair a seed that all arms have."""
        found = [runs.get((self.study, arm), {}) for arm in self.arms]
        seeds = sorted(set.intersection(*map(set, found)))
        read = [[[number(arm[s], m) for arm in found] for m in (self.x, self.y)] for s in seeds]
        return [(correlation(x, y), 0.0) for x, y in read]


@dataclass(frozen=True)
class Claim:
    """One claim: whose it is, how sure we are that it is made, and what is compared.

    `rule`: "every" comparison decides, "any" is enough, or "study", the rule of `fixed`, an
    experiment whose rule was in the code before its runs. `needs`: what is still to be run.
    `where`: chapters, behind each its figures: "5 fig-05-rates; 9".
    """

    number: str
    title: str
    claim: str
    source: str
    mark: str
    controls: str = ""
    compared: tuple[Comparison | Link, ...] = ()
    rule: str = "every"
    fixed: str = ""
    needs: str = ""
    note: str = ""
    where: str = ""


@dataclass(frozen=True)
class Exact:
    """What follows from the definitions; held by tests and shown in a chapter's section."""

    number: str
    title: str
    claim: str
    about: str
    tests: tuple[str, ...]
    chapter: int
    section: str


class Line(NamedTuple):
    """A comparison as the records have it."""

    what: Comparison | Link
    means: tuple[float, float] | None
    gap: Interval | None
    seeds: int
    planned: int
    reading: str


MARKS = {
    "stated": "stated there; the body is unread",
    "verified": "verified there",
    "second hand": "reported at second hand",
    "unverified": "reported at second hand, unverified",
    "reviews": "asked in public reviews, reported at second hand",
    "derived": "derived for this book",
}
RULES = {
    "every": "by the 95 % interval of each comparison; *holds here* if all lie on the claimed side",
    "any": "by the 95 % interval of each comparison; *holds here* if at least one lies on the "
    "claimed side, since the claim is about certain cases; some that point the other way do not "
    "refute it",
    "study": "for lines marked *(rule)* that of the study, which says when a claim holds; "
    "*contradicted* is our mirror image of it. For lines marked *(interval)* the 95 % interval",
}
VERDICTS = {
    HOLDS: "by its rule the claim holds here, in every comparison that decides (where the claim is "
    "about certain cases: in one)",
    PARTLY: "it holds in some comparisons, the others show nothing",
    MIXED: "it holds in some comparisons, and some contradict it",
    NOT_HERE: "no comparison that decides shows it; some may point the other way (all of them, "
    "where the claim is about certain cases). An effect too small for so few seeds may be there",
    CONTRADICTED: "all comparisons that decide point the other way",
    NOT_RUN: "fewer than two seeds are recorded, or no run was made, or trials of rates that the "
    "rule waits for are missing",
    HELD: "a statement that follows from the definitions, held by a test",
}


# ---- the claims ----

# Nets: what a label says, the study, and the name of its arms.
TOY = (("ReLU", "spiral", "relu-{}"), ("tanh", "spiral", "tanh-{}"))
SMALL = (("ReLU, depth 6", "spiral", "small"),)
REUSE = (("Fashion-MNIST, CNN", "reuse", "fashion-mnist"), ("CIFAR-10, CNN", "reuse", "cifar10"))
FASHION = (
    ("Fashion-MNIST, CNN", "droppath", "fashion-mnist-cnn-{}"),
    ("Fashion-MNIST, ViT", "droppath", "fashion-mnist-vit-{}"),
)
CIFAR = (
    ("CIFAR-10, CNN", "droppath", "cifar10-cnn-{}"),
    ("CIFAR-10, ViT", "droppath", "cifar10-vit-{}"),
)
FEW = (("Fashion-MNIST, CNN, 500 images", "droppath", "fashion-mnist-cnn-{}-few"),)
RATES = tuple(
    (f"{title}, drop rate {rate / 100}", study, f"{net}-p{rate}")
    for rate in (10, 50)
    for title, study, net in FASHION
)
MASKED = (("30 epochs", "mae", "{}"),)
SHORT = (("15 epochs", "decay", "{}"),)
MADE = (("usual rate", "diffusion", "{}"),)
OTHERS_MADE = (
    ("unconditional", "diffusion", "unconditional-{}"),
    ("CIFAR-10", "diffusion", "cifar10-{}"),
)
OTHER_SIZES = (
    ("90 epochs", "decay", "long-{}"),
    ("depth 12", "decay", "deep-{}"),
    ("width 192", "decay", "wide-{}"),
    ("nine tenths masked", "decay", "mask-{}"),
    ("four times the steps", "decay", "steps-{}"),
    ("tiny-imagenet-100", "decay", "tiny-{}"),
)
STEPS = tuple(one for one in OTHER_SIZES if one[2].startswith("steps"))
# Measures: name, path, and the claimed direction.
HALF_BLOCKS = ("accuracy with half of the blocks", "trained.half", 1)
HALF_PATHS = ("half of the paths", "trained.half", 1)
SKIP = ("accuracy lost without a block, mean", "mean:trained.skip", -1)
WORST = ("accuracy lost without a block, worst", "max:trained.skip", -1)
REBOUND = ("rebound of CKA", "trained.rebound.cka", -1)
FALL = ("fall of the probe", "fall:trained.probe", 1)
ACCURACY = ("accuracy", "trained.accuracy", 1)
KNN = ("kNN, last block", "trained.knn_last", 1)
READERS = (
    ("kNN, best block", "trained.knn_best", 1),
    ("probe, last block", "trained.probe_last", 1),
    ("probe, best block", "trained.probe_best", 1),
)
TUNED_WORSE = ("accuracy after fine-tuning", "trained.fine_tuned", -1)
LOSS = ("masked loss", "trained.loss", -1)
FD = ("FD", "trained.fd", -1)
# Behind the first and the last of five blocks.
BY_BLOCK = (
    ("kNN, block 1", "trained.knn.100.1", 1),
    ("kNN, block 5", "trained.knn.100.5", 1),
    ("probe, block 5", "trained.probe.100.5", 1),
)
INSIDE = (("kNN inside", "trained.knn_best", 1), ("probe inside", "trained.probe_best", 1))
# Behind the middle of five blocks, at the noise of t = 100.
RANK_INSIDE = ("rank entropy inside", "trained.rank_entropy.100.3", -1)
SHARES = tuple(
    (name, f"trained.{name}", 1) for name in ("precision", "recall", "density", "coverage")
)
RANK = ("rank entropy", "last:trained.rank_entropy", -1)
CENTRED = ("rank entropy, centred", "last:trained.rank_entropy_centred", -1)
# Arms.
BOTH = ("standard", "skips-only")
SEEN_MADE = (FD, *SHARES, *INSIDE, RANK_INSIDE)
SEEN_INSIDE = ("no-skips", "rates", "taps", "scaled-sum")
BESIDE_MADE = (*SEEN_INSIDE, "alpha-0.5", "alpha-0.7", "alpha-0.9", "taps-0.5")
LINKED = (
    "standard-xavier", *BOTH, "decay", "scaled-sum", "constant", *CELLS[:2], "standard-decay",
    "branch-scaled", *LEARNED, *SCHEDULES, *SWEEP,
)  # fmt: skip
PLANNED = [one for one in EXPERIMENTS.values() if not one.expects.startswith("not run")]
TRIALS = {
    study: tuple(e.arm for e in EXPERIMENTS.values() if e.study == study and e.turn == 1)
    for study in ("decay", "diffusion")
}
DROPPING = ("-droppath", "-two-stage", "-mixture", "-no-freeze", "-random-freeze")


def rows(
    nets: Sequence[tuple[str, str, str]],
    arm: str,
    controls: Sequence[str],
    *measures: tuple[str, str, int],
    beside: bool = False,
) -> tuple[Comparison, ...]:
    """An arm minus each control, in every net and measure; `beside`: they do not decide.

    An arm "" is the plain one, whose name is the net's. Labels name a control that is not alone.
    """
    against = beside or len(controls) > 1
    return tuple(
        Comparison(
            f"{title}, {name}".removeprefix(", ") + f", against `{c or 'plain'}`" * against,
            study,
            net.format(arm).strip("-"),
            net.format(c).strip("-"),
            metric,
            sign,
            decides=not beside,
        )
        for c in controls
        for title, study, net in nets
        for name, metric, sign in measures
    )


def extra(
    arm: str,
    controls: Sequence[str],
    *measures: tuple[str, str, int],
    net: tuple[str, str, str] = ("", "decay", "{}"),
) -> tuple[Comparison, ...]:
    """Rows of the study `decay` that do not decide and name their arm."""
    title, study, name = net
    named = (f"{title}, `{arm}`".removeprefix(", "), study, name)
    return rows((named,), arm, controls, *measures, beside=True)


def tuned(arm: str, rates: Mapping[str, float] = TUNED) -> str:
    """The arm of the study `decay`, or of that of `rates`, at the rate that its trial won."""
    return f"{arm}-lr-{rates[arm]:g}" if arm in rates else arm


def learned(
    nets: Sequence[tuple[str, str, str]], *measures: tuple[str, str, int], digits: int = 3
) -> tuple[Comparison, ...]:
    """The trained net minus itself untrained."""
    return tuple(
        replace(row, before=row.metric.replace("trained", "init"), digits=digits)
        for row in rows(nets, "", ("",), *measures)
    )


RESIDUAL_DROPPATH = (
    Claim(
        "A1",
        "Similarity falls and rises again",
        "Across the layers of a trained residual net similarity falls and then rises; this is read "
        "as indirect evidence that features are transformed back and made again.",
        "figure 3, caption",
        "stated",
        "the same net untrained; two activations; four measures; a small CNN on real images",
        (
            *learned(
                TOY,
                ("rebound of CKA", "trained.rebound.cka", 1),
                ("rebound of centred cosine", "trained.rebound.centred_cosine", 1),
                ("rebound of cosine", "trained.rebound.cosine", 1),
            ),
            *learned(REUSE, ("rebound of debiased CKA", "trained.rebound.debiased_cka", 1)),
        ),
        needs="trained nets of another width (untrained ones are in chapter 3)",
        note="Much of what the picture shows is there before training: in raw cosine, and in CKA "
        "for tanh. The rise in CKA of ReLU nets is not, and why it comes is open.",
        where="3 fig-03-maps fig-03-images",
    ),
    Claim(
        "A2",
        "Distributions come back",
        "After several layers the activations of a node reach a distribution that they had before.",
        "figures 1 and 4, captions",
        "stated",
        "the same nets untrained; a strict count, in which the same points must come back too; "
        "two activations, two depths",
        learned(
            TOY + SMALL,
            ("returning nodes", "trained.returning", 1),
            ("strict count", "trained.returning_paired", 1),
            digits=1,
        ),
        note="A histogram that returns is not a feature that returns: shuffling the points keeps "
        "every plain count and removes every strict one.",
        where="2 fig-02-counts",
    ),
    Claim(
        "A3",
        "This loses information",
        "Falling and rising could be bad for keeping information along depth.",
        "captions",
        "stated",
        "the same nets untrained; for the correlation all eight arms of the toy. *Fall* is the "
        "most that the accuracy of a linear probe loses on the way through the layers",
        (
            *learned(TOY + REUSE, FALL),
            *(
                Link(
                    f"{act}, rebound with fall",
                    "spiral",
                    tuple(act.lower() + arm for arm in ("", "-plain-half", "-plain-eq", *DROPPING)),
                    REBOUND[1],
                    FALL[1],
                )
                for act in ("ReLU", "tanh")
            ),
        ),
        needs="ten seeds, which the plan of this claim asks for",
        note="A probe reads labels. What else is lost it cannot see.",
        where="3 fig-03-probe",
    ),
    Claim(
        "A4",
        "Dropping paths enforces reuse",
        "Training with randomly dropped layers makes the others build on features that they have.",
        "abstract",
        "stated",
        "toy: `plain-half`, with 500 updates a block against about 800; beside it `plain`, with as "
        "many steps. Images: `plain-eq`, of about equal compute, where no other is named",
        (
            *rows(TOY, "droppath", ("plain-half",), HALF_BLOCKS, SKIP, WORST, REBOUND),
            *rows(CIFAR + FEW, "droppath", ("plain-eq",), HALF_PATHS),
            *rows(FASHION, "droppath", ("plain-eq", "plain-half"), HALF_PATHS),
            *rows(TOY, "droppath", ("",), HALF_BLOCKS, beside=True),
        ),
        note="Robustness to missing blocks is what reuse would predict. It is also what small or "
        "interchangeable blocks would predict.",
        where="4 fig-04-half fig-04-skip",
    ),
    Claim(
        "A5",
        "The second stage, with frozen parts, adds to it",
        "Training the dropped parts while the kept ones are frozen makes the dropped ones learn "
        "with reuse in mind.",
        "abstract",
        "stated",
        "`mixture`: the same drops and as many updates a block, nothing frozen. Beside it: "
        "`random-freeze`, without the link between dropped and trained; `no-freeze`, with more "
        "updates; `droppath`, without a second stage, with about equal compute and more updates. "
        "The drop rate is 0.2 where no other is named",
        (
            *rows(TOY, "two-stage", ("mixture",), HALF_BLOCKS, SKIP, REBOUND),
            *rows(FASHION + CIFAR + RATES, "two-stage", ("mixture",), HALF_PATHS),
            *rows(TOY, "two-stage", ("random-freeze", "droppath"), HALF_BLOCKS, beside=True),
            *rows(FASHION, "two-stage", ("random-freeze", "no-freeze"), HALF_PATHS, beside=True),
        ),
        note="For SGD the mixture moves blocks in the same direction on average, to first order "
        "(E6). What freezing adds is of second order.",
        where="4 fig-04-survival fig-04-half",
    ),
    Claim(
        "A6",
        "Image classification improves in certain cases",
        "The two-stage method improves the accuracy of residual nets in image classification, in "
        "certain cases.",
        "abstract",
        "stated",
        "`plain-eq`: plain training of equal compute. Beside it: `mixture`, the same without "
        "freezing; `plain`, with as many batches. *500 images*: seen ten times as often, so that "
        "plain nets overfit",
        (
            *rows(FASHION + CIFAR + FEW, "two-stage", ("plain-eq",), ACCURACY),
            *rows(FASHION + CIFAR + FEW, "two-stage", ("mixture",), ACCURACY, beside=True),
            *rows(FASHION, "two-stage", ("plain",), ACCURACY, beside=True),
        ),
        rule="any",
        fixed="droppath-cifar10-cnn-two-stage",
        needs="longer runs",
        note="Our cells are few and all short. Certain cases that are not among them stay open.",
        where="4 fig-04-images",
    ),
    Claim(
        "A7",
        "Shortcuts make deep nets trainable",
        "Residual connections let gradients through, and so make deep nets trainable (a statement "
        "of background).",
        "abstract",
        "stated",
        "the same net and weights without shortcuts; in chapter 1 also weights drawn by He's rule",
        rows(
            (("depth 32", "spiral", "{}"),),
            "relu",
            ("plain",),
            ("test accuracy", "trained.accuracy", 1),
            ("training loss", "trained.train_loss", -1),
        ),
        note="This is the second half of the claim. Gradients by layer are measured live in "
        "chapter 1, where they vanish in the plain net alone. There the *plain* net trains as well "
        "if its weights are drawn by He's rule: at another start the claim is another.",
        where="1 fig-gradient fig-control",
    ),
)

DECAYED = (
    Claim(
        "B1",
        "Decay makes features better",
        "Shortcuts that weaken with depth make a masked autoencoder learn more abstract features. "
        "The paper's figures, for a ViT-B/16 on ImageNet-1K: kNN accuracy from 27.4 % to 63.9 %, "
        "linear probe from 67.8 % to 72.7 %.",
        "abstract",
        "verified",
        "`standard`: the usual architecture, from the same zero initialisation; `skips-only`: the "
        "architecture of decay with factors of 1. Floors: raw pixels, and the encoder untrained. "
        "Beside the last block stands the best one",
        (
            *rows(MASKED, "decay", BOTH, KNN),
            *(
                replace(row, after=TRIALS["decay"])
                for row in rows(
                    SHORT, tuned("decay"), tuple(map(tuned, ("standard-xavier", *BOTH))), KNN
                )
            ),
            *rows(OTHER_SIZES, "decay", BOTH, KNN),
            *rows(MASKED, "decay", BOTH, *READERS, beside=True),
            *extra("decay-xavier", ("skips-only-xavier",), KNN, *READERS),
            *(
                replace(row, label=f"kNN, last block, against {floor}", before=path)
                for floor, path in (
                    ("raw pixels", "trained.knn_pixels"),
                    ("itself untrained", "init.knn_last"),
                )
                for row in rows(MASKED, "decay", ("decay",), KNN, beside=True)
            ),
        ),
        rule="study",
        fixed="mae-decay",
        needs="far longer runs of a far larger encoder, on a GPU",
        note="The rule of 15 epochs is that of the others, with `standard-xavier` as one more "
        "control and the rates of trials. When seed 0 of six arms at the usual rate had been "
        "read, a quarter of the rate was added to the trials, which `decay` then took, and a "
        "trial of `standard-xavier`, declared before, was dropped; at the usual rate decay is "
        "behind the same three, too. The best block of kNN is a maximum over test figures; that "
        "of the probe is chosen on held-out images of the train split. Our encoder is far "
        "smaller, its training far shorter, and the images are another set. A verdict is about "
        "that size, not about the paper's.",
        where="5; 7; 8; 9",
    ),
    Claim(
        "B2",
        "It is the shortcut that matters, not the branch",
        "Scaling shortcut and branch by √½ helps nearly as much as decay; scaling the branch alone "
        "does not.",
        "ablation table",
        "second hand",
        "`scaled-sum`, √½ on both, and `branch-scaled`, √½ on the branch alone, against "
        "`skips-only` and decay; one architecture",
        (
            *rows(SHORT, "scaled-sum", ("skips-only", "branch-scaled"), KNN),
            *extra("branch-scaled", ("skips-only", "decay"), KNN),
            *rows(SHORT, "scaled-sum", ("decay",), KNN, RANK, LOSS, beside=True),
            *rows(OTHER_SIZES[:1], "scaled-sum", ("skips-only", "decay"), KNN, beside=True),
        ),
        note="E2 predicts the second half: a branch scaled by one number has a flat gain profile. "
        "The first has the other sign here: √½ on both costs, on the branch alone nothing shows.",
        where="5; 9",
    ),
    Claim(
        "B3",
        "A ramp beats a constant",
        "Factors that fall linearly with depth do better than equal ones.",
        "ablation table",
        "second hand",
        "`constant`, one factor of equal product; √½ on both. Beside them a cosine ramp, the ramp "
        "on attention alone and on the MLP alone, and factors as chances to keep the identity",
        (
            *rows(SHORT, "decay", ("constant", "scaled-sum"), KNN),
            *rows(SHORT, "decay", SCHEDULES, KNN, beside=True),
        ),
        note="On the spiral, without norms and features, a ramp still learns at a product where "
        "equal factors no longer do (chapter 5, live). Of generated images: B11.",
        where="5 fig-05-spiral; 9",
    ),
    Claim(
        "B4",
        "Decay needs long skips",
        "Without long skips from the encoder to the decoder, decay does harm.",
        "ablation table",
        "second hand",
        "`standard-decay`, decay without skips, against `standard`; and what decay adds to "
        "`skips-only` against what it adds to `standard`",
        (
            *(replace(row, sign=-1) for row in rows(SHORT, "standard-decay", ("standard",), KNN)),
            Comparison(
                "what decay adds, with skips against without, kNN, last block",
                "decay",
                "decay",
                "standard-decay",
                KNN[1],
                bases=("skips-only", "standard"),
            ),
            *extra("decay", ("standard-decay",), KNN),
        ),
        where="7; 9",
    ),
    Claim(
        "B5",
        "A rival: long skips alone make features better",
        "The long skips, which decay brought along, are what makes features better.",
        "a question of reviewers",
        "reviews",
        "`skips-only` against `standard`, both with factors of 1",
        (
            *rows(MASKED + SHORT + OTHER_SIZES, "skips-only", ("standard",), KNN),
            *rows(MASKED, "skips-only", ("standard",), *READERS, LOSS, beside=True),
        ),
        note="What decay adds to the skips is in B1.",
        where="7 fig-07-loss; 8; 9",
    ),
    Claim(
        "B6",
        "The product is the knob",
        "Whatever the depth, decay works best if the product of all factors lies in one window.",
        "text of the paper",
        "second hand",
        "decay, whose product is in the window, against other last factors; with the ε of norms as "
        "it is and, *undamped*, rescaled",
        (
            *rows(SHORT, "decay", SWEEP, KNN),
            *(
                row
                for net, arms in ((SHORT[0], SWEEP), (STEPS[0], SWEEP[3:]))
                for arm in arms
                for row in extra(arm, ("skips-only",), KNN, net=net)
            ),
            *rows((("undamped", "decay", "{}-undamped"),), "decay", SWEEP[:2], KNN, beside=True),
            *(row for a in UNDAMPED for row in extra(f"{a}-undamped", (a,), KNN, LOSS)),
        ),
        needs="a sweep at another depth",
        note="On digits the product at which training loss is least moves with the learning rate "
        "(chapter 5, live): a window found at one rate may not be one at another.",
        where="5 fig-05-rates; 9",
    ),
    Claim(
        "B7",
        "Low rank goes with good features",
        "Features of low effective rank are the more abstract ones; decay is said to lower it.",
        "text of the paper",
        "second hand",
        "rank of `decay` against the arms with factors of 1, as an entropy ρ in nats, the form "
        "reported of the paper (chapter 8 prints dimensions, $e^\\rho$: 3.0 nats are 20); over the "
        "arms of a seed, the rank correlation of rank and kNN accuracy. Untrained, each has the "
        "rank of its stem (E5)",
        (
            *rows(MASKED, "decay", BOTH, RANK, CENTRED, beside=True),
            *(
                Link(f"rank{centred} with kNN, last block", "decay", LINKED, rank, KNN[1], -1)
                for centred, rank in (("", RANK[1]), (", centred,", CENTRED[1]))
            ),
        ),
        note="The correlation takes the arms that have three seeds, if these are six or more; at "
        "first it waited for all of them. That was changed when the then +0.97 of chapter 9, over "
        "the means of 12 nets (`decay` and `rates-taps` count once), was known. The verdict is "
        "about low rank and good features. That decay ends below its controls in rank shows in "
        "the lines *beside*; that its features are better does not follow: B1 says what became of "
        "the accuracy of the same nets. The mean of the features is one large singular value, so "
        "that the rank is better centred (chapter 8). Of Gaussian tokens, in nets with random "
        "branches, rank falls with the factor before any training (chapter 5, live). On the way of "
        "one net rank and accuracy mostly rise together, and at equal accuracy the rank of `decay` "
        "was the lower one in the few runs that recorded it (chapter 9).",
        where="5 fig-05-rank; 8; 9 fig-09-rank",
    ),
    Claim(
        "B8",
        "An echo of shallow features reaches deep layers",
        "The identity carries shallow features into deep layers, where they hinder abstraction.",
        "motivation of the paper",
        "second hand",
        "how well pixels can be read from the last state, with decay and without",
        needs="a probe of the last state for pixels and high frequencies",
        note="The weight of the stem in the last state is exact (E1). In the kept nets of 30 "
        "epochs (one seed each) the stem wrote a quarter to a third of the last state, with decay "
        "nothing (chapter 9). Whether it hinders is not settled by that.",
        where="5 fig-05-weights; 7; 9 fig-09-shares",
    ),
    Claim(
        "B9",
        "Decay stays trainable",
        "Unlike a net without shortcuts, a decayed one trains well; only very small factors make "
        "it unstable.",
        "text of the paper",
        "second hand",
        "masked loss on unseen images, where decay may cost at most a margin of 0.02 (of nearly 1 "
        "for predicting zero); the margin was fixed before the runs were read",
        tuple(
            replace(row, margin=0.02)
            for row in (
                *rows(MASKED + SHORT, "decay", BOTH, LOSS),
                *extra("alpha-0.1", BOTH, LOSS),
            )
        ),
        note="On digits and on the spiral, chapter 5 shows live where it breaks: at Adam's ϵ "
        "without norms, at the step size with them.",
        where="5 fig-05-rates fig-05-spiral; 9",
    ),
    Claim(
        "B10",
        "Fixed factors beat learned ones",
        "If the factors are learned, they drift back to plain shortcuts, and features get worse.",
        "ablation table",
        "second hand",
        "`learned`, factors learned from 1, and `learned-ramp`, from the ramp",
        (
            *rows(SHORT, "decay", LEARNED, KNN),
            *extra("learned", ("skips-only",), KNN, RANK),
        ),
        needs="weight decay on the factors, on and off; the learned factors themselves",
        where="9",
    ),
    Claim(
        "B11",
        "Decay helps diffusion models",
        "Decay lowers the Fréchet distance of generated images and improves features inside the "
        "model.",
        "tables",
        "second hand",
        "`plain`, the same U-shaped transformer with factors of 1; each of the two at that of "
        "three learning rates with which it has the least loss on held-out images of the train "
        "split. Beside it, all at the usual rate: `no-skips`, without long skips; `rates`, plain "
        "shortcuts and the learning-rate groups of decay; `taps`, plain shortcuts and long skips "
        "as loud as decay's; `scaled-sum`, √½; milder ramps, and `taps-0.5` beside one of them; "
        "without classes; CIFAR-10. Measured beside FD: {term}`precision and recall`, "
        "{term}`density and coverage`; kNN and a probe of features inside, at the block and noise "
        "level that a held-out tenth of the bank chooses; their rank behind the middle block at "
        "t = 100, not centred, in nats",
        tuple(
            replace(row, shown="cifar10-plain" if "cifar10" in row.arm else "plain")
            for row in (
                *(
                    replace(row, after=TRIALS["diffusion"])
                    for row in rows(
                        (("each at the rate of its trial", "diffusion", "{}"),),
                        tuned("decay", TUNED_DENOISERS),
                        (tuned("plain", TUNED_DENOISERS),),
                        FD,
                    )
                ),
                *rows(MADE, "decay", ("plain",), *SEEN_MADE, *BY_BLOCK, beside=True),
                *(
                    row
                    for arm in BESIDE_MADE
                    for row in rows(
                        ((f"`{arm}`", "diffusion", "{}"),),
                        arm,
                        ("plain",),
                        FD,
                        *INSIDE,
                        RANK_INSIDE,
                        *(BY_BLOCK if arm in SEEN_INSIDE else ()),
                        beside=True,
                    )
                ),
                *rows(MADE, "decay", ("rates", "taps"), FD, beside=True),
                *rows(MADE, "decay", ("scaled-sum",), FD, *INSIDE, *BY_BLOCK, beside=True),
                *rows(MADE, "decay", ("alpha-0.5",), FD, beside=True),
                *(
                    row
                    for arm, other in (
                        ("scaled-sum", "alpha-0.5"),
                        ("scaled-sum", "taps-0.5"),
                        ("alpha-0.5", "taps-0.5"),
                    )
                    for row in rows(
                        ((f"`{arm}`", "diffusion", "{}"),), arm, (other,), FD, beside=True
                    )
                ),
                *rows(OTHERS_MADE, "decay", ("plain",), *SEEN_MADE, beside=True),
            )
        ),
        fixed="diffusion-decay",
        needs="tiny-imagenet-100 at 64 × 64, the study `diffusion64`, for those with a GPU",
        note="FD of 2000 images by the features of a small classifier: comparable with no FID. The "
        "rule, and so the verdict, is about FD alone; the claim's second half, features inside, "
        "is read in rows beside it. By the rule quoted, `no-skips` answers a question of its own "
        "and `rates` tells whether step sizes explain what decay does. `taps` tells the same of "
        f"louder long skips, by a “{EXPERIMENTS['diffusion-taps'].expects}”. "
        "Nothing is read unless the judge finds the class that was asked for in half of the "
        "samples of `plain`, on average over seeds and without guidance, and nothing of CIFAR-10 "
        "unless it does in those of `cifar10-plain`. A net without classes is judged by the same "
        "condition on `plain`.",
        where="11; 12",
    ),
    Claim(
        "B12",
        "Fine-tuning does not improve",
        "After fine-tuning of the whole net decay is slightly worse than the usual autoencoder.",
        "tables",
        "second hand",
        "`standard` and `skips-only`, fine-tuned on the same few labelled images at the same "
        "settings. Beside them the plain net that decay is exported to (E4), since rates that fall "
        "from block to block act on top of the gains, and each net from scratch: fine-tuned alike, "
        "but untrained before",
        (
            *rows(OTHER_SIZES[:1], "decay", BOTH, TUNED_WORSE),
            Comparison(
                "90 epochs, exported, against `decay`",
                "decay",
                "long-decay",
                "long-decay",
                "trained.fine_tuned_exported",
                before="trained.fine_tuned",
                decides=False,
            ),
            *(
                Comparison(
                    f"90 epochs, `{arm}`{told}, against from scratch",
                    "decay",
                    f"long-{arm}",
                    f"long-{arm}",
                    f"trained.{metric}",
                    before=f"init.{metric}",
                    decides=False,
                )
                for arm, told, metric in (
                    *((arm, "", "fine_tuned") for arm in (*BOTH, "decay")),
                    ("decay", " exported", "fine_tuned_exported"),
                )
            ),
        ),
        needs="fine-tuning for longer, and on more labelled images",
        note="Ten epochs of 1200 images, at one learning rate for all, which was chosen for "
        "`skips-only`, by other images of the train split. *Slightly* has no size here: by its "
        "interval a difference of any size is read as worse, or as better.",
        where="9",
    ),
    Claim(
        "B13",
        "It is the shortcut that harms",
        "What decay changes is the shortcut, rather than step sizes, taps or the ε of norms.",
        "title of the paper, made precise here",
        "derived",
        "on the architecture of `skips-only`, with the ε of decay: learning-rate groups on "
        "(`rates`) or off × taps scaled (`taps`) or not; both on (`rates-taps`) is decay, both off "
        "(`norms`) is `skips-only` but for ε. An effect is the distance from `norms`, either way",
        (
            *(
                Comparison(
                    f"{title}, effect of decay beyond that of `{half}`, kNN, last block",
                    study,
                    arm.format("decay"),
                    arm.format(half),
                    KNN[1],
                    bases=(arm.format("norms"),) * 2,
                    absolute=True,
                )
                for title, study, arm in SHORT + STEPS + OTHER_SIZES[:1]
                for half in ("rates", "taps")
            ),
            *rows(SHORT + STEPS + OTHER_SIZES[:1], "decay", CELLS, KNN, beside=True),
            *extra("norms", ("skips-only",), KNN),
            *extra("rates", ("norms",), KNN),
            *extra("taps", ("norms",), KNN),
            *extra("rates-taps", ("decay",), LOSS, READERS[2]),
            *extra("rates", ("norms",), KNN, net=STEPS[0]),
            *extra("taps", ("norms",), KNN, net=STEPS[0]),
            *extra("rates-taps", ("decay",), LOSS, READERS[2], net=STEPS[0]),
            *rows(
                (("float32", "decay", "float32-{}"),), "rates-taps", ("decay",), LOSS, beside=True
            ),
        ),
        note="Seed 0 of `decay`, `rates`, `taps` and `rates-taps` over 15 epochs had begun under "
        "another rule: a half within 2 pooled deviations of decay explains it. By that one step "
        "sizes explain decay at both lengths, and taps at neither. "
        "`rates-taps` and `decay` are one net: where no scaling rounds, a test finds the same "
        "losses bit for bit, in bf16 too. So what they differ by comes from rounding, made large "
        "by training. Over 15 epochs two of five measures excluded 0 with three seeds, so that "
        "seeds 3 and 4 of `rates-taps` were added; with five none does. "
        "E3 settles one half without a run: without taps, from zero initialisation, decay and "
        "learning-rate groups are one and the same. With four times the steps either half alone "
        "spoils the last block, `rates` less firmly (by the probe its interval holds 0); that the "
        "whole does more is not shown. "
        "Of generated images: B11.",
        where="5 fig-05-equal; 9",
    ),
    Claim(
        "B14",
        "A small decayed net beats a large plain one",
        "A decayed encoder has better linear probes than a plain one that is wider and deeper.",
        "tables",
        "second hand",
        "encoders of two sizes, each with factors of 1 and with decay",
        needs="the study",
        where="14",
    ),
    Claim(
        "B15",
        "Features segment objects without labels",
        "Unsupervised segmentation with features of the decayed net is better.",
        "tables",
        "unverified",
        needs="not planned in this book",
    ),
    Claim(
        "B16",
        "Not for contrastive learning",
        "Methods that want features of high rank, such as contrastive ones, do not gain.",
        "limitations",
        "second hand",
        needs="not planned in this book",
    ),
    Claim(
        "B17",
        "Strong decay needs zero initialisation",
        "Where the last factor is small, branches must start at zero, or norms grow early on.",
        "text of the paper",
        "second hand",
        "what decay adds to `skips-only`, from random branches (`…-xavier`) against from zero; "
        "beside it the masked loss of `decay-xavier`",
        (
            Comparison(
                "what decay adds, from zero against from random branches, kNN, last block",
                "decay",
                "decay",
                "decay-xavier",
                KNN[1],
                bases=("skips-only", "skips-only-xavier"),
            ),
            *extra("decay-xavier", ("decay", "skips-only-xavier"), LOSS),
        ),
        needs="smaller last factors from random branches",
        note="The rule that the study fixed asks something else of the same runs, whether the zero "
        "start is what makes decay harm: chapter 9 and B1 print the differences for that. Norms "
        "are not recorded; what is contradicted is the use for the last block, at one ramp.",
        where="9",
    ),
)

EXACT = (
    Exact(
        "E1",
        "The product rule",
        "A decayed net holds the stem's output with the product of all factors, and each branch "
        "with the product of the factors behind it. With zero branches gradients follow it too.",
        "B6, B8, B9",
        (
            "tests/test_shortcuts.py::test_D06_unrolled_identity",
            "tests/test_shortcuts.py::test_D05_gradient_products_with_zero_branches",
        ),
        5,
        "Build: the schedule and its product",
    ),
    Exact(
        "E2",
        "Decay is a branch that grows",
        "A pre-norm net with decay has the states of a plain one whose branches are multiplied by "
        "rising gains, up to one scale a layer, if the ε of the norms is rescaled.",
        "B2, B13",
        (
            "tests/test_shortcuts.py::test_D03_gain_equivalence_forward",
            "tests/test_shortcuts.py::test_D03_gain_profiles_of_the_other_forms",
        ),
        5,
        "First equivalence: a branch that grows",
    ),
    Exact(
        "E3",
        "Decay is a learning rate that rises",
        "Under AdamW, with rescaled ε, weight decay and Adam's ϵ and without clipping, a decayed "
        "net trains as a plain one whose output projections learn faster with depth.",
        "B1, B13",
        (
            "tests/test_shortcuts.py::test_D03_decay_is_a_gain_is_a_learning_rate",
            "tests/test_shortcuts.py::test_D03_a_vit_of_hugging_face_follows_its_decayed_self",
        ),
        5,
        "Second equivalence: a learning rate that rises",
    ),
    Exact(
        "E4",
        "A trained decayed encoder is a plain one",
        "Gains folded into its weights, and ε set layer by layer, a plain vision transformer has "
        "the same features.",
        "B12",
        ("tests/test_vit.py::test_D04_exported_encoder_is_a_plain_one_with_the_same_features",),
        5,
        "First equivalence: a branch that grows",
    ),
    Exact(
        "E5",
        "From zero initialisation nothing is lower at the start",
        "The encoder passes on its input times the product, whatever the factors: the rank at step "
        "0 is the input's.",
        "B7",
        ("tests/test_mae.py::test_D08_encoder_passes_on_its_input_times_the_product",),
        5,
        "Rank",
    ),
    Exact(
        "E6",
        "A pair follows the mixture to first order",
        "Under SGD the mean step of a two-stage pair is that of the loss with dropped paths plus "
        "the drop rate times the loss of the whole net.",
        "A5",
        ("tests/test_droppath.py::test_R29_the_mean_pair_follows_the_mixture_to_first_order",),
        4,
        "Explain",
    ),
    Exact(
        "E7",
        "A pair updates each block once",
        "Whatever the mask: kept blocks in the first stage, dropped ones in the second.",
        "A5, A6",
        ("tests/test_droppath.py::test_R21_every_path_is_updated_once_a_pair",),
        4,
        "Counted: updates and cost",
    ),
    Exact(
        "E8",
        "Frozen is not cut off",
        "Frozen weights and their optimizer state stay bit for bit, while gradients flow through "
        "frozen blocks to earlier ones.",
        "A5",
        (
            "tests/test_droppath.py::test_R20_frozen_weights_and_their_state_are_bit_identical",
            "tests/test_droppath.py::test_R24_gradients_flow_through_frozen_paths",
        ),
        4,
        "The algorithm beside its code",
    ),
    Exact(
        "E9",
        "What arms cost",
        "Block-units of a pair and of its controls, counted; they say which plain run is one of "
        "equal compute.",
        "A6",
        (
            "tests/test_droppath.py::test_R37_cost_of_a_pair",
            "tests/test_droppath.py::test_R37_cost_of_the_other_arms",
        ),
        4,
        "Counted: updates and cost",
    ),
    Exact(
        "E10",
        "A histogram does not know its points",
        "Shuffling the points of each layer keeps every return by histogram and ends those of "
        "features.",
        "A2",
        ("tests/test_reuse.py::test_shuffling_each_layer_keeps_returns_by_histogram_only",),
        2,
        "Over training: the small net",
    ),
    Exact(
        "E11",
        "In a U-ViT the long skips get louder, too",
        "A decayed U-ViT has the output of a plain one with rising branch gains, if the ε of norms "
        "is rescaled and each tap made louder by as much as the stream has lost since. Under AdamW "
        "from zero initialisation, and with those norms, learning rates alone are decay only "
        "without long skips.",
        "B11, B13",
        (
            "tests/test_uvit.py::test_D03_decay_is_gains_that_rise_and_scaled_taps",
            "tests/test_experiments.py::"
            "test_D03_equal_steps_are_decay_but_for_the_long_skips_and_the_norms",
        ),
        11,
        "Decay as a plain net: branches that grow, taps that are louder",
    ),
    Exact(
        "E12",
        "Few steps make Gaussian samples too pale, even with a perfect denoiser",
        "On Gaussian pixels the best denoiser is known, its loss is above 0, and a sampler of few "
        "steps gives their deviation as too small. So neither loss nor samples of two schedules, "
        "targets or numbers of steps can be compared without these floors.",
        "B11",
        (
            "tests/test_diffusion.py::test_D15_loss_of_the_best_denoiser",
            "tests/test_diffusion.py::test_D15_ddim_of_a_gaussian_known_answers",
        ),
        10,
        "What few steps cost, exactly",
    ),
)
CLAIMS = (*RESIDUAL_DROPPATH, *DECAYED)


# ---- from records to verdicts ----


def recorded(root: Path) -> Runs:
    """All records under `root` that belong to an experiment, by study and arm, then seed."""
    known = [(one.study, one.arm) for one in EXPERIMENTS.values()]
    there = results.recorded(root)
    found: dict[tuple[str, str], dict[int, Run]] = {}
    for study in dict.fromkeys(study for study, arm in known if (study, arm) in there):
        for run in results.load_runs(study, root=root):
            found.setdefault((study, run.arm), {})[run.seed] = run
    return {key: one for key, one in found.items() if key in known}


def number(run: Run, metric: str) -> float:
    """A number of a run, or the mean, max, last or largest fall of a list of numbers."""
    kind, _, path = metric.rpartition(":")
    if not kind:
        return results.value(run, path)
    part, name = path.split(".")
    values = np.asarray(run.metrics[part][name])
    falls = (np.maximum.accumulate(values) - values).max()
    told = {"mean": values.mean(), "max": values.max(), "last": values[-1], "fall": falls}
    return float(told[kind])


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    if min(len(set(x)), len(set(y))) == 1:
        return 0.0
    return float(spearmanr(x, y).statistic)


def begun(claim: Claim, runs: Runs) -> Claim:
    """With its correlations over the arms that have three seeds, where these are six or more.

    A claim about samples also with what their features and distances are to be held against.
    """
    told = []
    for what in claim.compared:
        there = tuple(a for a in what.arms if len(runs.get((what.study, a), {})) > 2)
        if isinstance(what, Link) and 6 <= len(there) < len(what.arms):
            label = f"{what.label}, {len(there)} of {len(what.arms)} arms"
            what = replace(what, arms=there, label=label)
        told.append(what)
    if any(what.study == "diffusion" for what in claim.compared):
        claim = replace(claim, note=f"{claim.note} {floors(runs)}".strip())
    if tuple(told) == claim.compared:
        return claim
    needs = "; ".join(filter(None, (claim.needs, "the other arms of the correlation")))
    return replace(claim, compared=tuple(told), needs=needs)


def floors(runs: Runs) -> str:
    """By data set: neighbours by noisy pixels, and how far samples are from training images.

    Runs from before these were measured are left out.
    """
    sets: dict[str, dict[str, list[Run]]] = {}
    for (study, arm), one in runs.items():
        for run in one.values():
            if study == "diffusion" and "far" in run.metrics["trained"]:
                sets.setdefault(run.data["name"], {}).setdefault(arm, []).append(run)
    told = []
    for name, arms in sets.items():
        first = next(iter(arms.values()))[0].metrics["trained"]
        pixels = ", ".join(f"{v:.3f} at t = {t}" for t, v in first["pixels"].items())
        far = ", ".join(
            f"`{arm}` {results.summary(mine, 'trained.far')[0]:.2f} ({len(mine)})"
            for arm, mine in arms.items()
        )
        told.append(
            f"Neighbours by the pixels of the same noisy images, {name}: {pixels}. Euclidean "
            "distance to the nearest training image, pixels from −1 to 1, median: test images "
            f"{first['far_test']:.2f}; samples of (in brackets: seeds) {far}."
        )
    return " ".join(told)


def planned(what: Comparison | Link) -> int:
    """How many seeds the experiments of all its arms have in common."""
    names = [f"{what.study}-{arm}" for arm in what.arms]
    return len(set.intersection(*(set(EXPERIMENTS[name].seeds) for name in names)))


def by_interval(what: Comparison | Link, pairs: Sequence[tuple[float, float]]) -> str:
    """Holds if the 95 % interval lies on the claimed side (of the margin); or the opposite."""
    gap = results.paired_interval(*zip(*pairs, strict=True))
    claimed = what.sign * gap.mean + what.margin
    if abs(claimed) <= gap.half_width:
        return NOT_HERE
    return HOLDS if claimed > 0 else CONTRADICTED


def by_decision(what: Comparison, runs: Runs) -> str:
    """The rule of the study `mae`, or its mirror image: `results.decided`."""
    arm, control = (tuple(runs[what.study, name].values()) for name in what.arms[:: what.sign])
    if results.decided(arm, control, what.metric):
        return HOLDS
    return CONTRADICTED if results.decided(control, arm, what.metric) else NOT_HERE


def line(claim: Claim, what: Comparison | Link, runs: Runs) -> Line:
    """What the records say on one comparison."""
    pairs = what.pairs(runs)
    if pairs and isinstance(what, Comparison) and what.shown:
        share = what.share(runs)
        if share is not None and share < 0.5:
            told = f"{UNSHOWN}: `{what.shown}` shows {share:.2f} of the classes asked for"
            return Line(what, None, None, len(pairs), planned(what), told)
    a, b = zip(*pairs, strict=True) if pairs else ((), ())
    means = (mean(a), mean(b)) if pairs else None
    few_arms = isinstance(what, Link) and len(what.arms) < 6
    if len(pairs) < 2 or few_arms:
        told = FEW_ARMS if few_arms else NOT_RUN
        return Line(what, means, None, len(pairs), planned(what), told)
    if claim.rule == "study" and what.decides and isinstance(what, Comparison):
        told = by_decision(what, runs)
    else:
        told = by_interval(what, pairs)
    gap = results.paired_interval(a, b)
    return Line(what, means, gap, len(pairs), planned(what), told)


def verdict(claim: Claim, lines: Sequence[Line]) -> str:
    """The verdict of a row, from the readings of the comparisons that decide."""
    read = [r for one in lines if one.what.decides and not (r := one.reading).startswith(UNREAD)]
    held, against = read.count(HOLDS), read.count(CONTRADICTED)
    if not read:
        return NOT_RUN
    if held == len(read) or (held and claim.rule == "any"):
        return HOLDS
    if held and claim.rule != "study":  # that one asks for all
        return MIXED if against else PARTLY
    return CONTRADICTED if against == len(read) and claim.rule != "any" else NOT_HERE


# ---- the page ----


def chapters() -> dict[int, str]:
    """Number and file of every chapter in the table of contents."""
    toc = (BOOK.parent / "_toc.yml").read_text(encoding="utf-8")
    return {int(name[:2]): f"{name}.ipynb" for name in re.findall(r"file: book/(\d\d-.+)", toc)}


def place(text: str) -> str:
    """A link to a chapter, or that it is planned, and references to its figures."""
    number, *figures = text.split()
    file = chapters().get(int(number))
    told = f"[chapter {number}]({file})" if file else f"chapter {number}, planned"
    return ", ".join([told, *(f"{{numref}}`{name}`" for name in figures)])


def signed(value: float, digits: int) -> str:
    """A number with its sign; zero has none."""
    text = plain(value, digits)
    return "+" * (round(value, digits) > 0) + text


def plain(value: float, digits: int) -> str:
    """A number with that many digits, and no minus in front of a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def table_row(one: Line, rule: str) -> str:
    """One comparison: means of control and arm, difference, reading and seeds."""
    d, label = one.what.digits, f"{one.what.label}\u00a0{'↑' if one.what.sign > 0 else '↓'}"
    label += "" if one.what.decides else " *(beside)*"
    means = gap = "–"
    if one.means and isinstance(one.what, Comparison):
        means = f"{plain(one.means[1], d)} →\u00a0{plain(one.means[0], d)}"
    if one.gap and one.gap.half_width < 1e-9:
        gap = f"{signed(one.gap.mean, d)} in every seed"
    elif one.gap:
        gap = f"{signed(one.gap.mean, d)} ±\u00a0{plain(one.gap.half_width, d)} "
        gap += f"({plain(one.gap.smallest_effect, d)})"
    reading = "too few seeds" if one.seeds == 1 and one.means else one.reading
    if rule == "study" and one.gap:
        reading += " *(rule)*" if one.what.decides else " *(interval)*"
    return f"| {label} | {means} | {gap} | {reading}, {one.seeds}/{one.planned} |"


def so_far(claim: Claim, lines: Sequence[Line]) -> str:
    """ ", so far" where runs that decide are missing, or kinds of runs."""
    some = any(not one.reading.startswith(UNREAD) for one in lines if one.what.decides)
    missing = any(one.seeds < one.planned for one in lines if one.what.decides)
    return ", so far" if some and (missing or claim.needs) else ""


def count(claim: Claim, lines: Sequence[Line]) -> str:
    """In how many of the comparisons that decide it holds, and how many contradict it."""
    readings = [one.reading for one in lines if one.what.decides]
    read = [one for one in readings if not one.startswith(UNREAD)]
    if not read:
        return ""
    told = f"holds in {read.count(HOLDS)} of {len(read)} comparisons"
    told += f", contradicted in {n}" if (n := read.count(CONTRADICTED)) else ""
    unread = {w: sum(one.startswith(w) for one in readings) for w in UNREAD}
    return f" ({told}" + "".join(f"; {n} {w}" for w, n in unread.items() if n) + ")"


def rule_of(claim: Claim) -> str:
    """The rule in words; that of a study as it stands in the code."""
    text = RULES[claim.rule]
    if any(what.margin for what in claim.compared):
        text += ", the margin granted"
    if claim.rule == "any":
        count = sum(what.decides for what in claim.compared)
        chance = 100 * (1 - 0.975**count)
        text += f". With {count} independent comparisons and no effect at all, chance would find "
        text += f"one or more in {chance:.0f} % of studies"
    if claim.fixed:
        told = EXPERIMENTS[claim.fixed].expects.removeprefix("rule fixed before the runs: ")
        text += f". Fixed in the code before the runs: “{told}”"
    return text


def listed(entries: Mapping[str, str]) -> str:
    """A list of all entries that are not empty, each with its name."""
    return "\n".join(f"- **{name}**: {text}" for name, text in entries.items() if text)


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text and text[0].upper() + text[1:] + ("" if text[-1] in ".”" else ".")


def claim_row(claim: Claim, lines: Sequence[Line], paper: str) -> str:
    """A section of the page."""
    head = f"(claim-{claim.number.lower()})=\n### {claim.number} {claim.title}\n"
    told = verdict(claim, lines)
    about = listed(
        {
            "Verdict": f"**{told}**{so_far(claim, lines)}{count(claim, lines)}",
            "Claim": claim.claim,
            "Source": f"{{cite:t}}`{paper}`, {claim.source}: {MARKS[claim.mark]}.",
            "Controls": linked(sentence(claim.controls)),
            "Rule": sentence(rule_of(claim)) if lines else "",
        }
    )
    table = [table_row(one, claim.rule) for one in lines]
    if table:
        table = ["", "| Compared | Means | Difference | Reading |", "|:--|:--|:--|:--|", *table]
    seeds = "the seeds missing above" * any(one.seeds < one.planned for one in lines)
    studies = sorted({one.what.study for one in lines if one.seeds})
    links = (f"[`{s}`]({REPO}/tree/v{__version__}/book/results/{s})" for s in studies)
    rest = listed(
        {
            "Still to run": sentence("; ".join(filter(None, (seeds, claim.needs)))),
            "Note": linked(claim.note),
            "Where": "; ".join(map(place, filter(None, claim.where.split("; ")))),
            "Records": ", ".join(links),
        }
    )
    return "\n".join([head, about, *table, "", rest, ""])


def exact_row(one: Exact) -> str:
    """A section of what is exact: the tests and the place in the book."""
    tests = [test.split("::") for test in one.tests]
    links = [f"[`{name}`]({REPO}/blob/v{__version__}/{file})" for file, name in tests]
    about = listed(
        {
            "Verdict": f"**{HELD}**",
            "Statement": one.claim,
            "Tests": ", ".join(links),
            "Bears on": ", ".join(reference(number) for number in one.about.split(", ")),
            "Where": f"{place(str(one.chapter))}, section *{one.section}*",
        }
    )
    return f"(claim-{one.number.lower()})=\n### {one.number} {one.title}\n\n{about}\n"


def reference(number: str, text: str = "") -> str:
    """A link to a row of this page."""
    return f"{{ref}}`{text or number} <claim-{number.lower()}>`"


def linked(text: str) -> str:
    """Rows that a text names become links."""
    return re.sub(r"\b[ABE]\d+\b", lambda found: reference(found[0]), text)


def overview(rows: Sequence[tuple[Claim, Sequence[Line]]]) -> str:
    """One line a claim: a link and the verdict."""
    table = ["| Claim | Verdict |", "|:--|:--|"]
    for claim, lines in rows:
        link = reference(claim.number, f"{claim.number} {claim.title}")
        table.append(f"| {link} | {verdict(claim, lines)}{so_far(claim, lines)} |")
    return "\n".join(table)


def studies(runs: Runs) -> str:
    """One line a study: how much of it is recorded, on what, and for how long it ran."""
    table = ["| Study | Recorded | Data, tier, device | Hours |", "|:--|:--|:--|--:|"]
    for study in dict.fromkeys(study for study, _ in runs):
        total = sum(len(one.seeds) for one in PLANNED if one.study == study)
        there = [run for (s, _), one in runs.items() if s == study for run in one.values()]
        what = [
            ", ".join(sorted({read(run) for run in there}))
            for read in (
                lambda run: f"{run.data['name']} ({run.data['train']} to train)",
                lambda run: f"tier `{run.recipe['tier']}`",
                lambda run: run.device,
            )
        ]
        told = f"{len(there)} of {total} runs"
        hours = f"{sum(run.seconds for run in there) / 3600:.1f}"
        table.append(f"| {study} | {told} | {'; '.join(filter(None, what)) or '–'} | {hours} |")
    return "\n".join(table)


def tally(words: Sequence[str]) -> str:
    """ "1 holds here, 2 mixed": how often each verdict was given, in the order of the list."""
    return ", ".join(f"{n} {word}" for word in VERDICTS if (n := words.count(word)))


def page(root: Path) -> str:
    """The whole page, from the records under `root`."""
    runs = recorded(root)
    claims = [begun(claim, runs) for claim in CLAIMS]
    rows = [(claim, [line(claim, what, runs) for what in claim.compared]) for claim in claims]
    papers = (
        ("ResidualDroppath", "park2024residualdroppath", rows[: len(RESIDUAL_DROPPATH)]),
        ("Decayed shortcuts", "zhang2024decayed", rows[len(RESIDUAL_DROPPATH) :]),
    )
    words = {title: [verdict(*row) for row in mine] for title, _, mine in papers}
    text = HEAD.format(
        tallies="; ".join(
            f"{title}, {len(one)} claims: {tally(one)}" for title, one in words.items()
        ),
        claims=len(CLAIMS),
        intervals=sum(one.gap is not None for _, lines in rows for one in lines),
        verdicts=listed(VERDICTS),
        overview=overview(rows),
    )
    for title, cite, mine in papers:
        text += f"\n## {title}\n\n" + "\n".join(claim_row(*row, cite) for row in mine)
    text += EXACT_HEAD + "\n".join(map(exact_row, EXACT))
    return text + TAIL.format(studies=studies(runs), left=left(runs))


def left(runs: Runs) -> str:
    """What to type for studies that are begun and not complete, at the tier of their records."""
    tiers = {run.study: run.recipe["tier"] for one in runs.values() for run in one.values()}
    missing = dict.fromkeys(tiers, 0)
    for one in PLANNED:
        if one.study in tiers:
            seeds = runs.get((one.study, one.arm), {})
            missing[one.study] += sum(seed not in seeds for seed in one.seeds)
    return "".join(
        f"# {n} left of {study}\npython -m mini_resdecay run {study}-study "
        f"--tier {tiers[study]} \\\n    --resume --out book/results\n"
        for study, n in missing.items()
        if n
    )


HEAD = """\
% Written by book/_tools/evidence.py (`make evidence`). Do not edit: a test compares.

# Evidence

**{tallies}.**

Here is every claim of the two papers that we know of, one row a claim: what was run for it,
against which controls, with how many seeds, and the verdict. The numbers are computed from the
recorded runs and the verdicts from the numbers, by a rule that stands in each row. Nobody types
them, and a test writes the page again.

**What a verdict is about.** Small nets, few images, short runs. It says what holds *here*. Of the
first paper only abstract and captions were read, of the second the abstract and the code
({{doc}}`references`). No verdict repeats or refutes an experiment of theirs, and what reached us at
second hand is marked so.

## How to read a row

- **Compared**: the measure, and the control if the row has more than one; the arrow is the claimed
  direction. Both sides share data, seeds and evaluation; where they differ in length, the controls
  say so. *(beside)* marks what does not decide.
- **Means**: control → {{term}}`arm`, over seeds.
- **Difference**: arm minus control, paired by seed ({{term}}`paired difference`) and subtracted
  before rounding, ± half of the 95 % interval. (A star in a chapter's table marks an interval
  without 0. Behind a mean, chapters print the deviation over seeds with the same ±.) In brackets
  stands the {{term}}`smallest visible effect`. It is no threshold: so many seeds find a true
  difference of that size four times in five, and a smaller one less often. For correlations the
  mean {{term}}`Spearman's rank correlation`, if there are six arms or more.
- **Reading**: what this comparison shows, and the seeds recorded of those planned.

A rule that is quoted as fixed stood in the code before the runs. The other rules were put into this
form for this page: those of the first paper after its runs were known, those of the second before
its runs were read.

One interval in twenty excludes 0 by chance, and there are {intervals} on this page. Trust a
pattern before a single line.

The verdicts:

{verdicts}

*So far* means that runs are missing: seeds, or what stands under *Still to run*.

## All {claims} claims

{overview}
"""

EXACT_HEAD = """
## What is exact

These statements need no runs. Each is held by tests, with known answers or in double precision, and
shown in a chapter.

"""

TAIL = """
## The recorded studies

{studies}

A record is one JSON file with recipe, metrics, curve, device, seconds, versions and commit;
{{doc}}`setup` says what a tier is and where image sets come from. What is left to run, and how this
page learns of it, from the checkout:

```bash
{left}make evidence
```
"""


def main() -> None:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(description="Write book/evidence.md from recorded runs.")
    parser.add_argument("--results", type=Path, default=BOOK / "results", help="folder of records")
    parser.add_argument("--out", default=str(BOOK / "evidence.md"), help="file, or - to print")
    options = parser.parse_args()
    text = page(options.results)
    if options.out == "-":
        print(text, end="")
    else:
        Path(options.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
