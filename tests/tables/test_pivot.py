"""Pivots of reports, against means computed by hand."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from tabled import ACCURACY, cells, made_of, parsed, write

from moe_lab.report.figures import MISSING
from moe_lab.types import UserError


def test_rows_are_what_differs_and_seeds_are_averaged(sweep: Path) -> None:
    made = made_of(sweep)
    rows = parsed(made)
    keys = ["condense/experts", "condense/num_layers"]
    assert [[row[key] for key in keys] for row in rows] == [
        ["random", "2"], ["random", "4"], ["l1", "2"], ["l1", "4"],
    ]  # fmt: skip
    for row, layers in zip(rows, (2, 4), strict=False):
        found = [value for (one, _), value in ACCURACY.items() if one == layers]
        mean = sum(found) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / 2)
        assert float(row["compressed/eval/average"]) == pytest.approx(mean, abs=1e-9)
        assert float(row["compressed/eval/average (std)"]) == pytest.approx(deviation, abs=1e-9)
        assert deviation == pytest.approx(statistics.stdev(found))
        assert row["compressed/parameter_ratio"] == "0.75"
    assert rows[2]["compressed/eval/average"] == "0.7"
    assert rows[2]["compressed/eval/average (std)"] == ""
    assert rows[2]["compressed/kl"] == ""
    head, _, *body = cells(made.markdown())
    at = head.index("compressed/eval/average")
    assert [row[at] for row in body] == [
        "**80.7 % ± 2.1 %**", "65.0 % ± 5.6 %", "70.0 %", "failed",
    ]  # fmt: skip
    assert body[0][head.index("compressed/prefill_speedup")] == "1.25×"
    assert body[0][head.index("compressed/kl")] == "0.2000"
    assert body[2][head.index("compressed/kl")] == MISSING


def test_a_failed_job_is_told_and_gives_no_number(sweep: Path) -> None:
    made = made_of(sweep)
    last = parsed(made)[-1]
    assert last["dense/eval/average"] == "", "what a failed job left is no result"
    text = made.markdown()
    told = "- failed: condense/experts=l1, condense/num_layers=4: too many layers | 4\n"
    assert told in text
    assert "over condense/seed=0,1,2\n" in text
    assert "same in all 8 reports that have it: model=tiny; method=condense; commit=abc\n" in text


def test_what_is_mixed_in_a_cell_is_told(sweep: Path) -> None:
    text = made_of(sweep, rows=["condense/num_layers"]).markdown()
    assert "- cells also mix condense/experts=random,l1\n" in text
    narrow = made_of(sweep, rows=["model"], filters={"condense/seed": ["0"]}).markdown()
    assert "condense/seed=0;" in narrow and "± sample" not in narrow
    layers = sweep.parent / "layers"
    write(layers, 0, condense__num_layers=2, seed=0)
    write(layers, 1, condense__num_layers=4, seed=1)
    text = made_of(layers).markdown()
    assert "- differs between cells seed=0,1\n" in text
    assert cells(text)[2:] == [["2", "ok"], ["4", "ok"]], "no figures, but it is known how it went"


def test_columns_spread_a_setting(sweep: Path) -> None:
    made = made_of(sweep, columns=["condense/num_layers"], values=["compressed/eval/average"])
    head, _, *body = cells(made.markdown())
    assert head == ["condense/experts"] + [
        f"compressed/eval/average (condense/num_layers={layers})" for layers in (2, 4)
    ]
    assert body == [
        ["random", "**80.7 % ± 2.1 %**", "65.0 % ± 5.6 %"],
        ["l1", "70.0 %", "failed"],
    ]
    write(sweep, 11, condense__experts="frequency", condense__num_layers=2, condense__seed=0,
          compressed__eval__average=0.5)  # fmt: skip
    made = made_of(sweep, columns=["condense/num_layers"], values=["compressed/eval/average"])
    assert cells(made.markdown())[-1] == ["frequency", "50.0 %", MISSING], "never asked for"


def test_filters(sweep: Path) -> None:
    made = made_of(sweep, filters={"condense/experts": ["l1"], "status": ["ok", "x"]})
    assert len(parsed(made)) == 1
    with pytest.raises(UserError, match=r"no report has condense/seed=7 and model=tiny"):
        made_of(sweep, filters={"condense/seed": ["7"], "model": ["tiny"]})


def test_settings_of_another_method(tmp_path: Path) -> None:
    """What only one method has makes rows where it differs, and is otherwise told below."""
    for number, routed in enumerate((0, 4)):
        write(tmp_path, number, condense__num_routed=routed, condense__beam=1, compressed__kl=0.1,
              plan__layers="[1, 2]")  # fmt: skip
    write(tmp_path, 2, method="drop_layers", compressed__kl=0.3, plan__layers="[5]")
    made = made_of(tmp_path)
    rows = [list(row.values()) for row in parsed(made)]
    assert rows == [
        ["condense", "0", "0.1"], ["condense", "4", "0.1"], ["drop_layers", "none", "0.3"],
    ]  # fmt: skip
    assert "condense/beam=1" in made.remarks[-1]


def test_rows_can_be_sorted(sweep: Path) -> None:
    by_figure = made_of(sweep, sort=["-compressed/eval/average"])
    assert by_figure.numbers["compressed/eval/average"].round(3).tolist()[:3] == [0.807, 0.7, 0.65]
    assert by_figure.text["compressed/eval/average"].iloc[-1] == "failed"
    by_setting = made_of(sweep, sort=["-condense/num_layers", "condense/experts"])
    assert by_setting.index.to_numpy().tolist() == [
        ["l1", "4"], ["random", "4"], ["l1", "2"], ["random", "2"],
    ]  # fmt: skip
    spread = made_of(sweep, columns=["condense/num_layers"], sort=["compressed/eval/average"],
                     values=["compressed/eval/average"])  # fmt: skip
    assert spread.index["condense/experts"].tolist() == ["l1", "random"], "70.0 %, 80.7 %"
    with pytest.raises(UserError, match="--sort ratio: the table has no 'ratio'; it has condense"):
        made_of(sweep, sort=["ratio"])


def test_jobs_that_no_setting_tells_apart_are_rows_of_their_own(tmp_path: Path) -> None:
    """An option that some have not at all, and one that reports do not tell; seeds are averaged."""
    request = "fingerprint__request"
    for number, (top_k, seed) in enumerate([(None, 0), (None, 1), (1, 0), (1, 1)]):
        write(tmp_path, number, finetune__top_k=top_k, seed=seed, compressed__kl=number / 10,
              **{request: f"r{number}"})  # fmt: skip
    made = made_of(tmp_path)
    assert [list(row.values())[:2] for row in parsed(made)] == [["none", "0.05"], ["1", "0.25"]]
    write(tmp_path, 4, finetune__top_k=1, seed=1, compressed__kl=0.9, **{request: "r4"})
    assert {row["job"] for row in parsed(made_of(tmp_path))} == {f"job {one}" for one in range(5)}


def test_the_same_job_in_two_folders_is_one(tmp_path: Path) -> None:
    for number, (seed, kl) in enumerate([(0, 0.1), (1, 0.2), (1, 0.2), (1, 0.2)]):
        write(tmp_path, number, seed=seed, compressed__kl=kl, fingerprint__request=f"r{seed}",
              status="failed" if number == 3 else "ok")  # fmt: skip
    made = made_of(tmp_path)
    assert made.numbers["compressed/kl (std)"].tolist() == [
        pytest.approx(statistics.stdev([0.1, 0.2]))
    ]
    assert "left out, the same job as another report: 1, 3" in made.remarks
