"""Pictures of a sweep, from what its folder holds: what is not there is not drawn.

`draw_sweep` returns the PNGs that it wrote, each with a PDF of the same name beside it.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.files import CURVE, PLOTS
from moe_lab.report import figures
from moe_lab.report.figures import Figure
from moe_lab.report.frame import NONE, STATUS, free_keys, keys_of, label_of
from moe_lab.report.plots import cloud, curve, style
from moe_lab.report.report import OK

LEVEL: dict[str, Any] = {"color": "0.35", "marker": "", "linestyle": (0, (5, 3)), "linewidth": 1.0}
VARIANT_LABELS = {
    "compressed": "compressed (hollow)",
    "finetuned": "fine-tuned or quantized (filled)",
}
# Keys of a report that no picture shows: where and when a job was done, and with what.
NOT_SHOWN = re.compile(
    r"(sweep|run_id|url|error|commit|hardware|[^/]+/checkpoint)$|(seconds|cached|artifact|versions)/"
)
DRAWN_COSTS = tuple(cost for cost in figures.COSTS if cost.picture)
# What tells the points of a sweep apart is the first of these that differs, else what is text.
FIRST = (
    "method metric condense/experts condense/layers condense/gates merge/grouping ratio_method "
    "prune/replacement finetune"
).split()
SETTINGS = {
    "ratio": "share removed",
    "condense/num_layers": "layers condensed, merged or dropped",
    "condense/num_routed": "routed experts kept in a condensed layer",
    "calibration/num_samples": "calibration samples",
    "calibration/max_length": "tokens of a calibration sample, at most",
}


def draw_sweep(folder: Path, frame: pd.DataFrame) -> list[Path]:
    """Draw into <folder>/plots what `read_reports(folder)` tells of the jobs that went well.

    pareto_<cost>: the quality left against each cost; by_<setting>: quality along each swept
    number; curves: fine-tuning.
    """
    return draw_sweep_into(folder, shown_jobs(frame), folder / PLOTS)


def shown_jobs(frame: pd.DataFrame) -> pd.DataFrame:
    """What pictures show of reports: jobs that went well, without places, times and origin."""
    frame = frame[frame[STATUS] == OK] if STATUS in frame else frame[:0]
    return frame[[key for key in keys_of(frame) if not NOT_SHOWN.match(key)]]


def curve_files(folder: Path, frame: pd.DataFrame) -> dict[str, Path]:
    """The fine-tunings' curves that there are, by job."""
    files = {name: folder / name / CURVE for name in frame.index}
    return {name: file for name, file in files.items() if file.is_file()}


def draw_sweep_into(folder: Path, frame: pd.DataFrame, home: Path) -> list[Path]:
    """Draw the jobs of `shown_jobs` into the folder `home`; folder: theirs."""
    quality = _quality(frame)
    written = []
    if quality:
        for cost in DRAWN_COSTS:
            name = f"pareto_{_as_file(cost.name)}"
            written.append(_pareto(frame, cost, quality, home / f"{name}.png"))
    for setting in free_keys(frame):
        if _is_number(frame[setting]):
            written.append(_along(frame, setting, home / f"by_{_as_file(setting)}.png"))
    written.append(_all_curves(folder, frame, home / "curves.png"))
    return [path for path in written if path]


def values_of(figure: Figure, frame: pd.DataFrame, variant: str) -> pd.Series:
    """A figure's values as a picture shows them, NaN where a report has none."""
    values = _numbers(frame, f"{variant}/{figure.name}") * figure.unit.scale
    return values / _numbers(frame, f"dense/{figure.name}") if figure.unit.relative else values


