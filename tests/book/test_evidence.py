"""The Evidence page: written from the records, one row a claim, each verdict by its rule."""

import ast
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT, tool

from mini_resdecay import results
from mini_resdecay.experiments import EXPERIMENTS
from mini_resdecay.results import Run

evidence: ModuleType = tool("evidence")
PAGE = ROOT / "book" / "evidence.md"
# The claims of the two sheets' tables, in their order; behind B13 what is reported beside them.
OF_THE_TABLES = [f"A{n}" for n in range(1, 8)] + [f"B{n}" for n in range(1, 14)]
EXTRA = [f"B{n}" for n in range(14, 18)]
SECOND_HAND = ("second hand", "unverified", "reviews")
COMPARED = [what for claim in evidence.CLAIMS for what in claim.compared]


def sections(text: str) -> dict[str, str]:
    """Rows of the page by their number."""
    parts = re.split(r"^### ([ABE]\d+) ", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ---- the page as it is committed ----


def test_the_page_is_what_the_records_say() -> None:
    written = evidence.page(ROOT / "book" / "results")
    assert written == PAGE.read_text(encoding="utf-8"), "records or claims changed: make evidence"


def test_every_claim_of_the_tables_has_one_row() -> None:
    numbers = re.findall(r"^### ([AB]\d+) ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert numbers == OF_THE_TABLES + EXTRA


def test_every_row_says_what_a_reader_must_know() -> None:
    for number, text in sections(PAGE.read_text(encoding="utf-8")).items():
        names = {"Statement", "Tests", "Where"} if number[0] == "E" else {"Verdict", "Source"}
        if "| Compared |" in text:
            names |= {"Controls", "Rule", "Where"}
        elif number[0] != "E":
            names |= {"Still to run"}
        assert names <= set(re.findall(r"^- \*\*(.+?)\*\*: ", text, re.MULTILINE)), number


def test_no_number_of_a_paper_comes_at_second_hand() -> None:
    for claim in evidence.CLAIMS:
        told = re.sub(r"\bchapter \d+|\b[ABE]\d+\b|`[^`]*`", "", f"{claim.title} {claim.claim}")
        assert claim.mark not in SECOND_HAND or not re.search(r"\d", told), claim.number
        assert claim.mark in evidence.MARKS


@pytest.mark.parametrize("what", COMPARED, ids=lambda what: f"{what.study}: {what.label}")
def test_what_is_compared_are_arms_of_one_study_that_exist(what) -> None:
    assert {f"{what.study}-{arm}" for arm in what.arms} <= EXPERIMENTS.keys()
    assert evidence.planned(what) >= 3


def test_an_arm_at_its_best_rate_is_not_read_before_all_its_trials() -> None:
    waits = [what for what in COMPARED if getattr(what, "after", ())]
    assert [(what.study, len(what.after)) for what in waits] == 3 * [("decay", 9)] + [
        ("diffusion", 4)
    ]
    run = results.load_runs("mae", "decay", ROOT / "book" / "results")[0]
    run = replace(run, metrics={"trained": {"fd": 1.0, "knn_last": 1.0} | shows(0.6)})
    for told in waits:
        assert {f"{told.study}-{arm}" for arm in told.after} <= EXPERIMENTS.keys()
        runs = {(told.study, arm): {0: run, 1: run} for arm in {*told.arms, "plain"}}
        trials = {(told.study, arm): {0: run} for arm in told.after}
        assert told.pairs(trials | runs) == [(1.0, 1.0), (1.0, 1.0)]
        for arm in set(told.after) - set(told.arms):
            there = trials | runs
            del there[told.study, arm]
            assert told.pairs(there) == []


def shows(*shares: float) -> dict:
    """Metrics of a denoiser in whose samples the judge finds that share of the classes."""
    return {"guidance": {"agreement": list(shares)}}


def made_runs(arm: str, fd: float, shares: list[float]) -> dict[int, Run]:
    run = replace(a_run(arm, 0, 0.5), study="diffusion", arm=arm)
    metrics = {"fd": fd, "precision": 0.9, "rank_entropy": {"100": [4.0, 3.0, 3.0, 2.5]}}
    return {
        seed: replace(run, seed=seed, metrics={"trained": metrics | shows(share, 0.9)})
        for seed, share in enumerate(shares)
    }


@pytest.mark.parametrize(
    ("shares", "reading"),
    [
        ([0.4, 0.5, 0.6], "holds here"),  # half, on average
        ([0.3, 0.4, 0.5], "not read: `cifar10-plain` shows 0.40 of the classes asked for"),
        ([0.9, 0.1, 0.1], "not read: `cifar10-plain` shows 0.37 of the classes asked for"),
    ],
)
def test_samples_of_cifar10_are_not_read_unless_they_show_their_class(
    shares: list[float], reading: str
) -> None:
    claim = next(one for one in evidence.CLAIMS if one.number == "B11")
    runs = {
        ("diffusion", "plain"): made_runs("plain", 2.0, [0.7] * 3),
        ("diffusion", "decay"): made_runs("decay", 1.0, [0.2] * 3),
        ("diffusion", "cifar10-plain"): made_runs("cifar10-plain", 2.0, shares),
        ("diffusion", "cifar10-decay"): made_runs("cifar10-decay", 1.0, [0.9] * 3),
    }
    lines = {
        one.what.label: one
        for what in claim.compared
        if what.arm in ("decay", "cifar10-decay") and what.metric == "trained.fd"
        for one in [evidence.line(claim, what, runs)]
    }
    told, usual = (lines[f"{name}, FD, against `plain`"] for name in ("CIFAR-10", "usual rate"))
    assert (usual.reading, usual.means) == ("holds here", (1.0, 2.0))
    assert (told.reading, told.seeds) == (reading, 3)
    row = evidence.table_row(told, claim.rule).replace("\u00a0", " ")
    means = "2.000 → 1.000 | −1.000 in every seed" if reading == "holds here" else "– | –"
    assert row == f"| CIFAR-10, FD, against `plain` ↓ *(beside)* | {means} | {reading}, 3/3 |"
    if reading != "holds here":  # where it decides, it is no verdict
        decides = told._replace(what=replace(told.what, decides=True))
        assert evidence.verdict(claim, [decides]) == evidence.NOT_RUN
        held = decides._replace(reading=evidence.HOLDS)
        assert evidence.count(claim, [decides, held]).endswith("1 of 1 comparisons; 1 not read)")


def test_all_of_the_diffusion_study_waits_for_the_judge_to_find_its_classes() -> None:
    claim = next(one for one in evidence.CLAIMS if one.number == "B11")
    asked = {(what.study, what.arm.startswith("cifar10"), what.shown) for what in claim.compared}
    assert asked == {("diffusion", False, "plain"), ("diffusion", True, "cifar10-plain")}
    assert "for CIFAR-10 likewise of cifar10-plain's samples" in EXPERIMENTS[claim.fixed].expects
    unknown = next(what for what in claim.compared if what.arm.startswith("unconditional"))
    runs = {("diffusion", arm): made_runs(arm, 1.0, [0.9] * 3) for arm in unknown.arms}
    assert unknown.pairs(runs) == []  # without plain nobody knows
    plain = {("diffusion", "plain"): made_runs("plain", 1.0, [0.9])}
    assert len(unknown.pairs(runs | plain)) == 3


def test_samples_stand_beside_pixels_and_beside_unseen_images() -> None:
    claim = next(one for one in evidence.CLAIMS if one.number == "B11")
    old = {("diffusion", "plain"): made_runs("plain", 2.0, [0.7] * 3)}
    assert evidence.begun(claim, old) == claim  # runs from before it was measured
    runs = dict(old)
    for arm, far in {"scaled-sum": (8.0, 9.0), "alpha-0.5": (7.25,)}.items():
        measured = {"pixels": {"50": 0.8071, "100": 0.785}, "far_test": 7.0}
        runs["diffusion", arm] = {
            seed: replace(
                run, metrics={"trained": run.metrics["trained"] | measured | {"far": far[seed]}}
            )
            for seed, run in made_runs(arm, 2.0, [0.7] * len(far)).items()
        }
    told = evidence.begun(claim, runs).note.removeprefix(claim.note)
    assert told == (
        " Neighbours by the pixels of the same noisy images, cifar10: 0.807 at t = 50, 0.785 at "
        "t = 100. Euclidean distance to the nearest training image, pixels from −1 to 1, median: "
        "test images 7.00; samples of (in brackets: seeds) `scaled-sum` 8.50 (2), `alpha-0.5` "
        "7.25 (1)."
    )


def test_what_is_not_planned_is_neither_counted_nor_left(tmp_path: Path) -> None:
    results.write(replace(a_run("fashion-mnist", 0, 0.5), study="judge"), tmp_path)
    tail = evidence.page(tmp_path).partition("## The recorded studies")[2]
    assert "| judge | 1 of 2 runs |" in tail and "# 1 left of judge" in tail
    idle = {one.name for one in EXPERIMENTS.values()} - {one.name for one in evidence.PLANNED}
    assert idle == {"judge-tiny-imagenet-100"} | {
        f"diffusion64-{arm}" for arm in ("plain", "no-skips", "decay")
    }


def test_every_recorded_arm_is_compared_somewhere() -> None:
    """Arms may be planned in code before a claim compares them; a record must be used.

    But for trials of a learning rate that did not win.
    """
    used = {(what.study, arm) for what in COMPARED for arm in what.arms}
    recorded = results.recorded(ROOT / "book" / "results")
    recorded = {(study, arm) for study, arm in recorded if "-lr-" not in arm and study != "judge"}
    assert recorded - used == set(), "a recorded arm needs a comparison in its claim"


def test_labels_of_a_claim_differ_and_places_exist() -> None:
    for claim in evidence.CLAIMS:
        labels = [what.label for what in claim.compared]
        assert len(set(labels)) == len(labels), claim.number
        for place in filter(None, claim.where.split("; ")):
            number, *figures = place.split()
            there = evidence.chapters().get(int(number))
            text = (ROOT / "book" / there).read_text(encoding="utf-8") if there else ""
            assert all(f'"name": "{name}"' in text for name in figures), (claim.number, place)


def test_studies_fix_the_rules_that_rows_quote() -> None:
    for claim in evidence.CLAIMS:
        assert claim.rule in evidence.RULES
        assert claim.rule != "study" or claim.fixed
        if claim.fixed:
            assert "rule fixed before the runs: " in EXPERIMENTS[claim.fixed].expects
    assert "by 1 point and 2 pooled deviations" in EXPERIMENTS["mae-decay"].expects


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("one", evidence.EXACT, ids=lambda one: one.number)
def test_what_is_exact_has_its_tests_and_its_section(one) -> None:
    for name in one.tests:
        file, _, function = name.partition("::")
        assert function in functions(ROOT / file)
    chapter = json.loads((ROOT / "book" / evidence.chapters()[one.chapter]).read_text())
    text = "\n".join("".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "markdown")
    assert re.search(rf"^##+ {re.escape(one.section)}$", text, re.MULTILINE)
    assert set(one.about.split(", ")) <= {*OF_THE_TABLES, *EXTRA}


# ---- from records to a verdict, on made-up records ----


def a_run(arm: str, seed: int, knn: float, loss: float = 0.5, rank: float = 3.0) -> Run:
    trained = {
        "loss": loss,
        "knn_pixels": 0.3,
        **dict.fromkeys(("knn_last", "knn_best", "probe_last", "probe_best"), knn),
        "rank_entropy": [4.0, rank],
        "rank_entropy_centred": [4.0, rank],
    }
    return Run(
        study="mae",
        arm=arm,
        seed=seed,
        data={"name": "cifar10", "train": 10, "test": 10},
        recipe={"tier": "t4"},
        metrics={"init": {"knn_last": 0.25}, "trained": trained},
        curve={"step": [1], "loss": [1.0]},
        device="CPU",
        seconds=360.0,
        versions={},
        commit="unknown",
        fingerprint="ab12",
        peak_memory_gib=0.5,
        first_losses=[1.0] * 5,
    )


def rows_of(root: Path, arms: dict[str, list[float]], **more: float) -> dict[str, str]:
    for arm, values in arms.items():
        for seed, knn in enumerate(values):
            results.write(a_run(arm, seed, knn, **more), root)
    return sections(evidence.page(root))


def told(row: str) -> str:
    return re.search(r"^- \*\*Verdict\*\*: (.*)$", row, re.MULTILINE)[1]


BASE = {"standard": [0.40, 0.41, 0.42], "skips-only": [0.41, 0.42, 0.43]}


def test_without_records_nothing_is_claimed(tmp_path: Path) -> None:
    rows = sections(evidence.page(tmp_path))
    assert {told(row) for number, row in rows.items() if number[0] != "E"} == {"**not yet run**"}


@pytest.mark.parametrize(
    ("decay", "verdict", "count"),
    [
        # Above both in all seeds, by more than a point and two pooled deviations (of 0.01 each).
        ([0.50, 0.51, 0.52], "holds here", "holds in 2 of 2 comparisons"),
        ([0.30, 0.31, 0.32], "contradicted", "holds in 0 of 2 comparisons, contradicted in 2"),
        # By 2.5 points over the standard net and by 1.5 over skips alone, in all seeds.
        ([0.425, 0.435, 0.445], "not at this scale", "holds in 1 of 2 comparisons"),
        # Far above in two seeds, below in the third.
        ([0.70, 0.71, 0.30], "not at this scale", "holds in 0 of 2 comparisons"),
    ],
)
def test_the_masked_study_is_read_by_its_own_rule(
    tmp_path: Path, decay: list[float], verdict: str, count: str
) -> None:
    row = told(rows_of(tmp_path, BASE | {"decay": decay})["B1"])
    assert row == f"**{verdict}**, so far ({count}; 15 not yet run)"


def test_a_line_has_means_interval_visible_effect_and_seeds(tmp_path: Path) -> None:
    """Differences .02, .03, .04: mean .03, deviation .01; t(.975, 2) = 4.3027, lambda = 5.678."""
    arms = {"standard": [0.40, 0.41, 0.42], "skips-only": [0.42, 0.44, 0.46]}
    row = rows_of(tmp_path, arms)["B5"]
    half = 4.3027 * 0.01 / math.sqrt(3)
    line = f"| 0.410 → 0.440 | +0.030 ± {half:.3f} (0.033) | holds here, 3/3 |"
    assert f"| 30 epochs, kNN, last block ↑ {line}" in row.replace("\u00a0", " ")
    assert told(row) == "**holds here**, so far (holds in 1 of 1 comparisons; 7 not yet run)"


def test_a_study_half_recorded_says_so(tmp_path: Path) -> None:
    few = {"standard": [0.40, 0.41], "skips-only": [0.45, 0.46, 0.47], "decay": [0.5]}
    rows = rows_of(tmp_path, few)
    assert told(rows["B5"]) == "**holds here**, so far (holds in 1 of 1 comparisons; 7 not yet run)"
    assert "| +0.050 in every seed | holds here, 2/3 |" in rows["B5"]
    assert told(rows["B1"]) == "**not yet run**"
    assert "| 0.400 →\u00a00.500 | – | too few seeds, 1/3 |" in rows["B1"]
    assert "- **Still to run**: The seeds missing above." in rows["B5"]
    page = evidence.page(tmp_path)
    assert "| mae | 6 of 9 runs |" in page
    assert "run mae-study --tier t4" in page


@pytest.mark.parametrize("change", [{"fingerprint": "cd34"}, {"recipe": {"tier": "cpu"}}])
def test_runs_of_other_data_or_tiers_are_not_compared(tmp_path: Path, change) -> None:
    for arm in BASE | {"decay": BASE["standard"]}:
        for seed in range(2):
            run = a_run(arm, seed, 0.4 + 0.01 * seed)
            results.write(replace(run, **change) if arm == "decay" else run, tmp_path)
    with pytest.raises(ValueError, match="mae: decay and .*must share tier and data"):
        evidence.page(tmp_path)


def test_what_arms_add_to_their_bases_is_compared() -> None:
    knn = {"decay": 0.30, "rates": 0.45, "norms": 0.40}
    runs = {
        ("decay", arm): {seed: a_run(arm, seed, v + 0.01 * seed) for seed in range(2)}
        for arm, v in knn.items()
    }
    more = evidence.Comparison(
        "", "decay", "decay", "rates", evidence.KNN[1], bases=("norms", "norms"), absolute=True
    )
    for what, wanted in ((more, (0.10, 0.05)), (replace(more, absolute=False), (-0.10, 0.05))):
        assert what.arms == ("decay", "rates", "norms", "norms")
        assert what.pairs(runs) == [pytest.approx(wanted)] * 2


def test_a_margin_is_granted(tmp_path: Path) -> None:
    for part, loss in (("inside", 0.512), ("outside", 0.53)):
        rows_of(tmp_path / part, BASE)
        for seed, extra in enumerate((0.0, 0.001, 0.002)):
            run = a_run("decay", seed, 0.5, loss=loss + extra)
            results.write(run, tmp_path / part)
    verdicts = [told(sections(evidence.page(tmp_path / p))["B9"]) for p in ("inside", "outside")]
    assert [one.split("**")[1] for one in verdicts] == ["holds here", "contradicted"]


def tuned_runs(decay: float, exported: float) -> dict:
    """Three seeds of the arms of B12; the usual arms reach 0.6 and 0.61, each net 0.4 before."""
    found: dict = {}
    for arm, value in (("standard", 0.6), ("skips-only", 0.61), ("decay", decay)):
        for seed in range(3):
            run = replace(a_run(f"long-{arm}", seed, 0.5), study="decay")
            run.metrics["trained"]["fine_tuned"] = value + 0.001 * seed
            run.metrics["init"]["fine_tuned"] = 0.4
            if arm == "decay":
                run.metrics["trained"]["fine_tuned_exported"] = exported + 0.001 * seed
                run.metrics["init"]["fine_tuned_exported"] = 0.39
            found.setdefault(("decay", run.arm), {})[seed] = run
    return found


@pytest.mark.parametrize(
    ("decay", "verdict"), [(0.59, "holds here"), (0.605, "mixed"), (0.62, "contradicted")]
)
def test_worse_after_fine_tuning_is_what_is_claimed(decay: float, verdict: str) -> None:
    claim = next(one for one in evidence.CLAIMS if one.number == "B12")
    runs = tuned_runs(decay, decay + 0.02)
    lines = [evidence.line(claim, what, runs) for what in claim.compared]
    assert evidence.verdict(claim, lines) == verdict
    told = {one.what.label: one.gap.mean for one in lines}
    assert told == pytest.approx(
        {
            "90 epochs, accuracy after fine-tuning, against `standard`": decay - 0.6,
            "90 epochs, accuracy after fine-tuning, against `skips-only`": decay - 0.61,
            "90 epochs, exported, against `decay`": 0.02,
            "90 epochs, `standard`, against from scratch": 0.201,
            "90 epochs, `skips-only`, against from scratch": 0.211,
            "90 epochs, `decay`, against from scratch": decay - 0.399,
            "90 epochs, `decay` exported, against from scratch": decay + 0.021 - 0.39,
        }
    )
    assert [one.what.decides for one in lines] == [True, True, *[False] * 5]


def test_six_arms_are_enough_for_a_correlation() -> None:
    claim = next(one for one in evidence.CLAIMS if one.number == "A3")
    link = next(what for what in claim.compared if isinstance(what, evidence.Link))
    link = replace(link, arms=link.arms[:6], x="trained.loss", y="trained.knn_last", sign=-1)
    runs = {
        ("spiral", arm): {seed: a_run(arm, seed, 0.1 * place, loss=-place) for seed in range(2)}
        for place, arm in enumerate(link.arms)
    }
    read = evidence.line(claim, link, runs)
    assert (read.gap.mean, read.gap.half_width, read.reading) == (-1.0, 0.0, evidence.HOLDS)
    few = replace(link, arms=link.arms[:5])
    assert evidence.line(claim, few, runs).reading == evidence.FEW_ARMS
    assert evidence.verdict(claim, [evidence.line(claim, few, runs)]) == evidence.NOT_RUN


def test_a_correlation_takes_the_arms_that_are_there() -> None:
    claim = next(one for one in evidence.CLAIMS if one.number == "B7")
    link = next(what for what in claim.compared if isinstance(what, evidence.Link))
    runs = {
        ("decay", arm): {seed: a_run(arm, seed, 0.1 * i, rank=i) for seed in range(3)}
        for i, arm in enumerate(link.arms[:7])
    }
    runs["decay", link.arms[6]].pop(2)  # two seeds would cut the others to two
    now = evidence.begun(claim, runs)
    lines = [evidence.line(now, what, runs) for what in now.compared]
    told = [one for one in lines if isinstance(one.what, evidence.Link)]
    assert [one.gap.mean for one in told] == [1.0, 1.0]
    assert told[0].what.label.endswith(f", 6 of {len(link.arms)} arms")
    assert evidence.so_far(now, lines) == ", so far" and "the other arms" in now.needs
    runs.pop(("decay", link.arms[0]))
    assert evidence.begun(claim, runs) == claim  # five are too few


def test_what_decay_adds_from_zero_and_from_random_branches() -> None:
    knn = {"decay": 0.30, "skips-only": 0.40, "decay-xavier": 0.15, "skips-only-xavier": 0.41}
    runs = {
        ("decay", arm): {seed: a_run(arm, seed, v + 0.01 * seed) for seed in range(2)}
        for arm, v in knn.items()
    }
    claim = next(one for one in evidence.CLAIMS if one.number == "B17")
    first, *rest = [evidence.line(claim, what, runs) for what in claim.compared]
    assert first.means == pytest.approx((-0.10, -0.26))
    assert first.reading == evidence.HOLDS and [one.what.decides for one in rest] == [False, False]


def test_rows_say_by_which_rule_they_are_read(tmp_path: Path) -> None:
    row = rows_of(tmp_path, BASE | {"decay": [0.30, 0.31, 0.32]})["B1"]
    assert row.count("contradicted *(rule)*, 3/3") == 2
    # Random starts stand beside as well, and are not recorded here.
    assert row.count(" *(interval)*, 3/3") == row.count("*(beside)*") - 4 == 8


def test_a_study_without_records_is_not_listed(tmp_path: Path) -> None:
    rows_of(tmp_path, BASE)
    tail = evidence.page(tmp_path).partition("## The recorded studies")[2]
    assert "| mae | 6 of 9 runs |" in tail
    assert "droppath" not in tail


def test_certain_cases_need_one_and_are_not_refuted() -> None:
    claim = next(one for one in evidence.CLAIMS if one.rule == "any")
    cell = evidence.Line(claim.compared[0], None, None, 5, 5, evidence.CONTRADICTED)
    assert evidence.verdict(claim, [cell, cell]) == evidence.NOT_HERE
    lines = [cell, cell._replace(reading=evidence.HOLDS)]
    assert evidence.verdict(claim, lines) == evidence.HOLDS
    assert evidence.verdict(replace(claim, rule="every"), lines) == evidence.MIXED
    assert evidence.verdict(replace(claim, rule="every"), [cell]) == evidence.CONTRADICTED


def test_numbers_of_lists() -> None:
    run = a_run("decay", 0, 0.5)
    run.metrics["trained"]["probe"] = [0.5, 0.75, 0.25, 0.5]
    found = {
        kind: evidence.number(run, f"{kind}:trained.probe") for kind in ("mean", "max", "last")
    }
    assert found == {"mean": 0.5, "max": 0.75, "last": 0.5}
    assert evidence.number(run, "fall:trained.probe") == 0.5
    assert evidence.number(run, "trained.knn_pixels") == 0.3


def test_zero_has_no_sign() -> None:
    assert [evidence.signed(v, 3) for v in (-0.0004, 0.0, 0.0004)] == ["0.000"] * 3
    assert [evidence.signed(v, 1) for v in (-0.25, 0.25, 12.0)] == ["−0.2", "+0.2", "+12.0"]
    assert evidence.correlation([1, 1, 1], [1, 2, 3]) == 0.0
