"""Run chapters in place: the only writer of notebook outputs.

    python book/_tools/execute.py                      every chapter
    python book/_tools/execute.py book/03-….ipynb      these

Each notebook runs in a fresh kernel of this environment, one thread, without the network of a hub
and without anybody's data folder; cells tagged `skip-execution` are left alone. What it cost, and
a hash of the code that ran, is written into its metadata (`resdecay`), where tests hold it against
the budgets and against the code as it is now. A notebook in which a cell fails is left as it was.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parents[1]
KERNEL_SPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
# Editors leave these; they change with every run and say nothing to a reader.
NOISE = ("execution", "collapsed", "scrolled", "ExecuteTime", "outputId", "colab", "vscode")


def chapters() -> list[Path]:
    """The book's notebooks in reading order."""
    return sorted(BOOK.glob("[0-9][0-9]-*.ipynb"))


def kernel_environment() -> dict[str, str]:
    """The environment of a chapter: one thread, inline figures, no hub, no local data, no bar."""
    unwanted = ("MPLBACKEND", "MINI_RESDECAY_DATA", "FORCE_COLOR")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return kept | threads | offline | {"TQDM_DISABLE": "1"}


def peak_gib(client: NotebookClient) -> float:
    """Highest resident memory of the kernel so far, in GiB (where the system tells; else now)."""
    assert client.km is not None
    pid = getattr(client.km.provisioner, "pid", None)
    status = Path(f"/proc/{pid}/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    return psutil.Process(pid).memory_info().rss / 2**30


def run(notebook: NotebookNode, folder: Path) -> dict[str, float]:
    """Execute a notebook in place; returns seconds and peak memory of its kernel."""
    peak = 0.0

    def watch(**_: Any) -> None:
        nonlocal peak
        peak = max(peak, peak_gib(client))

    client = NotebookClient(
        notebook,
        timeout=3000,
        startup_timeout=600,
        kernel_name="python3",
        store_widget_state=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=watch,
    )
    start, others = time.perf_counter(), os.getloadavg()[0]
    client.execute(env=kernel_environment())
    seconds = time.perf_counter() - start
    # With other work on the machine the seconds say little: `load` tells how much there was.
    return {
        "seconds": round(seconds, 1),
        "load": round(others, 1),
        "peak_memory_gib": round(peak, 2),
    }


def stamp(notebook: dict[str, Any]) -> str:
    """Hash of the code that outputs come from, as it is in the cells; trailing space is no code.

    Cells tagged `nbval-skip` (Colab's set-up, GPU) give no outputs and do not count.
    """
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    run_here = [c for c in cells if "nbval-skip" not in c["metadata"].get("tags", [])]
    sources = ["".join(cell["source"]).strip().splitlines() for cell in run_here]
    code = json.dumps([[line.rstrip() for line in lines] for lines in sources if lines])
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def copy_alt(cell: NotebookNode) -> None:
    """Copy the alt text that `figures.show` left in an output to where the page takes it from."""
    for output in cell.get("outputs", []):
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        if alt:
            cell.metadata.setdefault("mystnb", {}).setdefault("image", {})["alt"] = alt


def normalise(notebook: NotebookNode) -> None:
    """Leave nothing in the metadata that differs between machines or runs."""
    for index, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{index:02d}")
        for key in NOISE:
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            copy_alt(cell)
    for key in NOISE:
        notebook.metadata.pop(key, None)
    notebook.metadata["kernelspec"] = KERNEL_SPEC
    notebook.metadata["language_info"] = LANGUAGE
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)


def stable_widget_ids(text: str, name: str) -> str:
    """Replace the random ids of widget models by ids that depend on the chapter and the order."""
    widgets = json.loads(text)["metadata"].get("widgets", {})
    models = [model for state in widgets.values() for model in state["state"]]
    stable = [hashlib.md5(f"{name}-{index}".encode()).hexdigest() for index in range(len(models))]
    if set(models) & set(stable):
        return text  # done before: replacing one by one would merge models
    for model, new in zip(models, stable, strict=True):
        text = text.replace(model, new)
    return text


def write(notebook: NotebookNode, path: Path) -> None:
    """Write beside the file, then rename, so that a reader never sees half a notebook."""
    text = stable_widget_ids(nbformat.writes(notebook), path.stem)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def execute(path: Path) -> dict[str, float]:
    """Run one chapter and write it; its cost goes into its metadata and back to the caller."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    cost = run(notebook, path.parent)
    normalise(notebook)
    notebook.metadata.setdefault("resdecay", {}).update(cost, code=stamp(notebook))
    write(notebook, path)
    return cost


def report(path: Path, cost: dict[str, float]) -> str:
    """One line of the table of chapter budgets."""
    cells = nbformat.read(path, as_version=4).cells
    count = sum(cell.cell_type == "code" for cell in cells)
    size = path.stat().st_size / 1e6
    return (
        f"{path.name:55s} {cost['seconds']:6.1f} s {cost['peak_memory_gib']:6.2f} GiB "
        f"{size:6.2f} MB {count:3d} code cells"
    )


def main() -> None:
    """Run the chapters named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Run chapters in place.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every chapter")
    failed = []
    for path in parser.parse_args().notebooks or chapters():
        try:
            print(report(path, execute(path)), flush=True)
        except CellExecutionError as error:
            failed.append(path.name)
            print(f"{path.name}: a cell failed, the file is unchanged\n{error}", file=sys.stderr)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
