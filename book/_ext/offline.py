"""Sphinx extension: switch off what would make a page load scripts of another host.

jupyter-book always loads sphinx-thebe. Its scripts serve a live kernel, which this book does not
offer; they name a CDN and declare one constant twice, which is an error in the browser's console.
"""

from sphinx.application import Sphinx


def drop_thebe(app: Sphinx) -> None:
    """Remove the listeners and files of sphinx-thebe, which is already set up by now."""
    for name, listeners in app.events.listeners.items():
        app.events.listeners[name] = [
            listener
            for listener in listeners
            if not listener.handler.__module__.startswith("sphinx_thebe")
        ]
    registry = app.registry
    registry.css_files = [(name, kw) for name, kw in registry.css_files if "thebe" not in name]
    registry.js_files = [
        (name, kw) for name, kw in registry.js_files if "thebe" not in (name or "")
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx, after jupyter-book's own extensions."""
    drop_thebe(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
