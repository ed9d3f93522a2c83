"""Named experiments and the command line: what they promise, and what they do with typos."""

import copy
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.spatial
import torch

from mini_resdecay import data, experiments, figures, results, train, vit
from mini_resdecay.__main__ import main
from mini_resdecay.experiments import (
    EXPERIMENTS,
    DiffusionRecipe,
    ImageRecipe,
    MaskedRecipe,
    SpiralRecipe,
    diff,
    recipe_of,
)
from mini_resdecay.shortcuts import (
    SHORTCUTS,
    alpha_schedule,
    effective_alpha,
    rescale_norms,
    suggest_alpha_min,
)
from mini_resdecay.uvit import UViT

BOOK = Path(__file__).parents[1] / "book" / "results"
RECORDED = sorted(BOOK.glob("*/*.json"))
# Studies of which every seed is recorded; of others, what is there is checked.
IN_THE_BOOK = [
    name for name, e in EXPERIMENTS.items() if e.study in ("spiral", "reuse", "droppath", "mae")
]
# Of these the first five losses are computed again: every study, every kind of net and of step.
REPLAYED = [
    "spiral-relu",
    "spiral-tanh-two-stage",
    "reuse-fashion-mnist",
    "reuse-cifar10",
    "droppath-fashion-mnist-cnn-mixture",
    "droppath-fashion-mnist-vit-two-stage",
    "mae-standard",
    "mae-decay",
    "decay-rates-taps",
    "decay-decay-xavier",  # from a zero start the first losses of all arms are nearly the same
    "judge-fashion-mnist",
    "diffusion-plain",
    "diffusion-rates",
]
MASKED = ["standard", "skips-only", "decay"]
QUICK = ["depth=3", "width=4", "steps=6"]
LITTLE = ["patch=8", "dim=16", "depth=2", "heads=2", "decoder_dim=8", "decoder_depth=1"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_says_source_expectation_and_cost(name):
    one = EXPERIMENTS[name]
    assert one.name == name
    assert "arXiv" in one.source
    assert len(one.expects) > 20
    assert one.minutes > 0
    assert one.memory_gib > 0
    alone = one.study == "judge" or "-lr-" in name  # a trial of a rate
    assert len(one.seeds) >= (1 if alone else 3)
    assert tuple(one.tiers) == experiments.TIERS


def test_arms_of_the_spiral_differ_in_one_idea():
    base = recipe_of(EXPERIMENTS["spiral-relu"], "cpu")
    assert diff(base, recipe_of(EXPERIMENTS["spiral-tanh"], "cpu")) == {
        "activation": ("relu", "tanh")
    }
    assert diff(base, recipe_of(EXPERIMENTS["spiral-plain"], "cpu")) == {"residual": (True, False)}
    assert diff(base, base) == {}


@pytest.mark.parametrize("tier", experiments.TIERS)
@pytest.mark.parametrize(
    "name", [one.arm for one in EXPERIMENTS.values() if one.study == "droppath"]
)
def test_arms_of_the_droppath_study_differ_in_what_they_say(tier, name):
    parts = r"(fashion-mnist|cifar10)-(cnn|vit)-(.+?)(?:-p(\d+))?(-few)?"
    images, net, arm, percent, few = re.fullmatch(parts, name).groups()
    base, other = (
        recipe_of(EXPERIMENTS[f"droppath-{cell}"], tier)
        for cell in (f"fashion-mnist-{net}-two-stage", name)
    )
    expected = {} if arm == "two-stage" else {"arm": ("two-stage", arm)}
    if images == "cifar10":
        expected |= {"data": ("fashion-mnist", "cifar10"), "flips": (False, True)}
    if percent:
        expected["p"] = (0.2, int(percent) / 100)
    if few and tier != "cpu":
        n = {"t4": 5000, "full": 10_000}[tier]
        expected |= {"images": (n, n // 10), "epochs": (15, 195)}
    assert diff(base, other) == expected


def test_arms_of_the_spiral_differ_in_the_arm_alone():
    base, other = (EXPERIMENTS[f"spiral-tanh-{arm}"] for arm in ("two-stage", "mixture"))
    assert diff(recipe_of(base, "cpu"), recipe_of(other, "cpu")) == {
        "arm": ("two-stage", "mixture")
    }


@pytest.mark.parametrize(
    ("arm", "p", "calls", "draws"),
    [
        ("plain", 0.2, 1000, 1),
        ("droppath", 0.2, 1000, 1),
        ("plain-half", 0.2, 500, 1),
        ("plain-eq", 0.2, 767, 1),  # the sheet's number
        ("plain-eq", 0.5, 667, 1),
        ("two-stage", 0.2, 500, 2),
        ("random-freeze", 0.2, 500, 2),
        ("no-freeze", 0.2, 500, 2),
        ("mixture", 0.2, 500, 2),
    ],
)
def test_arms_have_the_budgets_of_the_sheet(arm, p, calls, draws):
    assert experiments._length(SpiralRecipe(arm=arm, p=p), 1000) == (calls, draws)


def test_two_arms_see_the_same_batches(monkeypatch):
    train = data.shapes(64, 0)[0]
    recipe = ImageRecipe(batch=8, epochs=1, widths=(8,), blocks=1)
    one, pairs = (
        experiments._image_training(dataclasses.replace(recipe, arm=arm), 0, train)[1]
        for arm in ("plain", "two-stage")
    )
    assert (len(one), len(pairs)) == (8, 4)
    for i, pair in enumerate(pairs):
        for place, (images, labels) in enumerate(pair):
            assert torch.equal(images, one[2 * i + place][0])
            assert torch.equal(labels, one[2 * i + place][1])


@pytest.mark.parametrize("tier", experiments.TIERS)
def test_image_arms_differ_in_the_set_and_its_augmentation(tier):
    fashion, cifar = (
        recipe_of(EXPERIMENTS[f"reuse-{name}"], tier) for name in ("fashion-mnist", "cifar10")
    )
    assert set(diff(fashion, cifar)) == {"data", "flips"}


def test_changes_keep_the_type_of_the_field():
    one = EXPERIMENTS["reuse-cifar10"]
    recipe = recipe_of(one, "t4", ["widths=8,16", "lr=0.1", "epochs=3", "flips=false"])
    assert (recipe.widths, recipe.lr, recipe.epochs, recipe.flips) == ((8, 16), 0.1, 3, False)
    assert recipe_of(EXPERIMENTS["diffusion-plain"], "t4", ["guidances=1,2.5"]).guidances == (
        1,
        2.5,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=3", 'set must be one of .*"epoch"; did you mean "epochs"'),
        ("batch_size=8", 'set must be one of .*"batch_size"; did you mean "batch"'),
        ("epochs=many", "epochs must be a whole number, got 'many'"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("flips=perhaps", "flips must be true or false, got 'perhaps'"),
        ("widths=a,b", "widths must be a whole number, or several with commas between, got 'a,b'"),
    ],
)
def test_bad_change_names_key_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(EXPERIMENTS["reuse-cifar10"], "t4", [change])


def test_run_writes_a_record_that_can_be_read_and_repeated(tmp_path):
    first = results.read(experiments.run("spiral-relu", out=tmp_path / "a", changes=QUICK))
    again = results.read(experiments.run("spiral-relu", out=tmp_path / "b", changes=QUICK))
    assert first.metrics == again.metrics
    assert first.first_losses == first.curve["loss"][:5]
    assert first.recipe["depth"] == 3
    assert len(first.metrics["trained"]["probe"]) == 4
    assert len(first.metrics["trained"]["skip"]) == 3
    other = results.read(experiments.run("spiral-relu", seed=1, out=tmp_path / "a", changes=QUICK))
    assert other.first_losses != first.first_losses


def test_resume_leaves_a_recorded_run_alone(tmp_path):
    path = experiments.run("spiral-relu", out=tmp_path, changes=QUICK)
    before = path.stat().st_mtime_ns
    assert experiments.run("spiral-relu", out=tmp_path, changes=QUICK, resume=True) == path
    assert path.stat().st_mtime_ns == before


@pytest.fixture
def little_images(monkeypatch, tmp_path):
    """The image experiment on 96 generated shapes, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    sets = {split: data.shapes(n, n)[0] for split, n in (("train", 96), ("test", 60))}
    monkeypatch.setattr(experiments, "load", lambda name, split, root: sets[split])
    return ["batch=16", "epochs=2", "images=96", "measured=60", "widths=8,8", "blocks=1"]


def test_other_images_than_the_books_are_a_warning(little_images, monkeypatch):
    def warned(**more):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            experiments.run("reuse-cifar10", **{"changes": little_images} | more)
        return [str(one.message) for one in caught if "other data" in str(one.message)]

    monkeypatch.setattr(results, "checkout", lambda: Path("book"))
    assert warned(out="book") == warned(out="same") == []
    other = data.shapes(96, 5)[0]
    monkeypatch.setattr(experiments, "load", lambda name, split, root: other)
    (told,) = warned(out="mine", seed=1)
    assert told.startswith("reuse/cifar10 was recorded with other data") and "JPEG" in told
    assert warned(out="short", changes=[*little_images, "epochs=1"]) == []  # nothing like it there


def test_stopped_image_run_goes_on_to_the_same_record(little_images, tmp_path, monkeypatch):
    whole = results.read(experiments.run("reuse-cifar10", out="whole", changes=little_images))
    real, seen = experiments._classify, []

    def stops_at_nine(state, batch):
        seen.append(state.step)
        if state.step == 9:
            os.kill(os.getpid(), 2)
        return real(state, batch)

    monkeypatch.setattr(experiments, "_classify", stops_at_nine)
    assert main(["run", "reuse-cifar10", "--out", "cut", "--set", *little_images]) == 130
    monkeypatch.setattr(experiments, "_classify", real)
    path = experiments.run("reuse-cifar10", out="cut", resume=True, changes=little_images)
    assert results.read(path).metrics == whole.metrics
    assert results.read(path).curve == whole.curve
    assert max(seen) < 12


def test_killed_masked_run_goes_on_from_its_checkpoint_to_the_same_record(
    little_images, monkeypatch
):
    changes = ["batch=4", "epochs=5", "images=96", "measured=60", *LITTLE]
    whole = results.read(experiments.run("mae-decay", out="whole", changes=changes))
    real, seen = experiments._reconstruct, []

    def dies_at_110(state, batch):
        seen.append(state.step)
        if state.step == 110:
            raise MemoryError  # like a kill: nothing is saved any more
        return real(state, batch)

    monkeypatch.setattr(experiments, "_reconstruct", dies_at_110)
    with pytest.raises(MemoryError):
        experiments.run("mae-decay", out="cut", changes=changes)
    monkeypatch.setattr(experiments, "_reconstruct", real)
    assert not list(Path("cut").glob("*/*.json"))
    fit, begun = experiments.fit, []
    monkeypatch.setattr(
        experiments, "fit", lambda state, *a, **k: begun.append(state.step) or fit(state, *a, **k)
    )
    again = results.read(experiments.run("mae-decay", out="cut", resume=True, changes=changes))
    assert begun == [100, 0] and len(seen) == 111  # the run, then its first losses
    assert again.metrics == whole.metrics  # with the hash of the encoder that is kept
    assert (again.curve, again.first_losses) == (whole.curve, whole.first_losses)


@pytest.mark.parametrize("net", ["cnn", "vit"])
@pytest.mark.parametrize("arm", ["plain-half", "droppath", "two-stage", "mixture"])
def test_every_arm_trains_and_writes_its_measures(little_images, net, arm):
    changes = [change for change in little_images if "widths" not in change]
    name = f"droppath-cifar10-{net}-two-stage"
    path = experiments.run(name, changes=[*changes, f"arm={arm}", "widths=8"])
    run = results.read(path)
    assert run.recipe["arm"] == arm
    found = run.metrics["trained"]
    assert len(found["skip"]) == (1 if net == "cnn" else 2)
    assert 0 <= found["calibration_error"] <= 1
    assert found["loss"] > 0
    assert run.metrics["init"]["accuracy"] != found["accuracy"] or found["loss"] != pytest.approx(
        run.metrics["init"]["loss"]
    )


@pytest.mark.parametrize("tier", experiments.TIERS)
def test_arms_of_the_mae_study_differ_in_one_field(tier):
    arms = {name: recipe_of(EXPERIMENTS[f"mae-{name}"], tier) for name in MASKED}
    assert list(diff(arms["standard"], arms["skips-only"])) == ["arch"]
    assert list(diff(arms["skips-only"], arms["decay"])) == ["alpha_min"]
    decay = arms["decay"]
    assert decay.alpha_min == pytest.approx(suggest_alpha_min(decay.depth), abs=5e-5)


FULL = MaskedRecipe(
    images=50_000, epochs=200, batch=1024, lr=2e-3, dim=192, depth=12, heads=6,
    decoder_dim=128, decoder_depth=4, decoder_heads=4,
)  # fmt: skip


def test_recipes_of_the_mae_study_are_those_that_were_run():
    for arm, arch, ends in (
        ("standard", "standard", (1.0, 1.0, 1.0)),
        ("skips-only", "paper", (1.0, 1.0, 1.0)),
        ("decay", "paper", (0.3141, 0.3141, 0.5927)),
    ):
        sizes = MaskedRecipe(images=1000, epochs=2, measured=500), MaskedRecipe(epochs=30), FULL
        assert list(EXPERIMENTS[f"mae-{arm}"].tiers.values()) == [
            dataclasses.replace(size, arch=arch, alpha_min=end)
            for size, end in zip(sizes, ends, strict=True)
        ]


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("standard", [0.593238, 0.573523, 0.5868222, 0.5474937, 0.5470666]),
        ("skips-only", [0.593238, 0.5740859, 0.5933868, 0.5507632, 0.5466674]),
        ("decay", [0.593238, 0.5740859, 0.5933871, 0.5507328, 0.54665]),
    ],
)
def test_first_losses_of_the_mae_study_are_those_before_the_decay_study(arm, expected):
    changes = ["batch=16", "images=96", "lr=0.2", *LITTLE]
    recipe = recipe_of(EXPERIMENTS[f"mae-{arm}"], "t4", changes)
    losses = experiments.first_losses(recipe, 0, data.shapes(96, 96)[0])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


# Pairs of arms of the decay study, and all that differs between them.
NEIGHBOURS = [
    ("standard-xavier", "standard", "zero_init"),
    ("standard", "skips-only", "arch"),
    ("standard", "standard-decay", "alpha_min"),
    ("skips-only", "decay", "alpha_min"),
    ("skips-only", "scaled-sum", "shortcut"),
    ("skips-only", "branch-scaled", "shortcut"),
    ("skips-only", "learned", "shortcut"),
    ("skips-only", "norms", "norms_as"),
    ("norms", "rates", "rates_as"),
    ("norms", "taps", "taps_as"),
    ("rates", "rates-taps", "taps_as"),
    ("taps", "rates-taps", "rates_as"),
    ("decay", "constant", "kind"),
    ("decay", "cosine", "kind"),
    ("decay", "attention-only", "kind"),
    ("decay", "mlp-only", "kind"),
    ("decay", "learned-ramp", "shortcut"),
    ("decay", "identity-drop", "shortcut"),
    ("decay", "decay-xavier", "zero_init"),
    ("skips-only", "skips-only-xavier", "zero_init"),
    ("decay", "decay-undamped", "norms_as"),
    *((one, f"{one}-undamped", "norms_as") for one in experiments.SWEEP[:2]),
    *(("decay", one, "alpha_min") for one in experiments.SWEEP),
    *(
        (one, f"{one}-lr-{rate}", "lr")
        for one in experiments.RULED
        for rate in ("0.25", "0.5", "2")
    ),
    *((one, f"long-{one}", "epochs tuned_images") for one in MASKED),
    *((one, f"long-{one}", "epochs") for one in ("scaled-sum", *experiments.CELLS)),
    ("long-decay", "long-decay-lr-0.25", "lr"),
    *((one, f"deep-{one}", "depth") for one in MASKED[:2]),
    ("decay", "deep-decay", "alpha_min depth"),
    *((one, f"tiny-{one}", "data patch") for one in MASKED),
    *(
        (one, f"steps-{one}", "batch lr")
        for one in (*MASKED, *experiments.SWEEP[3:], *experiments.CELLS)
    ),
    *((one, f"wide-{one}", "dim heads") for one in MASKED),
    *((one, f"float32-{one}", "precision") for one in ("decay", "rates-taps")),
    *((one, f"mask-{one}", "mask_ratio") for one in MASKED),
]
DECAY = {one.arm: one for one in EXPERIMENTS.values() if one.study == "decay"}


@pytest.mark.parametrize("tier", experiments.TIERS)
@pytest.mark.parametrize(("one", "other", "field"), NEIGHBOURS)
def test_arms_of_the_decay_study_differ_in_what_they_say(tier, one, other, field):
    a, b = (recipe_of(DECAY[arm], tier) for arm in (one, other))
    assert " ".join(diff(a, b)) == field


def test_every_arm_of_the_decay_study_has_a_neighbour_and_a_recipe_of_its_own():
    assert {arm for pair in NEIGHBOURS for arm in pair[:2]} == set(DECAY)
    for tier in experiments.TIERS:
        assert len({recipe_of(one, tier) for one in DECAY.values()}) == len(DECAY)


def test_arms_of_other_sizes_have_a_rule_that_they_can_meet():
    for arm, one in DECAY.items():
        size, _, what = arm.partition("-")
        if (
            size in ("deep", "tiny", "steps", "wide", "mask", "long")
            and what not in experiments.CELLS
            and "-lr-" not in what
        ):
            assert "at this size or length" in one.expects and "xavier" not in one.expects
        else:
            assert "at this size or length" not in one.expects


@pytest.mark.parametrize("tier", experiments.TIERS)
def test_ramps_end_where_the_product_is_in_the_middle_of_the_window(tier):
    for arm in ("decay", "standard-decay", "deep-decay", "rates-taps", "long-rates"):
        recipe = recipe_of(DECAY[arm], tier)
        ends = [recipe.alpha_min, recipe.rates_as, recipe.taps_as, recipe.norms_as]
        told = [end for end in ends if 0 < end < 1]
        assert told and told == pytest.approx([suggest_alpha_min(recipe.depth)] * len(told), 1e-3)
    base, tuned = recipe_of(DECAY["decay"], tier), recipe_of(DECAY["decay-lr-2"], tier)
    assert tuned.lr == 2 * base.lr
    assert recipe_of(DECAY["long-decay"], "t4").epochs == 90 and base.depth in (6, 12)


def test_the_decay_study_runs_what_decides_first(tmp_path):
    runs = [(one.arm, seed) for one, seed in experiments.queue("decay", tmp_path)]
    assert len(runs) == len(set(runs)) == sum(len(one.seeds) for one in DECAY.values())
    deciding = list(experiments._FIRST)
    assert runs[:30] == [(arm, seed) for seed in (0, 1, 2) for arm in deciding]
    more = [arm for arm in deciding if arm in (*MASKED, "rates-taps")]
    assert runs[30:38] == [(arm, seed) for seed in (3, 4) for arm in more]
    order = [DECAY[arm].turn for arm, _ in runs]
    assert order == sorted(order)
    for turn in range(7):
        seeds = [seed for arm, seed in runs if DECAY[arm].turn == turn]
        assert seeds == sorted(seeds)
    assert all(arm.startswith("long-") == (DECAY[arm].turn == 5) for arm, _ in runs)
    halves = [experiments.queue("decay", tmp_path, part, 2) for part in (1, 2)]
    assert abs(len(halves[0]) - len(halves[1])) <= 1


def masked_losses(recipe, train_images, steps):
    """Losses of an experiment's own training, in float64."""
    state, batches, step = experiments._masked_training(recipe, 0, train_images, cpu=True)
    state.net.double()
    train.fit(state, batches, step, until=steps, every=1, quiet=True)
    return torch.tensor([line["loss"] for line in state.history], dtype=torch.float64)


def test_D03_rates_and_taps_are_decay_and_neither_is_alone(monkeypatch):
    """Claim 13 of the sheet, by the recipes of the study and their training."""
    monkeypatch.setattr(experiments, "to_float", lambda x: data.to_float(x).double())
    small = ["patch=8", "dim=16", "heads=2", "decoder_dim=8", "decoder_heads=2", "batch=16"]
    changes = [*small, "images=96", "epochs=6", "lr=0.02", "precision=no"]
    images = data.shapes(96, 96)[0]
    found = {
        arm: masked_losses(recipe_of(DECAY[arm], "t4", changes), images, 30)
        for arm in ("decay", "rates-taps", "rates", "taps", "norms")
    }
    expected = found.pop("decay")
    assert len(expected) == 30
    gaps = {arm: (losses - expected).abs().max().item() for arm, losses in found.items()}
    assert gaps.pop("rates-taps") < 1e-12
    assert min(gaps.values()) > 1e-4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rates_and_taps_are_decay_bit_for_bit_where_scalings_are_exact(monkeypatch, precision):
    """Factors that are powers of two round nothing: so no dtype treats the two differently."""

    def halves(depth, alpha_min=1.0, *_):
        return (1.0, 0.5 if alpha_min < 1 else 1.0) * depth

    for module in (experiments, vit):
        monkeypatch.setattr(module, "alpha_schedule", halves)
    changes = [*LITTLE, "depth=6", "batch=16", "images=96", "epochs=6", f"precision={precision}"]
    images, found = data.shapes(96, 96)[0], {}
    for arm in ("decay", "rates-taps", "norms"):
        recipe = recipe_of(DECAY[arm], "t4", changes)
        state, batches, step = experiments._masked_training(recipe, 0, images, cpu=True)
        train.fit(state, batches, step, until=20, every=1, quiet=True)
        found[arm] = [line["loss"] for line in state.history]
    assert len(found["decay"]) == 20
    assert found["rates-taps"] == found["decay"] != found["norms"]


@functools.cache
def early_losses(arm):
    changes = ["batch=16", "images=96", "lr=0.2", "epochs=4", *LITTLE]
    recipe = recipe_of(DECAY[arm], "cpu", changes)
    return experiments.first_losses(recipe, 0, data.shapes(96, 96)[0])


@pytest.mark.parametrize("arm", experiments._ARMS)
def test_every_arm_of_the_decay_study_trains_and_is_another_net(arm):
    assert len(early_losses(arm)) == 5 and all(0 < loss < 3 for loss in early_losses(arm))
    assert [b for b in experiments._ARMS if early_losses(b) == early_losses(arm)] == [arm]


def test_record_of_the_decay_study_follows_its_encoder_over_time(little_images, monkeypatch):
    changes = ["batch=16", "epochs=8", "images=96", "measured=60", "lr=0.01", *LITTLE]
    path = experiments.run("decay-identity-drop", changes=changes)
    run = results.read(path)
    assert not list(path.parent.glob("*.safetensors")) and "encoder" not in run.metrics
    seen, after = run.metrics["over_time"], run.metrics["trained"]
    assert seen["step"] == [6, 12, 24, 48]
    for name in ("knn_last", "knn_best", "probe_last"):
        assert len(seen[name]) == 4 and all(0 < accuracy < 1 for accuracy in seen[name])
    assert all(a <= b for a, b in zip(seen["knn_last"], seen["knn_best"], strict=True))
    for name in ("rank_entropy_last", "rank_entropy_centred_last"):
        assert len(set(seen[name])) == 4
    assert 0 < after["knn_held"] < 1
    # Who looks changes nothing.
    monkeypatch.setattr(experiments, "_watched", lambda step, *rest: step)
    blind = results.read(experiments.run("decay-identity-drop", changes=changes, out="blind"))
    assert "over_time" not in blind.metrics
    assert (blind.curve, blind.metrics["trained"]) == (run.curve, after)


@pytest.mark.parametrize("tier", experiments.TIERS)
def test_fine_tuned_are_the_three_arms_of_the_rule_in_the_longest_runs(tier):
    tuned = {
        name: recipe.tuned_images
        for name, one in EXPERIMENTS.items()
        if (recipe := recipe_of(one, tier)) and getattr(recipe, "tuned_images", 0)
    }
    assert tuned == {f"decay-long-{arm}": 1200 for arm in (*MASKED, "decay-lr-0.25")}


# An encoder with random branches and its fine-tuning, small; two classes, dark and bright.
TUNED = {"patch": 4, "dim": 16, "depth": 2, "heads": 2, "arch": "paper", "alpha_min": 0.2}
TUNED |= {"zero_init": False, "precision": "no"}


def tuning(**changes):
    recipe = MaskedRecipe(**(TUNED | {"tuned_images": 1280} | changes))
    torch.manual_seed(0)
    labels = torch.arange(2000) % 2
    images = (100 * labels[:, None, None, None] + torch.randint(50, (2000, 1, 8, 8))).byte()
    toy = data.ImageSet(images, labels, ("dark", "bright"))
    return experiments.encoder_of(recipe, 8, 1), recipe, 0, toy.subset(1500, 0), toy.subset(200, 1)


@pytest.mark.parametrize("precision", ["no", "half"])
def test_fine_tuning_learns_what_a_line_separates(precision):
    few = experiments._fine_tuned(*tuning(precision=precision, tuned_images=5))
    assert max(few.values()) < 1  # ten steps of five images
    many = experiments._fine_tuned(*tuning(precision=precision))
    assert many == {"fine_tuned": 1, "fine_tuned_exported": 1}


@pytest.mark.parametrize("arch", ["paper", "standard"])
def test_D04_the_export_is_fine_tuned_from_the_same_logits(arch, monkeypatch):
    seen, logits = [], experiments._logits
    monkeypatch.setattr(
        experiments, "_logits", lambda net, x: seen.append(logits(net, x)) or seen[-1]
    )
    experiments._fine_tuned(*tuning(arch=arch))
    assert (seen[0] - seen[1]).abs().max() > 1e-3  # trained, the two are different nets
    seen.clear()
    monkeypatch.setattr(experiments, "fit", lambda *rest: None)
    experiments._fine_tuned(*tuning(arch=arch))
    assert seen[0].std() > 0.01
    torch.testing.assert_close(seen[0], seen[1], rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["fine_tuned", "fine_tuned_exported"]),
        ({"alpha_min": 1.0}, ["fine_tuned"]),
        ({"shortcut": "identity-drop"}, ["fine_tuned"]),
    ],
)
def test_fine_tuning_leaves_the_net_and_all_random_states_alone(changes, names):
    given = tuning(**changes, tuned_images=20)
    before, state = copy.deepcopy(given[0]), torch.get_rng_state()
    found = experiments._fine_tuned(*given)
    assert list(found) == names and torch.equal(torch.get_rng_state(), state)
    assert repr(given[0]) == repr(before) and given[0].training == before.training
    for name, value in before.state_dict().items():
        assert torch.equal(value, given[0].state_dict()[name])
    assert experiments._fine_tuned(*given) == found


def test_fine_tuning_keeps_the_factors_and_falling_rates(monkeypatch):
    states = []
    monkeypatch.setattr(experiments, "fit", lambda state, *rest: states.append(state))
    experiments._fine_tuned(*tuning())
    for state, alpha in zip(states, (0.2, 1.0), strict=True):
        assert getattr(state.net.vit.blocks[-1].rule, "alpha", 1.0) == pytest.approx(alpha)
        rates = {group["initial_lr"] for group in state.optimizer.param_groups}
        assert sorted(rates) == pytest.approx([3e-3 * 0.65**k for k in (3, 2, 1, 0)])


@pytest.mark.parametrize("arm", ["decay", "identity-drop"])
def test_a_run_that_is_fine_tuned_is_otherwise_the_same(little_images, arm):
    changes = ["batch=16", "epochs=8", "images=96", "measured=60", "lr=0.01", *LITTLE]
    plain, tuned = (
        results.read(experiments.run(f"decay-{arm}", changes=[*changes, *more], out=out))
        for out, more in (("plain", []), ("tuned", ["tuned_images=64"]))
    )
    assert (plain.curve, plain.first_losses) == (tuned.curve, tuned.first_losses)
    for when in ("init", "trained"):
        found = tuned.metrics[when]
        assert "fine_tuned" not in plain.metrics[when] and 0 < found.pop("fine_tuned") < 1
        if arm == "decay":
            assert 0 < found.pop("fine_tuned_exported") < 1
    assert tuned.metrics == plain.metrics


def test_each_tenth_of_the_bank_is_asked_once_and_never_of_itself(monkeypatch):
    asked = []

    def look(bank, bank_labels, queries, labels):
        bank, queries = (set(part[:, 0].tolist()) for part in (bank, queries))
        assert not bank & queries and len(bank) == 45 and len(labels) == 5
        assert set(bank_labels.tolist()) == bank and set(labels.tolist()) == queries
        asked.extend(queries)
        return len(asked) / 100

    monkeypatch.setattr(experiments, "_neighbours", look)
    rows = torch.arange(50)
    assert experiments._held(rows[:, None].float(), rows) == pytest.approx(0.275)
    assert sorted(asked) == list(range(50))


def assert_winners(study, arms, rates, measure, best, won):
    """The factors in `won` are those of the trials, and only of arms with all trials recorded."""
    for arm in arms:
        names = {1.0: arm} | {rate: f"{arm}-lr-{rate:g}" for rate in rates}
        paths = {rate: BOOK / study / f"{name}-s0.json" for rate, name in names.items()}
        if not all(path.exists() for path in paths.values()):
            assert arm not in won
            continue
        held = {r: results.read(p).metrics["trained"][measure] for r, p in paths.items()}
        assert won.get(arm, 1.0) == best(held, key=held.get)


def test_rates_of_the_arms_are_those_that_won_their_trials():
    rates = 0.25, 0.5, 2.0
    assert_winners("decay", experiments.RULED, rates, "knn_held", max, experiments.TUNED)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"alpha_min": 0.5}, "got plain with alpha_min 0.5"),
        ({"shortcut": "scaled-sum"}, "got scaled-sum with alpha_min 1"),
    ],
)
@pytest.mark.parametrize("part", ["rates_as", "taps_as"])
def test_rates_and_taps_of_a_decay_need_plain_shortcuts(part, changes, told):
    for kind, prepare in (
        (MaskedRecipe, experiments._masked_training),
        (DiffusionRecipe, experiments._diffusion_training),
    ):
        recipe = kind(batch=16, **{part: 0.5}, **changes)
        with pytest.raises(ValueError) as error:
            prepare(recipe, 0, data.shapes(96, 96)[0])
        wanted = "be plain with alpha_min 1 where rates_as or taps_as is above 0"
        assert str(error.value) == f"shortcut must {wanted}, {told}"


