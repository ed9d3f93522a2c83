"""The package keeps its shape: import order, size, docstrings, and nothing that runs a stranger.

Everything here is read with `ast` and `tokenize`; the package is not imported.
"""

import ast
import io
import re
import statistics
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mini_resdecay"
# The reading order: a file imports only from files above it.
ORDER = (
    ["__init__", "data", "shortcuts", "toy", "vit", "cnn", "mae", "uvit", "diffusion", "droppath"]
    + ["train", "evaluate", "reuse", "results", "figures", "widgets", "checks", "experiments"]
    + ["__main__"]
)
MODELS = {"toy", "vit", "cnn", "mae", "uvit"}
TOOLS = {"droppath", "train", "evaluate", "reuse"}
# Edges that the order allows and the design does not.
FORBIDDEN = {
    "diffusion": MODELS | {"shortcuts", "data"},
    **{tool: MODELS | (TOOLS - {tool}) for tool in TOOLS},
    **{name: MODELS for name in ("figures", "widgets", "checks")},
}
MOST_FILES, MOST_LINES, MEDIAN_FUNCTION, LONGEST_FUNCTION = 19, 3034, 9, 60
NOT_HERE = {"torchvision", "timm", "diffusers", "pickle", "dill", "cloudpickle", "joblib"}
# Heavy or often absent: imported where it is used, not with the package.
LAZY = {"datasets", "ipywidgets", "transformers", "pyarrow"}
UNPICKLES = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle", "eval", "exec"}

FILES = sorted(PACKAGE.glob("*.py"))
NAMES = [file.stem for file in FILES]


def read(name: str) -> str:
    return (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def parse(name: str) -> ast.Module:
    return ast.parse(read(name))


def imported(tree: ast.AST) -> list[str]:
    """Full dotted names of all that a file imports; `from mini_resdecay import x` counts as x."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "mini_resdecay" if node.level else (node.module or "")
            module += f".{node.module}" if node.level and node.module else ""
            own = module == "mini_resdecay"
            found += [f"{module}.{alias.name}" if own else module for alias in node.names]
    return found


def own_imports(tree: ast.AST) -> set[str]:
    """Which files of the package a file imports from."""
    parts = [name.split(".") for name in imported(tree)]
    found = {p[1] for p in parts if p[0] == "mini_resdecay" and len(p) > 1}
    return {name for name in found if name in ORDER}


def wrong_edges(name: str, tree: ast.AST) -> set[str]:
    """Imports that point down the reading order, or that the design forbids."""
    above = set(ORDER[: ORDER.index(name)])
    return {n for n in own_imports(tree) if n not in above or n in FORBIDDEN.get(name, ())}


def foreign_imports(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)} - {"mini_resdecay", ""}


def top_level_imports(tree: ast.Module) -> set[str]:
    """What is imported when the file is (functions and `if TYPE_CHECKING` do not count)."""
    body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return foreign_imports(ast.Module(body=body, type_ignores=[]))


def docstring_lines(tree: ast.AST) -> set[int]:
    """Line numbers of docstrings."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def code_line_numbers(source: str) -> set[int]:
    """The lines that hold code: no blank line, comment or docstring."""
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(source))


def statements(source: str) -> int:
    """Lines of code as a person counts them: a signature is one, however it is broken up."""
    logical, lines = 0, docstring_lines(ast.parse(source))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        logical += token.type == tokenize.NEWLINE and token.start[0] not in lines
    return logical


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def function_lines(source: str) -> dict[str, int]:
    """Lines of code of each function, from its signature to its end."""
    lines = code_line_numbers(source)
    spans = {f"{f.name}:{f.lineno}": (f.lineno, f.end_lineno) for f in functions(ast.parse(source))}
    return {name: sum(a <= n <= b for n in lines) for name, (a, b) in spans.items()}


