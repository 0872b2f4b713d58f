"""Pictures of a plan: what scored how, what stays, and the divergence on the way to it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lab.models.edits.base import Edit, State
from moe_lab.models.edits.plan import Plan
from moe_lab.report.plots import style, widths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

MOST_WORDS = 200  # numbers in the cells of a picture: more take seconds, and nobody reads them
REMOVED: State = "removed"
KEPT: State = "kept"
JOINED: State = "joined"
WORDS_OF_JOINED = ("others merged into it", "experts merged into it")  # where no edit has any
SEARCHES = {  # condense.layers and condense.experts -> what their search looks at
    "greedy_js": "JS divergence (nats)",
    "greedy_kl": "KL divergence (nats)",
    "greedy_ppl": "perplexity",
    "greedy_logits": "KL divergence of the predictions (nats)",
}


def draw_plan(
    plan: Plan, sizes: Mapping[int, int], told: Mapping[str, Any], folder: Path
) -> list[Path | None]:
    """Each picture as far as the plan tells of it, None where it does not.

    scores.png, kept.png, divergence.png, and neurons.png of plans by which hidden units go.

    sizes: experts of each layer by index, where known; told: the run's report, for names.
    """
    return [
        _scores(plan, told, folder / "scores.png") or _layers(plan, folder / "scores.png"),
        widths.draw_widths(plan, folder / "kept.png") or _kept(plan, sizes, folder / "kept.png"),
        _divergence(plan, told, folder / "divergence.png"),
        widths.draw_neurons(plan, told, folder / "neurons.png"),
    ]


def _scores(plan: Plan, told: Mapping[str, Any], path: Path) -> Path | None:
    """The scores of the experts, layer by expert, those that go crossed out."""
    chains = [chain for chain in plan.chains() if chain.expert_scores]
    rows = [(chain.index, expert, score, chain.fate(expert).state == REMOVED)
            for chain in chains for expert, score in enumerate(chain.expert_scores)]  # fmt: skip
    if not rows:
        return None
    table = pd.DataFrame(rows, columns=["layer", "expert", "score", "goes"])
    finite = table["score"][np.isfinite(table["score"])]
    wide = len(finite) > 0 and finite.min() > 0 and finite.max() > 10 * finite.min()
    metric = told.get("metric") or plan.notes.get("scores")
    summed = any(chain.width_of(0) is not None for chain in chains)
    words = (edit.gone for chain in chains for edit in chain.edits)
    goes = next((word for word in words if word != REMOVED), REMOVED)
    style.draw_by_expert(
        table, "score", path, _scores_title(goes, bool(table["goes"].any()), summed),
        f"score: {metric}" if metric else "score", logarithmic=wide, marked="goes", crossed=True,
    )  # fmt: skip
    return path


def _scores_title(goes: str, crossed: bool, summed: bool) -> str:
    """What the picture shows; summed: of hidden units, which add up to an expert's."""
    words = "Hidden units' scores by expert" if summed else "Scores of the experts"
    return f"{words} ({goes}: crossed out)" if crossed or not summed else words


def _layers(plan: Plan, path: Path) -> Path | None:
    """The score of each layer over depth, those that go crossed out."""
    scored = [(chain.index, score, chain.drops_layer)
              for chain in plan.chains() if (score := chain.layer_score) is not None]  # fmt: skip
    if not scored:
        return None
    with style.figure(path, 5.5, 3.2, "Scores of the layers") as made:
        axes = made.add_subplot()
        axes.plot(*zip(*(point for *point, _ in scored), strict=True), c="0.7", lw=1)
        for number, (goes, name) in enumerate([(False, "kept"), (True, "dropped")]):
            some = [point for *point, dropped in scored if dropped == goes]
            axes.plot([index for index, _ in some], [score for _, score in some], ls="none", ms=8,
                      c=style.COLOURS[number], marker="X" if goes else "o", label=name)  # fmt: skip
        style.whole_numbers(axes.xaxis)
        what = str(plan.notes.get("scores", "score")).partition(":")[0]
        axes.set(xlabel="layer", ylabel=textwrap.fill(what, 30))
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.3)
    return path


