"""The committed chapters: executed, in order, within the budgets, in the format of the template.

Each check takes a notebook and returns what is wrong with it, in words. The last tests run every
check on a small chapter that is right, and on a copy of it that is wrong in just one way.
"""

import ast
import copy
import json
import re
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from pages import ROOT, chapters, tool

from mini_resdecay import REPO, __version__

Notebook = dict[str, Any]
stamp = tool("execute").stamp

TAGS = {
    "nbval-check-output",
    "hide-input",
    "remove-cell",
    "nbval-skip",
    "nbval-ignore-output",
    "solution",
    "gpu",
    "skip-execution",
}
# Headings and admonition titles that a chapter must have, in this order; more may stand between.
SECTIONS = (
    "at a glance",
    "set-?up",
    "idea",
    "predict",
    "build",
    "run",
    "observe",
    "explain",
    "limits",
    "exercises",
    "key points",
    "references",
    "for teachers",
)
EXERCISE_TYPES = ("Predict", "Code", "Measure", "Think", "Extend")
FEWEST_CELLS, MOST_CELLS, MEDIAN_CELL, LONGEST_CELL, LONGEST_SETUP = 12, 25, 6, 20, 30
WIDTH, ALT_AT_LEAST, EXERCISES_AT_LEAST, MOST_IGNORED = 79, 40, 4, 3
MOST_BYTES, MOST_SECONDS, MOST_GIB = 1_000_000, 60, 3
LONG_CHAPTER = re.compile(r"^:label: ex-(09|12)-", re.MULTILINE)  # twice the seconds and bytes

LOCAL_PATH = re.compile(r"(?:/(?:work|root|tmp|Users|home/\w+)/|[A-Z]:\\\\Users)[\w./-]*")
FETCHING = re.compile(r"https?://|git\+|\brequests\b|\burllib|huggingface\.co|\bhf\.co")
FOREIGN_PICTURE = re.compile(
    r"!\[[^\]]*\]\(\s*https?:|\b(?:src|href)=[\"']?(?:https?:)?//[^\"'>\s]*"
)
BLOB = re.compile(r"[A-Za-z0-9+/=\n]{200,}")
LANDMARK = re.compile(r"^#{1,4} +(.+)$|^[`:]{3,}\{(?:admonition|margin)\} *(.*)$", re.MULTILINE)
GATE = re.compile(r"^[`:]{3,}\{((?:exercise|solution)-(?:start|end))\} *(\S*)", re.MULTILINE)
LABEL = re.compile(r"^:label: *(\S+)", re.MULTILINE)
PYTHON_BLOCK = re.compile(r"^[`:]{3,}(?:\{code-block\} *)?python\n(.*?)^[`:]{3,}", re.M | re.S)


# Parts of a notebook.


