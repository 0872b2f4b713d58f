"""Pictures of a diagnosis: what the experts of each layer do, over depth, by rank and by pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.diagnose.tables import Tables
from moe_lab.report.plots import style

PER_PAGE = 12  # layers on a page of small pictures
LayerMatrices = Mapping[int, np.ndarray]


def over_depth(
    layers: pd.DataFrame, panels: Sequence[tuple[str, Mapping[str, str]]], path: Path, title: str
) -> None:
    """Lines over depth: a panel for each (label of its axis, {column: name of its line})."""
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns)
    with style.figure(path, 5 * columns, 0.5 + 2.6 * rows, title) as made:
        for place, (label, lines) in enumerate(panels):
            axes = made.add_subplot(rows, columns, place + 1)
            for number, (column, name) in enumerate(lines.items()):
                colour = style.shades(len(lines))[number]
                marker = style.MARKERS[number % len(style.MARKERS)]
                line = style.LINE_STYLES[number % len(style.LINE_STYLES)]
                axes.plot(layers["layer"], layers[column], marker=marker, ms=4, c=colour,
                          ls=line, label=name)  # fmt: skip
            style.whole_numbers(axes.xaxis)
            axes.set(xlabel="layer", ylabel=label)
            axes.grid(alpha=0.3)
            if len(lines) > 1:
                axes.legend(fontsize="small", ncols=len(lines), columnspacing=1.0, frameon=False,
                            loc="lower center", bbox_to_anchor=(0.5, 0.98))  # fmt: skip
            if all(column.endswith("_experts") for column in lines):
                style.whole_numbers(axes.yaxis)
                axes.set_ylim(-0.3, max(1.0, layers[list(lines)].to_numpy().max()) + 0.3)


def by_rank(ranks: pd.DataFrame, path: Path, title: str) -> None:
    """The mean shares of a token's weight by rank, stacked to 1 for each layer."""
    grid = ranks.pivot(index="layer", columns="rank", values="share").fillna(0.0)
    places = np.arange(len(grid))
    with style.figure(path, min(12, max(5.5, 2.5 + 0.35 * len(grid))), 3.6, title) as made:
        axes = made.add_subplot()
        below = np.zeros(len(grid))
        for rank, colour in zip(grid.columns, style.shades(len(grid.columns)), strict=True):
            axes.bar(places, grid[rank], bottom=below, color=colour, label=str(rank))
            below += grid[rank].to_numpy()
        style.thinned(axes.xaxis, list(grid.index))
        axes.margins(x=0.02)
        axes.set(xlabel="layer", ylabel="mean share of a token's weight", ylim=(0, 1))
        handles, labels = axes.get_legend_handles_labels()  # the heaviest lies below, as in the bar
        axes.legend(handles[::-1], labels[::-1], title="rank", loc="center left",
                    bbox_to_anchor=(1, 0.5), fontsize="small")  # fmt: skip


def by_pair(
    matrices: LayerMatrices, path: Path, title: str, unit: str, factors: bool = False
) -> list[Path]:
    """Small pictures of matrices [E, E], twelve layers a page, all in the same colours.

    Writes <path>.png, or <path>_<page>.png where there are several, and returns them. The diagonal
    and what has no value are left grey. factors: of values around 1, as powers of two; those beyond
    4 times more or less, 0 among them, take the last colour.
    """
    shown = {index: _without_diagonal(matrix) for index, matrix in matrices.items()}
    if factors:
        limits: tuple[float, float] = (-2, 2)
        shown = {index: _powers_of_two(matrix, limits) for index, matrix in shown.items()}
    else:
        limits = style.limits_of(np.concatenate([matrix.ravel() for matrix in shown.values()]))
    indices, written = list(shown), []
    pages = [indices[start : start + PER_PAGE] for start in range(0, len(indices), PER_PAGE)]
    for number, page in enumerate(pages, start=1):
        many = len(pages) > 1
        file = path.with_name(f"{path.name}_{number}.png" if many else f"{path.name}.png")
        name = f"{title} ({number} of {len(pages)})" if many else title
        _draw_page({index: shown[index] for index in page}, limits, file, name, unit, factors)
        written.append(file)
    return written