def states(plan: Plan, sizes: Mapping[int, int]) -> pd.DataFrame:
    """A row for each expert: layer, expert, state, number, into, whole.

    state: kept, removed, or joined: one into which others were merged (number: how many it is made
    of), or a part of the condensed layer (number: its place in the order of choice). into: the
    expert that a removed one was merged into, -1 elsewhere; whole: its whole layer goes. A layer
    of unknown size is as large as the largest known; where none is known there is no row.
    """
    chains = plan.chains()
    known = {chain.index: len(chain.expert_scores) for chain in chains}
    known = {index: size for index, size in known.items() if size > 1} | dict(sizes)
    named = [expert for edit in (*plan.edits, *plan.searched) for expert in edit.named_experts]
    most = max([*known.values(), *(expert + 1 for expert in named)], default=0)
    rows = []
    for chain in chains:
        for expert in range(known.get(chain.index, most)):
            rows.append((chain.index, expert, *chain.fate(expert), chain.drops_layer))
    return pd.DataFrame(rows, columns=["layer", "expert", "state", "number", "into", "whole"])


def _kept(plan: Plan, sizes: Mapping[int, int], path: Path) -> Path | None:
    """Layer by expert: what stays, what goes, and what becomes of it."""
    table = states(plan, sizes)
    if not plan.edited() or table.empty:
        return None
    layers, columns = sorted(table["layer"].unique()), range(table["expert"].max() + 1)
    width, height, cell = style.grid_size(len(layers), len(columns))
    joined, what = next((edit.joined for edit in plan.edits if edit.joined), WORDS_OF_JOINED)
    with style.figure(path, width, height + 0.3, "What is kept of the experts") as made:
        axes, shades = made.add_subplot(), _shades(table)
        colours = np.ones((len(layers), len(columns), 4))
        rows = table["layer"].map({layer: row for row, layer in enumerate(layers)})
        colours[rows, table["expert"]] = [
            shades.to_rgba(number) if state == JOINED else FACES[state]
            for state, number in zip(table["state"], table["number"], strict=True)
        ]
        style.cells(axes, colours)
        gone = np.zeros(colours.shape[:2], dtype=bool)
        gone[rows, table["expert"]] = (table["state"] == REMOVED) & ~table["whole"]
        _words(axes, table.assign(row=rows), cell)
        if not _says_into(table, cell):
            style.mark(axes, gone, 0.7 * cell, cross=True, colours=("0.55",))
        for row in rows[table["whole"]].unique():
            axes.axhspan(row - 0.5, row + 0.5, fc="none", ec="0.4", hatch="////", lw=0)
        style.ticks(axes, columns, layers)
        axes.set(xlabel="expert", ylabel="layer")
        style.legend_below(made, _legend(table, joined, _says_into(table, cell)), width)
        if table["state"].eq(JOINED).any():
            bar = made.colorbar(shades, ax=axes, label=what)
            style.whole_numbers(bar.ax.yaxis)
    return path


FACES = {KEPT: (0.0, 0.447, 0.698, 1.0), REMOVED: (0.93, 0.93, 0.93, 1.0)}