def test_norms_of_another_ramp_are_damped_as_there():
    plain, like, decayed, undamped = (
        experiments.encoder_of(MaskedRecipe(depth=2, arch="paper", **more), 32, 3)
        for more in ({}, {"norms_as": 0.4}, {"alpha_min": 0.4}, {"alpha_min": 0.4, "norms_as": 1})
    )
    products = (1, 1, 0.8, 0.8 * 0.6)  # of the factors 1, .8, .6, .4 before each sub-layer
    for net, expected in (
        (plain, [1e-6] * 4),
        (decayed, [1e-6] * 4),
        (like, [1e-6 / p**2 for p in products]),
        (undamped, [1e-6 * p**2 for p in products]),
    ):
        assert [block.norm.eps for block in net.blocks] == pytest.approx(expected, 1e-9)


def test_a_field_that_came_after_a_record_had_its_default(little_images):
    changes = ["batch=16", "images=96", "measured=60", "epochs=1", *LITTLE]
    path = experiments.run("mae-standard", changes=changes)
    run = results.read(path)
    later = ("kind", "rates_as", "taps_as", "norms_as", "tuned_images")
    old = {key: value for key, value in run.recipe.items() if key not in later}
    results.write(dataclasses.replace(run, recipe=old), path.parents[1])
    assert experiments.run("mae-standard", changes=changes, resume=True) == path
    with pytest.raises(ValueError, match=r"other settings, got .*'norms_as': \(0\.0, 0\.5\)"):
        experiments.run("mae-standard", changes=[*changes, "norms_as=0.5"], resume=True)
    # Checkpoints are of a `repr`, which has not grown.
    assert repr(MaskedRecipe(tuned_images=5)) == repr(MaskedRecipe())
    assert repr(MaskedRecipe()).endswith("norms_as=0.0)")


