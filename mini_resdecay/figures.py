"""Arrays in, picture out: every figure of the book, with its description in words.

Each function takes numpy arrays or tensors, draws in one house style and shows one PNG of at most
7 inches. Its description `alt` is required: it is what a screen reader says in the picture's place.
"""

import io
import math
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.stats import spearmanr

from . import known, require

Array = NDArray[np.float64]
Arrays = Mapping[str, ArrayLike]
Names = Sequence[str]

DPI, WIDEST, SHORTEST_ALT = 150, 7.0, 40  # dots per inch, inches, characters
PITCH = 1.12  # of the cells of a mosaic, whose side is 1

# Okabe and Ito's palette without yellow, which vanishes on white.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#666666"
CLASSES = ((BLUE, "o"), (VERMILLION, "^"))  # colour and marker of class 0 and class 1


# How one arm looks in every figure: never by hue alone.
Style = namedtuple("Style", "colour marker dash")

ARM_STYLE = {
    "init": Style(GREY, "x", ":"),
    "trained": Style(BLUE, "o", "-"),
    "plain net": Style(VERMILLION, "s", "--"),
    "residual net": Style(BLUE, "D", "-"),
    "relu": Style(GREEN, "v", "-"),
    "tanh": Style(PURPLE, "^", "--"),
    # Ways to train the same net (chapter 4).
    "plain": Style(BLUE, "p", "-"),
    "plain-half": Style(SKY, "v", "--"),
    "plain-eq": Style(BLUE, "<", "-."),
    "droppath": Style(ORANGE, "^", "-"),
    "two-stage": Style(GREEN, "D", "--"),
    "no-freeze": Style(PURPLE, "P", "-."),
    "mixture": Style(VERMILLION, "X", ":"),
    "random-freeze": Style(BLACK, "*", "-"),
    # Shortcuts (chapters 5, 9 and 11).
    "standard": Style(BLUE, "h", "-"),
    "skips-only": Style(SKY, "d", "--"),
    "decay": Style(VERMILLION, ">", "-"),
    "constant": Style(ORANGE, "H", "-."),
    "learned": Style(GREEN, "8", ":"),
}
# What a pass does with a part of the net: never by hue alone.
PARTS: dict[str, dict[str, Any]] = {
    "run and updated": {"fc": "#99D8C7", "ec": GREEN, "lw": 2.4},
    "run, frozen": {"fc": "white", "ec": BLUE, "hatch": "////", "lw": 1.2},
    "not run": {"fc": "white", "ec": GREY, "ls": ":", "lw": 1.4},
    "run in one of two passes, updated": {"fc": "#F7DCA6", "ec": VERMILLION, "hatch": ".."},
}
OTHER_STYLES = [
    *map(
        Style,
        (BLUE, VERMILLION, GREEN, BLACK, PURPLE, ORANGE, SKY),
        "os^Dv<P",
        ("-", "--", "-.", ":", "-", "--", "-."),
    )
]

HOUSE: dict[str, Any] = {
    "font.size": 11,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.formatter.min_exponent": 3,  # 0.5, 1, 2 on logarithmic axes in place of powers
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "image.interpolation": "nearest",  # smoothing would more than double the file of a map
}
# 25 steps of colour: a smooth ramp makes the file three times larger.
DIVERGING: dict[str, Any] = {"cmap": plt.get_cmap("RdBu_r", 25), "origin": "lower"}
_open_frames: list[list[tuple[bytes, str]]] = []


def arm_styles(names: Names) -> dict[str, Style]:
    """Look of each arm: its own where `ARM_STYLE` has it, else from a fixed list of seven."""
    taken = {ARM_STYLE[name].colour for name in names if name in ARM_STYLE}
    others = [name for name in names if name not in ARM_STYLE]
    spare = sorted(OTHER_STYLES, key=lambda look: look.colour in taken)
    require("arms outside ARM_STYLE", others, len(others) <= len(spare), f"be at most {len(spare)}")
    return {name: ARM_STYLE.get(name) or spare[others.index(name)] for name in names}