def _shades(table: pd.DataFrame) -> ScalarMappable:
    """Colours of the joined by their number: orange, always lighter than the kept ones."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    numbers = table["number"][table["state"] == JOINED]
    least, most = (numbers.min(), numbers.max()) if len(numbers) else (0, 1)
    palette = ListedColormap(colormaps["YlOrBr"](np.linspace(0.15, 0.6, most - least + 1)))
    return ScalarMappable(Normalize(least - 0.5, most + 0.5), palette)


def _says_into(table: pd.DataFrame, cell: float) -> bool:
    """Whether the picture has room to say in which expert each merged one is now."""
    return 0 < (table["into"] >= 0).sum() <= MOST_WORDS and cell >= 11


def _words(axes: Axes, table: pd.DataFrame, cell: float) -> None:
    """The numbers of the joined, and of removed ones where they went; where there is room."""
    joined, into = table[table["state"] == JOINED], table[table["into"] >= 0]
    look: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}
    look["fontsize"] = min(8.0, 0.6 * cell)
    if cell >= 9 and len(joined) <= MOST_WORDS:
        for row, expert, number in joined[["row", "expert", "number"]].itertuples(index=False):
            axes.text(expert, row, number, **look)
    if _says_into(table, cell):
        for row, expert, to in into[["row", "expert", "into"]].itertuples(index=False):
            axes.text(expert, row, f"→{to}", color="0.25", **look)


def _legend(table: pd.DataFrame, joined: str, arrows: bool) -> dict[str, Any]:
    from matplotlib.patches import Patch

    merged = "merged (→ into which)" if arrows else "merged into others"
    gone = merged if (table["into"] >= 0).any() else "removed"
    whole, partial = table["whole"], set(table["state"][~table["whole"]])
    legend = {"kept": Patch(fc=FACES[KEPT])} if KEPT in partial else {}
    if JOINED in partial:
        legend[joined] = Patch(fc="#fe9929")
    if REMOVED in partial:
        legend[gone] = Patch(fc=FACES[REMOVED], ec="0.5")
    if whole.any():
        legend["whole layer dropped"] = Patch(fc=FACES[REMOVED], ec="0.4", hatch="////")
    return legend


def _divergence(plan: Plan, told: Mapping[str, Any], path: Path) -> Path | None:
    """Along the search over layers, and in each layer along its search over experts."""
    condensed = [edit for edit in plan.edits if edit.divergence]
    others = [edit for edit in plan.searched if edit.divergence]
    panels = bool(plan.layer_divergence) + bool(condensed)
    if not panels:
        return None
    with style.figure(path, 5.2 * panels, 3.6, "Divergence along the search") as made:
        if plan.layer_divergence:
            _along_layers(made.add_subplot(1, panels, 1), plan, told)
        if condensed:
            _along_experts(made.add_subplot(1, panels, panels), condensed, others, told)
    return path


def _along_layers(axes: Axes, plan: Plan, told: Mapping[str, Any]) -> None:
    values = plan.layer_divergence
    axes.plot(range(len(values)), values, ms=5, **style.look(0))
    style.thinned(axes.xaxis, plan.layer_order, most=28)
    axes.tick_params(axis="x", labelsize="small" if len(values) > 14 else "medium")
    axes.set(xlabel="layers in order of choice", title="layer by layer",
             ylabel=SEARCHES.get(str(told.get("condense/layers")), "divergence"))  # fmt: skip
    _scale(axes, values)


def _along_experts(
    axes: Axes, chosen: list[Edit], others: list[Edit], told: Mapping[str, Any]
) -> None:
    for edit in others:
        axes.plot(range(len(edit.divergence)), edit.divergence, c="0.75", lw=0.8, zorder=1)
    shades = style.shades(len(chosen))
    for number, edit in enumerate(chosen):
        axes.plot(range(len(edit.divergence)), edit.divergence, c=shades[number], ms=4, lw=1.2,
                  marker=style.MARKERS[number % len(style.MARKERS)],
                  ls=style.LINE_STYLES[number % len(style.LINE_STYLES)],
                  label=str(edit.index))  # fmt: skip
    if others:
        axes.plot([], [], c="0.75", lw=0.8, label="not\nchosen")
    style.whole_numbers(axes.xaxis)
    axes.set(xlabel="routed experts in the condensed layer", title="expert by expert",
             ylabel=SEARCHES.get(str(told.get("condense/experts")), "divergence"))  # fmt: skip
    axes.legend(title="layer", fontsize="small", frameon=False, loc="center left",
                bbox_to_anchor=(1, 0.5), ncols=math.ceil((len(chosen) + 1) / 14))  # fmt: skip
    _scale(axes, [value for edit in (*chosen, *others) for value in edit.divergence])


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """By orders of magnitude where there are some, else from 0."""
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        style.plain_powers(axes.yaxis)
    axes.grid(alpha=0.3)
