"""Arrays in, picture out: every figure of the book, with its description in words.

Each function takes numpy arrays or tensors, draws in one house style and shows one PNG of at most
7 inches. Its description `alt` is required: it is what a screen reader says in the picture's place.
"""

import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.stats import spearmanr

Array = NDArray[np.float64]
Arrays = Mapping[str, ArrayLike]
Names = Sequence[str]

DPI, WIDEST, SHORTEST_ALT = 150, 7.0, 40  # dots per inch, inches, characters
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
TEXT, GREY = "#1a1a1a", "#666666"

# Okabe and Ito's palette without yellow, which vanishes on white.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK = "#56B4E9", "#CC79A7", "#000000"
CLASSES = ((BLUE, "o"), (VERMILLION, "^"))  # colour and marker of class 0 and class 1


class Style(NamedTuple):
    """How one arm looks in every figure: never by hue alone."""

    colour: str
    marker: str
    dash: str


ARM_STYLE: dict[str, Style] = {
    "init": Style(GREY, "x", ":"), "trained": Style(BLUE, "o", "-"),
    # chapter 1
    "plain net": Style(VERMILLION, "s", "--"), "residual net": Style(BLUE, "D", "-"),
    # activations
    "relu": Style(GREEN, "v", "-"), "tanh": Style(PURPLE, "^", "--"),
    # ways to train the same net (chapter 4)
    "plain": Style(BLUE, "p", "-"), "plain-half": Style(SKY, "v", "--"),
    "plain-eq": Style(BLUE, "<", "-."), "droppath": Style(ORANGE, "^", "-"),
    "two-stage": Style(GREEN, "D", "--"), "no-freeze": Style(PURPLE, "P", "-."),
    "mixture": Style(VERMILLION, "X", ":"), "random-freeze": Style(BLACK, "*", "-"),
    # shortcuts (chapters 5, 9 and 11)
    "standard": Style(BLUE, "h", "-"), "skips only": Style(SKY, "d", "--"),
    "decay": Style(VERMILLION, ">", "-"), "constant": Style(ORANGE, "H", "-."),
    "learnable": Style(GREEN, "8", ":"),
}
OTHER_STYLES = (
    Style(BLUE, "o", "-"), Style(VERMILLION, "s", "--"), Style(GREEN, "^", "-."),
    Style(BLACK, "D", ":"), Style(PURPLE, "v", "-"), Style(ORANGE, "<", "--"),
    Style(SKY, "P", "-."),
)
HOUSE: dict[str, Any] = {
    "font.size": 12, "axes.titlesize": 12, "axes.labelsize": 12,  # legible on a phone: few inches
    "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11,
    "legend.title_fontsize": 10, "figure.constrained_layout.h_pad": 0.08, "hatch.linewidth": 0.6,
    "image.interpolation": "nearest",  # smoothing would more than double the file of a map
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.titlecolor": TEXT, "axes.edgecolor": GREY,
    "xtick.color": TEXT, "ytick.color": TEXT, "axes.grid": True, "grid.color": "#e6e6e6",
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.columnspacing": 1.2, "legend.handletextpad": 0.5,
}
_open_frames: list[list[tuple[bytes, str]]] = []


def house_style() -> AbstractContextManager[None]:
    """Matplotlib's defaults with the book's style on top, for as long as the context lasts."""
    return style.context(["default", HOUSE])


def arm_styles(names: Names) -> dict[str, Style]:
    """Look of each arm: its own where `ARM_STYLE` has it, else from a fixed list of seven."""
    taken = {ARM_STYLE[name].colour for name in names if name in ARM_STYLE}
    spare = sorted(OTHER_STYLES, key=lambda look: look.colour in taken)
    others = [name for name in names if name not in ARM_STYLE]
    if len(others) > len(spare):
        raise ValueError(f"arms outside ARM_STYLE must be at most {len(spare)}, got {others}")
    return {name: ARM_STYLE.get(name) or spare[others.index(name)] for name in names}


def to_png(fig: Figure) -> bytes:
    """The figure as a PNG of 256 colours at 150 dots per inch; equal figures give equal bytes."""
    raw, small = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, format="png", dpi=DPI, metadata={"Software": None})
    with Image.open(raw) as picture:  # MAXCOVERAGE keeps rare colours: the ends of a colour bar
        palette = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE,
                                                  dither=Image.Dither.NONE)
    palette.save(small, format="PNG", optimize=True, dpi=(DPI, DPI))
    return small.getvalue()