@pytest.mark.parametrize("arm", MASKED)
def test_masked_autoencoder_is_recorded_with_its_encoder(little_images, arm):
    changes = [change for change in little_images if "widths" not in change and change[0] != "b"]
    changes += ["batch=16", "epochs=8", "lr=0.01", *LITTLE]
    run = results.read(experiments.run(f"mae-{arm}", changes=changes))
    before, after = run.metrics["init"], run.metrics["trained"]
    # The first prediction is 0, whose loss is that of a patch's variance; flat patches have none.
    assert 0 < after["loss"] < before["loss"] < 191 / 192
    for key in ("knn", "rank_entropy", "rank_entropy_centred"):
        assert len(after[key]) == 3  # the stem and two blocks
    assert before["knn"][0] == before["knn"][-1]  # silent branches pass on what the stem gives
    assert before["knn_pixels"] == after["knn_pixels"]
    assert after["knn_last"] == after["knn"][-1] and after["knn_best"] == max(after["knn"][1:])
    assert after["probe_block"] in (1, 2)
    for name in ("knn_last", "knn_best", "probe_last", "probe_best"):  # what studies compare
        assert 0 < results.value(run, f"trained.{name}") < 1
    assert run.device.endswith(", bf16")
    assert len(run.first_losses) == 5
    recipe = recipe_of(EXPERIMENTS[f"mae-{arm}"], "cpu", changes)
    body = experiments.encoder_of(recipe, 32, 3)
    body.load_state_dict(results.encoder_weights(run, "runs"))
    assert any(block.branch.out.weight.abs().sum() > 0 for block in body.blocks)
    # The rest is there too, so that a recorded net can reconstruct.
    net = experiments.kept_mae(run, "runs")
    noise = torch.rand(600, 16, generator=torch.Generator().manual_seed(0))
    x = data.to_float(data.shapes(600, 1)[0].images)
    fresh = experiments._masked_training(recipe, 0, data.shapes(96, 96)[0], cpu=True)[0].net
    assert net(x, noise).loss < fresh(x, noise).loss
    assert net.encoder.state_dict().keys() == body.state_dict().keys()
    assert all(v.equal(body.state_dict()[k]) for k, v in net.encoder.state_dict().items())


