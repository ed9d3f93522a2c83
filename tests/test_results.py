"""Recorded runs: written whole, refused when touched, compared with the right statistics."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import socket
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mini_resdecay import REPO, __version__, results
from mini_resdecay.results import (
    Interval,
    Run,
    check_fingerprint,
    compare,
    decided,
    environment,
    index,
    load_runs,
    paired_interval,
    read,
    summary,
    value,
    versus,
    write,
)

RUN = Run(
    study="reuse",
    arm="plain",
    seed=0,
    data={"name": "digits", "train": 1000, "test": 797},
    recipe={"depth": 6, "lr": 0.001, "widths": [16, 32, 64], "clip": None},
    metrics={"init": {"rebound": {"cka": 0.25}}, "trained": {"rebound": {"cka": 0.5}}, "n": 3},
    curve={"step": [1, 2, 3], "loss": [2.0, 1.5, 1.25]},
    device="CPU, x86_64, 1 thread(s)",
    seconds=12.5,
    versions={"torch": "2.13.0"},
    commit="unknown",
    fingerprint="ab12",
    peak_memory_gib=0.5,
    first_losses=[2.5, 2.25, 2.0, 1.75, 1.5],
)


def changed(**fields: object) -> Run:
    return dataclasses.replace(RUN, **fields)


# ---- write and read ----


def test_round_trip_and_place(tmp_path: Path) -> None:
    path = write(RUN, tmp_path)
    assert path == tmp_path / "reuse" / "plain-s0.json"
    assert read(path) == RUN
    content = json.loads(path.read_text())
    assert list(content) == [field.name for field in dataclasses.fields(Run)] + ["sha256"]
    assert [p.name for p in path.parent.iterdir()] == ["plain-s0.json"]


def test_a_curve_is_one_line(tmp_path: Path) -> None:
    text = write(RUN, tmp_path).read_text()
    assert '"loss": [2.0, 1.5, 1.25]\n' in text
    assert text.endswith("}\n")


finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
runs = st.builds(
    Run,
    study=st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,9}", fullmatch=True),
    arm=st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,9}", fullmatch=True),
    seed=st.integers(0, 99),
    data=st.dictionaries(st.text(), plain, max_size=3),
    recipe=st.dictionaries(st.text(), plain, max_size=3),
    metrics=st.dictionaries(st.text(), plain, max_size=3),
    curve=st.integers(0, 4).flatmap(
        lambda n: st.dictionaries(st.text(), st.lists(finite, min_size=n, max_size=n), max_size=3)
    ),
    device=st.text(),
    seconds=st.floats(0, 1e9),
    versions=st.dictionaries(st.text(), st.text(), max_size=3),
    commit=st.text(),
    fingerprint=st.text(),
    peak_memory_gib=st.floats(0, 1e3),
    first_losses=st.lists(finite, min_size=5, max_size=5),
)


@given(run=runs)
def test_any_run_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    folder = tmp_path_factory.mktemp("runs")
    path = write(run, folder)
    again = read(path)
    assert again == run
    first = path.read_bytes()
    assert write(again, folder).read_bytes() == first


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": math.nan}, "seconds must be finite and plain JSON, got nan"),
        ({"metrics": {"a": {"b": [1.0, math.inf]}}}, "metrics must be finite and .*inf"),
        (
            {"recipe": {"widths": (16, 32)}},
            r"recipe must be finite and plain JSON, got .*\(16, 32\)",
        ),
        ({"metrics": {"acc": np.float32(0.5)}}, "float32 is not JSON serializable"),
        ({"recipe": {3: 1}}, "recipe must be .* plain JSON"),
        ({"seed": 0.5}, "seed must be a <class 'int'>, got 0.5"),
        ({"arm": "../../etc"}, "study and arm must be of a-z.* got reuse/../../etc"),
        ({"study": ""}, "study and arm must be of a-z"),
        ({"curve": [1.0]}, r"curve must be a dict\[str, .*got \[1.0\]"),
        ({"device": None}, "device must be a <class 'str'>, got None"),
    ],
)
def test_what_does_not_fit_the_schema_is_not_written(
    tmp_path: Path, fields: dict, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        write(changed(**fields), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_number_of_seconds_is_a_number(tmp_path: Path) -> None:
    assert read(write(changed(seconds=12), tmp_path)).seconds == 12


@pytest.mark.parametrize(
    ("old", "new"),
    [('"cka": 0.5', '"cka": 0.4'), ('"seed": 0', '"seed": 1'), ("1.25", "1.250001")],
)
def test_a_file_edited_by_hand_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = write(RUN, tmp_path)
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="plain-s0.json was edited: .*sha256.*run the experiment"):
        read(path)


def test_white_space_is_no_edit(tmp_path: Path) -> None:
    path = write(RUN, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read(path) == RUN


def test_a_field_gone_or_added_is_named(tmp_path: Path) -> None:
    path = write(RUN, tmp_path)
    content = json.loads(path.read_text())
    content["colour"] = content.pop("device")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fit the schema: missing or unknown: colour, device"):
        read(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"study": "reuse"', "\x00"])
def test_a_file_that_is_no_run(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.json is damaged: no JSON object with sha256"):
        read(path)


@pytest.mark.parametrize("place", ["Path.write_bytes", "os.fsync", "os.replace"])
def test_full_disk_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(RUN, tmp_path)
    monkeypatch.setattr(f"mini_resdecay.data.{place}", full)
    with pytest.raises(OSError, match="No space left"):
        write(changed(seconds=99.0), tmp_path)
    assert read(path) == RUN


# ---- opening a study ----


def three_arms(folder: Path) -> Path:
    for arm in ("plain", "decay", "decay-s"):
        for seed in (10, 2, 0):
            write(changed(arm=arm, seed=seed), folder)
    write(changed(study="other"), folder)
    return folder


def test_load_runs_sorts_by_arm_and_seed(tmp_path: Path) -> None:
    found = load_runs("reuse", root=three_arms(tmp_path))
    assert [(run.arm, run.seed) for run in found] == [
        (arm, seed) for arm in ("decay", "decay-s", "plain") for seed in (0, 2, 10)
    ]
    assert [run.arm for run in load_runs("reuse", "decay", tmp_path)] == ["decay"] * 3


@pytest.mark.parametrize(
    ("study", "arm", "message"),
    [
        ("resue", None, 'study with recorded runs must be one of other, reuse, got "resue"; did'),
        ("xyz", None, 'study with recorded runs must be one of other, reuse, got "xyz"'),
        ("reuse", "plane", 'got "plane"; did you mean "plain"?'),
    ],
)
def test_a_name_with_a_typo(tmp_path: Path, study: str, arm: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_runs(study, arm, three_arms(tmp_path))


def test_no_runs_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="study with recorded runs must be one of , got"):
        load_runs("reuse", root=tmp_path)


def test_the_checkout_is_found_from_a_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_arms(tmp_path / "book" / "results")
    (tmp_path / "mini_resdecay").mkdir()
    (tmp_path / "site-packages" / "mini_resdecay").mkdir(parents=True)
    installed = tmp_path / "site-packages" / "mini_resdecay" / "results.py"
    monkeypatch.setattr(results, "__file__", str(installed))
    monkeypatch.chdir(tmp_path / "book")
    assert len(load_runs("reuse")) == 9


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A released version somewhere on the net, no checkout here, an empty cache."""
    folder = three_arms(tmp_path / "released")
    served = {
        f"{REPO}/raw/v{__version__}/book/results/{path.parent.name}/{path.name}": path.read_bytes()
        for path in folder.glob("*/*.json")
    }
    asked: list[tuple[str, float]] = []

    class Answer:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *arguments: object) -> None:
            pass

        def read(self) -> bytes:
            return self.content

    def urlopen(url: str, timeout: float) -> Answer:
        asked.append((url, timeout))
        return Answer(served[url])

    (tmp_path / "index").write_text(index(folder))
    monkeypatch.setattr(results, "INDEX", tmp_path / "index")
    monkeypatch.setattr(results, "checkout", lambda: None)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("MINI_RESDECAY_CACHE", str(tmp_path / "cache"))
    return {"served": served, "asked": asked}


