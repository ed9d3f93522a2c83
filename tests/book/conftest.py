"""The built site, and the list of pages that it must have."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def site() -> Path:
    """The built site; built here where it is missing (`make test` has just built it)."""
    html = ROOT / "_build" / "html"
    if not html.is_dir():
        tools = Path(sys.executable).parent
        subprocess.run([sys.executable, "book/_tools/vendor.py"], cwd=ROOT, check=True)
        build = [tools / "jupyter-book", "build", ".", "--all", "-W", "--keep-going", "-n"]
        subprocess.run(build, cwd=ROOT, check=True)
    return html
