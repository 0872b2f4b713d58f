"""Points and lines of many jobs on one pair of axes, and the front of the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lab.report.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE_LOOK: dict[str, Any] = {
    "color": "black",
    "marker": "*",
    "markersize": 11,
    "linestyle": "none",
}
FRONT: dict[str, Any] = {"color": "0.45", "marker": "", "linestyle": "-", "linewidth": 1.2}


def front(x: np.ndarray, y: np.ndarray, x_lower: bool, y_lower: bool) -> np.ndarray:
    """Which points [N] no other beats: as good in both, better in one. Equal points stay both."""
    cost, gain = (x if x_lower else -x), (-y if y_lower else y)
    stays = np.zeros(len(x), dtype=bool)
    best, at = -math.inf, math.nan  # the highest gain so far, and the cost at which it came
    for one in np.lexsort((-gain, cost)):
        if gain[one] > best:
            best, at = gain[one], cost[one]
        stays[one] = gain[one] == best and cost[one] == at
    return stays


def draw_points(axes: Axes, table: pd.DataFrame, names: Sequence[str]) -> None:
    """Points with bars for the deviation over seeds; hollow ones before fine-tuning."""
    for (name, variant), rows in table.groupby(["name", "variant"], sort=False):
        look = style.look(names.index(name)) | {"linestyle": "none"}
        hollow = variant == "compressed" and table["variant"].nunique() > 1
        face = "white" if hollow else look["color"]
        axes.errorbar(rows["x"], rows["y"], xerr=rows["x_std"].fillna(0),
                      yerr=rows["y_std"].fillna(0), ms=6, mfc=face, elinewidth=0.9, capsize=2,
                      zorder=3, **look)  # fmt: skip


def steps(
    axes: Axes, table: pd.DataFrame, dense: tuple[float, float], x_lower: bool, y_lower: bool
) -> None:
    """The dense model and the steps of what can be had for each cost."""
    if not math.isnan(sum(dense)):
        axes.plot(*dense, zorder=4, **DENSE_LOOK)
    x, y = (np.append(table[key], value) for key, value in zip("xy", dense, strict=True))
    x, y = x[~np.isnan(x + y)], y[~np.isnan(x + y)]
    best = front(x, y, x_lower, y_lower)
    order = np.argsort(x[best], kind="stable")
    x, y = x[best][order], y[best][order]
    axes.step(x, y, where="post" if x_lower else "pre", zorder=1, **FRONT)
    axes.grid(alpha=0.3)


def lines(axes: Axes, table: pd.DataFrame, key: str, names: Sequence[str]) -> None:
    """Means over what has the same name and place, with bands of a standard deviation."""
    for name, rows in table.groupby("name", sort=False):
        means = rows.dropna(subset=[key]).groupby("at")[key].agg(["mean", "std"])
        look, spread = style.look(names.index(name)), means["std"].fillna(0)
        axes.plot(means.index, means["mean"], ms=5, **look)
        axes.fill_between(means.index, means["mean"] - spread, means["mean"] + spread, alpha=0.15,
                          color=look["color"], linewidth=0)  # fmt: skip
    places = sorted(table["at"].unique())
    if places[0] > 0 and places[-1] / places[0] >= 30:
        axes.set_xscale("log")
        axes.set_xticks(places, labels=[f"{place:g}" for place in places], minor=False)
        axes.minorticks_off()
    elif len(places) <= 6:
        axes.set_xticks(places, labels=[f"{place:g}" for place in places])
    axes.grid(alpha=0.3)
