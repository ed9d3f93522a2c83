"""Names of pages and chapters, read from the table of contents; the tools behind the book."""

import importlib.util
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


def tool(name: str) -> ModuleType:
    """The module `book/_tools/<name>.py`."""
    path = ROOT / "book" / "_tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