def text(value: str | list[str]) -> str:
    """Notebook files store text as a string or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def source(cell: dict) -> str:
    return text(cell["source"])


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def code_cells(notebook: Notebook) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def lines(cell: dict) -> int:
    return len(source(cell).strip().splitlines())


def where(notebook: Notebook, cell: dict) -> str:
    return f"cell {notebook['cells'].index(cell)}"


def figures(cell: dict) -> int:
    return sum("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


def widget_models(notebook: Notebook) -> list[dict]:
    widgets = notebook["metadata"].get("widgets", {})
    return [model for state in widgets.values() for model in state["state"].values()]


def shows_widget(cell: dict) -> bool:
    data = [o.get("data", {}) for o in cell.get("outputs", [])]
    return any("application/vnd.jupyter.widget-view+json" in d for d in data)


def python(cell: dict) -> ast.Module:
    """A cell's code without IPython's magics."""
    kept = [line for line in source(cell).splitlines() if not line.lstrip().startswith(("%", "!"))]
    try:
        return ast.parse("\n".join(kept))
    except SyntaxError:  # a magic was the only line of its block
        return ast.parse("")


def signatures(code: str) -> dict[str, str]:
    tree = ast.parse(code)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.unparse(node.args) for node in found}


def gates(notebook: Notebook) -> list[tuple[int, str, str]]:
    """(index of the cell, kind of gate, what follows the directive), in order."""
    found = []
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            found += [(index, m[1], m[2]) for m in GATE.finditer(source(cell))]
    return found


def exercises(notebook: Notebook) -> list[tuple[list[dict], list[dict]]]:
    """Cells of every exercise and of the solution behind it (well-formed gates only)."""
    marks = gates(notebook)
    found = []
    for k in range(0, len(marks) - 3, 4):
        a, b, c, d = (index for index, _, _ in marks[k : k + 4])
        found.append((notebook["cells"][a:b], notebook["cells"][c:d]))
    return found


# Checks: a notebook in, complaints out.


def executed_in_order(notebook: Notebook) -> list[str]:
    cells = [c for c in code_cells(notebook) if source(c).strip()]
    left_alone = [c for c in cells if "skip-execution" in tags(c)]
    counts = [c["execution_count"] for c in cells if c not in left_alone]
    bad = [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts {counts}"]
    return bad + [f"{where(notebook, c)} was executed" for c in left_alone if c["outputs"]]


def executed_as_it_is(notebook: Notebook) -> list[str]:
    """The outputs come from the code that stands above them: `make execute` left its hash."""
    told = notebook["metadata"].get("resdecay", {}).get("code")
    now = stamp(notebook)
    return [] if told == now else ["code changed since it was executed: run `make execute`"]


def no_errors(notebook: Notebook) -> list[str]:
    found = []
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                found.append(f"{where(notebook, cell)}: an error or a warning in its output")
    return found


def known_tags(notebook: Notebook) -> list[str]:
    found = []
    for cell in notebook["cells"]:
        mine, at = tags(cell), where(notebook, cell)
        found += [f"{at}: unknown tag {tag!r}" for tag in sorted(mine - TAGS)]
        if "nbval-skip" in mine and not mine & {"remove-cell", "gpu"}:
            found.append(f"{at}: nbval-skip is for the Colab cell and for gpu cells")
        if "gpu" in mine and not mine >= {"gpu", "skip-execution", "nbval-skip"}:
            found.append(f"{at}: gpu goes with skip-execution and nbval-skip")
        if "skip-execution" in mine and "gpu" not in mine:
            found.append(f"{at}: skip-execution is for gpu cells")
    return found


def compared_outputs(notebook: Notebook) -> list[str]:
    """Numbers that the text quotes are compared by nbval; what is ignored says why."""
    compared = [c for c in code_cells(notebook) if "nbval-check-output" in tags(c)]
    ignored = [c for c in code_cells(notebook) if "nbval-ignore-output" in tags(c)]
    found = [] if compared else ["no cell is tagged nbval-check-output"]
    found += [f"{where(notebook, c)}: nothing to compare" for c in compared if not c["outputs"]]
    found += [f"{where(notebook, c)}: no comment" for c in ignored if "#" not in source(c)]
    return found + (["too many ignored outputs"] if len(ignored) > MOST_IGNORED else [])


def cell_budgets(notebook: Notebook) -> list[str]:
    cells = code_cells(notebook)
    setup = next((c for c in cells if "remove-cell" not in tags(c)), None)
    found = []
    if not FEWEST_CELLS <= len(cells) <= MOST_CELLS:
        found.append(f"{len(cells)} code cells, not {FEWEST_CELLS} to {MOST_CELLS}")
    if cells and statistics.median(map(lines, cells)) > MEDIAN_CELL:
        found.append(f"the median cell has more than {MEDIAN_CELL} lines")
    for cell in cells:
        if lines(cell) > (LONGEST_SETUP if cell is setup else LONGEST_CELL):
            found.append(f"{where(notebook, cell)}: {lines(cell)} lines")
    return found


def run_budgets(notebook: Notebook) -> list[str]:
    """What `make execute` measured, against the budgets."""
    cost = notebook["metadata"].get("resdecay", {})
    if not {"seconds", "peak_memory_gib"} <= set(cost):
        return ["no measured cost in the metadata: run `make execute`"]
    size = len(json.dumps(notebook, ensure_ascii=False, indent=1).encode())
    twice = 2 if any(LONG_CHAPTER.search(source(cell)) for cell in notebook["cells"]) else 1
    measured = {
        f"{size / 1e6:.2f} MB": size > twice * MOST_BYTES,
        f"{cost['seconds']} s": cost["seconds"] > twice * MOST_SECONDS,
        f"{cost['peak_memory_gib']} GiB": cost["peak_memory_gib"] > MOST_GIB,
    }
    return [f"over its budget: {what}" for what, over in measured.items() if over]


def figure_alts(notebook: Notebook) -> list[str]:
    found = []
    for cell in code_cells(notebook):
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if figures(cell) and len(alt.strip()) < ALT_AT_LEAST:
            found.append(f"{where(notebook, cell)}: alt text {alt!r}")
    return found


def one_figure_a_cell(notebook: Notebook) -> list[str]:
    return [f"{where(notebook, c)}: two figures" for c in code_cells(notebook) if figures(c) > 1]


def widgets_are_stored(notebook: Notebook) -> list[str]:
    """A widget without its state is a blank on the page; its pictures need alt text too."""
    used = any(map(shows_widget, code_cells(notebook)))
    models = widget_models(notebook)
    if used and not models:
        return ["a widget is shown and its state is not stored"]
    found = []
    for model in models:
        for image in re.findall(r"<img[^>]*>", str(model["state"].get("value", ""))):
            alt = re.search(r"alt=([\"'])(.*?)\1", image, re.DOTALL)
            if alt is None or len(alt[2]) < ALT_AT_LEAST:
                found.append(f"a frame of a widget has alt text {alt and alt[2]!r}")
        if model["model_name"] in {"ImageModel", "OutputModel", "PlayModel"}:
            found.append(
                f"{model['model_name']} in a moving figure: no alt text, or needs a kernel"
            )
    return found


def no_local_paths(notebook: Notebook) -> list[str]:
    return LOCAL_PATH.findall(BLOB.sub("", json.dumps(notebook, ensure_ascii=False)))


def nothing_fetched(notebook: Notebook) -> list[str]:
    """No cell needs a hub or another host; no page shows what lies on one."""
    found = []
    for cell in notebook["cells"]:
        at, shown = where(notebook, cell), [source(cell)]
        if cell["cell_type"] == "code":
            if not tags(cell) & {"remove-cell", "gpu"} and FETCHING.search(source(cell)):
                found.append(f"{at}: the code fetches something")
            shown = [text(o.get("data", {}).get("text/html", "")) for o in cell["outputs"]]
        for piece in shown:
            links = FOREIGN_PICTURE.findall(re.sub(r"<a [^>]*>", "", piece))
            found += [f"{at}: shows {link}" for link in links]
    for model in widget_models(notebook):
        found += FOREIGN_PICTURE.findall(str(model["state"].get("value", "")))
    return found


def nothing_to_do(notebook: Notebook) -> list[str]:
    """No mark that something has yet to be written, in text or code."""
    return [f"{where(notebook, c)}: TODO" for c in notebook["cells"] if "TODO" in source(c)]


def narrow_code(notebook: Notebook) -> list[str]:
    cells = [c for c in code_cells(notebook) if "remove-cell" not in tags(c)]
    wide = [c for c in cells if max(map(len, source(c).splitlines()), default=0) > WIDTH]
    return [f"{where(notebook, c)}: a line of more than {WIDTH} columns" for c in wide]


def only_public_names(notebook: Notebook) -> list[str]:
    """A chapter uses what a reader may use, and neither torchvision nor timm."""
    found = []
    for cell in code_cells(notebook):
        for node in ast.walk(python(cell)):
            names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            private = [n for n in names if n.startswith("_") and not n.startswith("__")]
            found += [f"{where(notebook, cell)}: {name}" for name in private]
        if re.search(r"\b(?:torchvision|timm)\b", source(cell)):
            found.append(f"{where(notebook, cell)}: torchvision or timm")
    return found


def long_code_in_package(notebook: Notebook) -> list[str]:
    """No class, and no function over ten lines, outside of exercises."""
    found = []
    for cell in code_cells(notebook):
        if "solution" in tags(cell):
            continue
        for node in ast.walk(python(cell)):
            is_long = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 10
            if is_long or isinstance(node, ast.ClassDef):
                found.append(f"{where(notebook, cell)}: {node.name} belongs in the package")
    return found


def colab_cell(notebook: Notebook) -> list[str]:
    """The first code cell installs this version of the package where it is missing; no torch."""
    first = code_cells(notebook)[0]
    wrong = {
        "is not tagged remove-cell and nbval-skip": not tags(first)
        >= {"remove-cell", "nbval-skip"},
        "is longer than four lines": lines(first) > 4,
        f"does not install from {REPO}": REPO not in source(first),
        f"does not install v{__version__}": f"v{__version__}" not in source(first),
        "touches torch": "torch" in source(first),
    }
    return [f"the Colab cell {what}" for what, is_wrong in wrong.items() if is_wrong]


def template_sections(notebook: Notebook) -> list[str]:
    """The template's sections stand in its order, by heading or by title of an admonition."""
    markdown = [source(c) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    titles = [(m[1] or m[2]).lower() for m in LANDMARK.finditer("\n\n".join(markdown))]
    at = 0
    for section in SECTIONS:
        found = [i for i in range(at, len(titles)) if re.search(rf"\b{section}\b", titles[i])]
        if not found:
            return [f"section {section!r} is missing, or not in its place, in {titles}"]
        at = found[0] + 1
    return []


def gated_exercises(notebook: Notebook) -> list[str]:
    """exercise-start, exercise-end, solution-start, solution-end: cells of their own, in pairs."""
    marks, cells = gates(notebook), notebook["cells"]
    order = ["exercise-start", "exercise-end", "solution-start", "solution-end"]
    found = []
    for k in range(0, len(marks), 4):
        group = marks[k : k + 4]
        if [kind for _, kind, _ in group] != order:
            return [f"gates in a wrong order from cell {group[0][0]} on"]
        (start, _, _), (end, _, _), (solution, _, answered), _ = group
        label = LABEL.search(source(cells[start]))
        if label is None or label[1] != answered:
            found.append(
                f"cell {solution}: solution of {answered!r}, exercise {label and label[1]!r}"
            )
        elif not re.fullmatch(r"ex-0?\d+-\d+", label[1]):
            found.append(f"cell {start}: label {label[1]!r}, not ex-<chapter>-<n>")
        if solution != end + 1:
            found.append(f"cell {solution}: the solution does not follow its exercise")
        if ":class: dropdown" not in source(cells[solution]):
            found.append(f"cell {solution}: not folded")
    if len(marks) < 4 * EXERCISES_AT_LEAST:
        found.append(f"{len(marks) // 4} exercises, at least {EXERCISES_AT_LEAST} are due")
    alone = [i for i, _, _ in marks if len(re.findall(r"^[`:]{3,}", source(cells[i]), re.M)) != 2]
    return found + [f"cell {i}: a gate is a cell of its own" for i in alone]


def exercise_heads(notebook: Notebook) -> list[str]:
    """Each exercise says its type, difficulty and minutes; the first four types all occur."""
    found, seen = [], set()
    for asked, _ in exercises(notebook):
        head = source(asked[1]).strip().split("\n\n")[0] if len(asked) > 1 else ""
        kind = next((t for t in EXERCISE_TYPES if re.search(rf"\b{t}\b", head)), None)
        seen.add(kind)
        if kind is None or not re.search(r"[●○]{3}", head) or not re.search(r"\d+ min", head):
            found.append(f"{where(notebook, asked[0])}: type, ●○○ and minutes, got {head[:60]!r}")
    return found + [
        f"no exercise of type {kind}" for kind in EXERCISE_TYPES[:4] if kind not in seen
    ]


def solution_tags(notebook: Notebook) -> list[str]:
    """Code inside a solution carries the tag `solution`, other code does not."""
    inside = [id(c) for _, solution in exercises(notebook) for c in solution]
    found = []
    for cell in code_cells(notebook):
        if (id(cell) in inside) != ("solution" in tags(cell)):
            found.append(f"{where(notebook, cell)}: tag `solution` missing, or outside a solution")
    return found


def code_exercises(notebook: Notebook) -> list[str]:
    """A Code exercise gives a stub; its solution has the stub's signature and is checked."""
    found = []
    for asked, solution in exercises(notebook):
        if len(asked) < 2 or not re.search(r"\bCode\b", source(asked[1]).split("\n\n")[0]):
            continue
        at = where(notebook, asked[0])
        stubs = "\n".join(b for c in asked for b in PYTHON_BLOCK.findall(source(c)))
        code = [c for c in solution if c["cell_type"] == "code"]
        answer = "\n".join(ast.unparse(python(c)) for c in code)
        wanted, given = signatures(stubs), signatures(answer)
        if not wanted:
            found.append(f"{at}: no stub in a fenced python block")
        found += [f"{at}: stub {n}({a})" for n, a in wanted.items() if given.get(n) != a]
        if "check(" not in answer:
            found.append(f"{at}: the solution is not checked by mini_resdecay.checks")
    return found


def clean_metadata(notebook: Notebook) -> list[str]:
    """Nothing of a machine or an editor in the metadata."""
    found = [k for k in notebook["metadata"] if k not in KNOWN_METADATA]
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec")
    extra = [set(c["metadata"]) - {"tags", "mystnb"} for c in notebook["cells"]]
    return found + sorted(set().union(*extra))


KNOWN_METADATA = {"kernelspec", "language_info", "widgets", "resdecay"}
CHECKS: tuple[Callable[[Notebook], list[str]], ...] = (
    executed_in_order,
    executed_as_it_is,
    no_errors,
    known_tags,
    compared_outputs,
    cell_budgets,
    run_budgets,
    figure_alts,
    one_figure_a_cell,
    widgets_are_stored,
    no_local_paths,
    nothing_fetched,
    nothing_to_do,
    narrow_code,
    only_public_names,
    long_code_in_package,
    colab_cell,
    template_sections,
    gated_exercises,
    exercise_heads,
    solution_tags,
    code_exercises,
    clean_metadata,
)


@cache
def load(name: str) -> Notebook:
    return json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", chapters())
def test_chapter(name: str, check: Callable[[Notebook], list[str]]) -> None:
    assert check(load(name)) == []


def test_the_contents_list_every_chapter_in_order() -> None:
    files = sorted(p.stem for p in (ROOT / "book").glob("*.ipynb"))
    assert [name.removeprefix("book/") for name in chapters()] == files
    assert [int(name[:2]) for name in files] == list(range(1, len(files) + 1))


# A small chapter that is right, and what makes it wrong.


def markdown(content: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": content}


def code(content: str, *cell_tags: str, **data: Any) -> dict:
    outputs = [{"output_type": "display_data", "data": data, "metadata": {}}] if data else []
    return {
        "cell_type": "code",
        "metadata": {"tags": list(cell_tags)},
        "source": content,
        "outputs": outputs,
        "execution_count": 0,
    }


def an_exercise(n: int, kind: str, body: str, *answer: dict) -> list[dict]:
    return [
        markdown(f"```{{exercise-start}}\n:label: ex-1-{n}\n```"),
        markdown(f"*{kind} · ●○○ · 5 minutes.* Do this.\n\n{body}"),
        markdown("```{exercise-end}\n```"),
        markdown(f"```{{solution-start}} ex-1-{n}\n:class: dropdown\n```"),
        *(answer or [markdown("Because.")]),
        markdown("```{solution-end}\n```"),
    ]


def good_notebook() -> Notebook:
    """The smallest chapter that passes every check. Cell 1 is the Colab cell, 3 the set-up."""
    install = f"%pip install -q git+{REPO}@v{__version__}"
    figure = code("draw()", "hide-input", **{"image/png": "aGk="})
    figure["metadata"]["mystnb"] = {"image": {"alt": "Line plot of something that rises. " * 2}}
    view = {"application/vnd.jupyter.widget-view+json": {}}
    frame = f"<img alt='{'A frame that shows a rising line. ' * 2}' src='data:,'>"
    stub = "```python\ndef f(x):\n    ...\n```\n"
    answer = code("def f(x):\n    return x\ncheck('ex-1-2', f)", "solution")
    cells = [
        markdown("# Title\n\n```{admonition} At a glance\n```"),
        code(install, "remove-cell", "nbval-skip"),
        markdown("## Set-up"),
        code("import math"),
        markdown("## The idea\n\n## Predict\n\n## Build"),
        code("print(2)", "nbval-check-output", **{"text/plain": "2"}),
        code("show()  # a widget: nothing to compare", "nbval-ignore-output", **view),
        markdown("## Run\n\n## Observe"),
        figure,
        code("train()", "gpu", "skip-execution", "nbval-skip"),
        *[code(f"x = {i}") for i in range(5)],
        markdown("## Explain\n\n```{admonition} Limits\n```\n\n## Exercises"),
        *an_exercise(1, "Predict", ""),
        *an_exercise(2, "Code", stub, answer),
        *an_exercise(3, "Measure", "", code("y = 1", "solution")),
        *an_exercise(4, "Think", ""),
        markdown("## Key points\n\n## References\n\n:::{admonition} For teachers\n:::"),
    ]
    live = [c for c in cells if c["cell_type"] == "code" and "gpu" not in c["metadata"]["tags"]]
    for count, cell in enumerate(live, 1):
        cell["execution_count"] = count
    model = {"model_name": "HTMLModel", "state": {"value": frame}}
    metadata = {
        "kernelspec": {"name": "python3"},
        "resdecay": {"seconds": 9.0, "peak_memory_gib": 0.5},
        "widgets": {"state+json": {"state": {"a": model}}},
    }
    metadata["resdecay"]["code"] = stamp({"cells": cells})
    return {"cells": cells, "metadata": metadata}


def cell_with(notebook: Notebook, content: str) -> dict:
    return next(c for c in notebook["cells"] if content in c["source"])


def insert_before(notebook: Notebook, content: str, cell: dict) -> None:
    cells = notebook["cells"]
    cells.insert(cells.index(cell_with(notebook, content)), cell)


def swap(old: str, new: str) -> Callable[[Notebook], None]:
    """Replace text in the source of the first cell that holds it."""

    def change(notebook: Notebook) -> None:
        cell = cell_with(notebook, old)
        cell["source"] = cell["source"].replace(old, new)

    return change


def tag(content: str, *new: str) -> Callable[[Notebook], None]:
    return lambda n: cell_with(n, content)["metadata"].update(tags=list(new))


def output(content: str, **new: Any) -> Callable[[Notebook], None]:
    return lambda n: cell_with(n, content)["outputs"].append({"output_type": "x", **new})


def meta(**new: Any) -> Callable[[Notebook], None]:
    return lambda n: n["metadata"].update(new)


def cost(**new: float) -> Callable[[Notebook], None]:
    return lambda n: n["metadata"]["resdecay"].update(new)


def model(name: str, value: str) -> Callable[[Notebook], None]:
    new = {"model_name": name, "state": {"value": value}}
    return lambda n: n["metadata"]["widgets"].update(b={"state": {"b": new}})


BROKEN = [
    (executed_in_order, lambda n: cell_with(n, "x = 1").update(execution_count=None)),
    (executed_in_order, lambda n: cell_with(n, "x = 1").update(execution_count=99)),
    (executed_in_order, output("train()", data={})),
    (executed_as_it_is, swap("x = 1", "x = 10")),
    (executed_as_it_is, swap("def f(x):\n    return", "def f(x):\n  return")),
    (executed_as_it_is, lambda n: n["cells"].remove(cell_with(n, "x = 1"))),
    (executed_as_it_is, lambda n: n["cells"].reverse()),
    (executed_as_it_is, lambda n: n["metadata"]["resdecay"].pop("code")),
    (no_errors, output("x = 1", output_type="error")),
    (no_errors, output("x = 1", name="stderr")),
    (known_tags, tag("x = 1", "hide-cell")),
    (known_tags, tag("x = 1", "nbval-skip")),
    (known_tags, tag("x = 1", "skip-execution")),
    (known_tags, tag("train()", "gpu")),
    (compared_outputs, tag("print(2)")),
    (compared_outputs, lambda n: cell_with(n, "print(2)").update(outputs=[])),
    (compared_outputs, swap("  # a widget", "")),
    (compared_outputs, lambda n: [tag(f"x = {i}", "nbval-ignore-output")(n) for i in range(4)]),
    (cell_budgets, swap("x = 1", "x = 1\n" * 21)),
    (cell_budgets, swap("import math", "import math\n" * 31)),
    (cell_budgets, lambda n: [c.update(source="y\n" * 9) for c in code_cells(n)]),
    (cell_budgets, lambda n: [n["cells"].remove(cell_with(n, f"x = {i}")) for i in range(2)]),
    (cell_budgets, lambda n: n["cells"].extend(code("z") for _ in range(14))),
    (run_budgets, cost(seconds=60.1)),
    (run_budgets, cost(peak_memory_gib=3.01)),
    (run_budgets, swap("# Title", "x" * 1_000_000)),
    (run_budgets, meta(resdecay={})),
    (figure_alts, lambda n: cell_with(n, "draw()")["metadata"].pop("mystnb")),
    (
        figure_alts,
        lambda n: cell_with(n, "draw()")["metadata"].update(mystnb={"image": {"alt": "x"}}),
    ),
    (one_figure_a_cell, output("draw()", data={"image/png": "aGk="})),
    (widgets_are_stored, lambda n: n["metadata"].pop("widgets")),
    (widgets_are_stored, model("HTMLModel", "<img alt='frame 1' src='data:,'>")),
    (widgets_are_stored, model("HTMLModel", "<img src='data:,'>")),
    (widgets_are_stored, model("ImageModel", "")),
    (no_local_paths, swap("x = 1", "open('/" + "tmp/x')")),
    (no_local_paths, output("x = 1", text=["saved in /" + "home/me/runs"])),
    (nothing_fetched, swap("x = 1", "urllib.request.urlopen(u)")),
    (nothing_fetched, swap("x = 1", "load('https://data.example/x')")),
    (nothing_fetched, swap("## Predict", "![x](https://pictures.example/x.png)")),
    (nothing_fetched, swap("## Predict", "<img src='https://pictures.example/x.png'>")),
    (nothing_fetched, output("x = 1", data={"text/html": ["<script src='//cdn.example/x.js'>"]})),
    (nothing_fetched, model("HTMLModel", "<img src='http://pictures.example/x.png'>")),
    (nothing_to_do, swap("## Predict", "## Predict\n\n% TODO" + "-RECORDS 1: what came out")),
    (narrow_code, swap("x = 1", "x = 1" + " + 1" * 20)),
    (only_public_names, swap("x = 1", "from mini_resdecay.reuse import _gram")),
    (only_public_names, swap("x = 1", "reuse._gram(x)")),
    (only_public_names, swap("x = 1", "import timm")),
    (long_code_in_package, swap("x = 1", "class A:\n    pass")),
    (long_code_in_package, swap("x = 1", "def g():\n" + "    y = 1\n" * 10)),
    (colab_cell, swap(f"v{__version__}", "main")),
    (colab_cell, swap(REPO, "x")),
    (colab_cell, swap("install -q", "install torch")),
    (colab_cell, tag("%pip", "remove-cell")),
    (colab_cell, swap("%pip", "a\nb\nc\nd\n%pip")),
    (template_sections, swap("## Key points", "")),
    (template_sections, swap("## Run\n\n## Observe", "## Observe\n\n## Run")),
    (template_sections, swap("{admonition} At a glance", "{note}")),
    (gated_exercises, swap(":label: ex-1-3", ":label: ex-1-9")),
    (gated_exercises, swap(":label: ex-1-3", "")),
    (gated_exercises, swap("{solution-start} ex-1-4\n:class: dropdown", "{solution-start} ex-1-4")),
    (gated_exercises, lambda n: n["cells"].remove(cell_with(n, "{exercise-end}"))),
    (gated_exercises, lambda n: insert_before(n, "{solution-start}", markdown("between"))),
    (gated_exercises, swap("{exercise-end}\n```", "{exercise-end}\n```\n\n```{note}\n```")),
    (exercise_heads, swap("Think", "Measure")),
    (exercise_heads, swap("*Predict · ●○○", "*Predict")),
    (exercise_heads, swap("5 minutes", "a while")),
    (solution_tags, tag("y = 1")),
    (solution_tags, tag("x = 1", "solution")),
    (code_exercises, swap("def f(x):\n    ...", "def f(x, y):\n    ...")),
    (code_exercises, swap("```python\ndef", "```\ndef")),
    (code_exercises, swap("check('ex-1-2', f)", "f(1)")),
    (clean_metadata, meta(kernelspec={"name": "venv"})),
    (clean_metadata, meta(colab={})),
    (clean_metadata, lambda n: cell_with(n, "x = 1")["metadata"].update(execution={})),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_check_passes_a_good_chapter(check: Callable[[Notebook], list[str]]) -> None:
    assert check(good_notebook()) == []


@pytest.mark.parametrize(
    ("check", "spoil"), BROKEN, ids=lambda value: getattr(value, "__name__", "spoilt")
)
def test_the_check_fails_a_broken_chapter(check, spoil: Callable[[Notebook], Any]) -> None:
    notebook = copy.deepcopy(good_notebook())
    spoil(notebook)
    assert check(notebook), "the check did not see what is wrong"


@pytest.mark.parametrize(
    "change",
    [
        swap("## Predict", "## Predict something"),
        swap("x = 1", "x = 1  \n"),
        swap("train()", "train(longer=True)"),  # for a GPU: it has no outputs
        swap("%pip", "%pip  # another version"),
        lambda n: cell_with(n, "x = 1").update(source=["x = 1"]),  # as files have it
        lambda n: n["cells"].append(code("")),
    ],
)
def test_what_gives_no_outputs_asks_for_no_execution(change: Callable[[Notebook], Any]) -> None:
    notebook = good_notebook()
    change(notebook)
    assert executed_as_it_is(notebook) == []


def test_every_check_can_fail() -> None:
    assert {check for check, _ in BROKEN} == set(CHECKS)
