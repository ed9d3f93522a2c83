"""The tools behind the book: vendor.py, execute.py and slowest.py."""

import hashlib
import json
import tarfile
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pages import tool

ALT = "Line plot, layer against norm: the line rises evenly from 0 to 9."


vendor, execute, slowest = tool("vendor"), tool("execute"), tool("slowest")


def a_package(folder: Path, sha256: str) -> vendor.Package:
    keep = {"a.js": "kept.js", "fonts/": "woff/"}
    return vendor.Package("a", "1.0.0", sha256, folder / "out", keep)


def a_tarball(folder: Path) -> Path:
    for name in ("a.js", "b.js", "fonts/x.woff"):
        file = folder / "package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    path = folder / "a-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / "package", "package")
    return path


def test_vendor_keeps_only_the_named_files(tmp_path: Path) -> None:
    tarball = a_tarball(tmp_path)
    package = a_package(tmp_path, hashlib.sha256(tarball.read_bytes()).hexdigest())
    assert not vendor.is_complete(package)
    vendor.check_hash(package, tarball)
    vendor.unpack(package, tarball)
    files = sorted(str(p.relative_to(package.folder)) for p in package.folder.rglob("*.*"))
    assert files == [".complete", "kept.js", "woff/x.woff"]
    assert vendor.is_complete(package)
    assert not vendor.is_complete(a_package(tmp_path, "0" * 64)), "another hash: fetch again"


def test_vendor_refuses_an_altered_tarball(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"a@1\.0\.0 has sha256 .*, expected 0000.*nothing was"):
        vendor.check_hash(a_package(tmp_path, "0" * 64), a_tarball(tmp_path))


def test_vendor_says_what_to_do_without_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="no npm found; install Node.js, or `pip install nodejs-"):
        vendor.find_npm()


def test_vendor_fetches_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr(vendor, "is_complete", lambda package: True)
    monkeypatch.setattr(vendor, "download", lambda *a: fetched.append(a))
    vendor.main()
    assert fetched == []


def test_the_accessibility_checker_is_not_published() -> None:
    published = [p.name for p in vendor.PACKAGES if p.folder.is_relative_to(vendor.SITE)]
    assert published == ["requirejs", "@jupyter-widgets/html-manager", "mathjax"]


def a_notebook(path: Path, *sources: str) -> Path:
    figure = f"""from IPython.display import display
display({{"image/png": b"x"}}, raw=True, metadata={{"image/png": {{"alt": "{ALT}"}}}})"""
    cells = [
        new_markdown_cell("# T", metadata={"collapsed": True}),
        new_code_cell(figure, metadata={"mystnb": {"figure": {"name": "fig-a"}}}),
        new_code_cell("import ipywidgets\nipywidgets.IntSlider()"),
        new_code_cell("1 / 0", metadata={"tags": ["gpu", "skip-execution", "nbval-skip"]}),
        new_code_cell(
            "import os\nprint(os.environ.get('MPLBACKEND'), 'MINI_RESDECAY_DATA' in os.environ)"
        ),
        *map(new_code_cell, sources),
    ]
    nbformat.write(new_notebook(cells=cells, metadata={"resdecay": {"studies": ["s"]}}), path)
    return path


def test_execute_stores_outputs_alt_text_widgets_and_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("MINI_RESDECAY_DATA", "somewhere")
    path = a_notebook(tmp_path / "01-x.ipynb", "from tqdm import tqdm\nfor _ in tqdm([0]): pass")
    cost = execute.execute(path)
    notebook = json.loads(path.read_text())
    _, figure, widget, skipped, environment, bar = notebook["cells"]
    assert bar["outputs"] == []
    assert figure["metadata"] == {"mystnb": {"figure": {"name": "fig-a"}, "image": {"alt": ALT}}}
    assert notebook["cells"][0]["metadata"] == {}
    assert (skipped["execution_count"], skipped["outputs"]) == (None, [])
    assert environment["execution_count"] == 3
    assert "".join(environment["outputs"][0]["text"]).split()[-1] == "False"
    assert "Agg" not in "".join(environment["outputs"][0]["text"])
    state = notebook["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    view = widget["outputs"][0]["data"]["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] in state
    code = execute.stamp(notebook)
    assert notebook["metadata"]["resdecay"] == {"studies": ["s"], **cost, "code": code}
    assert cost["seconds"] > 0
    assert 0.02 < cost["peak_memory_gib"] < 3
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert str(tmp_path) not in path.read_text()


def test_execute_leaves_a_failing_notebook_as_it_was(tmp_path: Path) -> None:
    path = a_notebook(tmp_path / "01-x.ipynb", "raise ValueError('no')")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        execute.execute(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_widget_ids_do_not_change_between_runs() -> None:
    def text(*ids: str) -> str:
        state = {"state": {i: {"children": [f"IPY_MODEL_{j}" for j in ids]} for i in ids}}
        return json.dumps({"metadata": {"widgets": {"mime": state}}})

    first, second = (
        execute.stable_widget_ids(text(*[c * 32 for c in ids]), "01-x") for ids in ("ab", "cd")
    )
    assert first == second
    assert first != execute.stable_widget_ids(text("a" * 32, "b" * 32), "02-y")


def test_slowest_lists_tests_by_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = '<testcase classname="t" name="n{0}" time="{0}"/>'
    cases = "".join(case.format(i) for i in range(12))
    (tmp_path / "a.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    monkeypatch.setattr(slowest.sys, "argv", ["slowest", str(tmp_path / "a.xml")])
    slowest.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "The slowest ten of 12 tests, 66 s in all:"
    assert [line.split()[-1] for line in lines[1:]] == [f"t::n{i}" for i in range(11, 1, -1)]