def test_probe_of_the_best_block_is_that_of_this_block_alone():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 60), generator=draw)
    layers = [torch.randn(2, 60, 4, generator=draw) + k * labels[..., None] for k in range(3)]
    best = experiments._probe(layers, *labels)
    assert best.source == "2" and best.accuracy > 0.5
    assert experiments._probe(layers[-1:], *labels) == best._replace(source="0")


def test_encoder_of_a_record_is_checked(little_images):
    changes = [change for change in little_images if change[0] != "b" and "widths" not in change]
    path = experiments.run("mae-decay", changes=[*changes, "batch=16", *LITTLE])
    run = results.read(path)
    parts = safetensors.torch.load_file(path.with_suffix(".safetensors"))
    alone = safetensors.torch.save({k: v for k, v in parts.items() if not k.startswith("mae.")})
    path.with_suffix(".safetensors").write_bytes(alone)
    run.metrics["encoder"]["sha256"] = data.sha256(alone)
    with pytest.raises(ValueError, match="run must have kept its decoder, got mae-decay"):
        experiments.kept_mae(run, "runs")
    path.with_suffix(".safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the file that its run kept"):
        results.encoder_weights(run, "runs")
    other = results.read(
        experiments.run("mae-decay", seed=1, changes=[*changes, "batch=16", *LITTLE])
    )
    with pytest.raises(ValueError, match="must have kept tensors, mae/decay-s1"):
        results.encoder_weights(other, "runs")


# ---- diffusion -------------------------------------------------------------------------------

# Pairs of arms, and all that differs between them; a run on CIFAR-10 is shorter in tier t4.
GENERATORS = [
    ("plain", "no-skips", "long_skips"),
    ("plain", "decay", "alpha_min"),
    ("plain", "scaled-sum", "shortcut"),
    ("plain", "rates", "rates_as"),
    *(("plain", f"taps{end}", "taps_as") for end in ("", "-0.5")),
    *(("plain", f"alpha-{alpha}", "alpha_min") for alpha in (0.5, 0.7, 0.9)),
    ("plain", "unconditional-plain", "labelled"),
    ("unconditional-plain", "unconditional-decay", "alpha_min"),
    ("decay", "unconditional-decay", "labelled"),
    ("plain", "cifar10-plain", "data"),
    ("cifar10-plain", "cifar10-decay", "alpha_min"),
    ("decay", "cifar10-decay", "data"),
    *((arm, f"{arm}-lr-{rate}", "lr") for arm in ("plain", "decay") for rate in ("0.5", "2")),
]
DIFFUSION = {one.arm: one for one in EXPERIMENTS.values() if one.study == "diffusion"}
# A little U-ViT, and few and rough samples of it.
DENOISER = ["patch=8", "dim=16", "depth=2", "heads=2", "images=96", "batch=16", "lr=0.01"]
ROUGH = ["samples=100", "guided=50", "sampling_steps=3", "measured=80"]


@pytest.mark.parametrize("tier", experiments.TIERS)
@pytest.mark.parametrize(("one", "other", "field"), GENERATORS)
def test_arms_of_the_diffusion_study_differ_in_what_they_say(tier, one, other, field):
    a, b = (recipe_of(DIFFUSION[arm], tier) for arm in (one, other))
    shorter = ["epochs"] if field == "data" and tier == "t4" else []
    assert list(diff(a, b)) == [field, *shorter]
    if field == "lr":
        assert b.lr == float(other.rpartition("-")[2]) * a.lr


def test_every_arm_of_the_diffusion_study_has_a_neighbour_and_one_rule():
    assert {arm for pair in GENERATORS for arm in pair[:2]} == set(DIFFUSION)
    words = {"": "(1) decay minus plain", "-lr-": "held_loss is lowest", "taps": "by taps-0.5"}
    of = {arm: next((k for k in ("-lr-", "taps") if k in arm), "") for arm in DIFFUSION}
    for kind, word in words.items():
        (rule,) = {one.expects for arm, one in DIFFUSION.items() if of[arm] == kind}
        assert rule.startswith("rule fixed before the") and word in rule


@pytest.mark.parametrize("tier", experiments.TIERS)
def test_ramps_of_a_u_vit_count_its_middle_block(tier):
    for arm in ("decay", "rates", "taps", "unconditional-decay", "cifar10-decay"):
        recipe = recipe_of(DIFFUSION[arm], tier)
        assert {4: 5, 12: 13}[recipe.depth] == recipe.depth + 1
        end = min(recipe.alpha_min, recipe.rates_as or 1, recipe.taps_as or 1)
        product = effective_alpha(alpha_schedule(recipe.depth + 1, end))
        assert product == pytest.approx(10**-2.5, rel=5e-3)
    # The sheet's numbers.
    assert end == pytest.approx(0.234 if tier != "full" else 0.619, abs=5e-4)


