"""Every page, offline, in headless Chromium, as wide as a desk and as narrow as a phone.

No error in the console, no request to another host, no sideways scrolling, no serious or critical
violation of axe-core's accessibility rules, and the moving figures move by keyboard alone.
MINI_RESDECAY_SCREENSHOTS=folder keeps a picture of every page at both widths.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pages import ROOT, toc_pages
from playwright.sync_api import BrowserContext, Page, Request, sync_playwright

pytestmark = pytest.mark.browser

PAGES = [*toc_pages(), "search", "genindex"]
WIDTHS = (1280, 360)
AXE = ROOT / "_build" / "axe-core" / "axe.min.js"
# The shell draws the same pages without the browser's own windows, at a fraction of the cost.
CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Offline: no name resolves, and only this machine answers.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# What the theme itself breaks and we cannot mend: rule -> (selector, upstream report).
ALLOWED: dict[str, tuple[str, str]] = {}

OPEN_ALL = """() => {
    const still = 'animation: none !important; transition: none !important';
    const style = document.head.appendChild(document.createElement('style'));
    style.textContent = `*, *::before, *::after {${still}}`;
    document.querySelectorAll('details').forEach(d => d.open = true);
    document.querySelectorAll('.toggle-hidden').forEach(d => d.classList.remove('toggle-hidden'));
}"""
RUN_AXE = """async () => (await axe.run(document, {resultTypes: ['violations']})).violations
    .filter(v => ['serious', 'critical'].includes(v.impact))
    .flatMap(v => v.nodes.map(n => [v.id, n.target.join(' '), n.html.slice(0, 160)]))"""
TOO_WIDE = """() => {
    const edge = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= edge) return [];
    return [...document.querySelectorAll('article *')]
        .filter(e => e.getBoundingClientRect().right > edge + 1)
        .map(e => e.tagName + '.' + e.className).slice(0, 8).concat(['page']);
}"""
SHOWN = """() => [...document.querySelectorAll('.jupyter-widgets img')]
    .filter(i => i.checkVisibility() && i.getBoundingClientRect().width > 0)
    .map(i => i.alt + i.src.length + i.src.slice(-200))"""


@dataclass
class Visit:
    """What happened while a page was open."""

    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    too_wide: list[str] = field(default_factory=list)
    violations: list[list[str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site, served on this machine only."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tool_missing: Callable[[str], None]) -> Iterator[BrowserContext]:
    """One headless Chromium for all pages, with one cache."""
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if binary is None:
        tool_missing(
            "no Chromium on this machine (Debian: apt-get install chromium-headless-shell)"
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=list(SWITCHES))
        yield chromium.new_context()
        chromium.close()


def open_page(browser: BrowserContext, address: str, name: str, width: int, visit: Visit) -> Page:
    """Load a page and wait until its maths and widgets are drawn."""
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": 800})
    page.set_default_timeout(120_000)  # two busy cores draw slowly

    def watch(request: Request) -> None:
        where = urlsplit(request.url)
        if where.scheme not in {"data", "blob"} and where.netloc != urlsplit(address).netloc:
            visit.foreign.append(request.url)

    page.on("request", watch)
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("response", lambda r: visit.errors.append(r.url) if r.status >= 400 else None)
    page.on("console", lambda m: visit.errors.append(m.text) if m.type == "error" else None)
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    page.wait_for_function("() => !window.MathJax || window.MathJax.startup?.promise")
    page.evaluate("() => window.MathJax?.startup?.promise")
    if page.locator("script[type='application/vnd.jupyter.widget-view+json']").count():
        page.wait_for_selector(".jupyter-widgets img")
    return page


@pytest.fixture(scope="module")
def visits(browser: BrowserContext, address: str) -> Callable[[str, int], Visit]:
    """Visit a page at a width, once for all tests."""
    seen: dict[tuple[str, int], Visit] = {}
    pictures = os.environ.get("MINI_RESDECAY_SCREENSHOTS")

    def visit(name: str, width: int) -> Visit:
        if (name, width) not in seen:
            new = seen[name, width] = Visit()
            page = open_page(browser, address, name, width, new)
            if pictures:
                file = Path(pictures) / f"{name.replace('/', '-')}-{width}.png"
                page.screenshot(path=file, full_page=True)
            page.evaluate(OPEN_ALL)
            new.too_wide = page.evaluate(TOO_WIDE)
            page.evaluate(AXE.read_text(encoding="utf-8"))
            new.violations = page.evaluate(RUN_AXE)
            page.close()
        return seen[name, width]

    return visit


def is_allowed(violation: list[str]) -> bool:
    rule, target, _ = violation
    return rule in ALLOWED and ALLOWED[rule][0] in target


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_page_opens_offline_without_an_error(visits, name: str, width: int) -> None:
    visit = visits(name, width)
    assert visit.foreign == []
    assert visit.errors == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_page_has_no_serious_accessibility_violation(visits, name: str, width: int) -> None:
    assert [v for v in visits(name, width).violations if not is_allowed(v)] == []


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(visits, name: str) -> None:
    assert visits(name, 360).too_wide == []


@pytest.mark.parametrize("width", WIDTHS)
def test_moving_figures_move_by_keyboard(browser, address, site: Path, width: int) -> None:
    view = "application/vnd.jupyter.widget-view+json"
    names = [n for n in toc_pages() if view in (site / f"{n}.html").read_text(encoding="utf-8")]
    assert names, "no chapter has a moving figure"
    for name in names:
        page = open_page(browser, address, name, width, Visit())
        first = page.evaluate(SHOWN)
        page.locator(".jupyter-widgets [role=slider]").first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"first => ({SHOWN})().join() !== first", arg=",".join(first))
        second = page.evaluate(SHOWN)
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(f"first => ({SHOWN})().join() === first", arg=",".join(first))
        assert len(first) == len(second) == 1, "one frame at a time is visible"
        page.close()


def test_the_visit_notices_errors_hosts_and_width(browser, address, site: Path) -> None:
    """A page with every fault at once: what the tests above look for is really seen."""
    bad = site / "_bad.html"
    bad.write_text(
        '<html><head></head><body><article><h1>x</h1><img src="https://pictures.example/x.png">'
        "<p style='width: 900px; color: #eee; background: #fff'>pale</p></article>"
        "<script>console.error('said'); throw new Error('thrown')</script></body></html>"
    )
    try:
        visit = Visit()
        page = open_page(browser, address, "_bad", 360, visit)
        assert visit.foreign == ["https://pictures.example/x.png"]
        assert {"said", "thrown"} <= set(visit.errors)
        assert page.evaluate(TOO_WIDE)[-1] == "page"
        page.evaluate(AXE.read_text(encoding="utf-8"))
        rules = {rule for rule, _, _ in page.evaluate(RUN_AXE)}
        assert {"image-alt", "color-contrast", "html-has-lang"} <= rules
        page.close()
    finally:
        bad.unlink()