def public(tree: ast.Module) -> list[ast.AST]:
    """Public functions and classes of a file, and the public methods of its classes."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [node for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    methods = [m for c in found for m in c.body if isinstance(c, ast.ClassDef)]
    known = {"forward", "extra_repr"}  # of torch: they say nothing that the class has not said
    plain = [m for m in methods if isinstance(m, ast.FunctionDef) and m.name not in known]
    return found + [m for m in plain if m.name[0] != "_"]


def unannotated(function: ast.FunctionDef) -> bool:
    """Whether an argument or the result has no type."""
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    missing = [arg.arg for arg in named if arg.annotation is None]
    return function.returns is None or bool(set(missing) - {"self", "cls"})


def dangerous_calls(tree: ast.AST) -> set[str]:
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return calls & UNPICKLES


def test_only_known_files_and_few() -> None:
    assert set(NAMES) <= set(ORDER)
    assert "__init__" in NAMES
    assert len(NAMES) <= MOST_FILES


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_up_the_reading_order(name: str) -> None:
    assert wrong_edges(name, parse(name)) == set()


@pytest.mark.parametrize("name", NAMES)
def test_no_model_zoo_and_nothing_that_unpickles(name: str) -> None:
    tree = parse(name)
    assert foreign_imports(tree) & NOT_HERE == set()
    assert dangerous_calls(tree) == set()


@pytest.mark.parametrize("name", NAMES)
def test_heavy_packages_are_imported_late(name: str) -> None:
    assert top_level_imports(parse(name)) & LAZY == set()


def test_figures_know_no_widgets() -> None:
    assert "ipywidgets" not in foreign_imports(parse("figures"))


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented_and_typed(name: str) -> None:
    tree = parse(name)
    assert ast.get_docstring(tree)
    assert [n.name for n in public(tree) if not ast.get_docstring(n)] == []
    assert [n.name for n in public(tree) if isinstance(n, ast.FunctionDef) and unannotated(n)] == []


def test_the_package_is_small() -> None:
    sizes = {name: statements(read(name)) for name in NAMES}
    counted = sum(lines for name, lines in sizes.items() if name != "checks")
    assert counted <= MOST_LINES, sizes


def test_functions_are_short() -> None:
    lengths = {f"{n}.{k}": v for n in NAMES for k, v in function_lines(read(n)).items()}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_the_package_docstring_lists_its_files_in_reading_order() -> None:
    listed = re.findall(r"^    (\w+)  ", ast.get_docstring(parse("__init__")) or "", re.MULTILINE)
    assert listed == [name for name in ORDER if name in listed]
    assert set(NAMES) - {"__init__"} == set(listed)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("data", "from mini_resdecay.train import fit"),
        ("data", "def f():\n    from mini_resdecay import reuse"),
        ("train", "import mini_resdecay.toy"),
        ("reuse", "from .train import fit"),
        ("figures", "from mini_resdecay.cnn import ResidualCNN"),
        ("toy", "from . import toy"),
    ],
)
def test_the_check_finds_wrong_edges(name: str, source: str) -> None:
    assert wrong_edges(name, ast.parse(source))


def test_the_check_allows_right_edges() -> None:
    tree = ast.parse("import torch\nfrom mini_resdecay import __version__\nfrom .data import load")
    assert wrong_edges("experiments", tree) == set()


def test_the_counts_are_right() -> None:
    source = (
        '"""Doc."""\n\n# comment\ndef f(\n    x,\n):\n    """Doc.\n\n    More."""\n    return x\n'
    )
    assert statements(source) == 2
    assert len(code_line_numbers(source)) == 4
    assert function_lines(source) == {"f:4": 4}
    assert unannotated(functions(ast.parse(source))[0])
    assert not unannotated(functions(ast.parse("def f(self, x: int) -> int: ..."))[0])
    assert dangerous_calls(ast.parse("w = torch.load(path)")) == {"torch.load"}
    assert top_level_imports(ast.parse("def f():\n    import datasets")) == set()