def show(fig: plt.Figure, alt: str) -> None:
    """Show the figure with its description in the output's metadata, and close it.

    A PNG of 256 colours at 150 dots per inch; equal figures give equal bytes. Inside `frames()` it
    is kept instead of shown; outside Jupyter nothing is shown.
    Raises ValueError for an `alt` under 40 characters and a figure wider than 7 inches.
    """
    require(
        "alt", repr(alt), len(alt.strip()) >= SHORTEST_ALT,
        f"say in {SHORTEST_ALT} characters or more what the figure shows (kind of plot, axes, "
        "the finding with its number)",
    )  # fmt: skip
    width = fig.get_figwidth()
    require("size", width, width <= WIDEST, f"be at most {WIDEST} inches wide")
    raw, small = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, dpi=DPI)
    plt.close(fig)
    # MAXCOVERAGE keeps rare colours: the ends of a colour bar.
    palette = Image.open(raw).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    palette.save(small, "PNG", optimize=True, dpi=(DPI, DPI))
    png, ipython = small.getvalue(), sys.modules.get("IPython")  # not imported: not in Jupyter
    if _open_frames:
        _open_frames[-1].append((png, alt))
    elif ipython is not None and ipython.get_ipython() is not None:
        ipython.display.display({"image/png": png}, raw=True, metadata={"image/png": {"alt": alt}})


@contextmanager
def frames() -> Iterator[list[tuple[bytes, str]]]:
    """Collect the figures drawn inside as (PNG, alt) pairs: the frames of `widgets.stepper`."""
    _open_frames.append([])
    try:
        yield _open_frames[-1]
    finally:
        _open_frames.pop()


@contextmanager
def canvas(
    rows: int = 1, columns: int = 1, *, alt: str, size: tuple[float, float], **share: Any
) -> Iterator[NDArray[Any]]:
    """Axes [rows, columns] in the house style, shown when the context ends; size in inches."""
    with plt.style.context(["default", HOUSE]):
        fig = plt.Figure(figsize=size, layout="compressed")
        yield fig.subplots(rows, columns, squeeze=False, **share)
        show(fig, alt)


def spiral_scatter(panels: Mapping[str, tuple[ArrayLike, ArrayLike]], *, alt: str) -> None:
    """Points of two classes: {title: (x [n, 2], y [n] of 0 and 1)}, all panels to one scale."""
    reach = max(float(np.abs(_array("x", x, -1, 2)).max()) for x, _ in panels.values())
    _planes(panels, {}, 1.05 * reach, alt)


def decision_maps(grids: Arrays, x: ArrayLike, y: ArrayLike, *, alt: str) -> None:
    """Probability of class 1 over the input plane, {title: [G, G]}, with the points on top.

    First grid index is x2 (upwards), second x1, both from -1.2 to 1.2.
    """
    _planes(dict.fromkeys(grids, (x, y)), grids, 1.2, alt)


def _planes(points: Mapping[str, Any], grids: Arrays, reach: float, alt: str) -> None:
    width, square = min(6.4, 3.8 * len(points)), (-reach, reach)
    size = (width, width / len(points) + (1.7 if grids else 0.9))
    with canvas(1, len(points), alt=alt, size=size, sharex=True, sharey=True) as axes:
        for axis, (title, grid) in zip(axes.flat, grids.items(), strict=False):
            look = {"vmin": 0, "vmax": 1, "extent": square * 2, "zorder": 1, "alpha": 0.6}
            image = axis.imshow(_array(title, grid, -1, -1), **DIVERGING, **look)
        for axis, (title, (x, y)) in zip(axes.flat, points.items(), strict=True):
            for i in np.unique(_array("y", y, len(x))).astype(int):
                colour, marker = CLASSES[i]
                dots = _array("x", x, -1, 2)[np.asarray(y) == i].T
                look = {"edgecolors": "white", "linewidths": 0.4, "zorder": 2}
                axis.scatter(*dots, 16, colour, marker=marker, label=f"class {i}", **look)
            axis.set(title=title, xlabel="$x_1$", xlim=square, ylim=square, aspect="equal")
        axes[0, 0].set_ylabel("$x_2$")
        if grids:
            image.figure.colorbar(image, ax=axes, location="bottom", label="probability of class 1")
        _legend_below(axes[0], 2, markerscale=2)


