"""Pictures of a diagnosis: PNG files for print, in colours that colour-blind readers can tell.

matplotlib is imported where it is used: other runs do not pay for it. All figures are drawn without
a display.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

DPI = 150
PER_PAGE = 12  # layers on a page of small pictures
AMOUNT, SIGNED = "viridis", "PuOr_r"
MISSING = {AMOUNT: "0.85", SIGNED: "0.55"}  # greys that the colour maps do not have
MARKERS, STYLES = "osD^v", ("-", "--", "-.", ":")
Matrices = Mapping[int, np.ndarray]


@contextmanager
def _figure(path: Path, width: float, height: float, title: str) -> Iterator[Any]:
    """A figure of so many inches, saved as a PNG in the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="compressed")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    yield figure
    figure.savefig(path, dpi=DPI)


def by_expert(
    experts: pd.DataFrame,
    column: str,
    path: Path,
    title: str,
    unit: str,
    logarithmic: bool = False,
    signed: bool = False,
    marked: str | None = None,
) -> None:
    """One column of the experts' table as a heat map, layer by expert.

    logarithmic: colours by orders of magnitude; signed: from -1 over 0 to 1; marked: a column of
    truths whose experts get a ring. Grey where there is no figure, or none above 0 to take the
    logarithm of.
    """
    grid = experts.pivot(index="layer", columns="expert", values=column)
    values = grid.to_numpy(dtype=float)
    if logarithmic:
        values = np.where(values > 0, values, np.nan)
    num_layers, num_experts = values.shape
    width = min(12, max(5.5, 2.5 + 0.16 * num_experts))
    with _figure(path, width, min(10, max(2.6, 1.6 + 0.26 * num_layers)), title) as figure:
        axes = figure.add_subplot()
        limits = (-1, 1) if signed else _limits(values, logarithmic)
        image = _image(axes, values, limits, SIGNED if signed else AMOUNT, logarithmic, "auto")
        _ticks(axes, range(num_experts), list(grid.index))
        axes.set(xlabel="expert", ylabel="layer")
        if marked is not None:
            rings = experts.pivot(index="layer", columns="expert", values=marked).eq(True)
            rows, columns = np.nonzero(rings.to_numpy())
            for colour, thickness in (("black", 3.0), ("white", 1.2)):  # seen on any colour
                axes.scatter(columns, rows, s=60, facecolors="none", edgecolors=colour,
                             linewidths=thickness)  # fmt: skip
        figure.colorbar(image, ax=axes, label=unit)


def over_depth(
    layers: pd.DataFrame, panels: Sequence[tuple[str, Mapping[str, str]]], path: Path, title: str
) -> None:
    """Lines over depth: a panel for each (label of its axis, {column: name of its line})."""
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns)
    with _figure(path, 5 * columns, 0.5 + 2.6 * rows, title) as figure:
        for place, (label, lines) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            for number, (column, name) in enumerate(lines.items()):
                colour = _colours(len(lines))[number]
                marker = MARKERS[number % len(MARKERS)]
                axes.plot(layers["layer"], layers[column], marker=marker, ms=4, c=colour,
                          ls=STYLES[number % len(STYLES)], label=name)  # fmt: skip
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(xlabel="layer", ylabel=label)
            axes.grid(alpha=0.3)
            if len(lines) > 1:
                axes.legend(fontsize="small", ncols=len(lines), columnspacing=1.0, frameon=False,
                            loc="lower center", bbox_to_anchor=(0.5, 0.98))  # fmt: skip
            if all(column.endswith("_experts") for column in lines):
                axes.yaxis.get_major_locator().set_params(integer=True)
                axes.set_ylim(-0.3, max(1.0, layers[list(lines)].to_numpy().max()) + 0.3)


def by_rank(ranks: pd.DataFrame, path: Path, title: str) -> None:
    """The mean shares of a token's weight by rank, stacked to 1 for each layer."""
    grid = ranks.pivot(index="layer", columns="rank", values="share").fillna(0.0)
    places = np.arange(len(grid))
    with _figure(path, min(12, max(5.5, 2.5 + 0.35 * len(grid))), 3.6, title) as figure:
        axes = figure.add_subplot()
        below = np.zeros(len(grid))
        for rank, colour in zip(grid.columns, _colours(len(grid.columns)), strict=True):
            axes.bar(places, grid[rank], bottom=below, color=colour, label=str(rank))
            below += grid[rank].to_numpy()
        _thinned(axes.xaxis, list(grid.index))
        axes.margins(x=0.02)
        axes.set(xlabel="layer", ylabel="mean share of a token's weight", ylim=(0, 1))
        handles, labels = axes.get_legend_handles_labels()  # the heaviest lies below, as in the bar
        axes.legend(handles[::-1], labels[::-1], title="rank", loc="center left",
                    bbox_to_anchor=(1, 0.5), fontsize="small")  # fmt: skip


