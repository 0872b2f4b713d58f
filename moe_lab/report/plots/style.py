"""What pictures are drawn with: figures for print, in colours that colour-blind readers can tell.

Every picture is a PNG for the screen and a PDF for print, the same bytes for the same input.
matplotlib is imported where it is used: other runs do not pay for it. All figures are drawn without
a display.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import RcKeyType

DPI = 150
Aspect = Literal["auto", "equal"]
AMOUNT, SIGNED = "viridis", "PuOr_r"
NO_VALUE = {AMOUNT: "0.85", SIGNED: "0.55"}  # greys that the colour maps do not have
# Okabe and Ito's colours without the yellow, which print loses. With each its own marker and line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINE_STYLES = "osD^vPX<", ("-", "--", "-.", ":")
# Fonts as TrueType: what journals take, and text stays text; a $ in a name is a $.
PRINTED: dict[RcKeyType, Any] = {"pdf.fonttype": 42, "text.parse_math": False}


@contextmanager
def figure(path: Path, width: float, height: float, title: str) -> Iterator[Figure]:
    """A figure of so many inches, saved in the end as the PNG `path` and as a PDF beside it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of each font's tables
    with rc_context(PRINTED):
        made = Figure(figsize=(width, height), layout="compressed")
        FigureCanvasAgg(made)
        made.suptitle(title, fontsize="large")
        yield made
        if engine := made.get_layout_engine():
            engine.execute(made)
        made.set_layout_engine(None)  # else each saving draws once more, to lay out again
        made.savefig(path, dpi=DPI, pil_kwargs={"compress_level": 3})
        made.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def look(number: int) -> dict[str, Any]:
    """Colour, marker and line style of the so-manieth of several lines: 56 differ."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
    }


def swatch(number: int, line: bool = False, **other: Any) -> Line2D:
    """What a legend shows beside a name: the so-manieth look, as a point or with its line."""
    from matplotlib.lines import Line2D

    chosen = look(number) | ({} if line else {"linestyle": "none"}) | other
    return Line2D([], [], **chosen)


def legend_rows(labels: Sequence[str], width: float) -> tuple[int, int]:
    """How many columns and rows a legend with these labels takes below so many inches."""
    longest = max((len(label) for label in labels), default=1)
    columns = max(1, min(len(labels), int(width / (0.55 + 0.075 * longest))))
    return columns, math.ceil(len(labels) / columns)


def legend_below(made: Figure, handles: Mapping[str, Any], width: float) -> None:
    """A legend below everything: {label: what is shown beside it}."""
    columns, _ = legend_rows(list(handles), width)
    made.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns,
                fontsize="small", frameon=False, columnspacing=1.2)  # fmt: skip


@contextmanager
def panels(
    path: Path, rows: int, columns: int, title: str, legend: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Axes [rows, columns] of a picture with a legend below."""
    width = max(4.4, 4.0 * columns)
    lines = legend_rows(list(legend), width)[1]
    with figure(path, width, 3.0 * rows + 0.5 + 0.2 * lines, title) as made:
        legend_below(made, legend, width)
        yield made.subplots(rows, columns, squeeze=False)


def draw_by_expert(
    experts: pd.DataFrame,
    column: str,
    path: Path,
    title: str,
    unit: str,
    logarithmic: bool = False,
    signed: bool = False,
    marked: str | None = None,
    crossed: bool = False,
) -> None:
    """One column of the experts' table as a heat map, layer by expert.

    logarithmic: colours by orders of magnitude; signed: from -1 over 0 to 1; marked: a column of
    truths whose experts get a ring, or are crossed out. Grey where there is no figure, or none
    above 0 to take the logarithm of.
    """
    grid = experts.pivot(index="layer", columns="expert", values=column)
    values = grid.to_numpy(dtype=float)
    values = np.where(np.isfinite(values), values, np.nan)
    if logarithmic:
        values = np.where(values > 0, values, np.nan)
    num_layers, num_experts = values.shape
    width, height, cell = grid_size(num_layers, num_experts)
    with figure(path, width, height, title) as made:
        axes = made.add_subplot()
        limits = (-1, 1) if signed else limits_of(values, logarithmic)
        shown = heat(axes, values, limits, SIGNED if signed else AMOUNT, logarithmic, "auto")
        ticks(axes, range(num_experts), list(grid.index))
        axes.set(xlabel="expert", ylabel="layer")
        if marked is not None:
            where = experts.pivot(index="layer", columns="expert", values=marked).eq(True)
            mark(axes, where.to_numpy(), cell, cross=crossed)
        bar = made.colorbar(shown, ax=axes, label=textwrap.fill(unit, 24))
        if logarithmic:
            plain_powers(bar.ax.yaxis)


