"""Pictures of a fine-tuning: its losses, and what else its recipe tells of each step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lab.report.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSSES = {"loss": "training loss", "validation_loss": "validation loss"}
SELDOM = ("validation_loss",)
OTHER_FIGURES = {
    "entropy": "entropy of the gates (nats)",
    "distillation": "divergence from the teacher (nats per token)",
    "top_k": "experts per token",
    "experts_alive": "experts alive in a layer",
}


def read_curve(path: Path) -> pd.DataFrame:
    """A fine-tuning's rows: phase, step, tokens, loss, …; tokens counted through all phases."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a killed run
            break
    curve = pd.DataFrame(rows)
    if "tokens" in curve:  # a phase's first row has none: it tells the state before its steps
        curve["tokens"] = curve["tokens"].ffill().fillna(0)
    return curve


def draw_curve(curve: pd.DataFrame, path: Path) -> Path | None:
    """Losses against steps and tokens, and whatever else the recipe tells against steps."""
    losses = [key for key in ("loss", "validation_loss") if key in curve]
    if not losses:
        return None
    other = [key for key in OTHER_FIGURES if key in curve and curve[key].notna().any()]
    panels = [(x, losses, "loss (nats per token)") for x in ("step", "tokens") if x in curve]
    panels += [("step", [key], OTHER_FIGURES[key]) for key in other]
    phases = list(dict.fromkeys(curve["phase"]))
    legend = {f"{LOSSES[key]}, {phase}": style.swatch(number, True, **look_of(key))
              for number, phase in enumerate(phases) for key in losses}  # fmt: skip
    with style.panels(path, math.ceil(len(panels) / 2), 2, "Fine-tuning", legend) as grid:
        for axes in grid.ravel()[len(panels) :]:
            axes.remove()
        for axes, (x, keys, label) in zip(grid.ravel(), panels, strict=False):
            for number, phase in enumerate(phases):
                rows = curve[curve["phase"] == phase]
                for key in keys:
                    line(axes, rows[x], rows[key], style.look(number) | look_of(key))
                if number:  # where a phase ends and the next begins
                    axes.axvline(rows[x].iloc[0], color="0.5", linestyle=":", linewidth=1)
            axes.set(xlabel=x if x == "tokens" else "steps", ylabel=label)
            scale(axes)
    return path


def scale(axes: Axes) -> None:
    """Steps or tokens in short: 200k."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def line(axes: Axes, x: pd.Series, y: pd.Series, look: dict[str, Any], raw: bool = True) -> None:
    """One curve: where it is told at every step, its running mean over the raw values."""
    x, y = x[y.notna()], y[y.notna()]
    window = len(y) // 25
    if not look["marker"] and window > 1:
        if raw:
            axes.plot(x, y, color=look["color"], alpha=0.3, linewidth=0.7)
        y = y.rolling(window, center=True, min_periods=1).mean()
    axes.plot(x, y, **look)


def look_of(key: str) -> dict[str, Any]:
    """Training's losses are a line; others, told now and then, have markers and dashes."""
    return (
        {"linestyle": "--", "markersize": 4} if key in SELDOM else {"marker": "", "linestyle": "-"}
    )
