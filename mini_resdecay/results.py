"""What a recorded run is: written, checked, compared, and opened.

    write(Run(study="reuse", arm="plain", seed=0, …), "book/results")
    runs = load_runs("reuse", arm="plain")
    summary(runs, "trained.rebound.cka")

One JSON object a run, `<study>/<arm>-s<seed>.json`. Where there is no checkout (Colab, pip), a run
is fetched at this version's tag and checked against `results.sha256`, which the package ships.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import numpy as np
import torch

from mini_resdecay import REPO, __version__

INDEX = Path(__file__).with_name("results.sha256")
TIMEOUT = 10  # seconds, then no network is an error
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


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


def write(run: Run, folder: str | Path) -> Path:
    """Write a run to `folder/<study>/<arm>-s<seed>.json`, whole or not at all.

    Raises ValueError, naming the field, for a value outside the schema or not finite.
    """
    content = asdict(run)
    _check(content, f"run {run.study}/{run.arm}")
    path = Path(folder) / run.study / f"{run.arm}-s{run.seed}.json"
    text = json.dumps({**content, "sha256": _hash(content)}, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\n[^\[\]{}]*\]", _one_line, text)  # a curve is no column
    _replace(path, (text + "\n").encode())
    return path


def _one_line(found: re.Match[str]) -> str:
    return re.sub(r"\n\s*", "", re.sub(r",\n\s*", ", ", found[0]))


def read(path: str | Path) -> Run:
    """Read a run and check it against the schema and its own hash.

    Raises ValueError if it was cut, edited by hand, or lacks a field.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"results file {path} is damaged: no JSON object with sha256") from error
    _check(content, f"results file {path}")
    if told != _hash(content):
        raise ValueError(
            f"results file {path} was edited: its content does not match its sha256; "
            "restore it, or run the experiment again"
        )
    return Run(**content)


def load_runs(study: str, arm: str | None = None, root: str | Path | None = None) -> list[Run]:
    """All recorded runs of a study, or of one arm, sorted by arm and seed.

    From `root` if given, else from the checkout's `book/results`, else fetched at this version's
    tag into the cache and checked by hash.
    Raises ValueError for a name that is not there, OSError without network.
    """
    folder = _checkout() if root is None else Path(root)
    if folder is None:
        paths = [_fetch(name, hash_) for name, hash_ in _choose(study, arm, _shipped())]
    else:
        names = {f"{p.parent.name}/{p.name}": "" for p in sorted(folder.glob("*/*.json"))}
        paths = [folder / name for name, _ in _choose(study, arm, names)]
    return sorted((read(path) for path in paths), key=lambda run: (run.arm, run.seed))


def index(folder: str | Path) -> str:
    """The text of `results.sha256`: hash and name of every result, as `sha256sum` prints them."""
    paths = sorted(Path(folder).glob("*/*.json"))
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.parent.name}/{path.name}\n"
        for path in paths
    )


def value(run: Run, metric: str) -> float:
    """One number of `run.metrics`, by its path: "trained.rebound.cka".

    Raises ValueError, naming what is there, for a path that leads to no number.
    """
    at: Any = run.metrics
    for key in metric.split("."):
        if not isinstance(at, dict) or key not in at:
            have = ", ".join(at) if isinstance(at, dict) else "a number"
            raise ValueError(
                f"metric {metric!r} is not in {run.study}/{run.arm}: {key!r} not among {have}"
            )
        at = at[key]
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise ValueError(f"metric {metric!r} must lead to a number, got {type(at).__name__}")
    return float(at)


def summary(runs: Sequence[Run], metric: str) -> tuple[float, float, int]:
    """Mean, standard deviation (n − 1; 0 for one run) and number of runs."""
    if not runs:
        raise ValueError("runs is empty: there is nothing to summarise")
    values = np.array([value(run, metric) for run in runs])
    sd = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(values.mean()), float(sd), len(values)


