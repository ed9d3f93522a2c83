"""Exercises: what the page asks for is what the solution defines and what `check` knows."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from mini_resdecay import experiments
from mini_resdecay.checks import EXERCISES, check

BOOK = Path(__file__).resolve().parents[2] / "book"
CHAPTERS = sorted(BOOK.glob("[0-9][0-9]-*.ipynb"))
LABEL = re.compile(r"^:label:\s*(ex-\d\d-\d+)\s*$", re.MULTILINE)
STUB = re.compile(r"^```python\n(def .*?)^```", re.MULTILINE | re.DOTALL)


def exercises(path: Path) -> dict[str, tuple[str, str]]:
    """Label -> (text of the exercise, code of its solution)."""
    found, label, part = {}, "", ""
    for cell in nbformat.read(path, as_version=4).cells:
        if "{exercise-start}" in cell.source:
            label, part = LABEL.findall(cell.source)[0], "text"
            found[label] = {"text": "", "code": ""}
        if part == "text" and cell.cell_type == "markdown":
            found[label]["text"] += cell.source + "\n"
        if part == "solution" and cell.cell_type == "code":
            found[label]["code"] += cell.source + "\n"
        if "{exercise-end}" in cell.source:
            part = ""
        if "{solution-start}" in cell.source:
            label, part = re.search(r"\{solution-start\} (\S+)", cell.source)[1], "solution"
        if "{solution-end}" in cell.source:
            part = ""
    return {label: (one["text"], one["code"]) for label, one in found.items()}


# Answers that a solution gives in words, not in code.
IN_WORDS = {
    "ex-09-6": ((1.0, 0.0, 0.3141, 0.3141), '`check("ex-09-6", (1.0, 0.0, 0.3141, 0.3141))`'),
    "ex-11-5": (0.382, '`check("ex-11-5", 0.382)`'),
    "ex-12-1": (30, "Together 30."),
    "ex-12-2": ((0.10, 50_000), r"0.35 - 0.25 = 0.10$, and $500/n \le 0.01$ from $n = 50\,000$ on"),
    "ex-12-5": ((2, 1), "is 2, and the largest of the"),
    "ex-12-7": (("samples", "nearest", "seeds"), '`("samples", "nearest", "seeds")`'),
}
ALL = {label: one for path in CHAPTERS for label, one in exercises(path).items()}
CODE = {label: one for label, one in ALL.items() if "*Code*" in one[0]}


def functions(code: str) -> dict[str, list[str]]:
    """Name -> arguments of the functions that a piece of code defines."""
    defined = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef))
    return {node.name: [argument.arg for argument in node.args.args] for node in defined}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem[:2])
def test_chapter_asks_for_each_kind_of_answer(path):
    texts = [text for text, _ in exercises(path).values()]
    assert len(texts) >= 5
    for kind in ("*Predict*", "*Code*", "*Measure*", "*Think*"):
        assert any(kind in text for text in texts), kind


@pytest.mark.parametrize("label", CODE)
def test_code_exercise_has_a_check_and_its_solution_passes_it(label):
    assert label in EXERCISES
    assert f'check("{label}"' in CODE[label][1]


@pytest.mark.parametrize("label", CODE)
def test_stub_has_the_signature_of_the_solution(label):
    text, code = CODE[label]
    stub = functions(STUB.search(text)[1])
    assert len(stub) == 1
    assert stub.items() <= functions(code).items()


@pytest.mark.parametrize("label", CODE)
def test_stub_runs_and_is_not_right(label):
    stub = STUB.search(CODE[label][0])[1]
    space: dict = {}
    exec("import math, torch, numpy as np\nfrom torch import nn, Tensor\n" + stub, space)
    verdict = check(label, space[next(iter(functions(stub)))])
    assert not verdict
    if "..." in stub:
        assert "nothing came back" in verdict.message
    else:  # a function with a bug to find: the bug has a name
        assert verdict.message in EXERCISES[label].mistakes


def test_every_check_belongs_to_an_exercise():
    assert set(EXERCISES) <= set(ALL)


@pytest.mark.parametrize("label", IN_WORDS)
def test_answer_in_words_stands_in_its_solution_and_is_right(label):
    answer, words = IN_WORDS[label]
    [path] = BOOK.glob(f"{label[3:5]}-*.ipynb")
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    solution = text.split(f"{{solution-start}} {label}\n")[1].split("{solution-end}")[0]
    assert words in solution
    assert check(label, answer)


def test_the_missing_control_is_the_arm_of_the_study():
    arm = experiments.get("decay-taps").tiers["t4"]
    assert IN_WORDS["ex-09-6"][0] == (arm.alpha_min, arm.rates_as, arm.taps_as, arm.norms_as)
