"""Draw a table of this folder for all models: accuracy, and divergence from the intact model.

    python experiments/tiny/plot.py criteria budgets merging

reads <table>/<model>.csv (made by `python -m moe_lab.tables`) and writes <table>/<table>.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullLocator

HERE = Path(__file__).resolve().parent
FIGURES = {
    "compressed/eval/average": ("average accuracy (%)", 100),
    "compressed/kl": ("KL to the intact model (nats per token)", 1),
    "finetuned/eval/average": ("average accuracy, tuned (%)", 100),
    "finetuned/kl": ("KL to the intact model, tuned (nats per token)", 1),
}
NO_SETTINGS = ("dense/eval/average", "seconds/plan", "seconds/finetune", "compressed/stock")
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73"), "osD"  # told apart without colour, too


def draw(table: str) -> Path:
    """One picture of a table: a row of panels for each model, a column for each figure."""
    files = [path for path in sorted((HERE / table).glob("*.csv")) if path.stem != "expected"]
    frames = {file.stem: pd.read_csv(file) for file in files}
    names = [name for name in FIGURES if any(columns(f, name) for f in frames.values())]
    height = sum(0.2 * len(frame) + 1.1 for frame in frames.values())
    figure, axes = plt.subplots(
        len(frames), len(names), figsize=(5.2 * len(names), height), squeeze=False,
        gridspec_kw={"height_ratios": [len(frame) + 3 for frame in frames.values()]},
        layout="constrained",
    )  # fmt: skip
    for row, (model, frame) in zip(axes, frames.items(), strict=True):
        ordered = frame.sort_values(columns(frame, names[0])[-1])
        for axis, name in zip(row, names, strict=True):
            panel(axis, ordered, name)
            axis.set_title(model, fontsize=10)
        for axis in row[1:]:
            axis.set_yticklabels([])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside upper center")
    path = HERE / table / f"{table}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def columns(frame: pd.DataFrame, name: str) -> list[str]:
    """The columns of one figure, the smallest ratio first."""
    found = [c for c in frame if c.partition(" (")[0] == name and not c.endswith("(std)")]
    return sorted(found)


def _labels(frame: pd.DataFrame) -> list[str]:
    """What sets a row apart: the settings that it has."""
    figures = (*FIGURES, *NO_SETTINGS)
    settings = [c for c in frame if c.partition(" (")[0] not in figures]
    rows = frame[settings].fillna("none").astype(str).to_numpy()
    return [" ".join(value for value in row if value != "none") for row in rows]


def panel(axis: Axes, frame: pd.DataFrame, name: str) -> None:
    """One figure of all rows of a table, with the deviations that it has."""
    text, scale = FIGURES[name]
    for number, column in enumerate(columns(frame, name)):
        deviation = frame.get(f"{column} (std)")
        axis.errorbar(
            frame[column] * scale, range(len(frame)),
            xerr=None if deviation is None else deviation.fillna(0) * scale,
            fmt=MARKERS[number], color=COLOURS[number], markersize=4, capsize=2, linewidth=1,
            label=_removed(column),
        )  # fmt: skip
    dense = columns(frame, "dense/eval/average")
    if dense and name.endswith("eval/average"):
        axis.axvline(frame[dense[0]].iloc[0] * scale, color="0.4", linestyle="--", label="intact")
    axis.set_yticks(range(len(frame)), _labels(frame), fontsize=8)
    axis.set_xlabel(text, fontsize=9)
    axis.grid(axis="x", color="0.9")


def by_magnitude(axis: Axis) -> None:
    """1, 2 and 5 of each power of ten, as plain numbers, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _removed(column: str) -> str:
    setting = column.partition("(ratio=")[2].rstrip(")")
    return f"{float(setting):.0%} removed" if setting else "half removed"


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        print(draw(chosen))
