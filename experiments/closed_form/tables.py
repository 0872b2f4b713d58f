"""Make the tables and pictures of this folder from the reports of its sweeps.

    python experiments/closed_form/tables.py outputs/closed_form [condensing ablations ...]

reads the reports of <folder>/<table>/<model> at any depth and writes <table>/<model>.csv and .md
beside this file, and <table>/<table>.png: means and deviations over calibration seeds that are
there. Of domains those of <folder>/domains-<domain>/<model>, one for each held-out text; of tuning,
those of <folder>/tuning-<samples>/<model>.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny"))
from plot import COLOURS, MARKERS, by_magnitude, plt  # noqa: E402  # a script beside this folder

MODELS = ("tiny_deepseek", "tiny_qwen2_moe", "tiny_mixtral")
CHOICES = "condense/experts,condense/layers,condense/fit_steps"
ROWS = {
    "condensing": f"condense/num_routed,condense/num_layers,{CHOICES}",
    "ablations": (
        "condense/experts,condense/layers,condense/refit,condense/propagate,condense/token_weight,"
        "condense/ridge,condense/beam,condense/own_documents,calibration/num_samples"
    ),
    "accuracy": f"method,metric,merge/grouping,{CHOICES}",
    "domains": f"{CHOICES},condense/own_documents",
    "tuning": CHOICES,
    "pruning": "prune/unit,metric,prune/widths,ratio_method,prune/refit",
    "merging": "merge/grouping,merge/refit",
}
BY_RATIO = ("pruning", "merging")
TUNED = ("accuracy", "tuning")


def write_tables(reports: Path, table: str) -> list[Path]:
    """<table>/<model>.csv and .md of each model with reports; of parts, <table>/<part>-<model>."""
    written = []
    for folder in sorted(reports.glob(f"{table}*")):
        part = folder.name.removeprefix(table).removeprefix("-")
        if part and table not in ("domains", "tuning"):
            continue
        for model in MODELS:
            if any((folder / model).rglob("report.json")):
                name = f"{part}-{model}" if part else model
                written.append(write_table(folder / model, table, HERE / table / name))
    return written


def write_table(reports: Path, table: str, to: Path) -> Path:
    """One table, .csv and .md."""
    values = ["compressed/kl"]
    if table in TUNED:
        values += ["finetuned/kl"]
    if table == "accuracy":
        values += ["dense/eval/average", "compressed/eval/average", "finetuned/eval/average"]
    if table in ("condensing", *BY_RATIO):
        values += ["seconds/plan"]
    to.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "moe_lab.tables", str(reports), "--rows", ROWS[table]]
    command += ["--columns", "ratio"] if table in BY_RATIO else []
    command += ["--values", ",".join(values)]
    for ending in (".md", ".csv"):
        subprocess.run([*command, "--output", str(to.with_suffix(ending))], check=True)
    return to.with_suffix(".csv")


def label(row: pd.Series) -> str:
    """What sets a row apart, in words."""
    if row["condense/experts"] == "greedy_js":
        return "CD-MoE-SR" if row.get("condense/num_routed", 4) else "CD-MoE-S"
    return "closed form, then 300 steps a layer" if row["condense/fit_steps"] else "closed form"


def draw_condensing(table: str) -> Path:
    """KL against the number of condensed layers, one panel for each model and width."""
    files = sorted((HERE / table).glob("*.csv"))
    frames = {path.stem: pd.read_csv(path) for path in files}
    numbers = pd.concat(frames).groupby("condense/num_routed")["condense/num_layers"].nunique()
    widths = sorted(numbers[numbers > 1].index)  # a line has two points at least
    figure, axes = plt.subplots(
        len(widths), len(frames), figsize=(4.4 * len(frames), 3.4 * len(widths)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for across, width in zip(axes, widths, strict=True):
        for axis, (model, frame) in zip(across, frames.items(), strict=True):
            some = frame[frame["condense/num_routed"] == width]
            for number, (name, rows) in enumerate(some.groupby(some.apply(label, axis=1))):
                rows = rows.sort_values("condense/num_layers")
                spread = rows.get("compressed/kl (std)")
                axis.errorbar(
                    rows["condense/num_layers"], rows["compressed/kl"],
                    yerr=None if spread is None else spread.fillna(0), label=name, capsize=2,
                    color=COLOURS[number], marker=MARKERS[number], markersize=4, linewidth=1,
                )  # fmt: skip
            axis.set_title(f"{model}, as wide as with {width} routed experts", fontsize=9)
            _readable(axis, "condensed layers of 8")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=len(names), loc="outside upper center")
    return _saved(figure, table)


def _readable(axis: Axes, x: str) -> None:
    axis.set_yscale("log")
    by_magnitude(axis.yaxis)
    axis.tick_params(labelsize=7)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel("KL to the intact model (nats per token)", fontsize=8)
    axis.grid(color="0.9", which="both")


def draw_rows(table: str) -> Path:
    """KL of every row, best first, a panel for each model."""
    frames = {path.stem: pd.read_csv(path) for path in sorted((HERE / table).glob("*.csv"))}
    most = max(len(frame) for frame in frames.values())
    figure, axes = plt.subplots(
        len(frames), 1, figsize=(7.5, (0.2 * most + 1.0) * len(frames)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (model, frame) in zip(axes[:, 0], frames.items(), strict=True):
        columns = [c for c in frame if c.startswith("compressed/kl") and not c.endswith("(std)")]
        rows = frame.sort_values(columns[-1], ascending=False)
        differing = [c for c in ROWS[table].split(",") if c in rows and rows[c].nunique(False) > 1]
        words = rows[differing].astype(object).where(rows[differing].notna(), "")
        for name in [one for one in differing if rows[one].dtype == bool]:
            words[name] = rows[name].map({True: name.partition("/")[2], False: ""})
        words = words.astype(str)
        for number, column in enumerate(columns):
            name = column.partition("(")[2].rstrip(")")
            axis.plot(
                rows[column], range(len(rows)), MARKERS[number], color=COLOURS[number],
                markersize=4, label=name,
            )  # fmt: skip
        names = [" ".join(word for word in row if word) for row in words.to_numpy()]
        axis.set_yticks(range(len(rows)), names, fontsize=7)
        axis.set_xscale("log")
        by_magnitude(axis.xaxis)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlabel("KL to the intact model (nats per token)", fontsize=8)
        axis.set_title(model, fontsize=9)
        axis.grid(axis="x", color="0.9", which="both")
        if len(columns) > 1:
            axis.legend(fontsize=7)
    return _saved(figure, table)


def _saved(figure: plt.Figure, table: str) -> Path:
    path = HERE / table / f"{table}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    for chosen in sys.argv[2:] or ROWS:
        made = write_tables(Path(sys.argv[1]), chosen)
        if made and chosen in ("condensing", "ablations", "pruning", "merging"):
            print((draw_condensing if chosen == "condensing" else draw_rows)(chosen))
