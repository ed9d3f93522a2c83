"""What a recorded run is: written, checked, compared, and opened.

    write(Run(study="reuse", arm="plain", seed=0, …), "book/results")
    runs = load_runs("reuse", arm="plain")
    summary(runs, "trained.rebound.cka")

One JSON object a run, `<study>/<arm>-s<seed>.json`. Where there is no checkout (Colab, pip), a run
is fetched at this version's tag and checked against `results.sha256`, which the package ships.
"""

import importlib.metadata
import json
import math
import platform
import re
import subprocess
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, get_origin, get_type_hints

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from . import REPO, __version__, known, require
from .data import cache_folder, sha256, write_whole

INDEX = Path(__file__).with_name("results.sha256")
NAME = r"[a-z0-9][a-z0-9_.-]*"
LINE = re.compile(rf"(?P<hash>\w+)  (?P<name>(?P<study>{NAME})/(?P<arm>{NAME})-s\d+\.json)")


@dataclass(frozen=True)
class Run:
    """One training run as it is recorded; the fields are the schema.

    `data`: name, sizes of the splits; `recipe`: what changes the result; `metrics`: nested dicts
    of numbers; `curve`: lists of equal length; `seconds`: wall time; `peak_memory_gib`: of the
    GPU where one is used, else of the process; `fingerprint`: of the data; `first_losses`: the
    first five, repeated in float32 on the CPU.
    """

    study: str
    arm: str
    seed: int
    data: dict[str, Any]
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    curve: dict[str, list[Any]]
    device: str
    seconds: float
    versions: dict[str, str]
    commit: str
    fingerprint: str
    peak_memory_gib: float
    first_losses: list[float]


class Interval(NamedTuple):
    """Mean paired difference, half-width of its 95 % interval, smallest effect to be shown."""

    mean: float
    half_width: float
    smallest_effect: float

    def __str__(self) -> str:
        """+0.206±0.068*: mean and half-width, with a star if 0 lies outside."""
        return f"{self.mean:+.3f}±{self.half_width:.3f}" + "*" * (abs(self.mean) > self.half_width)


def write(run: Run, folder: str | Path) -> Path:
    """Write a run to `folder/<study>/<arm>-s<seed>.json`, whole or not at all.

    Raises ValueError or TypeError for a value outside the schema, not finite, or not JSON.
    """
    content = asdict(run)
    _check(content, f"run {run.study}/{run.arm}")
    text = json.dumps({**content, "sha256": _hash(content)}, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\n[^\[\]{}]*\]", _one_line, text)  # a curve is no column
    path = Path(folder) / run.study / f"{run.arm}-s{run.seed}.json"
    write_whole(path, (text + "\n").encode())
    return path


def _one_line(found: re.Match[str]) -> str:
    return re.sub(r"\n\s*", "", re.sub(r",\n\s*", ", ", found[0]))


def read(path: str | Path) -> Run:
    """Read a run and check it against the schema and its own hash.

    Raises ValueError if it was cut, edited by hand, or lacks a field.
    """
    what = f"results file {path}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        told = content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{what} is damaged: no JSON object with sha256") from error
    _check(content, what)
    if told != _hash(content):
        raise ValueError(f"{what} was edited: its sha256 does not match; run the experiment again")
    return Run(**content)


def load_runs(study: str, arm: str | None = None, root: str | Path | None = None) -> list[Run]:
    """All recorded runs of a study, or of one arm, sorted by arm and seed.

    From `root` if given, else from the checkout's `book/results`, else fetched at this version's
    tag into the cache and checked by hash.
    Raises ValueError for a name that is not there, OSError without network.
    """
    folder, lines = _listed(root)
    for part, name in (("study", study), ("arm", arm)):
        if name is not None:
            known(f"{part} with recorded runs", name, sorted({line[part] for line in lines}))
            lines = [line for line in lines if line[part] == name]
    paths = [folder / m["name"] if folder else _fetch(m["name"], m["hash"]) for m in lines]
    return sorted(map(read, paths), key=lambda run: (run.arm, run.seed))


