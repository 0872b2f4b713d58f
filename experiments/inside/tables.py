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

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny"))
from plot import FIGURES, by_magnitude, columns, panel, plt  # noqa: E402  # a script beside this folder

TABLES = ("criteria", "units", "deep", "recovery")
MODELS = ("tiny_mixtral", "tiny_deepseek", "tiny_qwen2_moe")
UNITS = "prune/unit,metric,prune/widths,ratio_method"
ROWS = {"criteria": "metric", "units": UNITS, "deep": UNITS, "recovery": UNITS}


def write_table(reports: Path, table: str, model: str) -> bool:
    """<table>/<model>.md and .csv; whether there were reports."""
    folder = reports / table / model
    if not any(folder.rglob("table.md")):  # no sweep has ended
        return False
    figures = [name for name in FIGURES if table == "recovery" or name.startswith("compressed")]
    seconds = {"recovery": ["seconds/finetune"], "deep": []}.get(table, ["seconds/plan"])
    values = ["dense/eval/average", *figures, *seconds]
    across = [] if table == "recovery" else ["--columns", "ratio"]
    to = HERE / table / model
    to.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "moe_lab.tables", str(folder), "--rows", ROWS[table], *across]
    command += ["--values", ",".join(values), "--sort=" + figures[-1]]
    for ending in (".md", ".csv"):
        subprocess.run([*command, "--output", str(to.with_suffix(ending))], check=True)
    return True


def draw(table: str) -> Path:
    """One picture of a table: a row of panels for each model, a column for each figure."""
    files = [HERE / table / f"{model}.csv" for model in MODELS]
    frames = {file.stem: pd.read_csv(file) for file in files if file.is_file()}
    names = [name for name in FIGURES if any(columns(f, name) for f in frames.values())]
    sizes = [len(frame) + 3 for frame in frames.values()]
    figure, axes = plt.subplots(
        len(frames), len(names), figsize=(4.6 * len(names) + 1.5, 0.2 * sum(sizes) + 1.2),
        squeeze=False, gridspec_kw={"height_ratios": sizes}, layout="constrained",
    )  # fmt: skip
    for row, (model, frame) in zip(axes, frames.items(), strict=True):
        ordered = frame.sort_values(columns(frame, "compressed/kl")[-1], ascending=False)
        for axis, name in zip(row, names, strict=True):
            panel(axis, ordered, name)
            axis.set_title(model, fontsize=10)
            axis.tick_params(axis="y", labelsize=7)
            if name.endswith("kl"):
                axis.set_xscale("log")
                by_magnitude(axis.xaxis)
        for axis in row[1:]:
            axis.set_yticklabels([])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside upper center")
    path = HERE / table / f"{table}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    for chosen in sys.argv[2:] or TABLES:
        written = [write_table(Path(sys.argv[1]), chosen, model) for model in MODELS]
        if any(written):
            print(draw(chosen))
