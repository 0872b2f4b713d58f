"""Pictures of a plan by which hidden units go: how wide experts stay, and where the cut lies.

Letters: E experts of a layer, I hidden units of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_lab.models.edits.plan import Plan
from moe_lab.report.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERS = 300  # in the cells of a picture: more take seconds, and nobody reads them
MOST_PANELS, MOST_EXPERTS, MOST_POINTS = 12, 64, 160  # drawn of a plan: the others between them
PANEL_COLUMNS = 4
STAYS, GOES = style.COLOURS[0], "0.72"
ORDERS = 1e-7  # of the largest score: what is smaller is drawn at the picture's lower edge


class ScoredUnits(NamedTuple):
    """The hidden units of one layer's experts: their scores and which stay, both [E, I]."""

    score_EI: np.ndarray
    kept_EI: np.ndarray


def draw_widths(plan: Plan, path: Path) -> Path | None:
    """Layer by expert: the share of its hidden units that each expert keeps; None of other plans.

    The share is of the width before, which the plan's tensors have; without them of the widest.
    """
    share = shares(plan)
    if not share:
        return None
    layers, most = sorted(share), max(map(len, share.values()))
    values = np.full((len(layers), most), np.nan)
    for row, layer in enumerate(layers):
        values[row, : len(share[layer])] = share[layer]
    width, height, cell = style.grid_size(*values.shape)
    none = " (none: crossed out)" if (values == 0).any() else " of each expert"
    with style.figure(path, width, height, f"Hidden units that stay{none}") as made:
        axes, limits = made.add_subplot(), _limits(values)
        shown = style.heat(axes, 100 * values, limits, style.AMOUNT, False, "auto")
        if cell >= 11 and values.size <= MOST_NUMBERS:
            _write_shares(axes, values, limits, cell)
        style.mark(axes, values == 0, cell, cross=True)
        style.ticks(axes, range(most), layers)
        axes.set(xlabel="expert", ylabel="layer")
        made.colorbar(shown, ax=axes, label="hidden units that stay (%)")
    return path


def shares(plan: Plan) -> dict[int, np.ndarray]:
    """Of each layer with narrower experts the share [E] of hidden units that each one keeps."""
    found = {}
    for chain in plan.chains():
        number = max((len(edit.expert_scores) for edit in chain.edits), default=0)
        units = plan.tensors.get(f"layers.{chain.index}.neurons")
        number = len(units) if units is not None else number
        widths = [chain.width_of(expert) for expert in range(number)]
        known = [width for width in widths if width is not None]
        if known:
            whole = units.shape[1] if units is not None else max(1, *known)
            found[chain.index] = np.array([math.nan if w is None else w / whole for w in widths])
    return found


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Whole tens of per cent around all shares: equal ones have the colour of their size."""
    least, most = np.nanmin(values), np.nanmax(values)
    if least == most:
        return 0.0, 100.0
    return 10.0 * math.floor(10 * least), 10.0 * math.ceil(10 * most)


def _write_shares(axes: Axes, values: np.ndarray, limits: tuple[float, float], cell: float) -> None:
    least, most = limits
    look: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}
    look["fontsize"] = min(8.0, 0.55 * cell)
    for (row, column), share in np.ndenumerate(values):
        if share > 0:
            dark = 100 * share < least + 0.6 * (most - least)
            colour = "white" if dark else "black"
            axes.text(column, row, f"{100 * share:.0f}", color=colour, **look)


def draw_neurons(plan: Plan, told: Mapping[str, Any], path: Path) -> Path | None:
    """Of each layer its experts' hidden units by falling score, those that go in grey."""
    layers = scored_units(plan)
    if not layers:
        return None
    chosen = _spread(sorted(layers), MOST_PANELS)
    columns = min(PANEL_COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    title = "Scores of the hidden units of each expert, best first"
    legend = {"stays": style.swatch(0, marker="", linestyle="-"),
              "goes": style.swatch(0, marker="", linestyle="-", color=GOES)}  # fmt: skip
    width = max(5.5, 2.6 * columns)
    with style.figure(path, width, 2.1 * rows + 1.0, title) as made:
        style.legend_below(made, legend, width)
        grid = made.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        floor = _floor([layers[index] for index in chosen])
        for axes, index in zip(grid.flat, chosen, strict=False):
            _draw_layer(axes, layers[index], floor)
            axes.set_title(f"layer {index}", fontsize="small")
        for axes in list(grid.flat)[len(chosen) :]:
            axes.set_visible(False)
        if floor is not None:
            grid[0, 0].set_yscale("log")
            style.plain_powers(grid[0, 0].yaxis)
        for axes in grid[-1]:
            axes.set_xlabel("hidden units (%)", fontsize="small")
        metric = told.get("metric")
        made.supylabel(f"score: {metric}" if metric else "score", fontsize="small")
    return path


def scored_units(plan: Plan) -> dict[int, ScoredUnits]:
    """What the plan's tensors have of each layer's hidden units, where they have scores."""
    found = {}
    for name, score_EI in plan.tensors.items():
        if name.startswith("layers.") and name.endswith(".neuron_scores"):
            kept_EI = plan.tensors[name.replace("neuron_scores", "neurons")]
            index = int(name.split(".")[1])
            found[index] = ScoredUnits(score_EI.double().numpy(), kept_EI.numpy() > 0)
    return found


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, first and last among them."""
    if len(items) <= most:
        return list(items)
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[place] for place in places]


def _floor(layers: Sequence[ScoredUnits]) -> float | None:
    """The least score to be drawn by orders of magnitude; None where they span fewer than two."""
    values = np.concatenate([layer.score_EI.ravel() for layer in layers])
    values = values[np.isfinite(values)]
    if not len(values) or values.min() < 0 or values.max() <= 100 * np.median(values):
        return None
    positive = values[values > 0]
    return float(max(positive.min(), ORDERS * positive.max())) if len(positive) else None


def _draw_layer(axes: Axes, layer: ScoredUnits, floor: float | None) -> None:
    """A line for each expert, evenly chosen by their sums; what stays above what goes."""
    from matplotlib.collections import LineCollection

    order = np.nansum(layer.score_EI, axis=1).argsort()
    lines: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for expert in _spread(order, MOST_EXPERTS):
        best = np.argsort(-layer.score_EI[expert], kind="stable")
        score_I, kept_I = layer.score_EI[expert][best], layer.kept_EI[expert][best]
        if floor is not None:
            score_I = np.maximum(score_I, floor)
        place_I = 100 * np.arange(1, len(best) + 1) / len(best)
        for stays in (True, False):
            lines[stays].append(_line(place_I, np.where(kept_I == stays, score_I, np.nan)))
    width = 0.9 if len(order) <= 16 else 0.5
    for stays, colour in ((False, GOES), (True, STAYS)):
        axes.add_collection(LineCollection(lines[stays], colors=colour, linewidths=width))
    axes.autoscale_view()
    axes.set_xlim(0, 100)
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)


def _line(place_I: np.ndarray, score_I: np.ndarray) -> np.ndarray:
    """Points of a line, at most MOST_POINTS; none where the score is none."""
    there = np.isfinite(score_I).nonzero()[0]
    some = there[_spread(range(len(there)), MOST_POINTS)]
    return np.column_stack([place_I[some], score_I[some]])