def recorded(root: str | Path | None = None) -> set[tuple[str, str]]:
    """Study and arm of all runs that `load_runs` can open."""
    return {(line["study"], line["arm"]) for line in _listed(root)[1]}


def _listed(root: str | Path | None) -> tuple[Path | None, list[re.Match[str]]]:
    folder = checkout() if root is None else Path(root)
    text = INDEX.read_text(encoding="utf-8") if folder is None else index(folder)
    return folder, [line for line in map(LINE.fullmatch, text.splitlines()) if line]


def index(folder: str | Path) -> str:
    """The text of `results.sha256`: hash and name of every result, as `sha256sum` prints them."""
    paths = sorted(Path(folder).glob("*/*.json"))
    return "".join(f"{sha256(p.read_bytes())}  {p.parent.name}/{p.name}\n" for p in paths)


def value(run: Run, metric: str) -> float:
    """One number of `run.metrics`, by its path: "trained.rebound.cka"; in lists "knn.0", "knn.-1".

    Raises ValueError, naming what is there, for a path that leads to no number.
    """
    at: Any = run.metrics
    for key in metric.split("."):
        listed = {str(i): at[i] for i in range(-len(at), len(at))} if isinstance(at, list) else {}
        inside = at if isinstance(at, dict) else listed
        at = inside[known(f"{metric!r} of {run.study}/{run.arm}", key, inside)]
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise ValueError(f"metric {metric!r} must lead to a number, got {type(at).__name__}")
    return float(at)


def kept_tensors(run: Run, root: str | Path | None = None) -> dict[str, Tensor]:
    """What seed 0 of an arm kept beside its record.

    The weights of an encoder (with the rest of its MAE as "mae.…") or of a classifier, in float32
    (in the file they are halves), or "samples", uint8 [64, C, H, W]. Their hash stands in
    `metrics["encoder"]`, whichever they are, since encoders came first.
    Opened as `load_runs` opens records. Raises ValueError if the run kept none, or if the file is
    not the one that it kept; OSError without network.
    """
    name, kept = f"{run.study}/{run.arm}-s{run.seed}.safetensors", run.metrics.get("encoder")
    if kept is None:
        raise ValueError(f"run must have kept tensors, {name} does not exist")
    folder = checkout() if root is None else Path(root)
    content = (folder / name if folder else _fetch(name, kept["sha256"])).read_bytes()
    if sha256(content) != kept["sha256"]:
        raise ValueError(f"{name} is not the file that its run kept: the sha256 does not match")
    return {
        part: value.float() if value.is_floating_point() else value
        for part, value in safetensors.torch.load(content).items()
    }


def encoder_weights(run: Run, root: str | Path | None = None) -> dict[str, Tensor]:
    """`kept_tensors` of a run that trained an encoder, without what else a masked one kept."""
    return {k: v for k, v in kept_tensors(run, root).items() if not k.startswith("mae.")}


def summary(runs: Sequence[Run], metric: str) -> tuple[float, float, int]:
    """Mean, standard deviation (n − 1; 0 for one run) and number of runs."""
    require("runs", "none", runs, "hold at least one")
    values = [value(run, metric) for run in runs]
    return mean(values), stdev(values) if len(values) > 1 else 0.0, len(values)


def spread(runs: Sequence[Run], part: str, *names: str) -> str:
    """Means and, of several runs, deviations of metrics, in columns: "0.677±0.015 3.195±0.129".

    `spread(runs, "trained", "fd", "knn.100.3")` is of "trained.fd" and "trained.knn.100.3".
    """
    found = (summary(runs, f"{part}.{name}") for name in names)
    columns = (f"{middle:.3f}" + f"±{sd:.3f}" * (n > 1) for middle, sd, n in found)
    return " ".join(f"{column:11}" for column in columns).rstrip()


