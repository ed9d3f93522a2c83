"""Names of pages and chapters, read from the table of contents; the tools behind the book."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import yaml

ROOT = Path(__file__).resolve().parents[2]


def toc_pages() -> list[str]:
    """Every page of the table of contents, the first page first: `book/index`, `book/setup`, …"""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *files]


def chapters() -> list[str]:
    """The pages that are chapters: `book/01-…`, in order."""
    return [page for page in toc_pages() if Path(page).name[:2].isdigit()]


def gpu_cell(chapter: str) -> tuple[str, str]:
    """The first line of the one cell that a reader runs on a GPU, and the rest of it."""
    cells = json.loads((ROOT / "book" / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    [cell] = [c for c in cells if "gpu" in c["metadata"].get("tags", [])]
    first, rest = "".join(cell["source"]).split("\n", 1)
    return first, rest


def tool(name: str) -> ModuleType:
    """The module `book/_tools/<name>.py`."""
    path = ROOT / "book" / "_tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
