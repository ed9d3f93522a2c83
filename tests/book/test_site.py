"""The built site: links, figures, alt text, weight, and nothing from another host.

Each check takes a page and returns what is wrong with it; the last tests show that every check
does find what it is for.
"""

import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from pages import ROOT, chapters, toc_pages

PAGES = toc_pages()
PLAIN = [*PAGES, "index", "search", "genindex"]
ALT_AT_LEAST = 40
PAGE_AT_MOST = 3_000_000
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
    "link": "href",
}
# Roles, directives and maths that were meant to be rendered and were not.
RAW_MARKUP = re.compile(r"\{[a-z:-]+\}`|^:{3,}|^```|\$\$|\\begin\{", re.MULTILINE)
FOREIGN_CSS = re.compile(r"""(?:@import\s+|url\(\s*)['"]?(?:https?:)?//""")


@cache
def read_page(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(path: Path) -> frozenset[str]:
    page = read_page(path)
    named = [tag["name"] for tag in page.find_all("a", attrs={"name": True})]
    return frozenset([tag["id"] for tag in page.find_all(id=True)] + named)


def is_foreign(address: str) -> bool:
    """Whether an address leads to another host."""
    return bool(urlsplit(address).netloc)


def foreign_resources(page: BeautifulSoup) -> list[str]:
    """What a browser would fetch from another host; links that a reader may follow are fine."""
    found = []
    for tag in page.find_all(list(FETCHED)):
        address = tag.get(FETCHED[tag.name]) or ""
        navigational = tag.name == "link" and set(tag.get("rel", [])) <= {"canonical", "author"}
        if is_foreign(address) and not navigational:
            found.append(address)
        found += [a for a in (tag.get("srcset") or "").split() if is_foreign(a)]
    styles = [s.get_text() for s in page.find_all("style")]
    styles += [tag["style"] for tag in page.find_all(style=True)]
    return found + [s[:80] for s in styles if FOREIGN_CSS.search(s)]


def broken_links(page: BeautifulSoup, path: Path, site: Path) -> list[str]:
    """Links, scripts, styles and pictures whose file or anchor does not exist."""
    found = []
    for tag in page.find_all(["a", *FETCHED]):
        address = tag.get(FETCHED.get(tag.name, "href"))
        if address is None or is_foreign(address):
            continue
        parts = urlsplit(address)
        if parts.scheme:  # mailto:, data:, javascript:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir():
            target /= "index.html"
        if not target.is_file() or not target.is_relative_to(site.resolve()):
            found.append(f"{address}: no such file")
        elif target.suffix == ".html" and unquote(parts.fragment) not in {"", *anchors(target)}:
            found.append(f"{address}: no such anchor")
    return found


def pictures(page: BeautifulSoup) -> list:
    """The pictures of a page's text (logos and buttons of the theme lie outside the article)."""
    return page.select("article img")


def short_alts(page: BeautifulSoup) -> list[str]:
    """Pictures without alt text that tells what they show."""
    found = [(i.get("src", "")[:60], (i.get("alt") or "").strip()) for i in pictures(page)]
    return [f"{src}: alt {alt!r}" for src, alt in found if len(alt) < ALT_AT_LEAST]


def raw_markup(page: BeautifulSoup) -> list[str]:
    """Markup that reached the reader, and messages of the build inside the page."""
    article = BeautifulSoup(str(page.find("article")), "html.parser")
    messages = [m.get_text()[:80] for m in article.select(".problematic, .system-message")]
    for tag in article.select("pre, code, script, .math"):
        tag.decompose()
    return messages + RAW_MARKUP.findall(article.get_text())


def weight(page: BeautifulSoup, path: Path) -> int:
    """Bytes of the page and its pictures; scripts and fonts are shared by all pages."""
    sources = {i["src"] for i in pictures(page) if not i["src"].startswith("data:")}
    files = [path, *((path.parent / unquote(source)).resolve() for source in sources)]
    return sum(file.stat().st_size for file in files if file.is_file())


def visible_figures(notebook: dict) -> int:
    """How many pictures the outputs of a notebook put on its page."""
    hidden = {"remove-cell", "remove-output"}
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    shown = [c for c in cells if not hidden & set(c["metadata"].get("tags", []))]
    return sum("image/png" in o.get("data", {}) for c in shown for o in c["outputs"])


def missing_outputs(page: BeautifulSoup, notebook: dict) -> list[str]:
    """Figures, labels and widgets of the notebook that its page lacks."""
    found = []
    have, want = len(page.select("article .cell_output img")), visible_figures(notebook)
    if have != want:
        found.append(f"{have} figures on the page, {want} in the notebook")
    for cell in notebook["cells"]:
        name = cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
        if name and not page.find(id=name):
            found.append(f"no figure {name}")
    if notebook["metadata"].get("widgets"):
        scripts = [s.get("type") or s.get("src", "") for s in page.find_all("script")]
        for part in ("widget-state+json", "widget-view+json", "require.js", "embed-amd.js"):
            if not any(part in script for script in scripts):
                found.append(f"the widget's {part} is missing")
    return found


def load(site: Path, name: str) -> tuple[BeautifulSoup, Path]:
    path = site / f"{name}.html"
    assert path.is_file(), f"{name}.html was not built"
    return read_page(path), path


@pytest.mark.parametrize("name", PLAIN)
def test_links_lead_somewhere(site: Path, name: str) -> None:
    page, path = load(site, name)
    assert broken_links(page, path, site) == []


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_from_another_host(site: Path, name: str) -> None:
    assert foreign_resources(load(site, name)[0]) == []


def test_no_stylesheet_fetches_from_another_host(site: Path) -> None:
    sheets = list(site.rglob("*.css"))
    assert sheets
    assert [s.name for s in sheets if FOREIGN_CSS.search(s.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", PAGES)
def test_pictures_have_alt_text(site: Path, name: str) -> None:
    assert short_alts(load(site, name)[0]) == []


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole_and_light(site: Path, name: str) -> None:
    page, path = load(site, name)
    assert len(page.select("article h1")) == 1
    assert len(page.find("article").get_text(strip=True)) > 200, "an empty page"
    assert raw_markup(page) == []
    assert weight(page, path) <= PAGE_AT_MOST


@pytest.mark.parametrize("name", chapters())
def test_chapters_show_their_figures(site: Path, name: str) -> None:
    notebook = json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert visible_figures(notebook) > 0
    assert missing_outputs(load(site, name)[0], notebook) == []


@pytest.mark.parametrize("name", chapters())
def test_solutions_are_folded(site: Path, name: str) -> None:
    solutions = load(site, name)[0].select("article .solution")
    assert solutions
    assert all("dropdown" in solution["class"] for solution in solutions)


def test_the_site_holds_just_the_pages_of_the_contents(site: Path) -> None:
    built = {str(p.relative_to(site).with_suffix("")) for p in (site / "book").rglob("*.html")}
    assert built == set(PAGES)


def parse(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img src="http://pictures.example/x.png">',
        '<img srcset="https://pictures.example/x.png 2x">',
        "<style>@import 'https://fonts.example/x.css'</style>",
        '<p style="background: url(//x.example/y.png)">',
        '<iframe src="https://video.example/x"></iframe>',
    ],
)
def test_the_check_finds_other_hosts(html: str) -> None:
    assert foreign_resources(parse(html))
    assert foreign_resources(parse('<a href="https://arxiv.org/abs/2411.09475">x</a>')) == []


@pytest.mark.parametrize("address", ["gone.html", "#gone", "here.html#gone", "../../out.html"])
def test_the_check_finds_broken_links(tmp_path: Path, address: str) -> None:
    path = tmp_path / "here.html"
    html = (
        f'<i id="top"></i><a href="{address}"></a><a href="#top"></a><a href="here.html#top"></a>'
    )
    path.write_text(html)
    assert len(broken_links(parse(html), path, tmp_path)) == 1


def test_the_checks_find_poor_pages(tmp_path: Path) -> None:
    short = '<article><img src="x.png" alt="figure 1"><img src="y.png"></article>'
    assert len(short_alts(parse(short))) == 2
    raw = parse("<article><p>see {numref}`fig-1` and $$x$$</p><code>{doc}`x`</code></article>")
    assert raw_markup(raw) == ["{numref}`", "$$", "$$"]
    assert raw_markup(parse('<article><span class="problematic">x</span></article>')) == ["x"]
    (tmp_path / "x.png").write_bytes(b"x" * 1000)
    (tmp_path / "p.html").write_text(short)
    assert weight(parse(short), tmp_path / "p.html") == 1000 + len(short)


def test_the_check_finds_missing_outputs() -> None:
    figure = {
        "cell_type": "code",
        "metadata": {"mystnb": {"figure": {"name": "fig-a"}}},
        "outputs": [{"data": {"image/png": "…"}}],
    }
    notebook = {"cells": [figure], "metadata": {"widgets": {"state": {}}}}
    empty = missing_outputs(parse("<article></article>"), notebook)
    assert len(empty) == 6
    whole = '<article><figure id="fig-a"><div class="cell_output"><img></div></figure></article>'
    assert missing_outputs(parse(whole), {"cells": [figure], "metadata": {}}) == []
