"""The cell of chapter 9 that a reader runs on a T4, rehearsed at a size that a test can afford."""

from pathlib import Path
from typing import Any

import pytest
from pages import gpu_cell

from mini_resdecay import experiments, results

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