def show(fig: Figure, alt: str, path: str | Path | None = None) -> None:
    """Show the figure with its description in the output's metadata, and close it.

    Inside `frames()` the picture is kept instead of shown; with `path` it is also saved.
    Outside Jupyter nothing is shown. Raises ValueError for an `alt` under 40 characters.
    """
    _check_alt(alt)
    png = to_png(fig)
    plt.close(fig)
    if path is not None:
        Path(path).write_bytes(png)
    ipython = sys.modules.get("IPython")  # not imported: not in Jupyter
    if _open_frames:
        _open_frames[-1].append((png, alt))
    elif ipython is not None and ipython.get_ipython() is not None:
        ipython.display.display(
            {"image/png": png}, raw=True, metadata={"image/png": {"alt": alt}})


@contextmanager
def frames() -> Iterator[list[tuple[bytes, str]]]:
    """Collect the figures drawn inside as (PNG, alt) pairs: the frames of `widgets.stepper`."""
    _open_frames.append([])
    try:
        yield _open_frames[-1]
    finally:
        _open_frames.pop()


@contextmanager
def canvas(rows: int = 1, columns: int = 1, *, alt: str, size: tuple[float, float],
           **share: Any) -> Iterator[NDArray[Any]]:
    """Axes [rows, columns] in the house style, shown when the context ends; size in inches."""
    _check_alt(alt)
    if size[0] > WIDEST:
        raise ValueError(f"size must be at most {WIDEST} inches wide, got {size[0]}")
    with house_style():
        fig = Figure(figsize=size, layout="compressed")
        yield fig.subplots(rows, columns, squeeze=False, **share)
        show(fig, alt)


def spiral_scatter(panels: Mapping[str, tuple[ArrayLike, ArrayLike]], *, alt: str) -> None:
    """Points of two classes: {title: (x [n, 2], y [n] of 0 and 1)}, all panels to one scale."""
    data = {title: _points(x, y) for title, (x, y) in panels.items()}
    reach = 1.05 * max(float(np.abs(x).max()) for x, _ in data.values())
    with _planes(list(data), reach, alt, extra=0.9) as axes:
        for axis, (x, y) in zip(axes, data.values(), strict=True):
            _draw_points(axis, x, y)


def decision_maps(grids: Arrays, x: ArrayLike, y: ArrayLike, *, alt: str,
                  extent: float = 1.2) -> None:
    """Probability of class 1 over the input plane, {title: [G, G]}, with the points on top.

    First grid index is x2 (upwards), second x1, both from -extent to extent.
    """
    points, square = _points(x, y), (-extent, extent, -extent, extent)
    with _planes(list(grids), extent, alt, extra=1.7) as axes:
        for axis, (title, grid) in zip(axes, grids.items(), strict=True):
            image = _draw_plane(axis, _array(title, grid, 2), square, (0, 1), alpha=0.6)
            _draw_points(axis, *points)
        axes[0].figure.colorbar(image, ax=axes, label="probability of class 1",
                                location="bottom", aspect=30)


def curves(x: ArrayLike, arms: Mapping[str, Any], xlabel: str, ylabel: str, *, alt: str,
           log: bool = False, ylim: tuple[float, float] | None = None, band: bool = False,
           references: Mapping[str, float] | None = None) -> None:
    """Lines over x [T] of several arms {arm: [S, T]}: each seed thin, their mean thick.

    For panels side by side on the same axes give {title: {arm: [S, T]}}. `band=True` shades lowest
    to highest seed instead of drawing each; `references` are labelled level lines; gaps are NaN.
    """
    places = _array("x", x, 1)
    nested = all(isinstance(value, Mapping) for value in arms.values())
    panels = arms if nested else {"": arms}
    size = (5.6, 4.2) if len(panels) == 1 else (6.4, 4.0)
    with canvas(1, len(panels), alt=alt, size=size, sharex=True, sharey=True) as axes:
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
            for arm, look in arm_styles(list(lines)).items():
                _draw_arm(axis, places, _seeds(arm, lines[arm], places.size), arm, look, band)
            for dash, (label, level) in zip("-:" * 9, (references or {}).items(), strict=False):
                axis.axhline(level, color=GREY, linestyle=dash, linewidth=1.2, label=label)
            axis.set(title=title, xlabel=xlabel, yscale="log" if log else "linear")
        axes[0, 0].set(ylabel=f"{ylabel}, log scale" if log else ylabel, ylim=ylim)
        spread = "shaded: lowest to highest seed" if band else "thin: each seed"
        _legend_below(axes, 2 if references else 3, f"{spread}; thick: mean over seeds")


