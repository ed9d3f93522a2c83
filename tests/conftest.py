"""What every test shares: the checkout's folder, one Hypothesis profile, and how to skip honestly.

A test whose tool is missing (a browser, npm) skips and says why; with MINI_RESDECAY_STRICT set, as
`.ci/run` does, it fails instead.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every run; no limit on seconds, which depend on the machine.
settings.register_profile("book", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("book")


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Run a script in one process or in several, in a folder; returns what it printed.

    By torchrun: `accelerate launch` sets the same variables, but wants mpirun where there is no
    GPU. Fails with the end of its errors.
    """

    def run(script: Path, folder: Path, processes: int = 2) -> str:
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, *(several if processes > 1 else []), str(script)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tool_missing() -> Callable[[str], None]:
    """Call with a reason where a tool is missing: skips, or fails where tools are required."""
    return pytest.fail if os.environ.get("MINI_RESDECAY_STRICT") else pytest.skip


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real image sets; tests that need one skip where it is not."""
    folder = os.environ.get("MINI_RESDECAY_DATA")
    if not folder:
        pytest.skip("MINI_RESDECAY_DATA is not set: no real image sets here")
    if not Path(folder).is_dir():
        pytest.fail(f"MINI_RESDECAY_DATA is {folder!r}, which is no folder")
    return Path(folder)