def _draw_page(
    matrices: LayerMatrices,
    limits: tuple[float, float],
    file: Path,
    title: str,
    unit: str,
    factors: bool,
) -> None:
    """One page of small pictures, up to four in a row, with a bar of the colours."""
    columns = min(4, len(matrices))
    rows = math.ceil(len(matrices) / columns)
    with style.figure(file, 1.6 + 2.3 * columns, 0.5 + 2.6 * rows, title) as made:
        grid = made.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(matrices) :]:
            axes.remove()
        for axes, (index, matrix) in zip(grid, matrices.items(), strict=False):
            colours = style.SIGNED if factors else style.AMOUNT
            drawn = style.heat(axes, matrix, limits, colours, False, "equal")
            style.ticks(axes, range(len(matrix)), range(len(matrix)), most=4)
            axes.set_title(f"layer {index}", fontsize="medium")
        bar = made.colorbar(drawn, ax=list(grid[: len(matrices)]), label=unit,
                            extend="both" if factors else "neither")  # fmt: skip
        made.supxlabel("expert", fontsize="medium")
        made.supylabel("expert", fontsize="medium")
        if factors:
            bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    shown = matrix.astype(float)
    np.fill_diagonal(shown, np.nan)
    return shown


def _powers_of_two(matrix: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Logarithms within the limits: that of 0 is the least, not what has no value."""
    with np.errstate(divide="ignore"):
        powers: np.ndarray = np.log2(matrix)
    return powers.clip(*limits)


def draw_experts(
    tables: Tables,
    lifts: LayerMatrices,
    similar: Mapping[str, LayerMatrices],
    folder: Path,
) -> None:
    """All pictures of a diagnosis. lifts: of pairs, by layer; similar: by kind and layer."""
    for column, (name, title, unit, options) in BY_EXPERT.items():
        path = folder / f"{name}.png"
        style.draw_by_expert(tables.experts, column, path, title, unit, **options)
    by_rank(tables.ranks, folder / "ranks.png", "Weight by rank among a token's experts")
    _depth(tables.layers, folder / "depth.png")
    by_pair(
        lifts,
        folder / "coactivation",
        "Tokens that chose both experts",
        "observed / expected",
        factors=True,
    )
    for kind, matrices in similar.items():
        title = f"Similarity of the experts' {SIMILAR[kind]}"
        by_pair(matrices, folder / f"similarity_{kind}", title, "cosine")


def _depth(layers: pd.DataFrame, path: Path) -> None:
    """The panels over depth that have figures."""
    there = set(layers.columns[layers.notna().any()])
    panels = [
        (label, {key: name for key, name in lines.items() if key in there})
        for label, lines in PANELS
        if there & set(lines)
    ]
    over_depth(layers, panels, path, "The layers over depth")


# Heat maps of layers by experts: a column of the experts' table, and the picture's name, title,
# unit and options.
BY_EXPERT: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "usage": (
        "usage",
        "Usage of the experts (dead ones ringed)",
        "share of routed slots × experts (1 = even)",
        {"marked": "dead"},
    ),
    "mean_norm": (
        "norms",
        "Mean norm of the experts' outputs",
        "mean l2 norm over routed tokens",
        {"logarithmic": True},
    ),
    "max_activation": (
        "max_activation",
        "Largest activation of the experts' outputs (super experts ringed)",
        "max |component| over routed tokens",
        {"logarithmic": True, "marked": "super"},
    ),
    "router_norm": ("router_norm", "Norm of the routers' rows", "l2 norm", {}),
    "gate_norm_correlation": (
        "gate_norm_correlation",
        "Router weight and output norm",
        "Pearson correlation over routed tokens",
        {"signed": True},
    ),
}
SIMILAR = {"weight": "weights", "router": "router rows", "output": "outputs"}
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