def bars(arms: Arrays, xlabel: str, ylabel: str, *, alt: str, ticks: Names | None = None) -> None:
    """Bars from 0 of the mean over seeds, {arm: [S, K]}, with each seed as a point on its bar.

    The K positions (nodes, blocks) are numbered from 0 unless `ticks` names them.
    """
    count = _array("arms", next(iter(arms.values())), 2).shape[1]
    width = 0.8 / len(arms)
    with canvas(alt=alt, size=(min(6.4, 3 + 0.2 * count * len(arms)), 4.2)) as axes:
        axis = axes[0, 0]
        for i, (arm, (colour, marker, _)) in enumerate(arm_styles(list(arms)).items()):
            values = _seeds(arm, arms[arm], count)
            place = np.arange(count) + (i - (len(arms) - 1) / 2) * width
            axis.bar(place, values.mean(axis=0), width, color=colour, alpha=0.45)
            axis.plot(np.tile(place, len(values)), values.ravel(), marker, color=colour, label=arm,
                      markersize=3.5, markeredgecolor=TEXT, markeredgewidth=0.3)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.margins(x=0.01)
        axis.grid(axis="x", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ticks is not None:
            axis.set_xticks(range(count), ticks)
        _legend_below(axes, 3, "bar: mean; points: each seed")


def scatter_seeds(x: ArrayLike, y: ArrayLike, xlabel: str, ylabel: str, *, alt: str) -> None:
    """One point per block and seed, x and y [S, K] (row = seed); Spearman's rho in the title.

    It is nan, not defined, where all values of a seed are equal.
    """
    across, up = _array("x", x, 2), _array("y", y, 2)
    _demand("y's shape", up.shape, across.shape)
    each = [_spearman(a, b) for a, b in zip(across, up, strict=True)]
    title = (f"Spearman ρ = {_spearman(across.ravel(), up.ravel()):.2f} over all points,\n"
             f"{np.min(each):.2f} to {np.max(each):.2f} within one seed")
    with canvas(alt=alt, size=(5.6, 4.8)) as axes:
        looks = arm_styles([f"seed {i}" for i in range(len(across))])
        for (name, look), a, b in zip(looks.items(), across, up, strict=True):
            axes[0, 0].scatter(a, b, 32, look.colour, marker=look.marker, alpha=0.8, label=name)
        axes[0, 0].set(xlabel=xlabel, ylabel=ylabel, title=title.replace("-", "−"))
        _legend_below(axes, 3)


def heatmaps(panels: Arrays, *, alt: str, label: str, limits: tuple[float, float] = (0.0, 1.0),
             null: float | None = None, differences: Arrays | None = None,
             columns: int = 3) -> None:
    """Layer-by-layer maps {title: [L, L]} on one colour scale; NaN is hatched grey; layer 0 = stem.

    `null`, the level that unrelated features reach, is marked on the colour bar. `differences` have
    a scale of their own, centred on 0, in the same row if all fit there, else in rows below.
    """
    maps, changes = _maps("panels", panels), _maps("differences", differences or {})
    one_row = len(maps) + len(changes) <= columns
    columns = len(maps) + len(changes) if one_row else min(columns, max(len(maps), len(changes)))
    above = math.ceil(len(maps) / columns)
    rows = 1 if one_row else above + math.ceil(len(changes) / columns)
    width = min(WIDEST, 2.9 * columns)
    size = (width, rows * (width / columns + 0.4) + (1.1 if one_row else 1.8))
    with canvas(rows, columns, alt=alt, size=size, sharex=True, sharey=True) as axes:
        first, second = np.split(axes.T if one_row else axes, [len(maps) if one_row else above])
        mark = "" if null is None else f"\n(line: null level {null:.3f})"
        _draw_maps(first, maps, limits, label + mark, null)
        if changes:
            top = max(np.nanmax(np.abs(change), initial=1e-12) for change in changes.values())
            _draw_maps(second, changes, (-top, top), f"difference in\n{label}")
        for axis in axes[:, 0]:
            axis.set_ylabel("layer i")


def histogram_grid(features: ArrayLike, y: ArrayLike, row_labels: Names, column_labels: Names, *,
                   alt: str, baseline: ArrayLike | None = None) -> None:
    """Densities of node values by class: features [rows, n, nodes], y [n] of 0 and 1.

    The rows of a column share 40 bins, whose range is printed under it; `baseline` (same shape, the
    untrained net) is a black line over both classes. Heights are not comparable between panels.
    Standardise layers beforehand if their magnitudes differ.
    """
    values, labels = _array("features", features, 3), _array("y", y, 1)
    start = values if baseline is None else _array("baseline", baseline, 3)
    _demand("baseline's shape", start.shape, values.shape)
    _demand("y's length", labels.size, values.shape[1])
    _demand("y's classes", sorted(set(labels.tolist())), [0.0, 1.0])
    edges = [_bins(values[:, :, node], start[:, :, node]) for node in range(values.shape[2])]
    ranges = [f"{low:.2g}\nto {high:.2g}".replace("-", "−") for low, *_, high in edges]
    with _mosaic(values.shape[::2], row_labels, column_labels, ranges, alt) as (axis, cells):
        axis.set(xlabel="activation", ylabel="density")
        for (row, node), corner in cells:
            samples = [values[row, labels == label, node] for label in (0, 1)]
            before = [] if baseline is None else [start[row, :, node]]
            _draw_histograms(axis, samples + before, edges[node], corner)
        _legend_below(np.array([axis]), 3)


def input_maps(values: ArrayLike, row_labels: Names, column_labels: Names, *, alt: str,
               scale: str = "column", extent: float = 1.2) -> None:
    """Value of each node over the input plane: values [rows, nodes, G, G], G points a side.

    Shown as a part of the largest absolute value of its "column", its "panel" or the "figure".
    First grid index is x2 (upwards), second x1, both from -extent to extent.
    """
    maps = _array("values", values, 4)
    shared = {"panel": (2, 3), "column": (0, 2, 3), "figure": (0, 1, 2, 3)}
    if scale not in shared:
        raise ValueError(f"scale must be one of {', '.join(shared)}, got {scale!r}")
    maps = maps / np.nanmax(np.abs(maps), shared[scale], keepdims=True, initial=1e-12)
    ranges = [f"−{extent}\nto {extent}"] * maps.shape[1]
    with _mosaic(maps.shape[:2], row_labels, column_labels, ranges, alt) as (axis, cells):
        axis.set(xlabel="$x_1$", ylabel="$x_2$, same range")
        for cell, (x, y) in cells:
            image = _draw_plane(axis, maps[cell], (x, x + 1, y, y + 1), (-1, 1))
        axis.figure.colorbar(image, ax=axis, label=f"value / largest of its {scale}",
                             location="bottom", aspect=40)


def image_grid(images: Any, *, alt: str, titles: Names | None = None, columns: int = 8) -> None:
    """Pictures in rows: [N, H, W] or [N, C, H, W], uint8 in 0 to 255 or floats in [-1, 1]."""
    pictures = _array("images", images, 4 if np.ndim(images) == 4 else 3)
    whole = str(images.dtype).endswith("uint8")
    pictures = pictures / 255 if whole else np.clip((pictures + 1) / 2, 0, 1)
    _demand("titles' number", len(titles or pictures), len(pictures))
    columns = min(columns, len(pictures))
    rows, side = math.ceil(len(pictures) / columns), WIDEST / columns
    size = (WIDEST, rows * (side + (0.25 if titles else 0.0)))
    with canvas(rows, columns, alt=alt, size=size) as axes:
        for axis in axes.flat:
            axis.set_axis_off()
        for i, (axis, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
            seen = np.moveaxis(picture, 0, -1) if picture.ndim == 3 else picture
            axis.imshow(seen, cmap="gray", vmin=0, vmax=1)
            axis.set_title(titles[i] if titles else "", fontsize=9, pad=2)


def block_diagram(*, alt: str) -> None:
    """A plain block and a residual block, side by side, drawn from bottom to top."""
    with canvas(1, 2, alt=alt, size=(5.6, 4.2)) as axes:
        for axis, arm in zip(axes.flat, ("plain net", "residual net"), strict=True):
            residual, colour = arm == "residual net", ARM_STYLE[arm].colour
            edge = {"facecolor": "white", "edgecolor": colour, "linewidth": 1.8}
            axis.set(xlim=(-1.6, 1.6), ylim=(-0.2, 4.3), title=f"block of a {arm}")
            axis.set_axis_off()
            _arrow(axis, (0, 0.1), (0, 4.0), TEXT)
            axis.text(0, 1.6, "branch\n$f(h)$", ha="center", va="center",
                      bbox=edge | {"boxstyle": "round,pad=0.8"})
            axis.text(0, -0.1, "$h$", ha="center", va="center")
            axis.text(0, 4.15, "$h + f(h)$" if residual else "$f(h)$", ha="center", va="center")
            if residual:
                axis.text(0, 3.1, "+", ha="center", va="center", fontsize=15,
                          bbox=edge | {"boxstyle": "circle,pad=0.2"})
                axis.plot([0, 1.2, 1.2], [0.5, 0.5, 3.1], color=colour, linewidth=1.8)
                _arrow(axis, (1.2, 3.1), (0.18, 3.1), colour)
                axis.text(1.35, 1.6, "shortcut", rotation=90, va="center")


def _check_alt(alt: str) -> None:
    if not isinstance(alt, str) or len(alt.strip()) < SHORTEST_ALT:
        raise ValueError(f"alt must say in {SHORTEST_ALT} characters or more what the figure shows "
                         f"(kind of plot, axes, the finding with its number), got {alt!r}")


def _demand(name: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise ValueError(f"{name} must be {wanted}, got {got}")


def _array(name: str, value: Any, ndim: int) -> Array:
    detached = value.detach().cpu() if hasattr(value, "detach") else value
    array = np.asarray(detached, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must be an array with {ndim} axes, got shape {array.shape}")
    return array


def _seeds(arm: str, value: Any, points: int) -> Any:
    array = _array(arm, value, 2)
    _demand(f"shape of arm {arm!r}", array.shape, (len(array), points))
    return np.ma.masked_invalid(array)


def _points(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    points, labels = _array("x", x, 2), _array("y", y, 1)
    _demand("x's shape", points.shape, (labels.size, 2))
    _demand("y's classes", sorted(set(labels.tolist())), [0.0, 1.0])
    return points, labels


def _maps(name: str, maps: Arrays) -> dict[str, Array]:
    arrays = {title: _array(title, values, 2) for title, values in maps.items()}
    for title, values in arrays.items():
        _demand(f"shape of {title!r} in {name}", values.shape, next(iter(arrays.values())).shape)
    return arrays


def _bins(*samples: Array) -> Array:
    low, high = min(x.min() for x in samples), max(x.max() for x in samples)
    if not np.isfinite([low, high]).all():
        raise ValueError("features must be finite, got NaN or infinity")
    return np.linspace(low, high, 41) if high > low else np.linspace(low - 0.5, low + 0.5, 41)


def _spearman(x: Array, y: Array) -> float:
    return float(spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan


def _legend_below(axes: NDArray[Any], columns: int, title: str | None = None) -> None:
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    axes.flat[0].figure.legend(entries.values(), entries.keys(), loc="outside lower center",
                               ncols=min(columns, len(entries)), title=title)


@contextmanager
def _mosaic(shape: tuple[int, ...], row_labels: Names, column_labels: Names, ranges: Names,
            alt: str) -> Iterator[tuple[Axes, list[Any]]]:
    """One axes with a unit square for each cell: an axes for each would take seconds."""
    _demand("row_labels and column_labels", (len(row_labels), len(column_labels)), shape)
    across, down = 1.12 * np.arange(shape[1]), -1.12 * np.arange(shape[0])
    size = min(WIDEST, max(4.5, 1.2 + 0.95 * shape[1])), 2.2 + shape[0] * min(0.95, 5.8 / shape[1])
    with canvas(alt=alt, size=size) as axes:
        axis = axes[0, 0]
        yield axis, [((i, j), (x, y)) for i, y in enumerate(down) for j, x in enumerate(across)]
        axis.set(xlim=(-0.06, across[-1] + 1.06), ylim=(down[-1] - 0.02, 1.02), aspect="equal")
        axis.set_xticks(across + 0.5, ranges, fontsize=9)
        axis.set_yticks(down + 0.5, row_labels, fontsize=9)
        axis.tick_params(length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        for x, label in zip(across, column_labels, strict=True):
            axis.text(x + 0.5, 1.06, label, fontsize=9, ha="center", va="bottom")


@contextmanager
def _planes(titles: Names, reach: float, alt: str, extra: float) -> Iterator[Any]:
    width = min(6.4, 3.8 * len(titles))
    with canvas(1, len(titles), alt=alt, size=(width, width / len(titles) + extra),
                sharex=True, sharey=True) as axes:
        for axis, title in zip(axes.flat, titles, strict=True):
            axis.set(title=title, xlabel="$x_1$", aspect="equal",
                     xlim=(-reach, reach), ylim=(-reach, reach))
        axes[0, 0].set_ylabel("$x_2$")
        yield list(axes.flat)
        _legend_below(axes, 2)


def _draw_points(axis: Axes, x: Array, y: Array) -> None:
    for label, (colour, marker) in enumerate(CLASSES):
        across, up = x[y == label].T
        axis.scatter(across, up, 16, colour, marker=marker, edgecolors="white", linewidths=0.4,
                     label=f"class {label}")


def _draw_arm(axis: Axes, x: Array, seeds: Any, name: str, look: Style, band: bool) -> None:
    colour, marker, dash = look
    if band:
        axis.fill_between(x, seeds.min(axis=0), seeds.max(axis=0), color=colour, alpha=0.2, lw=0)
    elif len(seeds) > 1:
        axis.plot(x, seeds.T, color=colour, linewidth=0.8, alpha=0.4)
    axis.plot(x, seeds.mean(axis=0), color=colour, linestyle=dash, linewidth=2.2,
              marker=marker, markevery=max(1, len(x) // 8), label=name)


def _draw_maps(block: NDArray[Any], maps: Mapping[str, Array], limits: tuple[float, float],
               label: str, null: float | None = None) -> None:
    colours = DIVERGING if limits[0] < 0 else SEQUENTIAL
    for axis in list(block.flat)[len(maps):]:
        axis.set_visible(False)
    for axis, (title, values) in zip(block.flat, maps.items(), strict=False):
        axis.patch.set(facecolor="#cccccc", hatch="///", edgecolor=GREY)
        image = axis.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], origin="lower")
        axis.set(title=title, xlabel="layer j")
        axis.grid(visible=False)
        axis.locator_params(nbins=4, integer=True)
        axis.tick_params(labelbottom=True)
    bar = block.flat[0].figure.colorbar(image, ax=block, label=label, location="bottom", aspect=25)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    if null is not None:
        bar.ax.axvline(null, color="white", linewidth=3)
        bar.ax.axvline(null, color=BLACK, linewidth=1.2)


def _draw_plane(axis: Axes, values: Array, place: tuple[float, float, float, float],
                limits: tuple[float, float], alpha: float = 1.0) -> Any:
    axis.grid(visible=False)  # 25 steps of colour: a smooth ramp makes the file three times larger
    return axis.imshow(values, cmap=plt.get_cmap(DIVERGING, 25), vmin=limits[0], vmax=limits[1],
                       origin="lower", extent=place, alpha=alpha)


def _draw_histograms(axis: Axes, samples: Sequence[Array], edges: Array,
                     corner: tuple[float, float]) -> None:
    heights = [np.histogram(sample, edges, density=True)[0] for sample in samples]
    places, top = corner[0] + np.linspace(0, 1, edges.size), max(h.max() for h in heights)
    looks = (("class 0", BLUE, "-"), ("class 1", VERMILLION, ":"), ("at init, both", TEXT, "-"))
    for height, (label, colour, dash) in zip(heights, looks, strict=False):
        axis.stairs(corner[1] + height / top, places, baseline=corner[1], fill=colour != TEXT,
                    facecolor=f"{colour}66", edgecolor=colour, lw=0.9, ls=dash, label=label)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    look = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, zorder=0, arrowprops=look)