def compare(a: Sequence[Run], b: Sequence[Run], metric: str) -> Interval:
    """`paired_interval` of a − b, paired by seed.

    Raises ValueError unless both have the same seeds, each once.
    """
    seeds = sorted(run.seed for run in a)
    if seeds != sorted(run.seed for run in b) or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"a and b must have the same seeds, each once; got {seeds} and "
            f"{sorted(run.seed for run in b)}"
        )
    pairs = zip(*(sorted(runs, key=lambda run: run.seed) for runs in (a, b)), strict=True)
    left, right = zip(*((value(x, metric), value(y, metric)) for x, y in pairs), strict=True)
    return paired_interval(left, right)


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """95 % t interval of the mean of a − b, and the smallest effect that n pairs could show.

    half_width = t(.975, n−1) · sd / √n: 2.776 · sd / √5 for five pairs. smallest_effect = λ · sd /
    √n is the true difference that a two-sided test at 5 % finds four times in five: λ solves
    P(T > t(.975, n−1)) = 0.8 for T noncentral t with n − 1 degrees of freedom and centre λ.
    Raises ValueError for fewer than two pairs, unequal lengths, or values not finite.
    """
    from scipy import optimize, stats  # here: it takes half a second to import

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"a and b must be two or more pairs, got shapes {x.shape} and {y.shape}")
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ValueError("a and b must be finite")
    n = len(x)
    critical = stats.t.ppf(0.975, n - 1)
    found = optimize.brentq(lambda c: stats.nct.sf(critical, n - 1, c) - 0.8, 0.0, 4 * critical)
    error = (x - y).std(ddof=1) / math.sqrt(n)
    return Interval(float((x - y).mean()), float(critical * error), float(found * error))


