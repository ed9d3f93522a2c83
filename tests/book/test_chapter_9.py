"""Chapter 9: the cell for a T4, rehearsed at a small size, and what it shows of records to come."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, gpu_cell

from mini_resdecay import experiments, figures, results

SIZES = {"images": 64, "batch": 32, "epochs": 1, "measured": 30, "dim": 12, "decoder_dim": 8}
SMALL = [f"{key}={value}" for key, value in SIZES.items()]


@pytest.mark.parametrize("tier", ["cpu", "t4"])
def test_the_gpu_cell_runs_with_its_first_line_changed(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, rest = gpu_cell("09-the-decayed-masked-autoencoder")
    assert first.startswith('TIER, DATA = "cpu", "shapes"  # on a T4: "t4", "cifar10"')
    run = experiments.run

    def small(name: str, changes: list[str], **more: Any) -> Path:
        return run(name, changes=[*changes, *SMALL], **more)

    monkeypatch.setattr(experiments, "run", small)
    monkeypatch.chdir(tmp_path)
    names = {"pm": lambda runs, path: results.summary(runs, path)[0], "results": results}
    names |= {"experiments": experiments, "PATHS": {"kNN last": "trained.knn_last"}}
    exec(f'TIER, DATA = "{tier}", "shapes"\n{rest}', names)
    one: Any = names["one"]
    assert one.recipe["tier"] == tier
    assert one.recipe["alpha_min"] == 0.3141
    # Half precision is off on the CPU tier; elsewhere it is what the device has.
    assert one.recipe["precision"] == {"cpu": "no", "t4": "half"}[tier]


# ---- what the chapter shows of records that are not there yet ----

CELLS = {
    cell["id"]: "".join(cell["source"])
    for cell in json.loads(
        (ROOT / "book" / "09-the-decayed-masked-autoencoder.ipynb").read_text(encoding="utf-8")
    )["cells"]
}
# The cells that read records alone, in order; of two more the part before anything is trained.
RECORDED = ("04", "08", "11", "13", "21", "22", "24", "trend", "26", "30", "32", "33", "35")
UNTIL = {"11": "decayed, off = ", "13": "\n\n\ndef untrained", "32": "with figures.frames"}


def made_up(one: experiments.Experiment, seed: int, like: results.Run) -> results.Run:
    """A record of an arm, with numbers that say which it is."""
    recipe: Any = one.tiers["t4"]
    knn = [round(0.3 + 0.001 * i + 0.01 * seed, 4) for i in range(recipe.depth + 1)]
    lists = dict.fromkeys(("rank_entropy", "rank_entropy_centred"), [2.0 + v for v in knn])
    parts: Any = {}
    for part in ("init", "trained"):
        lift = (part == "trained") * (len(one.arm) % 7) / 100
        told = {name: [v + lift for v in values] for name, values in (lists | {"knn": knn}).items()}
        told |= {"knn_last": knn[-1] + lift, "knn_best": max(knn) + lift}
        parts[part] = like.metrics[part] | told
        if recipe.tuned_images:
            parts[part] |= dict.fromkeys(("fine_tuned", "fine_tuned_exported"), 0.777)
    metrics = parts | {"over_time": like.metrics["over_time"]}
    recipe = asdict(recipe) | {"tier": "t4"}
    return replace(like, study=one.study, arm=one.arm, seed=seed, recipe=recipe, metrics=metrics)


def shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[str]]:
    """Names and descriptions of figures after the cells that read records, here those of `root`."""
    names: dict[str, Any] = {}
    alts: list[str] = []
    monkeypatch.setattr(results, "checkout", lambda: root)
    monkeypatch.setattr(figures, "show", lambda fig, alt: alts.append(alt))
    for cell in RECORDED:
        code = CELLS[f"cell-{cell}"]
        exec(code.split(UNTIL[cell])[0] if cell in UNTIL else code, names)
    return names, alts


@pytest.mark.filterwarnings("error")
def test_every_record_of_the_decay_study_would_have_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    like = results.load_runs("decay", "decay", ROOT / "book" / "results")[0]
    for one in experiments.EXPERIMENTS.values():
        for seed in one.seeds if one.study in ("mae", "decay") else ():
            results.write(made_up(one, seed, like), tmp_path)
    names, alts = shown(tmp_path, monkeypatch)
    told = capsys.readouterr().out
    assert all(len(alt) > 40 for alt in alts) and len(alts) == 6
    table, _, trials = told.partition("30 epochs: raw pixels")[2].partition("trials, on held-out")
    rates = re.findall(r"^(\S+) +0\.", trials, re.MULTILINE)
    printed = set(re.findall(r"^(\S+) +[1-5] \d\.\d{3}", table, re.MULTILINE)) | set(rates)
    arms = {one.arm for one in experiments.EXPERIMENTS.values() if one.study == "decay"}
    sized = re.compile("(?:deep|tiny|steps|wide|mask|long|float32)-")
    assert {sized.sub("", arm) for arm in arms} <= printed | {"untrained"}
    assert len(re.findall("raw pixels have", told)) == len(names["STUDIES"]) == 10
    assert len(re.findall("fine-tuned from .* 0.777±0.000 0.777±0.000", trials)) == 3
    assert len(re.findall(r"^.* [+-]\d\.\d{3} \(\d\) [+-]", trials, re.MULTILINE)) == 9
    assert "of the zero start: " in trials
    verdicts = trials.partition("15 epochs, seeds: 5")[2].partition("seeds: ")[0]
    assert re.search(r"^decay-xavier +skips-only-xavier +3 [+-]", verdicts, re.MULTILINE)
    assert re.search(r"^decay +rates-taps +5 [+-]", verdicts, re.MULTILINE)
    assert re.search(r"^skips-only +standard +5 [+-]", verdicts, re.MULTILINE)
    # All nine bars, every seed of each, and the sweep from end to end.
    assert names["ours"].count(0).tolist() == [5, 3, 3, 3, 5, 3, 3, 3, 3]
    assert len(names["there"]) == 8
    assert names["lines"]["block 6"].count(0).tolist() == [3, 3, 5, 3, 3, 3, 3, 5]


@pytest.mark.filterwarnings("error")
def test_few_records_are_enough_for_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of a study is there: cells leave out what is not, and say so by numbers of seeds."""
    like = results.load_runs("decay", "decay", ROOT / "book" / "results")[0]
    ready = [*experiments.EXPERIMENTS["mae-decay"].seeds]
    some = {"long-standard": [0], "steps-skips-only": [0], "float32-decay": [0], "deep-decay": [0]}
    some |= dict.fromkeys(experiments._FIRST, [0, 1])
    for one in experiments.EXPERIMENTS.values():
        seeds = {"mae": ready, "decay": some.get(one.arm, [])}.get(one.study, [])
        for seed in seeds:
            results.write(made_up(one, seed, like), tmp_path)
    names, _ = shown(tmp_path, monkeypatch)
    told = capsys.readouterr().out
    assert "of the zero start: " not in told
    assert [name for name in names["less"]][:2] == ["30 epochs", "15 epochs"]
    assert re.search(r"^90 epochs +$", told, re.MULTILINE)  # nothing to compare yet
    assert names["ahead"] == ["30 epochs", "15 epochs"]