def curves(
    x: ArrayLike,
    arms: Mapping[str, Any],
    xlabel: str,
    ylabel: str,
    *,
    alt: str,
    log: bool = False,
    ylim: tuple[float, float] | None = None,
    references: Mapping[str, float] | None = None,
    window: tuple[float, float] | None = None,
) -> None:
    """Lines over x [T] of several arms {arm: [S, T]}: each seed thin, their mean thick.

    For panels on the same axes, three in a row, give {title: {arm: [S, T]}}. `references` are
    labelled level lines, `window` a shaded stretch of x; gaps are NaN.
    Where every arm has one row the legend does not speak of seeds.
    """
    panels = arms if all(isinstance(value, Mapping) for value in arms.values()) else {"": arms}
    shape = (height := math.ceil(len(panels) / 3)), math.ceil(len(panels) / height)
    size = (5.6, 4.2) if len(panels) == 1 else (6.4, 1.7 + 2.3 * height)
    with canvas(*shape, alt=alt, size=size, sharex=True, sharey=True) as axes:
        plt.setp(axes.flat[len(panels) :], visible=False)
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            _draw_arms(axis, _array("x", x, -1), lines)
            for dash, (label, level) in zip("-:" * 9, (references or {}).items(), strict=False):
                axis.axhline(level, color=GREY, linestyle=dash, linewidth=1.2, label=label)
            if window:
                axis.axvspan(*window, color="#e6e6e6", zorder=0)
            axis.set(title=title, xlabel=xlabel, yscale="log" if log else "linear")
        for axis in axes.flat[: len(panels)][-shape[1] :]:  # those above a gap, too
            axis.tick_params(labelbottom=True)
        plt.setp(axes[:, 0], ylabel=f"{ylabel}, log scale" if log else ylabel, ylim=ylim)
        several = any(len(seeds) > 1 for lines in panels.values() for seeds in lines.values())
        heading = "thin: each seed; thick: mean over seeds" if several else None
        _legend_below(axes.flat, 2 if references else 3, heading)