def test_without_a_checkout_runs_are_fetched_once(release: dict) -> None:
    found = load_runs("reuse", "decay")
    assert [(run.arm, run.seed) for run in found] == [("decay", 0), ("decay", 2), ("decay", 10)]
    assert all(url in release["served"] and 0 < t <= 10 for url, t in release["asked"])
    assert len(release["asked"]) == 3
    assert load_runs("reuse", "decay") == found
    assert len(release["asked"]) == 3  # the second time from the cache


def test_without_a_checkout_kept_tensors_are_fetched_once(release: dict) -> None:
    parts = {"weight": torch.tensor([0.5, -2.0]).half(), "samples": torch.tensor([255]).byte()}
    content = safetensors.torch.save(parts)
    told = {"encoder": {"sha256": hashlib.sha256(content).hexdigest()}}
    run = dataclasses.replace(load_runs("other")[0], metrics=told)
    name = f"{run.study}/{run.arm}-s{run.seed}.safetensors"
    release["served"][f"{REPO}/raw/v{__version__}/book/results/{name}"] = content
    release["asked"].clear()
    for _ in range(2):  # the second time from the cache
        found = results.kept_tensors(run)
        assert found["weight"].dtype == torch.float32
        assert found["weight"].tolist() == [0.5, -2.0]
        assert found["samples"].dtype == torch.uint8 and found["samples"].tolist() == [255]
        assert len(release["asked"]) == 1


