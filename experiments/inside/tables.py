"""Make the tables and pictures of this folder from the reports of its sweeps.

    python experiments/inside/tables.py outputs/runs [criteria units deep recovery]

reads the reports of <folder>/<table>/<model> at any depth and writes <table>/<model>.csv and .md
beside this file, and <table>/<table>.png. A table has a row for each setting, means and deviations
over the calibration seeds that are there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

HERE = Path(__file__).resolve().parent
TABLES = ("criteria", "units", "deep", "recovery")
MODELS = ("tiny_mixtral", "tiny_deepseek", "tiny_qwen2_moe")
UNITS = "prune/unit,metric,prune/widths,ratio_method"
ROWS = {"criteria": "metric", "units": UNITS, "deep": UNITS, "recovery": UNITS}
FIGURES = {
    "compressed/eval/average": ("average accuracy (%)", 100),
    "compressed/kl": ("KL to the intact model (nats per token)", 1),
    "finetuned/eval/average": ("average accuracy, tuned (%)", 100),
    "finetuned/kl": ("KL to the intact model, tuned (nats per token)", 1),
}
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "osD^"


def write_table(reports: Path, table: str, model: str) -> bool:
    """<table>/<model>.md and .csv; whether there were reports."""
    folder = reports / table / model
    if not any(folder.rglob("table.md")):  # no sweep has ended
        return False
    figures = [name for name in FIGURES if table == "recovery" or name.startswith("compressed")]
    seconds = {"recovery": ["seconds/finetune"], "deep": []}.get(table, ["seconds/plan"])
    values = ["dense/eval/average", *figures, *seconds]
    columns = [] if table == "recovery" else ["--columns", "ratio"]
    to = HERE / table / model
    to.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "moe_lab.tables", str(folder), "--rows", ROWS[table], *columns]
    command += ["--values", ",".join(values), "--sort=" + figures[-1]]
    for ending in (".md", ".csv"):
        subprocess.run([*command, "--output", str(to.with_suffix(ending))], check=True)
    return True


def draw(table: str) -> Path:
    """One picture of a table: a row of panels for each model, a column for each figure."""
    files = [HERE / table / f"{model}.csv" for model in MODELS]
    frames = {file.stem: pd.read_csv(file) for file in files if file.is_file()}
    names = [name for name in FIGURES if any(_columns(f, name) for f in frames.values())]
    sizes = [len(frame) + 3 for frame in frames.values()]
    figure, axes = plt.subplots(
        len(frames), len(names), figsize=(4.6 * len(names) + 1.5, 0.2 * sum(sizes) + 1.2),
        squeeze=False, gridspec_kw={"height_ratios": sizes}, layout="constrained",
    )  # fmt: skip
    for row, (model, frame) in zip(axes, frames.items(), strict=True):
        ordered = frame.sort_values(_columns(frame, "compressed/kl")[-1], ascending=False)
        for axis, name in zip(row, names, strict=True):
            _panel(axis, ordered, name)
            axis.set_title(model, fontsize=10)
        for axis in row[1:]:
            axis.set_yticklabels([])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside upper center")
    path = HERE / table / f"{table}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _columns(frame: pd.DataFrame, name: str) -> list[str]:
    """The columns of one figure, the smallest ratio first."""
    found = [c for c in frame if c.partition(" (")[0] == name and not c.endswith("(std)")]
    return sorted(found)


def _labels(frame: pd.DataFrame) -> list[str]:
    """What sets a row apart: the settings that it has."""
    figures = (*FIGURES, "dense/eval/average", "seconds/plan", "seconds/finetune")
    settings = [c for c in frame if c.partition(" (")[0] not in figures]
    rows = frame[settings].fillna("none").astype(str).to_numpy()
    return [" ".join(value for value in row if value != "none") for row in rows]


def _panel(axis: Axes, frame: pd.DataFrame, name: str) -> None:
    text, scale = FIGURES[name]
    for number, column in enumerate(_columns(frame, name)):
        deviation = frame.get(f"{column} (std)")
        axis.errorbar(
            frame[column] * scale, range(len(frame)),
            xerr=None if deviation is None else deviation.fillna(0) * scale,
            fmt=MARKERS[number], color=COLOURS[number], markersize=4, capsize=2, linewidth=1,
            label=_removed(column),
        )  # fmt: skip
    dense = _columns(frame, "dense/eval/average")
    if dense and name.endswith("eval/average"):
        axis.axvline(frame[dense[0]].iloc[0] * scale, color="0.4", linestyle="--", label="intact")
    if name.endswith("kl"):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(frame)), _labels(frame), fontsize=7)
    axis.set_xlabel(text, fontsize=9)
    axis.grid(axis="x", color="0.9")


def _removed(column: str) -> str:
    setting = column.partition("(ratio=")[2].rstrip(")")
    return f"{float(setting):.0%} removed" if setting else "half removed"


if __name__ == "__main__":
    for chosen in sys.argv[2:] or TABLES:
        written = [write_table(Path(sys.argv[1]), chosen, model) for model in MODELS]
        if any(written):
            print(draw(chosen))