def grid_size(num_layers: int, num_experts: int) -> tuple[float, float, float]:
    """Width and height of a picture of layers by experts in inches, and points across a cell."""
    width = min(12, max(5.5, 2.5 + 0.16 * num_experts))
    height = min(10, max(2.6, 1.6 + 0.26 * num_layers))
    cell = 72 * min((width - 1.8) / num_experts, (height - 1.2) / num_layers)
    return width, height, cell


def mark(
    axes: Axes,
    where: np.ndarray,
    cell: float,
    cross: bool,
    colours: Sequence[str] = ("black", "white"),
) -> None:
    """Rings around, or crosses through, the true cells of a heat map; seen on any colour.

    colours: from below, each thinner than the one before.
    """
    rows, columns = np.nonzero(where)
    size = min(8.0, 0.6 * cell if cross else 0.85 * cell)
    thickness = min(1.2, size / 5)
    for number, colour in enumerate(colours, start=1):
        width = thickness * (2.5 if number < len(colours) else 1)
        shape: dict[str, Any] = (
            {"marker": "x", "c": colour} if cross else {"fc": "none", "ec": colour}
        )
        axes.scatter(columns, rows, s=size**2, linewidths=width, **shape)


def heat(
    axes: Axes,
    values: np.ndarray,
    limits: tuple[float, float],
    colours: str,
    logarithmic: bool,
    aspect: Aspect,
) -> ScalarMappable:
    """A heat map; gives what its colour bar shows."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    palette = colormaps[colours].with_extremes(bad=NO_VALUE[colours])
    scale = ScalarMappable((LogNorm if logarithmic else Normalize)(*limits), palette)
    cells(axes, scale.to_rgba(np.ma.masked_invalid(values)), aspect)
    return scale


def cells(axes: Axes, colours: np.ndarray, aspect: Aspect = "auto") -> None:
    """Cells [rows, columns] of these colours [..., RGBA].

    A PDF takes the pixels as they are (interpolation none), and some viewers smooth between them:
    several to a cell keep its edges.
    """
    rows, columns = colours.shape[:2]
    pixels = (255 * colours[..., :3]).round().astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(pixels, extent=extent, aspect=aspect, interpolation="none")


def limits_of(values: np.ndarray, logarithmic: bool = False) -> tuple[float, float]:
    """From the least to the largest finite value, never the same."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (0.1, 1.0) if logarithmic else (0.0, 1.0)
    least, largest = float(finite.min()), float(finite.max())
    if least == largest:
        return (least / 2, largest * 2) if logarithmic else (least - 0.5, largest + 0.5)
    return least, largest


def shades(number: int) -> np.ndarray:
    """So many colours, from dark to light."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.0, 0.85, number))


def plain_powers(axis: Axis) -> None:
    """Labels of a logarithmic axis as plain text, 0.01 or 1e+06: no $ is read as mathematics."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain(labelOnlyBase=False))
    axis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def ticks(axes: Axes, columns: Sequence[int], rows: Sequence[int], most: int = 16) -> None:
    """Ticks for columns and rows, thinned to at most so many."""
    thinned(axes.xaxis, columns, most)
    thinned(axes.yaxis, rows, most)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers alone."""
    locator: Any = axis.get_major_locator()
    locator.set_params(integer=True)


def thinned(axis: Axis, labels: Sequence[int], most: int = 16) -> None:
    """Ticks for at most so many of the labels, evenly spread."""
    step = math.ceil(len(labels) / most)
    places = range(0, len(labels), step)
    axis.set_ticks(places, labels=[str(labels[place]) for place in places])