def test_a_damaged_cache_is_fetched_again(release: dict, tmp_path: Path) -> None:
    found = load_runs("other")
    cached = next((tmp_path / "cache").rglob("*.json"))
    cached.write_bytes(cached.read_bytes()[:-9])
    assert load_runs("other") == found
    assert len(release["asked"]) == 2


def test_a_fetched_file_with_another_hash_is_refused(release: dict, tmp_path: Path) -> None:
    url = next(url for url in release["served"] if "/other/" in url)
    release["served"][url] = write(changed(study="other", seconds=1.0), tmp_path).read_bytes()
    with pytest.raises(ValueError, match=f"is not the file that version {__version__} was"):
        load_runs("other")
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize("error", [socket.gaierror("no name"), TimeoutError("timed out")])
def test_no_network(release: dict, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def urlopen(url: str, timeout: float) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError, match=r"could not fetch https://github.*; or clone the repository"):
        load_runs("other")


def test_a_package_without_an_index_says_so(release: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "INDEX", Path("nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_runs("reuse")


def test_index_is_what_sha256sum_prints(tmp_path: Path) -> None:
    path = write(RUN, tmp_path)
    (tmp_path / "reuse" / "weights.safetensors").write_bytes(b"not listed")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert index(tmp_path) == f"{digest}  reuse/plain-s0.json\n"


def test_the_shipped_index_is_of_the_committed_results(root: Path) -> None:
    folder = root / "book" / "results"
    if not list(folder.glob("*/*.json")):
        pytest.skip("no results are recorded yet")
    assert results.INDEX.read_text(encoding="utf-8") == index(folder), (
        "write mini_resdecay/results.sha256 anew: results.index('book/results')"
    )


def test_every_committed_result_fits_the_schema(root: Path) -> None:
    paths = sorted((root / "book" / "results").rglob("*.json"))
    if not paths:
        pytest.skip("no results are recorded yet")
    for path in paths:
        run = read(path)
        assert path.relative_to(root / "book" / "results") == Path(
            run.study, f"{run.arm}-s{run.seed}.json"
        )


# ---- numbers ----


def with_metric(values: list[float], arm: str = "plain", first: int = 0) -> list[Run]:
    return [
        changed(arm=arm, seed=first + i, metrics={"test": {"accuracy": x}})
        for i, x in enumerate(values)
    ]


def test_value_follows_a_path() -> None:
    assert value(RUN, "trained.rebound.cka") == 0.5
    assert value(RUN, "n") == 3.0
    by_layer = changed(metrics={"knn": [0.25, 0.5, 0.75]})
    assert [value(by_layer, f"knn.{i}") for i in (0, 2, -1)] == [0.25, 0.75, 0.75]
    with pytest.raises(ValueError, match='must be one of -3, -2, -1, 0, 1, 2, got "3"'):
        value(by_layer, "knn.3")
    with pytest.raises(
        ValueError, match="'trained.rebound.cos' .* must be one of cka, got \"cos\""
    ):
        value(RUN, "trained.rebound.cos")
    with pytest.raises(ValueError, match="'n.x' of reuse/plain must be one of , got \"x\""):
        value(RUN, "n.x")
    with pytest.raises(ValueError, match="must lead to a number, got dict"):
        value(RUN, "trained.rebound")


def test_summary() -> None:
    assert summary(with_metric([1.0, 2.0, 6.0]), "test.accuracy") == (3.0, math.sqrt(7.0), 3)
    assert summary(with_metric([2.0]), "test.accuracy") == (2.0, 0.0, 1)
    with pytest.raises(ValueError, match="runs must hold at least one, got none"):
        summary([], "test.accuracy")


def test_spread_has_a_deviation_where_there_are_several() -> None:
    three = with_metric([1.0, 2.0, 6.0])
    assert results.spread(three, "test", "accuracy", "accuracy") == "3.000±2.646 3.000±2.646"
    assert results.spread(three[:1], "test", "accuracy", "accuracy") == "1.000       1.000"
    with pytest.raises(ValueError, match="accuracy"):
        results.spread(three, "test", "acuracy")


def test_paired_interval_of_five_is_the_sheet_s() -> None:
    a, b = [0.9, 0.8, 0.85, 0.95, 0.7], [0.85, 0.8, 0.8, 0.85, 0.75]
    sd = np.std(np.subtract(a, b), ddof=1)
    found = paired_interval(a, b)
    assert found.mean == pytest.approx(0.03, abs=1e-12)
    assert found.half_width == pytest.approx(2.776 * sd / math.sqrt(5), rel=2e-4)
    assert found.half_width == pytest.approx(1.24 * sd, rel=2e-3)


pairs = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(-1e3, 1e3), min_size=n, max_size=n)] * 2)
)


