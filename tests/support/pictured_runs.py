"""Runs and plans to be drawn, and whether a picture is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.models.edits.base import Edit, EditOfExperts
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.report.report import write_report


def save_report(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, {"status": "ok", "model": "tiny", "method": "prune"} | values)
    return folder


def save_curve(folder: Path, phases: tuple[str, ...], **told: float) -> None:
    rows, step = [], 0
    for phase in phases:
        rows.append({"phase": phase, "step": step, "validation_loss": 2.0})
        for _ in range(60):
            step += 1
            row = {"phase": phase, "step": step, "tokens": 100 * step, "loss": 1 + 1 / step}
            rows.append(row | told | ({} if step % 30 else {"validation_loss": 1.5}))
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_usage(folder: Path, sizes: dict[int, int]) -> None:
    rows = [(layer, expert, 10 * expert, 2 * expert / (size - 1))
            for layer, size in sizes.items() for expert in range(size)]  # fmt: skip
    columns = ["layer", "expert", "tokens", "usage"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "usage.csv", index=False)


def scored(
    kind: type[EditOfExperts], sizes: dict[int, int], scores: Any = None, **other: Any
) -> Plan:
    """Every layer keeps its first half; merged, each of it has one of the second half in it."""
    found = scores or (lambda size: tuple(float(number) for number in range(size, 0, -1)))
    edits = []
    for index, size in sizes.items():
        kept = tuple(range(size // 2))
        groups = {"groups": tuple((e, e + size // 2) for e in kept)}
        own = groups if kind is MergeExperts else {}
        edits.append(kind(index, f"layers.{index}", kept, scores=found(size), **own, **other))
    return Plan(tuple(edits))


def condensed(search: bool = True) -> Plan:
    divergence = (0.3, 0.2, 0.1) if search else ()
    edits = (
        CondenseLayer(1, "a", experts=(3, 0), gates=(0.1, 0.2), divergence=divergence),
        KeepLayer(2, "b"),
        CondenseLayer(4, "c", experts=(5, 2), gates=(0.1, 0.2), divergence=divergence),
    )
    searched = (CondenseLayer(2, "b", experts=(1, 6), divergence=divergence),)
    values = (0.01, 0.02) if search else ()
    return Plan(edits, layer_order=(4, 1), layer_divergence=values, searched=searched)


def dropped(kind: type[Edit]) -> Plan:
    edits = tuple(
        (kind if index == 2 else KeepLayer)(index, "x", scores=(0.5 + index / 10,))
        for index in range(4)
    )
    return Plan(edits, layer_order=(2,), notes={"scores": "mean cosine of x and y: highest first"})


def check(path: Path) -> None:
    """A PNG of sane size that shows something, and a PDF beside it."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert 300 <= height <= 2100 and 600 <= width <= 1900, path.name
    assert pixels.std() > 0.02 and pixels.min() < 0.3, path.name
    assert (pixels[[0, -1]] > 0.9).all() and (pixels[:, [0, -1]] > 0.9).all(), f"{path.name} is cut"
    printed = path.with_suffix(".pdf").read_bytes()
    assert printed.startswith(b"%PDF") and b"CreationDate" not in printed
    assert b"/TrueType" in printed or b"/CIDFontType2" in printed
    assert b"/Type3" not in printed


def names(paths: list[Path]) -> list[str]:
    for path in paths:
        check(path)
    return [path.stem for path in paths]


EVEN, UNEVEN = {1: 8, 2: 8}, {0: 8, 1: 4, 5: 2}
PLANS = {
    "prune": (scored(PruneExperts, EVEN), ["scores", "kept"]),
    "uneven": (scored(PruneExperts, UNEVEN, replacement="constant"), ["scores", "kept"]),
    "equal": (scored(PruneExperts, EVEN, lambda size: (0.0,) * size), ["scores", "kept"]),
    "infinite": (
        scored(PruneExperts, EVEN, lambda size: (-np.inf, np.nan, *range(size - 2))),
        ["scores", "kept"],
    ),
    "unknown": (scored(PruneExperts, EVEN, lambda size: (-np.inf,) * size), ["scores", "kept"]),
    "missing": (scored(PruneExperts, EVEN, lambda size: ()), ["kept"]),
    "merge": (scored(MergeExperts, UNEVEN), ["scores", "kept"]),
    "condense": (condensed(), ["kept", "divergence"]),
    "unsearched": (condensed(search=False), ["kept"]),
    "no_expert": (Plan((CondenseLayer(1, "a"), KeepLayer(2, "b"))), []),
    "drop_block": (dropped(DropBlock), ["scores"]),
    "large": (scored(PruneExperts, dict.fromkeys(range(27), 64)), ["scores", "kept"]),
}