def test_the_diffusion_study_runs_what_decides_first(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_kept_judge", lambda data: None)
    runs = [(one.arm, seed) for one, seed in experiments.queue("diffusion", tmp_path)]
    turns = [
        ["plain", "no-skips", "decay"],
        ["plain-lr-0.5", "plain-lr-2", "decay-lr-0.5", "decay-lr-2"],
        ["scaled-sum", "rates", "alpha-0.5", "alpha-0.7", "alpha-0.9"],
        ["unconditional-plain", "unconditional-decay", "cifar10-plain", "cifar10-decay"],
        ["taps", "taps-0.5"],
    ]
    assert runs == [
        (arm, seed)
        for arms in turns
        for seed in (0, 1, 2)
        for arm in arms
        if seed in DIFFUSION[arm].seeds
    ]
    assert all(one.minutes <= 15 for one in DIFFUSION.values())


def test_rates_of_the_denoisers_are_those_that_won_their_trials():
    arms, won = ("plain", "decay"), experiments.TUNED_DENOISERS
    assert_winners("diffusion", arms, (0.5, 2.0), "held_loss", min, won)


def test_a_study_looks_for_all_its_judges_before_its_first_run(tmp_path, monkeypatch, capsys):
    book, asked = tmp_path / "a checkout/book/results", []
    monkeypatch.setattr(results, "checkout", lambda: book)
    monkeypatch.setattr(results, "load_runs", lambda study, data: asked.append(data) or [data])
    monkeypatch.setattr(results, "kept_tensors", lambda run: {})
    runs = sum(len(one.seeds) for one in DIFFUSION.values())
    assert len(experiments.queue("diffusion", tmp_path)) == runs
    assert asked == ["cifar10", "fashion-mnist"]
    assert len(experiments.queue("diffusion64", tmp_path)) == 9
    assert asked[2:] == ["tiny-imagenet-100"]  # for which nobody else waits
    monkeypatch.undo()
    monkeypatch.setattr(results, "checkout", lambda: book)
    ran = []
    monkeypatch.setattr(experiments, "run", lambda name, **rest: ran.append(name))
    assert main(["run", "diffusion-study", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"run judge-cifar10 --tier t4 --out '{book}'" in error and not ran
    assert len(experiments.queue("reuse", tmp_path)) == 6  # needs none


def test_arms_of_a_seed_start_from_the_same_numbers():
    images, nets = data.shapes(96, 96)[0], {}
    for arm in ("plain", "no-skips", "decay", "rates", "unconditional-plain"):
        recipe = recipe_of(DIFFUSION[arm], "cpu", [*DENOISER, "zero_init=false"])
        nets[arm] = experiments._diffusion_training(recipe, 3, images, cpu=True)[0].net
    plain = nets.pop("plain").state_dict()
    lacking = {arm: plain.keys() - net.state_dict().keys() for arm, net in nets.items()}
    assert lacking.pop("no-skips") == {"skips.0.weight", "skips.0.bias"}
    assert not any(lacking.values())
    for arm, net in nets.items():
        for name, value in net.state_dict().items():
            assert torch.equal(value, plain[name]), (arm, name)


def test_an_arm_without_classes_learns_the_null_class_alone():
    images, learned = data.shapes(96, 96)[0], {}
    for arm in ("plain", "unconditional-plain"):
        recipe = recipe_of(DIFFUSION[arm], "cpu", [*DENOISER, "zero_init=false"])
        state, batches, _ = experiments._diffusion_training(recipe, 0, images, cpu=True)
        experiments._denoise(recipe, experiments._process(recipe), state, batches[0]).backward()
        learned[arm] = state.net.stem.label.weight.grad.abs().sum(1) > 0
    assert learned["unconditional-plain"].tolist() == 4 * [False] + [True]
    assert learned["plain"].sum() > 1


def test_nothing_that_is_drawn_or_measured_of_an_arm_without_classes_sees_one(little_judge):
    images = data.shapes(96, 96)[0]
    recipe = recipe_of(DIFFUSION["unconditional-plain"], "cpu", [*DENOISER, "zero_init=false"])
    net = experiments._diffusion_training(recipe, 0, images, cpu=True)[0].net.eval()
    with torch.no_grad():
        net.stem.label.weight[:-1] = torch.nan  # of all classes but the null class
    assert experiments._draw(net, recipe, 0, 20).isfinite().all()
    found = experiments._see_denoiser(net, recipe, 0, images, images)
    assert all(torch.tensor(value).isfinite() for value in found.values())


def test_held_out_images_are_not_trained_on():
    images = data.ImageSet(
        torch.arange(96).byte()[:, None, None, None].expand(96, 1, 8, 8), torch.arange(96) % 2,
        ("even", "odd"),
    )  # fmt: skip
    recipe = recipe_of(DIFFUSION["plain"], "cpu", [*DENOISER, "epochs=9"])
    _, batches, _ = experiments._diffusion_training(recipe, 0, images, cpu=True)
    seen = {int(value) for batch, _ in batches for value in batch[:, 0, 0, 0]}
    used, held = experiments._apart(images)
    assert seen == set(range(87)) == set(used.images[:, 0, 0, 0].tolist())
    assert held.images[:, 0, 0, 0].tolist() == list(range(87, 96))
    assert torch.equal(held.labels, images.labels[87:])


def test_block_and_level_are_chosen_without_test_images(little_judge, monkeypatch):
    """Features that say the class at one place in the bank, and at another in the test images."""
    train, test = (experiments.load("fashion-mnist", split, None) for split in ("train", "test"))
    recipe = recipe_of(DIFFUSION["plain"], "cpu", [*DENOISER, *ROUGH])
    bank = train.subset(80, 1)

    def inside(net, noisy, level):
        of_bank = len(noisy) == 80
        labels = (bank if of_bank else test.subset(40, 1)).labels
        informed, noise = (300, 2) if of_bank else (100, 1), torch.Generator().manual_seed(level)
        told = [torch.randn(len(labels), 8, generator=noise) for _ in range(4)]
        told[informed[1]] += 9 * torch.eye(8)[labels] * (level == informed[0])
        return told

    monkeypatch.setattr(experiments, "_inside", inside)
    net = UViT(32, 8, 16, 2, 2, classes=len(train.classes))
    found = experiments._diagnose_denoiser(net, recipe, 0, train, test)
    for name in ("knn", "probe"):
        assert found[f"{name}_place"] == {"t": 300, "block": 2}
        assert found[f"{name}_best"] == found[name]["300"][2]


def test_the_floor_of_pixels_is_that_of_noisy_images(little_judge):
    """With images that are their class, it falls with the noise that is put on them."""
    train, test = (experiments.load("fashion-mnist", split, None) for split in ("train", "test"))
    recipe = recipe_of(DIFFUSION["plain"], "cpu", [*DENOISER, *ROUGH])
    net = UViT(32, 8, 16, 2, 2, classes=len(train.classes))

    def told(images):
        grey = (118 + 20 * torch.nn.functional.one_hot(images.labels, 4)).byte()
        strips = grey.repeat_interleave(8, 1)[:, None, None].expand(-1, 3, 32, 32)
        return dataclasses.replace(images, images=strips)

    found = experiments._diagnose_denoiser(net, recipe, 0, told(train), told(test))["pixels"]
    assert found["50"] == found["100"] == 1.0 > found["600"]


def test_copies_lie_on_training_images(little_judge, monkeypatch):
    train, test = (experiments.load("fashion-mnist", split, None) for split in ("train", "test"))
    recipe = recipe_of(DIFFUSION["unconditional-plain"], "cpu", [*DENOISER, *ROUGH])
    seen, held = (data.to_float(part.images).flatten(1).numpy() for part in (train, test))
    nearest = scipy.spatial.distance.cdist(held, seen).min(1)
    far = {}
    for name, images in (("copies", seen), ("fresh", held), ("zero", 0 * held)):
        made = torch.from_numpy(images).reshape(-1, 3, 32, 32)
        monkeypatch.setattr(experiments, "_draw", lambda *rest, made=made: made)
        far[name] = experiments._judged(None, recipe, 0, train, test)[0]
    assert far["copies"]["far"] == pytest.approx(0, abs=0.05) and far["zero"]["far"] > 1
    assert far["fresh"]["far"] == far["fresh"]["far_test"] == far["copies"]["far_test"]
    # Of an even number of distances torch takes the lower of the two in the middle.
    assert far["fresh"]["far"] == pytest.approx(np.quantile(nearest, 0.5, method="lower"), 1e-3)


def denoising_losses(recipe, images, change=lambda net: None):
    """25 losses of an experiment's own training in float64, the net changed before."""
    state, batches, step = experiments._diffusion_training(recipe, 0, images, cpu=True)
    state.ema = None
    change(state.net.double())
    train.fit(state, batches, step, until=25, every=1, quiet=True)
    return torch.tensor([line["loss"] for line in state.history], dtype=torch.float64)


@pytest.mark.parametrize("skips", [True, False])
def test_D03_equal_steps_are_decay_but_for_the_long_skips_and_the_norms(skips, monkeypatch):
    """Claim 13 of the sheet: with its norms, and its weights of stream and tap, the same net."""
    monkeypatch.setattr(experiments, "to_float", lambda x: data.to_float(x).double())
    changes = [*DENOISER, "depth=4", "epochs=6", "lr=0.005", "precision=no", f"long_skips={skips}"]
    images = data.shapes(96, 96)[0]
    decay, steps = (recipe_of(DIFFUSION[a], "t4", changes) for a in ("decay", "rates"))
    alphas = alpha_schedule(5, decay.alpha_min)
    kept = [effective_alpha(alphas[:k]) for k in range(11)]

    def weigh(net):
        for k, skip in enumerate(net.skips):
            stream, tap = kept[2 * (3 + k)], kept[2 * (2 - k)]
            shares = torch.tensor([stream] * 16 + [tap] * 16, dtype=torch.float64)
            skip.register_forward_pre_hook(lambda skip, joined, shares=shares: joined[0] * shares)
            skip.register_forward_hook(lambda skip, joined, out, stream=stream: out / stream)

    def as_decay(net):
        rescale_norms(net, alphas)
        weigh(net)

    def with_biases(net):
        rescale_norms(net, alphas)
        for k, skip in enumerate(net.skips):
            more = 1 / kept[2 * (3 + k)] - 1
            skip.register_forward_hook(lambda skip, _, out, more=more: out + more * skip.bias)

    expected = denoising_losses(decay, images)
    gaps = [
        (denoising_losses(steps, images, change) - expected).abs().max().item()
        for change in (as_decay, lambda net: rescale_norms(net, alphas))
    ]
    assert len(expected) == 25 and gaps[0] < 1e-10
    assert (gaps[1] > 1e-4) == skips  # without long skips, steps are all of it
    if skips:  # equal steps and loud taps leave of decay only the norms and the joins' biases
        both = dataclasses.replace(steps, taps_as=decay.alpha_min)
        assert (denoising_losses(both, images, with_biases) - expected).abs().max() < 1e-10
        taps = dataclasses.replace(both, rates_as=0.0)
        assert (denoising_losses(taps, images, with_biases) - expected).abs().max() > 1e-4
    else:
        with pytest.raises(ValueError, match="taps_as must be 0 without long skips, got 0.234"):
            dataclasses.replace(steps, taps_as=decay.alpha_min)
    plain = recipe_of(DIFFUSION["plain"], "t4", changes)
    assert (denoising_losses(plain, images) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("arm", DIFFUSION)
def test_every_arm_of_the_diffusion_study_trains(arm):
    recipe = recipe_of(DIFFUSION[arm], "cpu", DENOISER)
    losses = experiments.first_losses(recipe, 0, data.shapes(96, 96)[0])
    assert len(losses) == 5 and all(0 < loss < 2 for loss in losses)
    assert losses[0] == pytest.approx(1, abs=0.02)  # at first nothing is predicted
    assert losses[-1] < losses[0] - 0.01  # 0.002 without learning


def test_arms_of_a_seed_see_the_same_images_noise_and_times(monkeypatch):
    seen = {}

    def look(process, model, x0, y, t, noise, drop_label):
        seen.setdefault(arm, []).append((x0, t, noise))
        return model(process.q_sample(x0, t, noise), t, *([] if y is None else [y])).mean()

    monkeypatch.setattr(experiments.Diffusion, "loss", look)
    for arm in ("plain", "decay", "unconditional-plain"):
        recipe = recipe_of(DIFFUSION[arm], "cpu", DENOISER)
        experiments.first_losses(recipe, 0, data.shapes(96, 96)[0])
    for arm in ("decay", "unconditional-plain"):
        for ours, theirs in zip(seen[arm], seen["plain"], strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_a_tenth_of_the_labels_is_dropped(monkeypatch):
    labels = []
    monkeypatch.setattr(
        experiments.Diffusion,
        "loss",
        lambda process, model, x0, y, *rest, **more: (
            labels.append(y) or sum(weight.sum() for weight in model.parameters())
        ),
    )
    recipe = recipe_of(DIFFUSION["plain"], "cpu", [*DENOISER, "epochs=200"])
    state, batches, step = experiments._diffusion_training(recipe, 0, data.shapes(96, 0)[0])
    for k in range(100):
        step(state, batches[k])
        told = labels[k] >= 0
        assert torch.equal(labels[k][told], batches[k][1][told])
    dropped = (torch.cat(labels) < 0).double().mean()
    assert dropped == pytest.approx(0.1, abs=0.03)  # four deviations of 1600 draws


@pytest.mark.parametrize("kernel", [True, False])
def test_a_notebook_sees_a_bar_of_a_run_and_of_its_samples(kernel, monkeypatch):
    asked, real = [], train.tqdm
    monkeypatch.setattr(train, "tqdm", lambda *a, **k: asked.append(k) or real(*a, **k))
    monkeypatch.delitem(sys.modules, "ipykernel.zmqshell", raising=False)
    if kernel:
        monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", None)
    recipe = recipe_of(DIFFUSION["plain"], "cpu", [*DENOISER, *ROUGH])
    state, batches, step = experiments._diffusion_training(recipe, 0, data.shapes(96, 96)[0])
    train.fit(state, batches, step, until=1)
    experiments._draw(state.ema, recipe, 0, 20)
    assert [one.get("disable", "shown") for one in asked] == 2 * ["shown" if kernel else None]
    assert [one["delay"] for one in asked] == [5, 5]


def test_samples_of_a_seed_start_from_the_same_noise():
    recipe = DiffusionRecipe(samples=40, guided=20, sampling_steps=2, labelled=False)
    silent = [UViT(8, 4, 16, 2, 2, 3, 4, long_skips=s, zero_init=True) for s in (True, False)]
    for net in silent:  # it predicts 0: what it makes is its noise alone
        torch.nn.init.zeros_(net.smooth.bias)
    with torch.no_grad():
        few, many = (
            experiments._draw(net, recipe, 3, n) for net, n in zip(silent, (20, 40), strict=True)
        )
    assert many.shape == (40, 3, 8, 8) and torch.equal(few, many[:20])
    assert not torch.equal(experiments._draw(silent[0], recipe, 4, 20), few)


def test_features_inside_a_denoiser_are_of_its_patches_alone():
    torch.manual_seed(0)
    net, images = UViT(32, 8, 16, 2, 2, classes=4), data.shapes(30, 0)[0].images

    def stem():
        fixed = torch.Generator().manual_seed(0)
        return experiments._inside(
            net, experiments._noisy(DiffusionRecipe(), images, 100, fixed), 100
        )

    before = stem()
    assert [x.shape for x in before] == 4 * [(30, 16)]  # the stem and three blocks
    with torch.no_grad():
        net.stem.positions[:2] += 100  # of class and time
    assert torch.equal(stem()[0], before[0]) and not torch.allclose(stem()[-1], before[-1])


@pytest.fixture
def little_judge(little_images, monkeypatch):
    """`little_images`, and a judge of them where the book would have it."""
    monkeypatch.setattr(results, "checkout", lambda: Path("runs"))
    return results.read(experiments.run("judge-fashion-mnist", changes=little_images))


def test_the_judge_is_the_kept_classifier_up_to_its_head(little_judge):
    test = experiments.load("fashion-mnist", "test", None)
    judge, digest, real = experiments._judge(DiffusionRecipe(samples=20, guided=20), test)
    kept = Path("runs/judge/fashion-mnist-s0.safetensors").read_bytes()
    assert digest == little_judge.metrics["encoder"]["sha256"] == data.sha256(kept)
    x = data.to_float(test.subset(60, 1).images)
    assert real.shape == (60, 8)
    with torch.no_grad():
        torch.testing.assert_close(judge.head(real), judge(x), atol=1e-6, rtol=0)
    right = (judge(data.to_float(test.images)).argmax(1) == test.labels).double().mean()
    assert right == pytest.approx(little_judge.metrics["trained"]["accuracy"], abs=0.04)  # halves


def test_samples_without_a_judge_name_the_command_that_makes_it(little_images, monkeypatch, capsys):
    monkeypatch.setattr(results, "checkout", lambda: Path("runs"))
    arguments = ["run", "diffusion-plain", "--set", *DENOISER, *ROUGH]
    command = "python -m mini_resdecay run judge-fashion-mnist --tier t4 --out 'runs'"
    assert main(arguments) == 2
    assert command in capsys.readouterr().err
    path = experiments.run("judge-fashion-mnist", changes=little_images)
    path.with_suffix(".safetensors").write_bytes(b"something else")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert command in error and "not the file that its run kept" in error
    path.with_suffix(".safetensors").unlink()
    assert main(arguments) == 2
    assert command in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["decay", "unconditional-plain"])
def test_denoiser_is_recorded_with_its_samples(little_judge, arm, monkeypatch, capsys):
    changes = [*DENOISER, *ROUGH, "epochs=8"]
    run = results.read(experiments.run(f"diffusion-{arm}", changes=changes))
    before, after = run.metrics["init"], run.metrics["trained"]
    assert before["test_loss"] == pytest.approx(1, abs=0.02)
    assert 0 < after["test_loss"] < before["test_loss"]
    numbers = {"fd": 100, "fd_floor": 48, "fd_floor_half": 48, "fd_floor_test": 30}
    assert after["fd_name"] == {
        name: f"FD_judge-fashion-mnist@{n}"
        for name, n in (numbers | {"fd_noise": 100, "fd_few": 10}).items()
    }
    assert 0 < after["fd_floor_test"] < after["fd_noise"]
    assert 0 < after["held_loss"] < before["held_loss"] == pytest.approx(1, abs=0.05)
    assert after["judge"] == little_judge.metrics["encoder"]["sha256"]
    assert 0 < after["fd_floor"] < min(after["fd"], after["fd_noise"])
    assert after["fd_floor"] == pytest.approx(after["fd_floor_half"])  # 48 images are half of all
    assert before["fd_few"] > 0 and after["precision"] <= 1 and after["recall"] <= 1
    for name in ("knn", "probe", "rank_entropy"):
        assert list(after[name]) == ["50", "100", "300", "600"]
        assert {len(layers) for layers in after[name].values()} == {4}  # the stem, three blocks
    for name in ("knn", "probe"):
        place = after[f"{name}_place"]
        assert place["block"] in (1, 2, 3)
        assert after[f"{name}_best"] == after[name][str(place["t"])][place["block"]]
    assert list(after["pixels"]) == ["50", "100", "300", "600"]
    assert after["pixels"] == before["pixels"]  # a floor: no net has a part in it
    assert run.metrics["over_time"]["step"] == [5, 10, 20, 40]
    assert run.metrics["over_time"]["held_loss"][-1] == pytest.approx(after["held_loss"], rel=0.05)
    assert run.metrics["over_time"]["fd_few"][-1] == pytest.approx(after["fd_few"], rel=0.2)
    if arm == "decay":
        assert after["guidance"]["scale"] == [1, 1.5, 2, 3]
        assert after["guidance"]["fd_name"] == "FD_judge-fashion-mnist@50"
        assert len(after["guidance"]["fd"]) == len(after["guidance"]["agreement"]) == 4
    else:
        assert "guidance" not in after
    samples = results.kept_tensors(run)["samples"]
    assert samples.shape == (64, 3, 32, 32) and 0 <= samples.min() < samples.max() <= 255
    assert len(run.first_losses) == 5 and run.device.endswith(", bf16")
    # Who looks changes nothing.
    monkeypatch.setattr(experiments, "_watched", lambda step, *rest: step)
    blind = results.read(experiments.run(f"diffusion-{arm}", changes=changes, out="blind"))
    assert (blind.curve, blind.metrics["trained"]) == (run.curve, after)
    capsys.readouterr()
    assert main(["report", "--out", "runs"]) == 0
    lines = [text.split() for text in capsys.readouterr().out.splitlines()]
    told = {words[2]: words[3] for words in lines if words[:2] == ["diffusion", arm]}
    assert float(told["trained.fd"]) == pytest.approx(after["fd"], abs=5e-5)
    assert "undefined" not in told.values()


def test_killed_denoiser_goes_on_from_its_checkpoint_to_the_same_record(little_judge, monkeypatch):
    changes = [*DENOISER, *ROUGH, "batch=4", "epochs=6"]
    whole = results.read(experiments.run("diffusion-decay", out="whole", changes=changes))
    real, seen = experiments._denoise, []

    def dies_at_110(recipe, process, state, batch):
        seen.append(state.step)
        if state.step == 110:
            raise MemoryError  # like a kill: nothing is saved any more
        return real(recipe, process, state, batch)

    monkeypatch.setattr(experiments, "_denoise", dies_at_110)
    with pytest.raises(MemoryError):
        experiments.run("diffusion-decay", out="cut", changes=changes)
    monkeypatch.setattr(experiments, "_denoise", real)
    assert seen[-1] == 110 and not list(Path("cut").glob("*/*.json"))
    with monkeypatch.context() as other, pytest.raises(ValueError, match="another experiment"):
        judge = experiments._judge
        other.setattr(experiments, "_judge", lambda *a: (judge(*a)[0], "else", judge(*a)[2]))
        experiments.run("diffusion-decay", out="cut", resume=True, changes=changes)
    fit, begun = experiments.fit, []
    monkeypatch.setattr(
        experiments, "fit", lambda state, *a, **k: begun.append(state.step) or fit(state, *a, **k)
    )
    again = results.read(
        experiments.run("diffusion-decay", out="cut", resume=True, changes=changes)
    )
    assert begun == [100, 0]  # the run, then its first losses
    assert again.metrics == whole.metrics  # with mean weights, FD, and the hash of the samples
    assert (again.curve, again.first_losses) == (whole.curve, whole.first_losses)


DIFFUSION64 = {one.arm: one for one in EXPERIMENTS.values() if one.study == "diffusion64"}


@pytest.mark.parametrize("tier", experiments.TIERS)
def test_arms_at_64_pixels_are_those_of_cifar10_in_larger_patches(tier):
    assert list(DIFFUSION64) == ["plain", "no-skips", "decay"]
    for arm, one in DIFFUSION64.items():
        assert one.expects.startswith("not run: for those with a GPU")
        assert not (BOOK / one.study).exists()  # else this line, setup.md and B11 are to change
        near = DIFFUSION["cifar10-plain" if arm == "no-skips" else f"cifar10-{arm}"]
        changed = {"data": ("cifar10", "tiny-imagenet-100"), "patch": (4, 8)}
        changed |= {"long_skips": (True, False)} if arm == "no-skips" else {}
        assert diff(recipe_of(near, tier), recipe_of(one, tier)) == changed


def test_a_denoiser_of_64_pixels_runs_and_is_judged(little_images, monkeypatch):
    monkeypatch.setattr(results, "checkout", lambda: Path("runs"))
    small = experiments.load
    monkeypatch.setattr(experiments, "load", lambda *name: twice_as_large(small(*name)))
    judge = results.read(experiments.run("judge-tiny-imagenet-100", changes=little_images))
    assert judge.recipe["flips"]
    changes = [*DENOISER, *ROUGH, "patch=16", "samples=20", "guided=10"]
    run = results.read(experiments.run("diffusion64-decay", changes=changes))
    found = run.metrics["trained"]
    assert found["fd_name"]["fd"] == "FD_judge-tiny-imagenet-100@20" and found["fd"] > 0
    assert found["judge"] == judge.metrics["encoder"]["sha256"]
    assert results.kept_tensors(run)["samples"].shape == (20, 3, 64, 64)


def twice_as_large(part):
    images = part.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return dataclasses.replace(part, images=images)


def test_all_samples_of_the_book_were_judged_by_the_kept_bytes():
    for path in BOOK.glob("diffusion/*.json"):
        run = results.read(path)
        (judge,) = results.load_runs("judge", run.data["name"], BOOK)
        assert run.metrics["trained"]["judge"] == judge.metrics["encoder"]["sha256"]


# ---- studies ---------------------------------------------------------------------------------


def test_run_of_fewer_than_five_steps_is_recorded(little_images):
    run = results.read(experiments.run("reuse-cifar10", changes=[*little_images, "images=32"]))
    assert len(run.first_losses) == 4


def test_study_runs_what_is_not_recorded_and_nothing_else(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(experiments, "run", lambda name, **rest: ran.append((name, rest["seed"])))
    arm = EXPERIMENTS["reuse-cifar10"]
    done = tmp_path / "reuse" / f"{arm.arm}-s0.json"
    done.parent.mkdir()
    book = BOOK / "reuse"
    done.write_bytes((book / done.name).read_bytes())
    study = ["run", "reuse-study", "--tier", "t4", "--out", str(tmp_path)]
    assert main(study) == 0
    left = [("reuse-fashion-mnist", 0)]
    left += [(f"reuse-{name}", seed) for seed in (1, 2) for name in ("fashion-mnist", "cifar10")]
    assert ran == left
    assert "[5 of 5] reuse-cifar10, seed 2" in capsys.readouterr().out
    halves = []
    for part in ("1/2", "2/2"):
        ran.clear()
        assert main([*study, "--part", part]) == 0
        halves.append(list(ran))
    assert sorted(halves[0] + halves[1]) == sorted(left)
    name = "fashion-mnist-s1.json"  # recorded by the first half
    (done.parent / name).write_bytes((book / name).read_bytes())
    ran.clear()
    assert main([*study, "--part", "2/2"]) == 0
    assert ran == halves[1]


def test_records_with_other_settings_are_not_taken_for_those_of_a_study(
    tmp_path, monkeypatch, capsys
):
    experiments.run("spiral-relu", out=tmp_path, changes=QUICK)
    monkeypatch.setattr(experiments, "run", lambda name, **rest: tmp_path)
    capsys.readouterr()
    assert main(["run", "spiral-study", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out must not hold this run with other settings, got ")
    assert "relu-s0.json" in error and "'depth': (3, 32)" in error
    left = experiments.queue("spiral", tmp_path, tier="cpu", changes=QUICK)
    assert len(left) == 89 and (EXPERIMENTS["spiral-relu"], 0) not in left


def test_all_records_of_the_book_are_those_of_its_studies():
    for path in RECORDED:
        run = results.read(path)
        recipe = recipe_of(EXPERIMENTS[f"{run.study}-{run.arm}"], run.recipe["tier"])
        assert experiments._is_recorded(path, experiments._plain(recipe, run.recipe["tier"]))


def test_a_study_is_of_one_tier(tmp_path, monkeypatch, capsys):
    """Else a run of tier cpu, the default, would stand among those of t4 and never be redone."""
    monkeypatch.setattr(experiments, "run", lambda name, **rest: tmp_path)
    book = BOOK / "reuse/cifar10-s0.json"
    (tmp_path / "reuse").mkdir()
    (tmp_path / "reuse" / book.name).write_bytes(book.read_bytes())
    assert main(["run", "reuse-study", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "other settings" in error and "cifar10-s0.json with {'tier': ('t4', 'cpu')" in error
    for part in ("1/2", "2/2"):
        assert main(["run", "reuse-study", "--part", part, "--out", str(tmp_path)]) == 2
        assert "other settings" in capsys.readouterr().err
    study = ["run", "reuse-study", "--tier", "t4", "--out", str(tmp_path)]
    assert main(study) == 0 and "[5 of 5]" in capsys.readouterr().out
    for record in book.parent.glob("*.json"):
        (tmp_path / "reuse" / record.name).write_bytes(record.read_bytes())
    assert main(study) == 0
    assert capsys.readouterr().out == f"nothing left: all runs of reuse are in {tmp_path}\n"


def test_seed_is_of_one_run_and_part_of_a_study(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "run", lambda name, **rest: tmp_path)
    for seed in ("0", "1"):
        assert main(["run", "spiral-study", "--seed", seed]) == 2
        told = f"error: --seed must be left out: a study has its own, got {seed}\n"
        assert capsys.readouterr() == ("", told)
    for part in ("1/1", "2/2"):
        assert main(["run", "spiral-relu", "--part", part]) == 2
        told = f"error: --part must be left out: it is for STUDY-study, got {part}\n"
        assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize("below", ["", "runs/of/mine"])
@pytest.mark.parametrize("name", ["spiral-relu", "reuse-cifar10"])
def test_out_that_takes_no_files_is_noticed_before_training(
    name, below, little_images, monkeypatch, tmp_path, capsys
):
    for part in ("_run_spiral", "_run_images"):
        monkeypatch.setattr(experiments, part, lambda *rest: pytest.fail("trained first"))
    (tmp_path / "file").write_text("no folder")
    out = str(tmp_path / "file" / below)
    assert main(["run", name, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: out must be a folder to write in, got {out} (")
    assert error.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write here")
def test_out_without_permission_is_noticed_before_training(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["run", "spiral-relu", "--out", str(tmp_path)]) == 2
    assert f"out must be a folder to write in, got {tmp_path}" in capsys.readouterr().err


def test_nothing_but_the_record_is_left_in_out(tmp_path):
    path = experiments.run("spiral-relu", out=tmp_path, changes=QUICK)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def test_run_on_images_says_at_once_what_it_does(little_images, monkeypatch, capsys):
    load, real = experiments.load, experiments._classify

    def slow(*name):
        said.append(capsys.readouterr().out)
        return load(*name)

    def stops(state, batch):
        os.kill(os.getpid(), 2)
        return real(state, batch)

    said = []
    monkeypatch.setattr(experiments, "load", slow)
    monkeypatch.setattr(experiments, "_classify", stops)
    assert main(["run", "reuse-cifar10", "--set", *little_images]) == 130
    monkeypatch.setattr(experiments, "_classify", real)
    assert main(["run", "reuse-cifar10", "--resume", "--set", *little_images]) == 0
    begin = "loads cifar10, measures the untrained net, then "
    assert said == [f"{begin}trains\n", "", f"{begin}goes on from its checkpoint\n", ""]
    assert main(["run", "spiral-relu", "--set", *QUICK]) == 0
    assert capsys.readouterr().out.splitlines()[-1:] == ["recorded in runs/spiral/relu-s0.json"]


@pytest.mark.parametrize("command", [["list"], ["show", "spiral-relu"]])  # a long and a short one
def test_a_closed_pipe_ends_a_command_quietly(command, root):
    with subprocess.Popen(
        [sys.executable, "-m", "mini_resdecay", *command],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as printing:
        printing.stdout.close()
        assert printing.stderr.read() == b""
    assert printing.returncode == 1


@pytest.mark.parametrize("part", ["3/2", "0/2", "half", "1", "2/1"])
def test_part_of_a_study_must_exist(part, capsys):
    assert main(["run", "reuse-study", "--part", part]) == 2
    assert f"got {part}" in capsys.readouterr().err


def test_study_with_a_typo_suggests_the_nearest(capsys):
    assert main(["run", "dropath-study"]) == 2
    assert 'did you mean "droppath"' in capsys.readouterr().err


def test_run_with_other_settings_neither_replaces_a_record_nor_passes_for_it(little_images):
    path = experiments.run("reuse-cifar10", changes=little_images)
    before = path.read_bytes()
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"other settings, .*'lr': \(0\.002, 0\.5\)"):
            experiments.run("reuse-cifar10", resume=resume, changes=[*little_images, "lr=0.5"])
    assert path.read_bytes() == before
    assert not list(path.parents[1].glob("unfinished/*"))


def test_stopped_run_leaves_its_checkpoint_to_its_own_recipe(little_images, monkeypatch):
    def stops(state, batch):
        os.kill(os.getpid(), 2)
        return real(state, batch)

    real = experiments._classify
    monkeypatch.setattr(experiments, "_classify", stops)
    with pytest.raises(KeyboardInterrupt):
        experiments.run("reuse-cifar10", changes=little_images)
    monkeypatch.setattr(experiments, "_classify", real)
    assert len(list(Path("runs/unfinished").glob("*"))) == 1
    path = experiments.run("reuse-cifar10", resume=True, changes=[*little_images, "lr=0.5"])
    assert results.read(path).recipe["lr"] == 0.5
    assert len(list(Path("runs/unfinished").glob("*"))) == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("spiral-relu", "steps=0", "steps must be at least 1, got 0"),
        ("spiral-relu", "depth=-1", "depth must be at least 1, got -1"),
        ("reuse-cifar10", "batch=0", "batch must be at least 1, got 0"),
        ("mae-decay", "tuned_images=-1", "tuned_images must be at least 0, got -1"),
        ("reuse-cifar10", "epochs=0", "epochs must be at least 1, got 0"),
        (
            "reuse-cifar10",
            "batch=97",
            "batch must be at most 96 for two batches of 96 images (epochs=2), got 97",
        ),
        ("reuse-cifar10", "lr=-1", "lr must be above 0 and finite, got -1.0"),
        ("spiral-relu", "lr=nan", "lr must be above 0 and finite, got nan"),
        ("spiral-relu", "p=1.5", "p must lie in [0, 1], got 1.5"),
        ("mae-decay", "rates_as=2", "rates_as must lie in [0, 1], got 2.0"),
        ("mae-decay", "norms_as=-0.1", "norms_as must lie in [0, 1], got -0.1"),
        ("diffusion-rates", "rates_as=1.5", "rates_as must lie in [0, 1], got 1.5"),
        ("diffusion-plain", "images=30", "images must be at least 40, got 30"),
        ("diffusion-plain", "samples=9", "samples must be at least 20, got 9"),
        ("diffusion-plain", "guided=101", "guided must be in 2…samples = 100, got 101"),
        ("diffusion-plain", "guided=1", "guided must be in 2…samples = 100, got 1"),
        ("diffusion-plain", "measured=39", "measured must be at least 40, got 39"),
        ("diffusion-plain", "sampling_steps=1001", "sampling_steps must be in 1…1000, got 1001"),
        ("diffusion-plain", "ema=0", "ema must lie in (0, 1), got 0.0"),
        ("diffusion-plain", "ema=1", "ema must lie in (0, 1), got 1.0"),
    ],
)
def test_recipe_that_trains_nothing_is_one_line(name, change, message, little_images, capsys):
    images = little_images if name.startswith("reuse") else []
    assert main(["run", name, "--set", *images, change]) == 2
    assert message in capsys.readouterr().err


def test_one_epoch_needs_batches_of_half_of_the_images(little_images, capsys):
    assert main(["run", "reuse-cifar10", "--set", *little_images, "epochs=1", "batch=49"]) == 2
    assert "batch must be at most 48 for two batches of 96 images" in capsys.readouterr().err


def test_changes_that_fit_only_together_are_made_together():
    recipe = recipe_of(EXPERIMENTS["diffusion-plain"], "t4", ["samples=100", "guided=50"])
    assert (recipe.samples, recipe.guided) == (100, 50)


def test_change_without_a_value_says_how_to_write_one(capsys):
    assert main(["run", "spiral-relu", "--set", "depth"]) == 2
    assert "set must be key=value, got 'depth'" in capsys.readouterr().err


def test_set_may_be_given_more_than_once(tmp_path):
    more = ["--set", "depth=3", "--set", "width=4", "steps=5"]
    assert main(["run", "spiral-relu", "--out", str(tmp_path), *more]) == 0
    recipe = results.read(tmp_path / "spiral/relu-s0.json").recipe
    assert (recipe["depth"], recipe["width"], recipe["steps"]) == (3, 4, 5)


def test_run_says_that_it_replaces_a_record(tmp_path, capsys):
    arguments = ["run", "spiral-small", "--out", str(tmp_path), "--set", *QUICK]
    path = tmp_path / "spiral/small-s0.json"
    assert main(arguments) == 0
    assert "replaced" not in capsys.readouterr().out
    path.write_text(path.read_text() + "\n")
    assert main([*arguments, "--resume"]) == 0
    assert "replaced" not in capsys.readouterr().out
    assert path.read_text().endswith("\n\n")
    assert main(arguments) == 0
    told = f"{path} is there and will be replaced; --resume keeps it\n"
    assert capsys.readouterr().out.startswith(told)
    assert not path.read_text().endswith("\n\n")


def test_report_of_the_book_reaches_its_end(capsys):
    assert main(["report", "--out", str(BOOK)]) == 0
    out = capsys.readouterr().out
    assert "undefined" in out  # CKA of the plain nets whose layers collapse
    assert "cifar10" in out
    lines = out.splitlines()[1:-1]
    # Nothing in the book was made with a changed recipe, and no arm by two of them.
    assert {line.split()[-1] for line in lines} == {"tier=cpu", "tier=t4"}
    named = [tuple(line.split()[:3]) for line in lines]
    assert len(named) == len(set(named))


@pytest.mark.parametrize("out", ["nowhere", "README.md", "empty"])
def test_report_of_what_holds_no_records_names_the_option(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no folder")
    Path("empty").mkdir()
    assert main(["report", "--out", out]) == 2
    told = f"error: --out must be a folder of runs, STUDY/ARM-sSEED.json in it, got {out}\n"
    assert capsys.readouterr() == ("", told)


def test_report_averages_no_runs_of_different_recipes(tmp_path, capsys):
    for seed, steps in ((0, 6), (1, 6), (2, 5)):
        changes = ["depth=3", "width=4", f"steps={steps}"]
        experiments.run("spiral-small", seed=seed, out=tmp_path, changes=changes)
    capsys.readouterr()
    assert main(["report", "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "trained.accuracy" in line]
    how = [re.split(r"  (?=\d+  tier)", line)[1] for line in lines]
    changed = "tier=cpu, depth=3, width=4, steps"
    assert how == [f"1  {changed}=5", f"2  {changed}=6"]
    runs = [results.read(tmp_path / f"spiral/small-s{seed}.json") for seed in range(3)]
    means = [results.summary(part, "trained.accuracy")[0] for part in (runs[2:], runs[:2])]
    assert [float(line.split()[3]) for line in lines] == pytest.approx(means, abs=5e-5)


def test_recipe_of_a_record_is_told_by_tier_and_changes(little_images):
    run = results.read(experiments.run("reuse-cifar10", changes=little_images))
    told = "tier=cpu, images=96, batch=16, widths=[8, 8], blocks=1, measured=60"
    assert experiments.made_with(run) == told  # two epochs are what the tier has
    # A record from before a field was there had its default, which is no change.
    old = {name: value for name, value in run.recipe.items() if name != "p"}
    assert experiments.made_with(dataclasses.replace(run, recipe=old)) == told
    with pytest.raises(ValueError, match="tier must be one of"):
        experiments.made_with(dataclasses.replace(run, recipe={}))


def test_seed_below_zero_is_one_line(capsys):
    assert main(["run", "spiral-relu", "--seed", "-1"]) == 2
    assert "seed must be at least 0, got -1" in capsys.readouterr().err


def test_loss_that_is_not_finite_names_step_and_rate(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+, lr=1e\+30"):
        changes = [*QUICK, "lr=1e30", "steps=40"]
        experiments.run("spiral-relu-two-stage", out=tmp_path, changes=changes)


def test_report_does_not_hide_a_record_edited_by_hand(tmp_path, capsys):
    path = experiments.run("spiral-small", out=tmp_path, changes=QUICK)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "edited" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_one_record(tmp_path, launch):
    """Under `accelerate launch` each process sees half of a batch; the records are those of one."""
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from accelerate import PartialState\n"
        "from mini_resdecay import data, experiments, results\n"
        "from mini_resdecay.__main__ import main\n"
        "sets = {s: data.shapes(n, n)[0] for s, n in (('train', 96), ('test', 60))}\n"
        "experiments.load = lambda name, split, root: sets[split]\n"
        "results.checkout = lambda: Path('runs')\n"
        "changes = ['batch=16', 'epochs=1', 'images=96', 'measured=60']\n"
        "cnn, mae = ['widths=8', 'blocks=1'], ['precision=no', 'lr=0.01', *LITTLE]\n"
        "unet = ['precision=no', *DENOISER]\n"
        "for name, more in (('droppath-cifar10-cnn-two-stage', cnn), ('mae-decay', mae),\n"
        "                   ('judge-fashion-mnist', cnn), ('diffusion-plain', unet)):\n"
        "    assert main(['run', name, '--set', *changes, *more]) == 0\n"
        "    PartialState().wait_for_everyone()  # for the judge's record\n".replace(
            "*LITTLE", repr(LITTLE)[1:-1]
        ).replace("*DENOISER", repr([*DENOISER, *ROUGH])[1:-1])
    )
    found = []
    for folder, processes in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        printed = launch(script, tmp_path / folder, processes)
        assert printed.count("recorded in") == printed.count("measures the untrained net") == 4
        written = sorted((tmp_path / folder / "runs").glob("*/*.json"))
        found.append([results.read(path) for path in written])
    for one, two in zip(*found, strict=True):
        assert one.recipe == two.recipe
        torch.testing.assert_close(one.curve["loss"], two.curve["loss"], rtol=1e-4, atol=0)
        torch.testing.assert_close(one.first_losses, two.first_losses, rtol=1e-4, atol=0)


def test_list_and_show_name_every_experiment(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in EXPERIMENTS)
    assert "mae-study                                  3 arms, 2.2 hours\n" in listed  # 9 x 15 min
    assert main(["show", "reuse-cifar10"]) == 0
    shown = capsys.readouterr().out
    assert '"epochs": 8' in shown
    assert "2411.09475" in shown


def test_typo_in_a_name_suggests_the_nearest(capsys):
    assert main(["run", "spiral-rely"]) == 2
    assert 'did you mean "spiral-relu"' in capsys.readouterr().err
    assert main(["run", "spiral-relu", "--tier", "gpu"]) == 2
    assert "tier must be one of cpu, t4, full" in capsys.readouterr().err


def test_show_of_a_study_says_where_its_arms_are(capsys):
    assert main(["show", "spiral-study"]) == 2
    told = "name must be one arm, not a study; `list` names the arms of each, got spiral-study"
    assert told in capsys.readouterr().err


def test_missing_data_folder_is_one_line(capsys, tmp_path):
    assert main(["run", "reuse-cifar10", "--data", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none" in error


def test_report_prints_what_is_recorded(tmp_path, capsys):
    for seed in (0, 1):
        experiments.run("spiral-small", seed=seed, out=tmp_path, changes=QUICK)
    capsys.readouterr()
    assert main(["report", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(text for text in lines if "small" in text and "trained.accuracy" in text)
    values = [
        json.loads((tmp_path / "spiral" / f"small-s{seed}.json").read_text())["metrics"]["trained"]
        for seed in (0, 1)
    ]
    mean = sum(value["accuracy"] for value in values) / 2
    assert f"{mean:.4f}" in line
    assert line.split()[5] == "2"
    # A heading, the three numbers of the arm, and one line for all that is not there.
    assert len(lines) == 5 and "small" not in lines[0]
    assert lines[-1].startswith(f"1 of {len(EXPERIMENTS)} arms are recorded here")


def test_report_of_masked_nets_is_about_their_features(little_images, capsys):
    run = results.read(experiments.run("mae-decay", changes=["batch=32", "images=96", *LITTLE]))
    capsys.readouterr()
    assert main(["report", "--out", "runs"]) == 0
    lines = [text.split() for text in capsys.readouterr().out.splitlines()]
    lines = [words for words in lines if words[:2] == ["mae", "decay"]]
    told = {name: float(mean) for _, _, name, mean, *_ in lines}
    after = run.metrics["trained"]
    expected = {f"trained.{k}": after[k] for k in ("knn_last", "probe_last", "loss")}
    expected["trained.rank_entropy.-1"] = after["rank_entropy"][-1]
    assert {name: told[name] for name in expected} == pytest.approx(expected, abs=5e-5)
    assert "trained.accuracy" not in told


def test_arms_have_looks_of_their_own_under_the_names_of_the_studies():
    arms = {one.arm for one in EXPERIMENTS.values() if one.study == "mae"}
    arms |= {*experiments.ARMS, *experiments.PLAIN}
    assert arms <= figures.ARM_STYLE.keys()
    assert "learned" in figures.ARM_STYLE.keys() & SHORTCUTS.keys()


# ---- the records of the book -----------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_record_fits_the_schema_and_its_experiment(path):
    run = results.read(path)
    experiment = EXPERIMENTS[f"{run.study}-{run.arm}"]
    assert run.seed in experiment.seeds
    recipe = dict(run.recipe)
    wanted = experiment.tiers[recipe.pop("tier")]
    # A field that came later has the value that was meant all along: its default.
    assert experiments._plain(wanted) == experiments._plain(type(wanted)(**recipe))
    assert path.name == f"{run.arm}-s{run.seed}.json"


@pytest.mark.parametrize("study", sorted({path.parent.name for path in RECORDED}))
def test_records_cost_what_their_experiments_say(study):
    """Memory of each run; time of the quickest alone, since most shared their machine."""
    shares = []
    for run in results.load_runs(study, root=BOOK):
        one = EXPERIMENTS[f"{study}-{run.arm}"]
        if one.tiers[run.recipe["tier"]] == one.tiers["t4"] and run.device.startswith("CPU"):
            assert run.peak_memory_gib <= 1.2 * one.memory_gib, (run.arm, run.seed)
            shares.append(run.seconds / 60 / one.minutes)
    assert min(shares) <= 1.3


@pytest.mark.parametrize("name", IN_THE_BOOK)
def test_every_seed_of_an_experiment_is_recorded(name):
    one = EXPERIMENTS[name]
    assert tuple(run.seed for run in results.load_runs(one.study, one.arm, BOOK)) == one.seeds


def test_shipped_index_is_that_of_the_records():
    assert results.INDEX.read_text() == results.index(BOOK)


def test_every_recorded_study_is_replayed():
    assert {path.parent.name for path in RECORDED} <= {EXPERIMENTS[n].study for n in REPLAYED}


@pytest.mark.parametrize("name", REPLAYED)
def test_first_five_losses_of_a_record_replay(name):
    one = EXPERIMENTS[name]
    try:
        run = results.load_runs(one.study, one.arm, BOOK)[0]
    except ValueError:
        pytest.skip(f"{name} is not recorded yet")
    recipe = recipe_of(one, run.recipe["tier"])
    images = None
    if not isinstance(recipe, SpiralRecipe):
        if not os.environ.get("MINI_RESDECAY_DATA"):
            pytest.skip("MINI_RESDECAY_DATA is not set: no real images to replay on")
        images = data.load(recipe.data, "train").subset(recipe.images, 0)
        assert run.fingerprint == images.fingerprint
    losses = experiments.first_losses(recipe, run.seed, images)
    assert len(losses) == len(run.first_losses) == 5
    torch.testing.assert_close(losses, run.first_losses, rtol=1e-4, atol=0)