@given(pairs)
def test_paired_interval_equals_scipy(ab: tuple[list[float], list[float]]) -> None:
    a, b = ab
    found = paired_interval(a, b)
    difference = np.subtract(a, b)
    if np.ptp(difference) <= 1e-6:
        assert found.half_width <= 1e-5
        return
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    scale = 1e-9 * (1 + np.abs(difference).max())
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-9, abs=scale)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-9, abs=scale)
    back = paired_interval(b, a)
    assert back == pytest.approx((-found.mean, found.half_width, found.smallest_effect))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_smallest_effect_is_found_four_times_in_five(n: int) -> None:
    # The claim itself, by simulation: the sample's sd is set to 1 to read the factor off.
    zigzag = np.arange(n) - (n - 1) / 2
    factor = paired_interval(zigzag / zigzag.std(ddof=1), np.zeros(n)).smallest_effect
    draws = np.random.default_rng(0).normal(factor, 1.0, size=(20_000, n))
    found = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_smallest_effect_is_larger_than_the_half_width() -> None:
    found = paired_interval([1.0, 2.0, 4.0], [0.5, 2.0, 3.0])
    assert found.smallest_effect > found.half_width > 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0], [2.0], r"two or more pairs, got shapes \(1,\) and \(1,\)"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"got shapes \(2,\) and \(3,\)"),
        ([[1.0, 2.0]], [[1.0, 2.0]], r"got shapes \(1, 2\)"),
        ([1.0, math.nan], [1.0, 2.0], "must be finite"),
    ],
)
def test_paired_interval_refuses(a: list, b: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_interval(a, b)


def test_by_seed_leaves_a_gap_where_a_run_is_missing() -> None:
    """A gap is no number to numpy's masked arrays, and NaN to everything else."""
    arms = {"a": with_metric([0.1, 0.2]), "b": with_metric([0.4], first=1), "c": []}
    table = results.by_seed(arms, ("b", "a", "c", "d"), "test.accuracy")
    assert np.asarray(table) == pytest.approx(
        np.array([[np.nan, 0.1, np.nan, np.nan], [0.4, 0.2, np.nan, np.nan]]), nan_ok=True
    )
    assert table.count(0).tolist() == [1, 2, 0, 0]
    assert (table[:, 0] - table[:, 1]).compressed() == pytest.approx([0.2])
    assert np.isnan(results.by_seed({}, ("a", "b"), "test.accuracy").data).tolist() == [
        [True, True]
    ]


def test_versus_takes_the_seeds_that_both_arms_have() -> None:
    a, b = with_metric([1.0, 2.0, 4.0], "plain"), with_metric([0.0, 1.5], "decay", first=1)
    gap = paired_interval([2, 4], [0, 1.5])
    told = f"n=2 {gap} ({gap.smallest_effect:.3f})"
    assert versus(a, b, "test.accuracy") == told and gap.smallest_effect > gap.half_width
    assert versus(a, b[:1], "test.accuracy") == "n=1 no interval"


@pytest.mark.parametrize(
    ("a", "b", "points", "told"),
    [
        ([0.60, 0.62, 0.61], [0.50, 0.52, 0.51], 0.01, True),
        ([0.50, 0.52, 0.51], [0.60, 0.62, 0.61], 0.01, False),  # below: not for a
        ([0.60, 0.62, 0.50], [0.50, 0.52, 0.51], 0.01, False),  # one seed below
        ([0.60, 0.62, 0.51], [0.50, 0.52, 0.51], 0.01, False),  # one seed level: "above" is strict
        ([0.29, 0.29], [0.28, 0.28], 0.01, True),  # just a point is "by 1 point", rounding aside
        ([0.289, 0.289], [0.28, 0.28], 0.01, False),
        ([0.289, 0.289], [0.28, 0.28], 0.005, True),
        ([5.0, 6.0, 7.0], [3.0, 4.0, 5.0], 0.01, True),  # deviations 1 and 1: a gap of just 2
        ([5.0, 6.0, 7.0], [3.1, 4.1, 5.1], 0.01, False),
        ([9.0, 17.0], [4.0, 5.0], 0.01, True),  # deviations √32 and √.5, pooled √16.25: 8.5 > 8.06
        ([9.0, 17.0], [5.0, 6.0], 0.01, False),  # 7.5 < 8.06
    ],
)
def test_decided_is_the_rule_of_the_masked_study(
    a: list[float], b: list[float], points: float, told: bool
) -> None:
    left, right = with_metric(a), with_metric(b, "decay")
    assert decided(left, right[::-1], "test.accuracy", points) is told


def test_decided_pairs_the_seeds_that_both_arms_have() -> None:
    a, b = with_metric([0.0, 0.6, 0.62]), with_metric([0.5, 0.52, 0.9], "decay", first=1)
    assert decided(a, b, "test.accuracy")  # the seeds 0 and 3 have no partner
    with pytest.raises(ValueError, match=r"two or more pairs, got shapes \(1,\)"):
        decided(a[:2], b, "test.accuracy")
    with pytest.raises(ValueError, match="two or more pairs"):
        decided([], b, "test.accuracy")
    with pytest.raises(ValueError, match=r"each once, got \[1, 1, 2\] and \[1, 2\]"):
        decided([a[1], *a], b, "test.accuracy")


def test_an_interval_has_a_star_where_it_excludes_zero() -> None:
    assert str(Interval(0.2063, 0.0684, 0.1)) == "+0.206±0.068*"
    assert str(Interval(-0.01, 0.04, 0.1)) == "-0.010±0.040"


def test_compare_pairs_by_seed() -> None:
    a = with_metric([1.0, 2.0, 4.0])
    b = with_metric([0.0, 1.5, 3.0], "decay")
    assert compare(a[::-1], b, "test.accuracy") == paired_interval([1, 2, 4], [0, 1.5, 3])
    with pytest.raises(ValueError, match=r"same seeds, each once, got \[0, 1, 2\] and \[1, 2, 3\]"):
        compare(a, with_metric([0.0, 1.5, 3.0], "decay", first=1), "test.accuracy")
    with pytest.raises(ValueError, match=r"each once, got \[0, 0\] and \[0, 0\]"):
        compare([a[0], a[0]], [b[0], b[0]], "test.accuracy")


# ---- the machine and the data ----


def test_environment_is_part_of_a_run(tmp_path: Path) -> None:
    found = environment()
    assert found.keys() == {"device", "versions", "commit", "peak_memory_gib"}
    assert read(write(changed(**found), tmp_path)).versions["mini_resdecay"] == __version__
    assert 0.01 < found["peak_memory_gib"] < 1000
    assert re.fullmatch(r"unknown|[0-9a-f]{40}\+?", found["commit"])


def test_commit_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path.parent))
    assert environment()["commit"] == "unknown"


def test_other_data_is_a_warning_that_says_what_it_means() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fingerprint(RUN, "ab12")
    message = "reuse/plain was recorded with other data: ab12, yours is cd34.*JPEG"
    with pytest.warns(UserWarning, match=message):
        check_fingerprint(RUN, "cd34")