def environment() -> dict[str, Any]:
    """`device`, `versions`, `commit` and `peak_memory_gib` of this process, as `Run` names them."""
    packages = ("torch", "numpy", "accelerate", "safetensors")
    versions = {"mini_resdecay": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return {
        "device": _device(),
        "versions": versions,
        "commit": _commit(),
        "peak_memory_gib": _peak_memory_gib(),
    }


def check_fingerprint(run: Run, fingerprint: str) -> bool:
    """Whether `run` was made with this very data; a UserWarning says what it means if not."""
    if run.fingerprint == fingerprint:
        return True
    warnings.warn(
        f"{run.study}/{run.arm} was recorded with other data: fingerprint {run.fingerprint!r}, "
        f"yours is {fingerprint!r}. The same pictures packed as JPEG and as PNG differ by a few "
        "grey levels (the hub's CIFAR-10 is PNG, the recorded one JPEG); losses then differ from "
        "the third digit on, and conclusions should not. If the set or a split is another one, "
        "numbers cannot be compared.",
        UserWarning,
        stacklevel=2,
    )
    return False


# ---- the schema ----


def _check(content: dict[str, Any], what: str) -> None:
    """Raise ValueError, naming the field, unless `content` is a run."""
    names = [field.name for field in fields(Run)]
    wrong = [f"no {name}" for name in names if name not in content]
    wrong += [f"unknown {name}" for name in content if name not in names]
    if wrong:
        raise ValueError(f"{what} does not fit the schema: {', '.join(wrong)}")
    for name, hint in get_type_hints(Run).items():
        kind = get_origin(hint) or hint
        kinds = (int, float) if kind is float else kind
        if isinstance(content[name], bool) or not isinstance(content[name], kinds):
            raise ValueError(f"{what}: {name} must be a {kind.__name__}, got {content[name]!r}")
        _check_plain(content[name], f"{what}: {name}")
    _check_values(content, what)


def _check_values(content: dict[str, Any], what: str) -> None:
    for name in ("study", "arm"):
        if not NAME.fullmatch(content[name]):
            raise ValueError(
                f"{what}: {name} must be of lower-case letters, digits, '-', '_' and '.', "
                f"got {content[name]!r}"
            )
    for name in ("seed", "seconds", "peak_memory_gib"):
        if content[name] < 0:
            raise ValueError(f"{what}: {name} must not be negative, got {content[name]}")
    lengths = {k: len(v) if isinstance(v, list) else v for k, v in content["curve"].items()}
    if len(set(map(str, lengths.values()))) > 1 or not all(
        isinstance(v, list) for v in content["curve"].values()
    ):
        raise ValueError(f"{what}: curve must hold lists of equal length, got {lengths}")
    losses = content["first_losses"]
    if len(losses) != 5 or not all(isinstance(x, float) for x in losses):
        raise ValueError(f"{what}: first_losses must be five floats, got {losses}")


def _check_plain(at: Any, where: str) -> None:
    """Raise ValueError, with the path, for what JSON would change or refuse."""
    if isinstance(at, dict):
        for key, item in at.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be text")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(at, list):
        for i, item in enumerate(at):
            _check_plain(item, f"{where}[{i}]")
    elif isinstance(at, float) and not math.isfinite(at):
        raise ValueError(f"{where} must be finite, got {at}")
    elif at is not None and not isinstance(at, str | bool | int | float):
        kind = type(at).__name__
        raise ValueError(f"{where} must be plain JSON (no tuple, no array), got a {kind}")


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- where runs are ----


def _checkout() -> Path | None:
    """`book/results` of the checkout that the package or the notebook is in."""
    here = Path.cwd()
    for folder in (Path(__file__).parents[1], here, *here.parents):
        if (folder / "mini_resdecay").is_dir() and (folder / "book" / "results").is_dir():
            return folder / "book" / "results"
    return None


def _shipped() -> dict[str, str]:
    """Name -> hash of every result of this version."""
    if not INDEX.exists():
        return {}
    pairs = (line.split(maxsplit=1) for line in INDEX.read_text(encoding="utf-8").splitlines())
    return {name: hash_ for hash_, name in pairs}


def _choose(study: str, arm: str | None, names: dict[str, str]) -> list[tuple[str, str]]:
    """The files of a study and arm; ValueError with the nearest names if there are none."""
    studies = {name.split("/")[0] for name in names}
    if study not in studies:
        raise ValueError(_unknown("study", study, studies))
    of_study = {name: hash_ for name, hash_ in names.items() if name.split("/")[0] == study}
    arms = {name.split("/")[1].rsplit("-s", 1)[0] for name in of_study}
    if arm is not None and arm not in arms:
        raise ValueError(_unknown("arm", arm, arms))
    return [
        (name, hash_)
        for name, hash_ in of_study.items()
        if arm is None or name.split("/")[1].rsplit("-s", 1)[0] == arm
    ]


def _unknown(what: str, name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known))}"
    return f"{what} {name!r} has no recorded run; {hint if known else 'there are none at all'}"


def _fetch(name: str, hash_: str) -> Path:
    """A result from the repository at this version's tag, by way of the cache."""
    cache = Path(os.environ.get("MINI_RESDECAY_CACHE") or "~/.cache/mini_resdecay").expanduser()
    path = cache / f"results-{__version__}" / name
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == hash_:
        return path
    raw = REPO.replace("://github.com/", "://raw.githubusercontent.com/")
    url = f"{raw}/v{__version__}/book/results/{name}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except OSError as error:  # URLError and time-outs are OSErrors
        raise OSError(
            f"could not fetch {url}: {error}. Without network, clone the repository and "
            "pass root='book/results'"
        ) from error
    if hashlib.sha256(content).hexdigest() != hash_:
        raise ValueError(f"{url} is not the file that version {__version__} was released with")
    _replace(path, content)
    return path


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; what was there is as it was") from error


# ---- the machine ----


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} thread(s)"


def _commit() -> str:
    """Commit of the checkout, "+" if files differ from it; "unknown" outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":  # has no getrusage
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes or KiB