def points(frame: pd.DataFrame, x: Figure, y: Figure, names: pd.Series) -> pd.DataFrame:
    """A row for each setting and variant: model, name, x, y as means over seeds, and their std.

    names: how each report is called in the picture; std is NaN where there is one seed only.
    """
    settings = [key for key in free_keys(frame) if key != "model"]
    known = frame[settings].map(label_of).assign(model=_models(frame), name=names)
    every = pd.concat(
        known.assign(
            variant=variant, x=values_of(x, frame, variant), y=values_of(y, frame, variant)
        )
        for variant in VARIANT_LABELS
    )
    keys = [*settings, "model", "name", "variant"]
    grouped = every.dropna(subset=["x", "y"]).groupby(keys, sort=False)[["x", "y"]]
    return grouped.mean().join(grouped.std().add_suffix("_std")).reset_index()


def naming(frame: pd.DataFrame, apart: Sequence[str], numbers: bool) -> tuple[pd.Series, list[str]]:
    """What tells a report's points or lines apart in a picture, and the settings that say so.

    Together all settings, or all that are text (numbers=False), while that gives at most as many
    names as there are markers; else the one that matters most.
    """
    free = [key for key in free_keys(frame) if key not in (*apart, "model")]
    text = [key for key in free if not _is_number(frame[key])]
    for keys in [free, text] if numbers else [text]:
        names = _joined(frame, keys)
        if keys and names.nunique() <= len(style.MARKERS):
            return names, keys

    def rank(key: str) -> tuple[bool, bool, int]:
        many = frame[key].map(label_of).nunique() > len(style.MARKERS)
        return key not in text, many, FIRST.index(key) if key in FIRST else len(FIRST)

    keys = sorted(free, key=rank)[:1]
    return _joined(frame, keys), keys


def _pareto(frame: pd.DataFrame, cost: Figure, quality: Figure, path: Path) -> Path | None:
    """A panel for each model: its settings, the dense model, and the front of them all."""
    names, _ = naming(frame, (), numbers=False)
    table = points(frame, cost, quality, names)
    if table.empty:
        return None
    legend = {name: style.swatch(number) for number, name in enumerate(names.unique()) if name}
    if table["variant"].nunique() > 1:
        legend[VARIANT_LABELS["compressed"]] = style.swatch(0, color="0.3", mfc="none")
        legend[VARIANT_LABELS["finetuned"]] = style.swatch(0, color="0.3")
    legend |= {
        "dense": style.swatch(0, **cloud.DENSE_LOOK),
        "Pareto front": style.swatch(0, **cloud.FRONT),
    }
    models = list(table["model"].unique())
    title = f"{quality.title} against {cost.title}"
    title = title[0].upper() + title[1:]
    with style.panels(path, 1, len(models), title, legend) as grid:
        for axes, model in zip(grid[0], models, strict=True):
            dense = frame[_models(frame) == model]
            x, y = (values_of(one, dense, "dense").mean() for one in (cost, quality))
            cloud.draw_points(axes, table[table["model"] == model], list(names.unique()))
            cloud.steps(axes, table[table["model"] == model], (x, y), cost.better < 0,
                        quality.better < 0)  # fmt: skip
            axes.set(xlabel=cost.unit.in_picture(cost.title), ylabel=_upright(quality))
            axes.set_title(model, fontsize="medium")
    return path


def _along(frame: pd.DataFrame, setting: str, path: Path) -> Path | None:
    """Quality along one swept number: a line for each name, a row of panels for each variant."""
    names, said = naming(frame, (setting,), numbers=True)
    there = [one for one in figures.QUALITIES if _there(frame, one)]
    shown = [one for one in there if one.axis == there[0].axis]
    if not shown:
        return None
    every = pd.concat(
        pd.DataFrame({one.name: values_of(one, frame, variant) for one in shown}).assign(
            name=names, at=pd.to_numeric(frame[setting]), model=_models(frame),
            row=_models(frame) + f", {VARIANT_LABELS[variant].partition(' ')[0]}",
        )
        for variant in VARIANT_LABELS
    ).dropna(subset=["at"]).dropna(subset=[one.name for one in shown], how="all")  # fmt: skip
    if every["at"].nunique() < 2:
        return None
    rest = [key for key in free_keys(frame) if key not in (*said, setting, "model")]
    title = f"Quality by {_spoken(setting)}"
    if every.groupby(["row", "name", "at"]).size().max() > 1:
        over = " and ".join(["seeds", *map(_spoken, rest)])
        title += f"\nmean and standard deviation over {over}"
    legend = {name: style.swatch(number, line=True) for number, name in enumerate(names.unique())
              if name}  # fmt: skip
    legend["dense"] = style.swatch(0, **LEVEL)
    rows = every.groupby("row", sort=False)
    with style.panels(path, len(rows), len(shown), title, legend) as grid:
        for (row, here), line in zip(rows, grid, strict=True):
            dense = frame[_models(frame) == here["model"].iloc[0]]
            for axes, figure in zip(line, shown, strict=True):
                cloud.lines(axes, here, figure.name, list(names.unique()))
                axes.axhline(values_of(figure, dense, "dense").mean(), **LEVEL)
                axes.set(xlabel=_spoken(setting), ylabel=_upright(figure))
                axes.set_title(row, fontsize="medium")
    return path


