"""The two commands, the pins and the addresses: what a stranger meets first."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from pages import ROOT, chapters

import mini_resdecay

MAKE = shutil.which("make")
needs_make = pytest.mark.skipif(MAKE is None, reason="no make on this machine")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in text("requirements.txt").splitlines()]
    found = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([\w.]+)", line) for line in lines if line]
    assert all(found), "requirements.txt holds exact pins and nothing else"
    return {m[1].lower(): m[2] for m in found}


def project() -> dict:
    return tomllib.loads(text("pyproject.toml"))["project"]


def would_run(folder: Path, target: str) -> str:
    """What make would run, with nothing of this session's make in its environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = [MAKE, "-n", target]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_make
@pytest.mark.parametrize(
    "target", ["help", "book", "test", "serve", "execute", "evidence", "clean"]
)
def test_targets_exist_and_help_names_them(target: str) -> None:
    would_run(ROOT, target)
    listed = subprocess.run([MAKE, "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"make {target} " in listed


def test_the_readme_names_the_two_commands() -> None:
    commands = re.findall(r"^make (\w+)", text("README.md"), re.MULTILINE)
    assert {"book", "test"} <= set(commands)
    targets = set(re.findall(r"^(\w+):", text("Makefile"), re.MULTILINE))
    assert set(commands) <= targets


@pytest.mark.parametrize(
    ("page", "form"),
    [
        ("README.md", r"^(book/\d\d-\S+)\.ipynb$"),
        ("book/index.md", r"^\|.*\]\((\d\d-\S+)\.ipynb\)"),
    ],
)
def test_lists_of_chapters_are_whole_and_in_order(page: str, form: str) -> None:
    listed = re.findall(form, text(page), re.MULTILINE)
    assert [Path(name).name for name in listed] == [Path(name).name for name in chapters()]


@needs_make
def test_a_second_make_installs_nothing(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    stamp = tmp_path / ".venv" / ".installed"
    assert "pip install" in would_run(tmp_path, "test")
    stamp.parent.mkdir()
    stamp.touch()
    assert "pip install" not in would_run(tmp_path, "test")
    later = stamp.stat().st_mtime + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    assert "pip install" in would_run(tmp_path, "test")


@needs_make
def test_a_wrong_python_is_refused_in_words(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "python9"
    fake.write_text("#!/bin/sh\nexec python3 -c 'import sys; sys.version_info = (3, 9)\n'\"$2\"\n")
    fake.chmod(0o755)
    command = [MAKE, "setup", f"PYTHON={fake}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_makes_missing_tools_a_failure_and_calls_make_test() -> None:
    script = text(".ci/run")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "MINI_RESDECAY_STRICT=1" in script
    assert "MINI_RESDECAY_DATA" in script
    assert script.rstrip().endswith("make test")


def test_pins_cover_the_package_and_no_index_is_named() -> None:
    names = [re.split(r"[<>=]", need)[0].lower() for need in project()["dependencies"]]
    extras = project()["optional-dependencies"].values()
    names += [re.split(r"[<>=]", need)[0].lower() for extra in extras for need in extra]
    assert set(names) <= set(pins())
    assert pins()["torch"] == "2.13.0"
    assert not re.search(r"index-url|find-links|https?:", text("requirements.txt"))


def test_colab_keeps_its_torch_and_no_model_zoo_is_installed() -> None:
    colab = " ".join(project()["optional-dependencies"]["colab"])
    assert not re.search(r"torch|numpy", colab)
    assert not {"torchvision", "torchaudio", "timm"} & set(pins())


def test_one_address_and_one_version() -> None:
    config = yaml.safe_load(text("_config.yml"))
    assert config["repository"]["url"] == mini_resdecay.REPO
    assert config["repository"]["branch"] == f"v{mini_resdecay.__version__}"
    assert project()["urls"]["Repository"] == mini_resdecay.REPO
    citation = yaml.safe_load(text("CITATION.cff"))
    assert str(citation["version"]) == mini_resdecay.__version__
    assert citation["repository-code"] == mini_resdecay.REPO


def test_no_static_folder_beside_the_config() -> None:
    assert not (ROOT / "_static").exists(), "Jupyter Book would load its scripts on every page"


def test_whatever_the_package_imports_is_installed_with_it() -> None:
    """A pip or Colab user has the dependencies and the named extras, not requirements.txt."""
    names = {"sklearn": "scikit-learn", "pil": "pillow", "ipython": "ipywidgets"}
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    told = {re.split(r"[<>=!~\[ ]", line)[0].lower() for group in groups for line in group}
    found = set()
    for path in (ROOT / "mini_resdecay").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0].lower() for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0].lower())
    foreign = found - {name.lower() for name in sys.stdlib_module_names}
    assert {names.get(name, name) for name in foreign} <= told