def by_seed(runs: Mapping[str, Sequence[Run]], arms: Sequence[str], metric: str) -> Any:
    """One number of each run: a masked array, a row a seed and a column an arm, NaN for no run."""
    found = {(run.seed, arm): value(run, metric) for arm in arms for run in runs.get(arm, ())}
    seeds = sorted({seed for seed, _ in found}) or [0]
    return np.ma.masked_invalid([[found.get((s, arm), math.nan) for arm in arms] for s in seeds])


def compare(a: Sequence[Run], b: Sequence[Run], metric: str) -> Interval:
    """`paired_interval` of a − b, paired by seed.

    Raises ValueError unless both have the same seeds, each once.
    """
    left, right = ({run.seed: value(run, metric) for run in runs} for runs in (a, b))
    require(
        "a and b", f"{[run.seed for run in a]} and {[run.seed for run in b]}",
        left.keys() == right.keys() and len(left) == len(a) == len(b),
        "have the same seeds, each once",
    )  # fmt: skip
    return paired_interval(*([side[seed] for seed in left] for side in (left, right)))


def versus(a: Sequence[Run], b: Sequence[Run], metric: str) -> str:
    """`compare` in words, over the seeds that both arms have: "n=3 +0.206±0.068* (0.087)".

    The number in brackets is the smallest effect that they could show.
    """
    left, right = _shared(a, b)
    if len(left) < 2:
        return f"n={len(left)} no interval"
    gap = compare(left, right, metric)
    return f"n={len(left)} {gap} ({gap.smallest_effect:.3f})"


def decided(a: Sequence[Run], b: Sequence[Run], metric: str, points: float = 0.01) -> bool:
    """Whether a is above b in all paired seeds, and on average by `points` and 2 pooled deviations.

    The rule of the study `mae`. Pairs are the seeds that both arms have; the pooled deviation is
    √((sd(a)² + sd(b)²) / 2) over these. "Above" is strict; a mean difference of just `points` or
    2 deviations, up to rounding, is enough. Not being decided is no evidence for b.
    Raises ValueError for fewer than two pairs, or a seed that an arm has twice.
    """
    left, right = _shared(a, b)
    gap = compare(left, right, metric).mean
    pooled = math.sqrt(mean(summary(arm, metric)[1] ** 2 for arm in (left, right)))
    above = (value(x, metric) > value(y, metric) for x, y in zip(left, right, strict=True))
    return all(above) and gap >= max(points, 2 * pooled) - 1e-9


