"""The figures: described, to one scale, told apart without colour, small and repeatable."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy.stats import rankdata

from mini_resdecay import figures

ALT = "Line plot, layer 0 to 8 against cosine 0 to 1: trained falls to 0.4."
RNG = np.random.default_rng(0)
X, Y = RNG.uniform(-1, 1, (40, 2)), np.arange(40) % 2
LAYERS = np.arange(9)
SEEDS = {"init": RNG.random((3, 9)), "trained": RNG.random((3, 9))}
MAP, OTHER_MAP = RNG.random((9, 9)), RNG.random((9, 9))
FEATURES = RNG.standard_normal((3, 40, 2))
PLANES = RNG.standard_normal((3, 2, 8, 8))
ROWS, COLUMNS = ["layer 0", "layer 4", "layer 8"], ["node 3", "node 5"]

DRAW = {
    "spiral_scatter": lambda alt: figures.spiral_scatter({"one": (X, Y), "two": (X, Y)}, alt=alt),
    "decision_maps": lambda alt: figures.decision_maps(
        {"plain net": MAP, "residual net": OTHER_MAP}, X, Y, alt=alt
    ),
    "curves": lambda alt: figures.curves(
        LAYERS, SEEDS, "layer", "loss, nats", alt=alt, log=True, references={"chance": 0.5}
    ),
    "curves, panels": lambda alt: figures.curves(
        LAYERS, {"ReLU": SEEDS, "tanh": SEEDS}, "layer", "loss, nats", alt=alt
    ),
    "bars": lambda alt: figures.bars(SEEDS, "block", "accuracy lost", alt=alt),
    "scatter_seeds": lambda alt: figures.scatter_seeds(
        SEEDS["init"], SEEDS["trained"], "block influence", "accuracy lost", alt=alt
    ),
    "heatmaps": lambda alt: figures.heatmaps(
        {"init": MAP, "trained": OTHER_MAP},
        alt=alt,
        label="linear CKA",
        null=0.07,
        differences={"trained − init": OTHER_MAP - MAP},
    ),
    "heatmaps, rows": lambda alt: figures.heatmaps(
        {"a": MAP, "b": MAP, "c": MAP},
        alt=alt,
        label="cosine",
        limits=(-1, 1),
        differences={"b − a": OTHER_MAP - MAP},
    ),
    "histogram_grid": lambda alt: figures.histogram_grid(
        FEATURES, Y, ROWS, COLUMNS, alt=alt, baseline=2 * FEATURES
    ),
    "input_maps": lambda alt: figures.input_maps(PLANES, ROWS, COLUMNS, alt=alt),
    "image_grid": lambda alt: figures.image_grid(PLANES[:, 0], alt=alt, titles=ROWS),
    "image_rows": lambda alt: figures.image_rows(dict.fromkeys(ROWS, PLANES[:, :1]), alt=alt),
    "block_diagram": lambda alt: figures.block_diagram(alt=alt),
    "path_diagram": lambda alt: figures.path_diagram(figures.path_rows([1, 0, 1]), alt=alt),
}
every_figure = pytest.mark.parametrize("name", DRAW)


def drawn(draw, monkeypatch) -> Figure:
    """The figure that `draw` would show, after its layout."""
    shown = []

    def keep(fig, alt):
        fig.draw_without_rendering()
        shown.append(fig)

    with monkeypatch.context() as patch:
        patch.setattr(figures, "show", keep)
        draw()
    return shown[0]


def png_of(draw) -> bytes:
    with figures.frames() as shots:
        draw()
    return shots[0][0]


def luminance(colour: str) -> float:
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast_with_white(colour: str) -> float:
    return 1.05 / (luminance(colour) + 0.05)


@every_figure
def test_alt_is_demanded(name):
    with pytest.raises(ValueError, match="alt must say in 40 characters or more.*got 'a plot'"):
        DRAW[name]("a plot")


def test_blanks_do_not_count_as_alt():
    with pytest.raises(ValueError, match="alt must say"):
        figures.block_diagram(alt="a plot" + 60 * " ")


@every_figure
def test_picture_is_small_and_nothing_is_cut_off(name):
    data = png_of(lambda: DRAW[name](ALT))
    assert len(data) < 100_000
    picture = Image.open(io.BytesIO(data))
    assert picture.width <= 7 * 150
    assert round(picture.info["dpi"][0]) == 150
    grey = np.asarray(picture.convert("L"))
    assert grey.min() < 60
    edge = np.concatenate(
        [grey[:2].ravel(), grey[-2:].ravel(), grey[:, :2].ravel(), grey[:, -2:].ravel()]
    )
    assert edge.min() > 240


@pytest.mark.parametrize("name", ["curves", "heatmaps", "input_maps"])
def test_equal_figures_give_equal_bytes(name):
    first, second = (png_of(lambda: DRAW[name](ALT)) for _ in range(2))
    assert first == second
    assert b"tIME" not in first and b"Software" not in first


@every_figure
def test_text_is_large_and_dark(name, monkeypatch):
    fig = drawn(lambda: DRAW[name](ALT), monkeypatch)
    texts = [text for text in fig.findobj(Text) if text.get_text().strip()]
    assert len(texts) >= 3
    assert min(text.get_fontsize() for text in texts) >= 9
    assert min(contrast_with_white(text.get_color()) for text in texts) >= 4.5


UNSCALED = ("image_grid", "image_rows", "block_diagram", "path_diagram")


@pytest.mark.parametrize("name", [n for n in DRAW if n not in UNSCALED])
def test_axes_have_names(name, monkeypatch):
    axes = [a for a in drawn(lambda: DRAW[name](ALT), monkeypatch).axes if a.get_visible()]
    assert axes[0].get_xlabel() and axes[0].get_ylabel()
    assert all(a.get_xlabel() for a in axes)


def test_panels_share_limits(monkeypatch):
    for name in ("spiral_scatter", "curves, panels", "decision_maps"):
        one, two = drawn(lambda name=name: DRAW[name](ALT), monkeypatch).axes[:2]
        assert one.get_xlim() == two.get_xlim()
        assert one.get_ylim() == two.get_ylim()


def test_more_than_three_panels_go_on_in_a_second_row(monkeypatch):
    panels = {title: SEEDS for title in "abcde"}
    fig = drawn(lambda: figures.curves(LAYERS, panels, "layer", "loss", alt=ALT), monkeypatch)
    assert [axis.get_title() for axis in fig.axes if axis.get_visible()] == [*panels]
    assert [axis.get_ylabel() for axis in fig.axes] == ["loss", "", "", "loss", "", ""]
    # Numbers stand under each column, above the gap as well.
    shown = [axis.xaxis.get_tick_params()["labelbottom"] for axis in fig.axes[:5]]
    assert shown == [False, False, True, True, True]


def test_long_names_of_bars_stand_aslant(monkeypatch):
    for name, angle in (("short", 0), ("a long name, and more of it", 35)):
        fig = drawn(
            lambda name=name: figures.bars(
                {"a": np.ones((1, 3))}, "", "y", alt=ALT, ticks=[name] * 3
            ),
            monkeypatch,
        )
        assert fig.axes[0].get_xticklabels()[0].get_rotation() == angle


def test_maps_share_colours_and_differences_are_centred(monkeypatch):
    fig = drawn(lambda: DRAW["heatmaps"](ALT), monkeypatch)
    images = [axis.images[0] for axis in fig.axes[:3]]
    assert images[0].get_clim() == images[1].get_clim() == (0.0, 1.0)
    low, high = images[2].get_clim()
    assert high == pytest.approx(np.abs(OTHER_MAP - MAP).max())
    assert low == -high
    assert images[0].cmap.name != images[2].cmap.name
    assert "null level 0.070" in fig.axes[3].get_xlabel()


def test_missing_cells_show_the_hatched_ground(monkeypatch):
    holed = MAP.copy()
    holed[2] = np.nan
    fig = drawn(
        lambda: figures.heatmaps({"holed": holed}, alt=ALT, label="linear CKA"), monkeypatch
    )
    axis = fig.axes[0]
    assert axis.images[0].get_array().mask.sum() == 9
    assert axis.patch.get_hatch()
    assert np.ptp(to_rgb(axis.patch.get_facecolor())) == 0


def test_gaps_in_curves_leave_the_mean_of_the_rest(monkeypatch):
    seeds = np.array([[1.0, np.nan, 3.0, np.nan], [3.0, 5.0, 5.0, np.nan]])
    fig = drawn(
        lambda: figures.curves(np.arange(4), {"trained": seeds}, "step", "loss, nats", alt=ALT),
        monkeypatch,
    )
    mean = fig.axes[0].lines[-1].get_ydata()
    np.testing.assert_array_equal(np.ma.filled(mean, -1), [2, 5, 4, -1])
    assert len(fig.axes[0].lines) == 3


@pytest.mark.filterwarnings("error")
def test_a_missing_bar_is_a_gap(monkeypatch):
    seeds = np.array([[0.2, np.nan], [0.4, np.nan]])
    fig = drawn(lambda: figures.bars({"a": seeds}, "node", "rho", alt=ALT), monkeypatch)
    assert [patch.get_height() for patch in fig.axes[0].patches] == pytest.approx(
        [0.3, np.nan], nan_ok=True
    )


def test_a_window_of_x_is_shaded_behind_curves(monkeypatch):
    fig = drawn(
        lambda: figures.curves(
            np.arange(4), {"a": np.ones((1, 4))}, "step", "loss", alt=ALT, window=(1.0, 2.5)
        ),
        monkeypatch,
    )
    [shade] = fig.axes[0].patches
    assert shade.get_x() == 1.0
    assert shade.get_width() == 1.5


def test_arms_keep_their_look_between_figures(monkeypatch):
    fig = drawn(lambda: DRAW["curves"](ALT), monkeypatch)
    for line in fig.axes[0].lines:
        look = figures.ARM_STYLE.get(line.get_label())
        if look is not None:
            assert (line.get_color(), line.get_marker(), line.get_linestyle()) == look
    assert fig.axes[0].get_ylabel() == "loss, nats, log scale"
    assert fig.axes[0].get_yscale() == "log"


def test_bars_start_at_zero_and_points_are_the_seeds(monkeypatch):
    fig = drawn(lambda: DRAW["bars"](ALT), monkeypatch)
    bars = fig.axes[0].patches
    assert {bar.get_y() for bar in bars} == {0}
    means = np.concatenate([values.mean(0) for values in SEEDS.values()])
    np.testing.assert_allclose([bar.get_height() for bar in bars], means)
    points = np.concatenate([line.get_ydata() for line in fig.axes[0].lines])
    np.testing.assert_array_equal(points, np.concatenate([v.ravel() for v in SEEDS.values()]))


def test_rank_correlation_in_the_title_is_that_of_the_ranks(monkeypatch):
    fig = drawn(lambda: DRAW["scatter_seeds"](ALT), monkeypatch)
    ranks = [rankdata(SEEDS[arm].ravel()) for arm in ("init", "trained")]
    expected = f"ρ = {np.corrcoef(ranks)[0, 1]:.2f} over".replace("-", "−")
    assert expected in fig.axes[0].get_title()


def test_rank_correlation_of_a_constant_is_not_invented(monkeypatch):
    fig = drawn(
        lambda: figures.scatter_seeds(
            SEEDS["init"], np.zeros((3, 9)), "block influence", "accuracy lost", alt=ALT
        ),
        monkeypatch,
    )
    assert "ρ = nan over" in fig.axes[0].get_title()


def test_histograms_have_forty_common_bins_a_column_and_area_one(monkeypatch):
    fig = drawn(lambda: DRAW["histogram_grid"](ALT), monkeypatch)
    steps = fig.axes[0].patches
    assert len(steps) == 3 * 2 * 3
    values = [step.get_data() for step in steps]
    assert {len(v.values) for v in values} == {40}
    for first in range(0, len(values), 3):
        heights = [v.values - v.baseline for v in values[first : first + 3]]
        assert max(h.max() for h in heights) == pytest.approx(1)
        areas = [h.sum() for h in heights]
        np.testing.assert_allclose(areas, areas[0])
    both = np.concatenate([FEATURES[:, :, 0], 2 * FEATURES[:, :, 0]])
    label = fig.axes[0].get_xticklabels()[0].get_text().replace("−", "-")
    assert label == f"{COLUMNS[0]}\n{both.min():.2g}\nto {both.max():.2g}"


@pytest.mark.parametrize(
    "scale, axes", [("panel", (2, 3)), ("column", (0, 2, 3)), ("figure", None)]
)
def test_input_maps_are_parts_of_the_largest(scale, axes, monkeypatch):
    fig = drawn(
        lambda: figures.input_maps(PLANES, ROWS, COLUMNS, alt=ALT, scale=scale), monkeypatch
    )
    shown = np.stack([image.get_array() for image in fig.axes[0].images]).reshape(PLANES.shape)
    np.testing.assert_allclose(shown, PLANES / np.abs(PLANES).max(axis=axes, keepdims=True))
    assert {image.get_clim() for image in fig.axes[0].images} == {(-1, 1)}


def test_images_of_bytes_and_of_floats_look_the_same(monkeypatch):
    pixels = RNG.integers(0, 256, (2, 3, 5, 5)).astype(np.uint8)
    floats = torch.from_numpy(pixels) / 127.5 - 1
    for images in (pixels, floats):
        fig = drawn(lambda images=images: figures.image_grid(images, alt=ALT), monkeypatch)
        shown = fig.axes[1].images[0].get_array()
        np.testing.assert_allclose(shown, np.moveaxis(pixels[1], 0, -1) / 255, atol=1e-6)


def test_rows_of_pictures_may_differ_in_size_and_colour(monkeypatch):
    grey = torch.from_numpy(RNG.integers(0, 256, (4, 1, 5, 5)).astype(np.uint8))
    colour = RNG.uniform(-1, 1, (12, 3, 8, 8))
    rows = {"small": grey, "large": colour}
    small, large = drawn(lambda: figures.image_rows(rows, columns=3), monkeypatch).axes
    assert [axis.get_title(loc="left") for axis in (small, large)] == ["small", "large"]
    named = [text for axis in (small, large) for text in axis.findobj(Text) if text.get_text()]
    assert [text.get_fontsize() for text in named] == [12, 12]  # a row has room for it
    # The first three, each with a white rim.
    strip = np.ones((7, 21))
    for k in range(3):
        strip[1:6, 7 * k + 1 : 7 * k + 6] = grey[k, 0] / 255
    np.testing.assert_allclose(np.squeeze(small.images[0].get_array()), strip)
    shown = large.images[0].get_array()
    assert shown.shape == (10, 30, 3)
    np.testing.assert_allclose(shown[1:9, 21:29], (np.moveaxis(colour[2], 0, -1) + 1) / 2)
    assert {image.get_clim() for axis in (small, large) for image in axis.images} == {(0, 1)}
    assert not any(axis.get_xticks().size or axis.get_frame_on() for axis in (small, large))


def test_rows_of_pictures_are_told_by_their_titles():
    with figures.frames() as shots:
        figures.image_rows({"plain": PLANES[:, :1], "decay": PLANES[:, :1]}, columns=3)
    told = "Rows of 3 pictures, a row for each of plain, decay, from above."
    assert shots[0][1] == told


def test_the_picture_follows_the_data():
    def draw(seeds):
        return png_of(
            lambda: figures.curves(
                LAYERS, {"trained": seeds}, "step", "loss, nats", alt=ALT, ylim=(0, 1)
            )
        )

    moved = SEEDS["trained"].copy()
    moved[0, 4] = 1 - moved[0, 4]
    assert draw(SEEDS["trained"]) != draw(moved)


def test_tensors_draw_like_arrays():
    tensor = torch.from_numpy(MAP).requires_grad_()
    one, two = (
        png_of(lambda m=m: figures.heatmaps({"init": m}, alt=ALT, label="linear CKA"))
        for m in (MAP, tensor)
    )
    assert one == two


@pytest.mark.parametrize(
    "draw, message",
    [
        (
            lambda: figures.curves(LAYERS, {"init": np.zeros(9)}, "x", "y", alt=ALT),
            r"init must have shape \(-1, 9\) .*, got \(9,\)",
        ),
        (
            lambda: figures.curves(LAYERS, {"init": np.zeros((3, 8))}, "x", "y", alt=ALT),
            r"init must have shape \(-1, 9\) .*, got \(3, 8\)",
        ),
        (
            lambda: figures.bars(
                {"init": np.zeros((3, 4)), "trained": np.zeros((3, 5))}, "x", "y", alt=ALT
            ),
            r"trained must have shape \(-1, 4\) .*, got \(3, 5\)",
        ),
        (
            lambda: figures.spiral_scatter({"one": (X, Y[:5])}, alt=ALT),
            r"y must have shape \(40,\) .*, got \(5,\)",
        ),
        (
            lambda: figures.heatmaps({"a": MAP, "b": MAP[:4, :4]}, alt=ALT, label="CKA"),
            r"b must have shape \(9, 9\) .*, got \(4, 4\)",
        ),
        (
            lambda: figures.scatter_seeds(MAP, MAP[:4], "x", "y", alt=ALT),
            r"y must have shape \(9, 9\) .*, got \(4, 9\)",
        ),
        (
            lambda: figures.histogram_grid(
                FEATURES, Y, ROWS[:2], COLUMNS, alt=ALT, baseline=FEATURES
            ),
            r"features must have shape \(2, -1, 2\) .*, got \(3, 40, 2\)",
        ),
        (
            lambda: figures.histogram_grid(
                np.nan * FEATURES, Y, ROWS, COLUMNS, alt=ALT, baseline=FEATURES
            ),
            "range of .nan, nan. is not finite",
        ),
        (
            lambda: figures.input_maps(PLANES, ROWS, COLUMNS, alt=ALT, scale="row"),
            'scale must be one of panel, column, figure, got "row"',
        ),
        (lambda: figures.image_grid(PLANES[:, 0], alt=ALT, titles=["one"]), "shorter"),
        (lambda: figures.arm_styles("abcdefgh"), "arms outside ARM_STYLE must be at most 7"),
        (lambda: figures.show(Figure(figsize=(8, 3)), ALT), "at most 7.0 inches wide, got 8"),
    ],
)
def test_bad_input_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_dead_node_still_has_a_histogram():
    dead = FEATURES * [1, 0]
    assert png_of(lambda: figures.histogram_grid(dead, Y, ROWS, COLUMNS, alt=ALT, baseline=dead))


def test_no_two_arms_look_alike():
    looks = list(figures.ARM_STYLE.values())
    assert len(set(looks)) == len(looks)
    assert len({(look.marker, look.dash) for look in looks}) == len(looks)
    assert len({look.marker for look in figures.OTHER_STYLES}) == len(figures.OTHER_STYLES)


def test_unnamed_arms_avoid_the_colours_of_named_ones():
    looks = figures.arm_styles(["width 32", "trained", "width 128"])
    assert list(looks) == ["width 32", "trained", "width 128"]
    assert looks["trained"] == figures.ARM_STYLE["trained"]
    assert len({look.colour for look in looks.values()}) == 3


def test_colours_stay_apart_for_a_deuteranope():
    # Viénot, Brettel and Mollon (1999): linear RGB as seen without the medium cones.
    blind = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    colours = sorted({look.colour for look in figures.ARM_STYLE.values()})
    seen = {c: blind @ np.array(to_rgb(c)) ** 2.2 for c in colours}
    for one, two in itertools.combinations(colours, 2):
        difference = np.abs(seen[one].clip(0) ** (1 / 2.2) - seen[two].clip(0) ** (1 / 2.2))
        assert difference.max() > 0.08, (one, two)
    grey = [luminance(colour) for colour, _ in figures.CLASSES]
    assert len({marker for _, marker in figures.CLASSES}) == 2
    assert abs(grey[0] - grey[1]) > 0.05


def test_frames_collects_and_then_stops():
    with figures.frames() as shots:
        figures.block_diagram(alt=ALT)
        figures.block_diagram(alt=ALT + " again")
    assert [alt for _, alt in shots] == [ALT, ALT + " again"]
    figures.block_diagram(alt=ALT)
    assert len(shots) == 2


def test_jupyter_gets_one_png_with_its_alt(monkeypatch):
    published = []
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)  # of another environment: IPython warns
    shell = InteractiveShell()
    monkeypatch.setattr(shell.display_pub, "publish", lambda **message: published.append(message))
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.core.interactiveshell.InteractiveShell._instance", shell)
    figures.block_diagram(alt=ALT)
    assert len(published) == 1
    assert list(published[0]["data"]) == ["image/png"]
    assert published[0]["metadata"] == {"image/png": {"alt": ALT}}


def test_show_makes_a_png_of_150_dots_an_inch_and_prints_nothing(capsys):
    with figures.frames() as shots:
        assert figures.show(Figure(figsize=(2, 2)), ALT) is None
    with Image.open(io.BytesIO(shots[0][0])) as picture:
        assert picture.size == (300, 300)
    assert figures.show(Figure(figsize=(2, 2)), ALT) is None
    assert capsys.readouterr().out == ""


def test_drawing_leaves_matplotlib_as_it_was():
    code = (
        "import matplotlib; before = dict(matplotlib.rcParams)\n"
        "from mini_resdecay import figures\n"
        f"figures.block_diagram(alt={ALT!r})\n"
        "import sys; assert dict(matplotlib.rcParams) == before\n"
        "assert 'torch' not in sys.modules and 'IPython' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_path_rows_say_what_each_stage_does_with_a_block():
    run, frozen, out, once = figures.PARTS
    plain, first, second, mixture = figures.path_rows([1, 0, 1]).values()
    assert plain == [run] * 5
    assert first == [run, run, out, run, run]
    assert second == [frozen, frozen, run, frozen, frozen]
    assert mixture == [run, run, once, run, run]
    assert "(b) stage 1, dropped: none" in figures.path_rows([1, 1, 1])
