"""Pictures of runs and sweeps: what they show against slow references, and that they are files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lab.report.frame import read_reports
from moe_lab.report.plots import cloud, curve, plan, style
from moe_lab.report.plots.run import draw_run
from moe_lab.report.plots.sweep import ACCURACY, COSTS, HELD_OUT, draw_sweep, naming, points
from moe_lab.report.report import write_report
from moe_lab.types import Edit, Plan

DENSE = {"eval/average": 0.9, "kl": 0, "bytes": 1000, "flops_per_token": 50, "parameter_ratio": 1}
PARAMETERS = COSTS[0]


def save_report(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, {"status": "ok", "model": "tiny", "method": "prune"} | values)
    return folder


def sweep(folder: Path, models: tuple[str, ...] = ("tiny",), tuned: bool = False) -> pd.DataFrame:
    """Jobs of two metrics, two ratios and two seeds for each model."""
    draw, number = np.random.default_rng(0), 0
    for model in models:
        for metric in ("reap", "frequency"):
            for ratio in (0.25, 0.5):
                for seed in (0, 1):
                    values = {f"dense/{name}": value for name, value in DENSE.items()}
                    for variant in ("compressed", "finetuned")[: 1 + tuned]:
                        values |= {
                            f"{variant}/eval/average": draw.uniform(0.4, 0.9),
                            f"{variant}/kl": draw.uniform(0, 2),
                            f"{variant}/parameter_ratio": 1 - ratio,
                            f"{variant}/memory_ratio": 1 - ratio / 2,
                            f"{variant}/bytes": 1000 * (1 - ratio),
                            f"{variant}/flops_per_token": 50,
                            f"{variant}/prefill_speedup": draw.uniform(1, 2),
                            f"{variant}/decode_speedup": draw.uniform(1, 2),
                        }
                    settings = {"model": model, "metric": metric, "ratio": ratio, "seed": seed}
                    job = save_report(folder / str(number), **settings, **values)
                    if tuned:
                        save_curve(job, ("lm",))
                    number += 1
    return read_reports(folder)


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


def scored(edit: str, sizes: dict[int, int], scores: Any = None, **other: Any) -> Plan:
    """Every layer keeps its first half."""
    found = scores or (lambda size: tuple(float(number) for number in range(size, 0, -1)))
    return Plan(
        tuple(
            Edit(index, f"layers.{index}", edit, tuple(range(size // 2)), found(size),
                 groups=tuple((e, e + size // 2) for e in range(size // 2 * (edit == "merge"))),
                 **other)
            for index, size in sizes.items()
        )
    )  # fmt: skip


def condensed(search: bool = True) -> Plan:
    divergence = (0.3, 0.2, 0.1) if search else ()
    edits = (
        Edit(1, "a", "condense", experts=(3, 0), gates=(0.1, 0.2), divergence=divergence),
        Edit(2, "b", "keep"),
        Edit(4, "c", "condense", experts=(5, 2), gates=(0.1, 0.2), divergence=divergence),
    )
    searched = (Edit(2, "b", "condense", experts=(1, 6), divergence=divergence),)
    values = (0.01, 0.02) if search else ()
    return Plan(edits, layer_order=(4, 1), layer_divergence=values, searched=searched)


def dropped(edit: str) -> Plan:
    edits = tuple(
        Edit(index, "x", edit if index == 2 else "keep", scores=(0.5 + index / 10,))
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


@pytest.mark.parametrize("x_lower", [True, False])
@pytest.mark.parametrize("y_lower", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_no_other_point_beats(x_lower: bool, y_lower: bool, seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 6, (2, 25)).astype(float)  # with many ties
    found = cloud.front(x, y, x_lower, y_lower)
    for i in range(25):
        beaten = False
        for j in range(25):
            pairs = ((x[i], x[j], x_lower), (y[i], y[j], y_lower))
            as_good = all((b <= a) if lower else (b >= a) for a, b, lower in pairs)
            better = any((b < a) if lower else (b > a) for a, b, lower in pairs)
            beaten |= as_good and better
        assert found[i] == (not beaten)


def test_front_of_few() -> None:
    none = np.array([])
    assert cloud.front(none, none, True, True).tolist() == []
    same = np.array([1.0, 1.0])
    assert cloud.front(same, same, True, False).tolist() == [True, True]


def test_points_are_means_over_seeds(tmp_path: Path) -> None:
    frame = sweep(tmp_path, ("tiny", "other"), tuned=True)
    labels, said = naming(frame, (), numbers=False)
    assert said == ["metric"] and set(labels) == {"reap", "frequency"}
    found = points(frame, PARAMETERS, ACCURACY, labels)
    assert len(found) == 2 * 2 * 2 * 2
    for row in found.itertuples():
        same = frame[(frame["model"] == row.model) & (frame["metric"] == row.metric)
                     & (frame["ratio"].map(str) == row.ratio)]  # fmt: skip
        assert len(same) == 2
        values = [100 * value for value in same[f"{row.variant}/eval/average"]]
        assert row.y == pytest.approx(np.mean(values))
        assert row.y_std == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        assert row.x == pytest.approx(100 * (1 - float(row.ratio)))
        assert row.x_std == pytest.approx(0)


def test_shares_are_of_the_dense_model(tmp_path: Path) -> None:
    frame = sweep(tmp_path)
    size = next(cost for cost in COSTS if cost.key == "bytes")
    assert list(size.of(frame, "compressed")) == [75.0, 75.0, 50.0, 50.0] * 2
    assert list(size.of(frame, "dense")) == [100.0] * 8
    assert HELD_OUT.of(frame, "dense").isna().all()


def test_what_tells_points_apart() -> None:
    rows = [{"method": method, "metric": metric, "ratio": ratio, "condense/experts": experts}
            for method, metric, experts in [("prune", "reap", None), ("prune", "ean", None),
                                            ("condense", None, "l1")]
            for ratio in (0.1, 0.2, 0.3)]  # fmt: skip
    frame = pd.DataFrame(rows, dtype=object)
    labels, said = naming(frame, (), numbers=False)
    assert said == ["method", "metric"]
    assert list(labels.unique()) == ["prune, reap", "prune, ean", "condense"]
    labels, said = naming(frame, ("method", "metric"), numbers=True)
    assert said == ["ratio"] and list(labels.unique()) == ["ratio=0.1", "ratio=0.2", "ratio=0.3"]
    many = pd.DataFrame([{"metric": f"m{n}", "eval": e} for n in range(9) for e in "ab"])
    assert naming(many, (), numbers=False)[1] == ["eval"]


def test_pictures_of_a_sweep(tmp_path: Path) -> None:
    frame = sweep(tmp_path, ("tiny", "other"), tuned=True)
    some = [
        key
        for key in frame
        if not key.endswith(("memory_ratio", "/bytes", "decode_speedup", "token"))
    ]
    written = draw_sweep(tmp_path, frame[some])
    costs = ["pareto_parameter_ratio", "pareto_prefill_speedup"]
    assert names(written) == [*costs, "by_ratio", "curves"]
    assert {path.parent for path in written} == {tmp_path / "plots"}


def test_a_sweep_without_costs_or_accuracy(tmp_path: Path) -> None:
    for number, layers in enumerate((1, 10, 100)):
        values = {"condense/num_layers": layers, "compressed/kl": 0.1 * number}
        save_report(tmp_path / str(number), **values)
    save_report(tmp_path / "3", status="failed", **{"condense/num_layers": 5, "compressed/kl": 9.0})
    written = draw_sweep(tmp_path, read_reports(tmp_path))
    assert names(written) == ["by_condense_num_layers"]


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert draw_run(tmp_path / "0") == []
    save_report(tmp_path / "0", status="failed", error="x")
    assert draw_run(tmp_path / "0") == []
    assert draw_sweep(tmp_path, read_reports(tmp_path)) == []
    save_report(tmp_path / "0", **{"compressed/eval/average": None})
    save_report(tmp_path / "1", seed=1)
    assert draw_sweep(tmp_path, read_reports(tmp_path)) == []
    kept = Plan((Edit(0, "x", "keep"),))
    (tmp_path / "0" / "plan.json").write_text(kept.to_text())
    (tmp_path / "0" / "curve.jsonl").write_text("")
    assert draw_run(tmp_path / "0") == []
    assert not list(tmp_path.rglob("plots"))


EVEN, UNEVEN = {1: 8, 2: 8}, {0: 8, 1: 4, 5: 2}
PLANS = {
    "prune": (scored("prune", EVEN), ["scores", "kept"]),
    "uneven": (scored("prune", UNEVEN, replacement="constant"), ["scores", "kept"]),
    "equal": (scored("prune", EVEN, lambda size: (0.0,) * size), ["scores", "kept"]),
    "infinite": (
        scored("prune", EVEN, lambda size: (-np.inf, np.nan, *range(size - 2))),
        ["scores", "kept"],
    ),
    "unknown": (scored("prune", EVEN, lambda size: (-np.inf,) * size), ["scores", "kept"]),
    "missing": (scored("prune", EVEN, lambda size: ()), ["kept"]),
    "merge": (scored("merge", UNEVEN), ["scores", "kept"]),
    "condense": (condensed(), ["kept", "divergence"]),
    "unsearched": (condensed(search=False), ["kept"]),
    "no_expert": (Plan((Edit(1, "a", "condense"), Edit(2, "b", "keep"))), []),
    "drop_block": (dropped("drop_block"), ["scores"]),
    "large": (scored("prune", dict.fromkeys(range(27), 64)), ["scores", "kept"]),
}


@pytest.mark.parametrize("name", PLANS)
def test_pictures_of_each_kind_of_plan(name: str, tmp_path: Path) -> None:
    made, expected = PLANS[name]
    (tmp_path / "plan.json").write_text(made.to_text())
    assert names(draw_run(tmp_path)) == expected


def test_states_of_the_experts() -> None:
    def told(made: Plan, sizes: dict[int, int] | None = None) -> dict[int, list]:
        table = plan.states(made, sizes or {}).set_index("layer")
        columns = ["state", "number", "into"]
        return {
            layer: table.loc[[layer], columns].to_numpy().tolist() for layer in set(table.index)
        }

    removed, kept = ["removed", 0, -1], ["kept", 0, -1]
    assert told(scored("prune", {3: 4})) == {3: [kept, kept, removed, removed]}
    merged = Edit(0, "x", "merge", (0, 2), groups=((0, 1, 3), (2,)), weights=((), ()))
    assert told(Plan((merged,)), {0: 4}) == {
        0: [["joined", 3, -1], ["removed", 0, 0], ["kept", 1, -1], ["removed", 0, 0]]
    }
    found = told(condensed())
    assert {layer: len(rows) for layer, rows in found.items()} == {1: 7, 2: 7, 4: 7}
    assert found[2] == [kept] * 7
    assert found[4] == [["joined", {5: 1, 2: 2}[e], -1] if e in (5, 2) else removed
                        for e in range(7)]  # fmt: skip
    assert len(told(condensed(), {1: 9})[1]) == 9
    known = dict.fromkeys(range(4), 2)
    assert plan.states(dropped("drop_layer"), known).query("whole")["layer"].tolist() == [2, 2]


def test_a_layer_without_routed_experts_has_as_many_as_were_used(tmp_path: Path) -> None:
    made, _ = PLANS["no_expert"]
    found = plan.states(made, {1: 3, 2: 2})
    assert found["state"].tolist() == ["removed"] * 3 + ["kept"] * 2


def test_pictures_of_a_run_with_everything(tmp_path: Path) -> None:
    save_report(tmp_path, metric="reap")
    save_usage(tmp_path, UNEVEN)
    save_curve(tmp_path, ("lm", "sft"), entropy=1.0, top_k=2)
    (tmp_path / "plan.json").write_text(scored("merge", UNEVEN).to_text())
    assert names(draw_run(tmp_path)) == ["usage", "scores", "kept", "curves"]


def test_tokens_of_a_curve_go_on_through_its_phases(tmp_path: Path) -> None:
    save_curve(tmp_path, ("lm", "sft"))
    read = curve.read_curve(tmp_path / "curve.jsonl")
    starts = read[read["loss"].isna()]
    assert starts["tokens"].tolist() == [0, 6000] and read["tokens"].is_monotonic_increasing


def test_same_input_same_bytes_in_any_process(tmp_path: Path) -> None:
    for name in "ab":
        save_report(tmp_path / name, metric="reap")
        save_usage(tmp_path / name, UNEVEN)
        (tmp_path / name / "plan.json").write_text(PLANS["merge"][0].to_text())
    draw_run(tmp_path / "a")
    script = "import sys, pathlib; from moe_lab.report.plots.run import draw_run; " \
             "draw_run(pathlib.Path(sys.argv[1]))"  # fmt: skip
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "b"], env=environment, check=True)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "plots").iterdir()}
        for name in "ab"
    )
    assert len(one) == 6 and one == other


def test_dropped_layers_are_told_from_kept_ones(tmp_path: Path) -> None:
    save_usage(tmp_path, dict.fromkeys(range(4), 8))
    (tmp_path / "plan.json").write_text(dropped("drop_layer").to_text())
    assert names(draw_run(tmp_path)) == ["usage", "scores", "kept"]


def test_looks_differ() -> None:
    looks = [style.look(number) for number in range(56)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 56
    assert style.legend_rows(["a"] * 3, 5.0) == (3, 1)
    columns, rows = style.legend_rows(["a long name of a method"] * 24, 4.4)
    assert columns * rows >= 24 and columns < 4