def _all_curves(folder: Path, frame: pd.DataFrame, path: Path) -> Path | None:
    """The fine-tunings of all jobs: a row of panels for each model."""
    read = {name: curve.read_curve(file) for name, file in curve_files(folder, frame).items()}
    frame = frame.loc[list(read)]
    shown = [key for key in curve.LOSSES if any(key in rows for rows in read.values())]
    if not shown:
        return None
    names, _ = naming(frame, (), numbers=True)
    numbers = {name: number for number, name in enumerate(names.unique())}
    legend = {name: style.swatch(number, True) for name, number in numbers.items() if name}
    models = list(_models(frame).unique())
    with style.panels(path, len(models), len(shown), "Fine-tuning", legend) as grid:
        for model, line in zip(models, grid, strict=True):
            for axes, key in zip(line, shown, strict=True):
                for job, name in names[_models(frame) == model].items():
                    rows, look = read[job], style.look(numbers[name])
                    if key not in curve.SELDOM:
                        look |= {"marker": "", "linewidth": 1.0}
                    if key in rows:
                        curve.line(axes, rows["tokens"], rows[key], look, raw=False)
                axes.set(xlabel="tokens", ylabel=f"{curve.LOSSES[key]} (nats per token)")
                axes.set_title(model, fontsize="medium")
                curve.scale(axes)
    return path


def _numbers(frame: pd.DataFrame, key: str) -> pd.Series:
    empty = pd.Series(math.nan, frame.index)
    return pd.to_numeric(frame[key], errors="coerce").astype(float) if key in frame else empty


def _there(frame: pd.DataFrame, figure: Figure) -> bool:
    values = (values_of(figure, frame, variant) for variant in VARIANT_LABELS)
    return any(one.notna().any() for one in values)


def _quality(frame: pd.DataFrame) -> Figure | None:
    """What stands for the quality that is left: the first of these that was measured."""
    return next((one for one in figures.QUALITIES if _there(frame, one)), None)


def _models(frame: pd.DataFrame) -> pd.Series:
    return frame["model"] if "model" in frame else pd.Series("model", frame.index)


def _is_number(column: pd.Series) -> bool:
    """Whether a setting's values, where it has one, are numbers; true and false are not."""
    return all(type(value) in (int, float) for value in column.dropna())


def _joined(frame: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """The settings' values in one text for each report; numbers with their name."""

    def text(row: pd.Series) -> str:
        parts = [
            f"{key.rpartition('/')[2]}={value:g}" if _is_number(frame[key]) else str(value)
            for key, value in zip(keys, row, strict=True)
            if label_of(value) != NONE
        ]
        return ", ".join(parts)

    if not keys:
        return pd.Series("", frame.index)
    return frame[list(keys)].apply(text, axis=1)


def _spoken(setting: str) -> str:
    return SETTINGS.get(setting, setting.replace("/", ": ").replace("_", " "))


def _upright(figure: Figure) -> str:
    """What stands beside an upright axis."""
    return textwrap.fill(figure.unit.in_picture(figure.title), 26)


def _as_file(key: str) -> str:
    return re.sub(r"\W+", "_", key)
