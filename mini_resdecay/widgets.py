"""Figures that move in a static page: no kernel, no server, only frames drawn beforehand."""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import require

if TYPE_CHECKING:
    import ipywidgets


def stepper(
    pngs: Sequence[bytes], alts: Sequence[str], labels: Sequence[str], description: str
) -> "ipywidgets.VBox":
    """A slider over frames: PNGs of one size, each with its description and its slider label.

    The browser moves it by itself (`jslink`), so it works in the built book and from a phone;
    on a keyboard: Tab to the slider, then the arrow keys. `figures.frames()` makes the frames.
    Raises ValueError if the three lists differ in length, or the frames in size;
    ImportError if ipywidgets is not installed.
    """
    require(
        "pngs, alts and labels", f"{len(pngs)}, {len(alts)} and {len(labels)}",
        2 <= len(pngs) == len(alts) == len(labels), "be equally many and at least 2",
    )  # fmt: skip
    try:
        import ipywidgets as widgets
    except ImportError as error:
        raise ImportError(
            "a figure that moves needs the package ipywidgets: pip install ipywidgets"
        ) from error
    sizes = {Image.open(io.BytesIO(png)).size for png in pngs}
    require("pngs", f"{sorted(sizes)} pixels", len(sizes) == 1, "all have one size")
    pictures = [widgets.HTML(_img(*pair, *sizes)) for pair in zip(pngs, alts, strict=True)]
    slider = widgets.SelectionSlider(
        options=[(label, i) for i, label in enumerate(labels)],
        index=0,
        description=description,
        tooltip=description,
        style={"description_width": "initial"},
        layout={"width": "100%", "max_width": "36em"},
    )
    if not hasattr(widgets, "Stack"):  # ipywidgets 7, as on Colab, where a kernel is at hand
        shown = widgets.HTML(pictures[0].value)

        def turn(change: dict[str, Any]) -> None:
            shown.value = pictures[change["new"]].value

        slider.observe(turn, "index")
        return widgets.VBox([slider, shown])
    stack = widgets.Stack(children=pictures, selected_index=0, layout={"width": "100%"})
    widgets.jslink((slider, "index"), (stack, "selected_index"))
    return widgets.VBox([slider, stack])


def _img(png: bytes, alt: str, size: tuple[int, int]) -> str:
    require("alts", repr(alt), alt.strip(), "each describe their frame")
    data = base64.b64encode(png).decode("ascii")
    # ipywidgets.Image has no alt attribute; an <img> inside an HTML widget has.
    return (
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" width="{size[0]}" '
        f'height="{size[1]}" style="max-width:100%;height:auto">'
    )