def _draw_arms(axis: Any, x: Array, arms: Arrays) -> None:
    for arm, (colour, marker, dash) in arm_styles(list(arms)).items():
        seeds = np.ma.masked_invalid(_array(arm, arms[arm], -1, x.size))
        axis.plot(x, seeds.T, color=colour, linewidth=0.8, alpha=0.4)
        look = {"linewidth": 2.2, "markevery": max(1, x.size // 8), "label": arm}
        axis.plot(x, seeds.mean(axis=0), marker + dash, color=colour, **look)
    axis.locator_params(axis="x", integer=not (x % 1).any())


def bars(arms: Arrays, xlabel: str, ylabel: str, *, alt: str, ticks: Names | None = None) -> None:
    """Bars from 0 of the mean over seeds, {arm: [S, K]}, with each seed as a point on its bar.

    The K positions (nodes, blocks) are numbered from 0 unless `ticks` names them. NaN is no bar.
    """
    count, width = np.shape(next(iter(arms.values())))[-1], 0.8 / len(arms)
    with canvas(alt=alt, size=(min(6.4, 3 + 0.2 * count * len(arms)), 4.2)) as [[axis]]:
        for i, (arm, (colour, marker, _)) in enumerate(arm_styles(list(arms)).items()):
            seeds = np.ma.masked_invalid(_array(arm, arms[arm], -1, count))
            place = np.arange(count) + (i - (len(arms) - 1) / 2) * width
            axis.bar(place, seeds.mean(axis=0).filled(math.nan), width, color=colour, alpha=0.45)
            axis.plot(place, seeds.T, marker, color=colour, ms=3.5, mec=BLACK, mew=0.3, label=arm)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.grid(axis="x", visible=False)
        axis.locator_params(axis="x", integer=True)
        if ticks is not None:
            aslant = {"rotation": 35, "ha": "right"} if len("".join(ticks)) > 60 else {}
            axis.set_xticks(range(count), ticks, **aslant)
        _legend_below([axis], 3, "bar: mean; points: each seed")


def scatter_seeds(x: ArrayLike, y: ArrayLike, xlabel: str, ylabel: str, *, alt: str) -> None:
    """One point per block and seed, x and y [S, K] (row = seed); Spearman's rho in the title.

    It is nan, not defined, where all values of a seed are equal.
    """
    across = _array("x", x, -1, -1)
    up = _array("y", y, *across.shape)
    rho = [_spearman(a, b) for a, b in zip(across, up, strict=True)]
    title = (
        f"Spearman ρ = {_spearman(across.ravel(), up.ravel()):.2f} over all points,\n"
        f"{np.min(rho):.2f} to {np.max(rho):.2f} within one seed"
    ).replace("-", "−")
    with canvas(alt=alt, size=(5.6, 4.8)) as [[axis]]:
        looks = arm_styles([f"seed {i}" for i in range(len(rho))])
        for (name, (colour, marker, _)), a, b in zip(looks.items(), across, up, strict=True):
            axis.scatter(a, b, 32, colour, marker=marker, alpha=0.8, label=name)
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
        _legend_below([axis], 3)


def heatmaps(
    panels: Arrays,
    *,
    alt: str,
    label: str,
    limits: tuple[float, float] = (0.0, 1.0),
    null: float | None = None,
    differences: Arrays | None = None,
    columns: int = 3,
) -> None:
    """Layer-by-layer maps {title: [L, L]} on one colour scale; NaN is hatched grey; layer 0 = stem.

    `null`, the level that unrelated features reach, is marked on the colour bar. `differences` have
    a scale of their own, centred on 0, in the same row if all fit there, else in rows below.
    """
    changes, count = differences or {}, len(panels) + len(differences or {})
    one_row = count <= columns
    columns = count if one_row else min(columns, max(len(panels), len(changes)))
    split = len(panels) if one_row else columns * math.ceil(len(panels) / columns)
    rows, width = math.ceil((split + len(changes)) / columns), min(WIDEST, 2.9 * columns)
    size = (width, rows * (width / columns + 0.4) + (1.1 if one_row else 1.8))
    with canvas(rows, columns, alt=alt, size=size, sharex=True, sharey=True) as axes:
        mark = "" if null is None else f"\n(line: null level {null:.3f})"
        bar = _draw_maps(axes.flat[:split], panels, limits, label + mark)
        if null is not None:
            bar.ax.axvline(null, color=VERMILLION, linewidth=3)
        if changes:
            _draw_maps(axes.flat[split:], changes, None, f"difference in\n{label}")
        plt.setp(axes[:, 0], ylabel="layer i")


def _draw_maps(block: Any, maps: Arrays, limits: tuple[float, float] | None, label: str) -> Any:
    shape = np.shape(next(iter(maps.values())))
    arrays = [_array(title, values, *shape) for title, values in maps.items()]
    top = max(float(np.nanmax(np.abs(array), initial=1e-12)) for array in arrays)
    low, high = limits or (-top, top)
    look = DIVERGING if low < 0 else DIVERGING | {"cmap": "viridis"}
    plt.setp(block[len(arrays) :], visible=False)
    for axis, title, array in zip(block, maps, arrays, strict=False):
        axis.patch.set(facecolor="#cccccc", hatch="///")
        image = axis.imshow(array, vmin=low, vmax=high, zorder=1, **look)
        axis.set(title=title, xlabel="layer j")
        axis.locator_params(nbins=4, integer=True)
        axis.tick_params(labelbottom=True, grid_alpha=0)
    bar = image.figure.colorbar(image, ax=block, label=label, location="bottom", aspect=25)
    bar.ax.locator_params(axis="x", nbins=4)
    return bar


def histogram_grid(
    features: ArrayLike,
    y: ArrayLike,
    row_labels: Names,
    column_labels: Names,
    *,
    alt: str,
    baseline: ArrayLike,
) -> None:
    """Densities of node values by class: features [rows, n, nodes], y [n] of 0 and 1.

    The rows of a column share 40 bins, whose range is printed with its name; `baseline` (same
    shape, the untrained net) is a black line over both classes. Heights are not comparable between
    panels. Standardise layers beforehand if their magnitudes differ.
    """
    values = _array("features", features, len(row_labels), -1, len(column_labels))
    labels = _array("y", y, values.shape[1])
    start = _array("baseline", baseline, *values.shape)
    both = np.concatenate([values, start]).reshape(-1, len(column_labels))
    edges = [np.histogram_bin_edges(column, 40) for column in both.T]
    ranges = [f"{bins[0]:.2g}\nto {bins[-1]:.2g}".replace("-", "−") for bins in edges]
    names = [f"{name}\n{span}" for name, span in zip(column_labels, ranges, strict=True)]
    with _mosaic(row_labels, names, alt) as axis:
        axis.set(xlabel="activation", ylabel="density")
        for row, node in np.ndindex(len(row_labels), len(column_labels)):
            classes = [values[row, labels == label, node] for label in (0, 1)]
            samples = [*classes, start[row, :, node]]
            heights = [np.histogram(sample, edges[node], density=True)[0] for sample in samples]
            _draw_steps(axis, heights, PITCH * node, -PITCH * row)
        _legend_below([axis], 3)


def _draw_steps(axis: Any, heights: Sequence[Array], left: float, bottom: float) -> None:
    looks = (("class 0", BLUE, "-"), ("class 1", VERMILLION, ":"), ("at init, both", BLACK, "-"))
    places = left + np.linspace(0, 1, heights[0].size + 1)
    for height, (label, colour, dash) in zip(heights, looks, strict=True):
        look = {"fc": f"{colour}66", "ec": colour, "lw": 0.9, "ls": dash, "fill": colour != BLACK}
        steps = bottom + height / np.max(heights)
        axis.stairs(steps, places, baseline=bottom, label=label, **look)


def input_maps(
    values: ArrayLike,
    row_labels: Names,
    column_labels: Names,
    *,
    alt: str,
    scale: str = "column",
) -> None:
    """Value of each node over the input plane: values [rows, nodes, G, G], G points a side.

    Shown as a part of the largest absolute value of its "column", its "panel" or the "figure".
    First grid index is x2 (upwards), second x1, both from -1.2 to 1.2.
    """
    maps = _array("values", values, len(row_labels), len(column_labels), -1, -1)
    shared = {"panel": (2, 3), "column": (0, 2, 3), "figure": (0, 1, 2, 3)}
    over = shared[known("scale", scale, shared)]
    maps = maps / np.nanmax(np.abs(maps), over, keepdims=True, initial=1e-12)
    with _mosaic(row_labels, column_labels, alt) as axis:
        axis.set(xlabel="$x_1$, each from −1.2 to 1.2", ylabel="$x_2$, each from −1.2 to 1.2")
        for row, node in np.ndindex(maps.shape[:2]):
            x, y = PITCH * node, -PITCH * row
            place = (x, x + 1, y, y + 1)
            image = axis.imshow(maps[row, node], vmin=-1, vmax=1, extent=place, **DIVERGING)
        axis.figure.colorbar(
            image, ax=axis, label=f"value / largest of its {scale}", location="bottom", aspect=40
        )


@contextmanager
def _mosaic(rows: Names, columns: Names, alt: str) -> Iterator[plt.Axes]:
    """One axes with a unit square for each cell: an axes for each would take seconds."""
    height, width = len(rows), len(columns)
    size = min(WIDEST, max(4.5, 1.2 + 0.95 * width)), 2.2 + height * min(0.95, 5.8 / width)
    with canvas(alt=alt, size=size) as [[axis]]:
        yield axis
        axis.set(xlim=(-0.06, PITCH * width - 0.06), ylim=(1.06 - PITCH * height, 1.04))
        axis.set(aspect="equal", frame_on=False)
        axis.set_xticks(0.5 + PITCH * np.arange(width), columns)
        axis.set_yticks(0.5 - PITCH * np.arange(height), rows)
        axis.tick_params(length=0, labelsize=9, grid_alpha=0, labeltop=True, labelbottom=False)


def image_grid(images: Any, *, alt: str, titles: Names | None = None, columns: int = 8) -> None:
    """Pictures in rows: [N, H, W] or [N, C, H, W], uint8 in 0 to 255 or floats in [-1, 1]."""
    _draw_pictures(_pictures(images), titles or [""] * len(images), columns, alt)


def image_rows(rows: Mapping[str, Any], *, columns: int = 10, alt: str | None = None) -> None:
    """The first pictures of each {title: images}, a row each; `images` are as in `image_grid`.

    Rows may differ in size and in channels. `alt` is by default the titles.
    """
    rimmed = (
        np.pad(_pictures(row)[:columns], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
        for row in rows.values()
    )
    _draw_pictures(
        [np.hstack([*row]) for row in rimmed],
        [*rows],
        columns=1,
        alt=alt or f"Rows of {columns} pictures, a row for each of {', '.join(rows)}, from above.",
        place="left",
    )


def _pictures(images: Any) -> Array:
    """As [N, H, W, C], from 0 to 1."""
    stack = np.asarray(images)
    stack = stack[..., None] if stack.ndim == 3 else np.moveaxis(stack, 1, -1)
    return stack / 255 if stack.dtype == np.uint8 else np.clip((stack + 1) / 2, 0, 1)


def _draw_pictures(
    pictures: Sequence[Array] | Array, titles: Names, columns: int, alt: str, place: str = "center"
) -> None:
    columns, (high, wide, _) = min(columns, len(pictures)), pictures[0].shape
    rows, named = math.ceil(len(pictures) / columns), zip(pictures, titles, strict=True)
    points = 12 if place == "left" else 9  # a row has room for its name, a small picture has not
    with canvas(
        rows,
        columns,
        alt=alt,
        size=(WIDEST, rows * (WIDEST / columns * high / wide + 0.1 + points / 60)),
        subplot_kw={"frame_on": False, "xticks": [], "yticks": []},
    ) as axes:
        for axis, (picture, title) in zip(axes.flat, named, strict=False):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=points, pad=2, loc=place)


def block_diagram(*, alt: str) -> None:
    """A plain block and a residual block, side by side, drawn from bottom to top."""
    middle = {"ha": "center", "va": "center"}
    with canvas(1, 2, alt=alt, size=(5.6, 4.2)) as axes:
        for axis, arm in zip(axes.flat, ("plain net", "residual net"), strict=True):
            residual, colour = arm == "residual net", ARM_STYLE[arm].colour
            box = {"boxstyle": "round,pad=0.8", "facecolor": "white", "edgecolor": colour}
            axis.set(xlim=(-1.6, 1.6), ylim=(-0.2, 4.3), title=f"block of a {arm}")
            axis.set_axis_off()
            axis.plot([0, 0], [0.1, 3.9], BLACK, marker="^", markevery=[1])
            axis.text(0, 1.6, "branch\n$f(h)$", bbox=box, **middle)
            axis.text(0, -0.1, "$h$", **middle)
            axis.text(0, 4.15, "$h + f(h)$" if residual else "$f(h)$", **middle)
            if residual:
                axis.plot(
                    [0, 1.2, 1.2, 0.25], [0.5, 0.5, 3.1, 3.1], colour, marker="<", markevery=[3]
                )
                axis.text(0, 3.1, "+", bbox=box | {"boxstyle": "circle,pad=0.2"}, **middle)
                axis.text(1.35, 1.6, "shortcut", rotation=90, va="center")


def path_diagram(rows: Mapping[str, Sequence[str]], *, alt: str) -> None:
    """One net a row, drawn from left to right: {title: what becomes of stem, blocks and head}.

    Each part is one of `PARTS`. A block is a branch above the shortcut, which is never cut.
    """
    count = len(next(iter(rows.values())))
    with canvas(alt=alt, size=(6.6, 0.8 + 1.2 * len(rows))) as [[axis]]:
        for row, (title, parts) in enumerate(rows.items()):
            down = -2.1 * row
            axis.plot([-0.9, count - 0.1], [down, down], BLACK, marker=">", markevery=[1])
            axis.text(-0.9, down + 1.35, title, fontsize=11, fontweight="bold")
            for i, part in enumerate(parts):
                _draw_part(axis, i, down, part, {0: "stem", count - 1: "head"}.get(i, f"$f_{i}$"))
        axis.set(xlim=(-1, count), ylim=(1.6 - 2.1 * len(rows), 1.9))
        axis.set_axis_off()
        looks = [plt.Rectangle((0, 0), 1, 1, label=name, **PARTS[name]) for name in PARTS]
        axis.figure.legend(handles=looks, loc="outside lower center", ncols=2)


def _draw_part(axis: Any, i: int, down: float, part: str, name: str) -> None:
    inner = name.startswith("$")
    height = down + 0.72 * inner
    ink, dash = (GREY, ":") if part == "not run" else (BLACK, "-")
    if inner:
        left, right = i - 0.45, i + 0.45
        axis.plot([left, left, right, right], [down, height, height, down], ink, ls=dash)
        axis.plot(right, down, "o", color=BLACK, mfc="white", ms=6)
    axis.add_patch(plt.Rectangle((i - 0.3, height - 0.27), 0.6, 0.54, zorder=3, **PARTS[part]))
    look = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85}
    axis.text(
        i, height, name, ha="center", va="center", fontsize=10, color=ink, bbox=look, zorder=4
    )


def path_rows(mask: Any) -> dict[str, list[str]]:
    """What a path mask [L] (1 kept) makes of stem, blocks and head: the rows of `path_diagram`."""
    run, frozen, out, once = PARTS
    gone = " and ".join(str(i + 1) for i, bit in enumerate(mask) if not bit)
    made = {
        "(a) ordinary flow: a plain step": (run, run, run),
        f"(b) stage 1, dropped: {gone or 'none'}": (run, out, run),
        "(c) stage 2: what was kept is frozen": (frozen, run, frozen),
        "(d) control: the mixture, one update": (run, once, run),
    }
    return {
        title: [outside, *(kept if bit else dropped for bit in mask), outside]
        for title, (kept, dropped, outside) in made.items()
    }


def _array(name: str, value: Any, *shape: int) -> Array:
    """The value as float64 on the CPU; -1 in `shape` stands for any length."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, np.float64)
    fits = (
        len(shape) == array.ndim
        and array.size > 0
        and all(n in (-1, m) for n, m in zip(shape, array.shape, strict=True))
    )
    require(name, array.shape, fits, f"have shape {shape} (-1: any length)")
    return array


def _spearman(x: Array, y: Array) -> float:
    return float(spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan


def _legend_below(axes: Any, columns: int, title: str | None = None, **more: Any) -> None:
    found = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    axes[0].figure.legend(
        handles=[*found.values()], loc="outside lower center", ncols=columns, title=title, **more
    )
