"""Hit rate, time and traffic of decoding over the size of the cache, a line for each policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from moe_lab.report.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_LABELS = {
    "decode/hit_rate": ("hits, of all accesses (%)", 100.0),
    "decode/seconds_per_token": ("time per token (ms)", 1e3),
    "decode/bytes_per_token": ("moved per token (MB)", 1e-6),
}


def draw_policies(
    frame: pd.DataFrame, path: Path, title: str, line: str = "policy", across: str = "experts"
) -> None:
    """One panel for each of PANEL_LABELS; line: the column whose values are lines.

    Over sizes (`share`, of what `across` says), or where there is but one, a bar for each line.
    """
    names = list(dict.fromkeys(frame[line]))
    several = frame["share"].nunique() > 1
    legend = {name: style.swatch(number, several) for number, name in enumerate(names)}
    with style.panels(path, 1, len(PANEL_LABELS), title, legend) as grid:
        for axes, (key, (label, unit)) in zip(grid.ravel(), PANEL_LABELS.items(), strict=True):
            for number, name in enumerate(names):
                rows = frame[frame[line] == name].sort_values("share")
                if several:
                    axes.plot(100 * rows["share"], unit * rows[key], **style.look(number),
                              markersize=4)  # fmt: skip
                else:
                    axes.bar(number, unit * rows[key].iloc[0], color=style.look(number)["color"])
            _finish(axes, label, f"{across} that fit (%)" if several else "")


def _finish(axes: Axes, label: str, across: str) -> None:
    axes.set(ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if across:
        axes.set(xlabel=across)
    else:
        axes.set_xticks([])