def by_pair(
    matrices: Matrices, path: Path, title: str, unit: str, factors: bool = False
) -> list[Path]:
    """Small pictures of matrices [E, E], twelve layers a page, all in the same colours.

    Writes <path>.png, or <path>_<page>.png where there are several, and returns them. The diagonal
    is left grey. factors: of values around 1, as powers of two; those beyond 4 times more or less
    take the last colour.
    """
    shown = {index: _without_diagonal(matrix) for index, matrix in matrices.items()}
    if factors:
        with np.errstate(divide="ignore"):
            shown = {index: np.log2(matrix) for index, matrix in shown.items()}
    limits = (-2, 2) if factors else _limits(np.concatenate([m.ravel() for m in shown.values()]))
    indices, written = list(shown), []
    pages = [indices[start : start + PER_PAGE] for start in range(0, len(indices), PER_PAGE)]
    for number, page in enumerate(pages, start=1):
        many = len(pages) > 1
        file = path.with_name(f"{path.name}_{number}.png" if many else f"{path.name}.png")
        name = f"{title} ({number} of {len(pages)})" if many else title
        columns = min(4, len(page))
        rows = math.ceil(len(page) / columns)
        with _figure(file, 1.6 + 2.3 * columns, 0.5 + 2.6 * rows, name) as figure:
            grid = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes in grid[len(page) :]:
                axes.remove()
            for axes, index in zip(grid, page, strict=False):
                colours = SIGNED if factors else AMOUNT
                image = _image(axes, shown[index], limits, colours, False, "equal")
                _ticks(axes, range(len(shown[index])), range(len(shown[index])), most=4)
                axes.set_title(f"layer {index}", fontsize="medium")
            bar = figure.colorbar(image, ax=list(grid[: len(page)]), label=unit,
                                  extend="both" if factors else "neither")  # fmt: skip
            figure.supxlabel("expert", fontsize="medium")
            figure.supylabel("expert", fontsize="medium")
            if factors:
                bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
        written.append(file)
    return written


def _image(
    axes: Any,
    values: np.ndarray,
    limits: tuple[float, float],
    colours: str,
    logarithmic: bool,
    aspect: str,
) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    palette = colormaps[colours].with_extremes(bad=MISSING[colours])
    scale = (LogNorm if logarithmic else Normalize)(*limits)
    return axes.imshow(values, cmap=palette, norm=scale, aspect=aspect, interpolation="nearest")


def _limits(values: np.ndarray, logarithmic: bool = False) -> tuple[float, float]:
    """From the least to the largest finite value, never the same."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (0.1, 1.0) if logarithmic else (0.0, 1.0)
    least, largest = float(finite.min()), float(finite.max())
    if least == largest:
        return (least / 2, largest * 2) if logarithmic else (least - 0.5, largest + 0.5)
    return least, largest


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    shown = matrix.astype(float)
    np.fill_diagonal(shown, np.nan)
    return shown


def _colours(number: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.0, 0.85, number))


def _ticks(axes: Any, columns: Sequence[int], rows: Sequence[int], most: int = 16) -> None:
    _thinned(axes.xaxis, columns, most)
    _thinned(axes.yaxis, rows, most)


def _thinned(axis: Any, labels: Sequence[int], most: int = 16) -> None:
    """Ticks for at most so many of the labels, evenly spread."""
    step = math.ceil(len(labels) / most)
    places = range(0, len(labels), step)
    axis.set_ticks(places, labels=[str(labels[place]) for place in places])


Drawer = Callable[..., Any]


def draw(tables: Any, lifts: Matrices, similar: Mapping[str, Matrices], folder: Path) -> None:
    """All pictures of a diagnosis. lifts: of pairs, by layer; similar: by kind and layer."""
    layers, experts = tables.layers, tables.experts
    by_expert(experts, "usage", folder / "usage.png", "Usage of the experts (dead ones ringed)",
              "share of routed slots × experts (1 = even)", marked="dead")  # fmt: skip
    by_expert(experts, "mean_norm", folder / "norms.png", "Mean norm of the experts' outputs",
              "mean l2 norm over routed tokens", logarithmic=True)  # fmt: skip
    by_expert(experts, "max_activation", folder / "max_activation.png",
              "Largest activation of the experts' outputs (super experts ringed)",
              "max |component| over routed tokens", logarithmic=True, marked="super")  # fmt: skip
    by_expert(experts, "router_norm", folder / "router_norm.png", "Norm of the routers' rows",
              "l2 norm")  # fmt: skip
    by_expert(experts, "gate_norm_correlation", folder / "gate_norm_correlation.png",
              "Router weight and output norm", "Pearson correlation over routed tokens",
              signed=True)  # fmt: skip
    by_rank(tables.ranks, folder / "ranks.png", "Weight by rank among a token's experts")
    there = set(layers.columns[layers.notna().any()])
    panels = [(label, {key: name for key, name in lines.items() if key in there})
              for label, lines in PANELS if there & set(lines)]  # fmt: skip
    over_depth(layers, panels, folder / "depth.png", "The layers over depth")
    by_pair(lifts, folder / "coactivation", "Tokens that chose both experts",
            "observed / expected", factors=True)  # fmt: skip
    for kind, matrices in similar.items():
        what = {"weight": "weights", "router": "router rows", "output": "outputs"}[kind]
        by_pair(matrices, folder / f"similarity_{kind}", f"Similarity of the experts' {what}",
                "cosine")  # fmt: skip


PANELS: Sequence[tuple[str, Mapping[str, str]]] = (
    ("deviation of usage / its mean", {"usage_deviation": "usage"}),
    ("slots of the most used expert", {"most_used_share": "share"}),
    ("gate entropy / log E", {"gate_entropy_share": "entropy"}),
    ("gate–norm correlation", {"gate_norm_correlation": "correlation"}),
    ("weight of rank 1", {"first_share": "share"}),
    ("mean cosine of pairs", {"gate_similarity": "gate", "up_similarity": "up",
     "down_similarity": "down", "router_similarity": "router", "output_similarity": "output"}),
    ("norm of the chosen / of all", {"chosen_norm": "norm"}),
    ("number of experts", {"dead_experts": "dead", "super_experts": "super"}),
)  # fmt: skip