def _shared(a: Sequence[Run], b: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of the seeds that both arms have, by seed."""
    seeds = {run.seed for run in a} & {run.seed for run in b}
    left, right = ([run for run in arm if run.seed in seeds] for arm in (a, b))
    return sorted(left, key=lambda run: run.seed), sorted(right, key=lambda run: run.seed)


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """95 % t interval of the mean of a − b, and the smallest effect that n pairs could show.

    half_width = t(.975, n−1) · sd / √n: 2.776 · sd / √5 for five pairs. smallest_effect = λ · sd /
    √n is the true difference that a two-sided test at 5 % finds four times in five: λ solves
    P(T > t(.975, n−1)) = 0.8 for T noncentral t with n − 1 degrees of freedom and centre λ.
    Raises ValueError for fewer than two pairs, unequal lengths, or values not finite.
    """
    from scipy import optimize, stats  # here: it takes half a second to import

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    fits = x.ndim == 1 and x.shape == y.shape and len(x) >= 2
    require("a and b", f"shapes {x.shape} and {y.shape}", fits, "be two or more pairs")
    require("a and b", "NaN or infinity", np.isfinite([x, y]).all(), "be finite")
    n = len(x)
    critical = stats.t.ppf(0.975, n - 1)
    found = optimize.brentq(lambda c: stats.nct.sf(critical, n - 1, c) - 0.8, 0.0, 4 * critical)
    error = (x - y).std(ddof=1) / math.sqrt(n)
    return Interval(float((x - y).mean()), float(critical * error), float(found * error))


def environment(gpu: bool = True) -> dict[str, Any]:
    """`device`, `versions`, `commit` and `peak_memory_gib` of this process, as `Run` names them.

    `gpu` says whether the run was on the GPU, where there is one. `commit` has a "+" if files
    differ from it, and is "unknown" outside of a checkout.
    """
    versions = {"mini_resdecay": __version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in ("torch", "numpy", "accelerate")
    }
    gpu = gpu and torch.cuda.is_available()
    cpu = f"CPU, {platform.machine()}, {torch.get_num_threads()} thread(s)"
    device = torch.cuda.get_device_name() if gpu else cpu
    command = "git describe --always --exclude=* --abbrev=40 --dirty=+"
    here = Path(__file__).parents[1]  # by the shell, for which a machine without git is no error
    git = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True)
    commit = (git.stdout.strip() if (here / ".git").exists() else "") or "unknown"
    return {"device": device, "versions": versions, "commit": commit, "peak_memory_gib": _peak(gpu)}


def check_fingerprint(run: Run, fingerprint: str) -> None:
    """A UserWarning that says what it means, if `run` was made with other data than this."""
    if run.fingerprint != fingerprint:
        warnings.warn(
            f"{run.study}/{run.arm} was recorded with other data: {run.fingerprint}, yours is "
            f"{fingerprint}. PNG pictures instead of JPEG change losses from the third digit on; "
            "another set or split cannot be compared",
            stacklevel=2,
        )


# ---- the schema ----


def _check(content: dict[str, Any], what: str) -> None:
    """Raise ValueError, naming the field, unless `content` is a run in plain, finite JSON."""
    hints = get_type_hints(Run)
    if odd := ", ".join(sorted(hints.keys() ^ content.keys())):
        raise ValueError(f"{what} does not fit the schema: missing or unknown: {odd}")
    for name, hint in hints.items():
        kind = int | float if hint is float else get_origin(hint) or hint
        if not isinstance(content[name], kind):
            raise ValueError(f"{what}: {name} must be a {hint}, got {content[name]!r}")
        if json.loads(json.dumps(content[name]), parse_constant=str) != content[name]:
            raise ValueError(f"{what}: {name} must be finite and plain JSON, got {content[name]!r}")
    if not re.fullmatch(f"{NAME}/{NAME}", name := f"{content['study']}/{content['arm']}"):
        raise ValueError(f"{what}: study and arm must be of a-z, 0-9, '-', '_', '.', got {name}")


def _hash(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


# ---- where runs are ----


def checkout() -> Path | None:
    """`book/results` of the checkout that the package or the notebook is in, where there is one."""
    places = [Path(__file__).parents[1], Path.cwd(), *Path.cwd().parents]
    found = (place / "book/results" for place in places if (place / "mini_resdecay").is_dir())
    return next(filter(Path.is_dir, found), None)


def _fetch(name: str, told: str) -> Path:
    """A result from the repository at this version's tag, by way of the cache."""
    path = cache_folder() / f"results-{__version__}" / name
    if path.exists() and sha256(path.read_bytes()) == told:
        return path
    url = f"{REPO}/raw/v{__version__}/book/results/{name}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            content = answer.read()
    except OSError as error:  # URLError and time-outs are OSErrors
        raise OSError(f"could not fetch {url}: {error}; or clone the repository") from error
    if sha256(content) != told:
        raise ValueError(f"{url} is not the file that version {__version__} was released with")
    write_whole(path, content)
    return path


def _peak(gpu: bool) -> float:
    """Most memory so far, in GiB: of the GPU, or else of this process."""
    if gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    if platform.system() == "Windows":  # has no getrusage
        return 0.0
    import resource

    unit = 2**30 if platform.system() == "Darwin" else 2**20  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
