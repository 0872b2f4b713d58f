"""Pictures of a sweep: points, shares, and what tells them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pictured_runs import names, save_curve, save_report

from moe_lab.report.figures import QUALITIES
from moe_lab.report.frame import read_reports
from moe_lab.report.plots.sweep import DRAWN_COSTS, draw_sweep, naming, points, values_of

DENSE = {"eval/average": 0.9, "kl": 0, "bytes": 1000, "flops_per_token": 50, "parameter_ratio": 1}
PARAMETERS = DRAWN_COSTS[0]
ACCURACY, _, HELD_OUT = QUALITIES


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
    size = next(cost for cost in DRAWN_COSTS if cost.name == "bytes")
    assert list(values_of(size, frame, "compressed")) == [75.0, 75.0, 50.0, 50.0] * 2
    assert list(values_of(size, frame, "dense")) == [100.0] * 8
    assert values_of(HELD_OUT, frame, "dense").isna().all()


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
