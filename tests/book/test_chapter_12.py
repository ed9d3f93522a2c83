"""The cell of chapter 12 that a reader runs on a T4, rehearsed at a size that a test can afford."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from pages import ROOT

from mini_resdecay import data, experiments, results

CHAPTER = ROOT / "book/12-judging-generated-images.ipynb"
JUDGE = ["batch=16", "epochs=1", "images=96", "measured=60", "widths=8,8", "blocks=1"]
SMALL = ["patch=8", "dim=16", "depth=2", "heads=2", "images=96", "batch=16", "epochs=1"]
ROUGH = ["samples=40", "guided=20", "sampling_steps=2", "measured=80"]


@pytest.mark.parametrize(("tier", "name"), [("cpu", "fashion-mnist"), ("t4", "cifar10")])
def test_the_gpu_cell_runs_with_its_first_line_changed(
    tier: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = nbformat.read(CHAPTER, as_version=4).cells
    [cell] = [c for c in cells if "gpu" in c.metadata.get("tags", [])]
    first, rest = cell.source.split("\n", 1)
    assert first == 'TIER, DATA = "cpu", "fashion-mnist"  # on a T4: "t4", "cifar10"'
    sets = {split: data.shapes(n, n)[0] for split, n in (("train", 96), ("test", 60))}
    monkeypatch.setattr(experiments, "load", lambda name, split, root: sets[split])
    monkeypatch.setattr(results, "checkout", lambda: Path("runs"))
    monkeypatch.chdir(tmp_path)
    experiments.run(f"judge-{name}", changes=JUDGE)
    run = experiments.run

    def small(arm: str, changes: list[str], **more: Any) -> Path:
        return run(arm, changes=[*changes, *SMALL, *ROUGH], **more)

    monkeypatch.setattr(experiments, "run", small)
    capsys.readouterr()
    names: dict[str, Any] = {"experiments": experiments, "results": results}
    exec(f'TIER, DATA = "{tier}", "{name}"\n{rest}', names)
    one, record = names["one"], results.read(names["path"])
    assert record.recipe["tier"] == tier and record.recipe["data"] == name
    # Half precision is off on the CPU tier; elsewhere it is what the device has.
    assert record.recipe["precision"] == {"cpu": "no", "t4": "half"}[tier]
    said = f"FD_judge-{name}@40 {one['fd']:.2f}, floor {one['fd_floor']:.2f}\n"
    assert capsys.readouterr().out.endswith(said)
