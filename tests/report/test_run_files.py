"""What lies in a run's folder, as its page reads it: whole, cut off by a kill, or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.report.run_files import (
    LOG_LINES,
    commands_of,
    curve_rows,
    files_of,
    read_plan,
    read_text,
    read_usage,
    tail_of,
    versions_of,
)
from moe_lab.store import Store


def test_a_plan_comes_to_four_digits_with_its_scores_apart() -> None:
    edits = (
        PruneExperts(1, "a", kept=(0, 2), scores=(0.123456, float("nan"), 2.0)),
        DropLayer(2, "b", scores=(0.5,)),
        KeepLayer(3, "c"),
    )
    text = Plan(edits, notes={"share": 1 / 3}).to_text()
    found, scores = read_plan(text)
    assert scores == {1: [0.1235, None, 2.0]}, "one value is none of experts"
    assert found["share"] == 0.3333
    assert [edit["edit"] for edit in found["layers"]] == ["prune", "drop_layer", "keep"]
    assert not any("scores" in edit for edit in found["layers"])
    assert found["layers"][0] == {
        "index": 1, "name": "a", "edit": "prune", "title": "prune", "changes": True,
        "kept": (0, 2), "num_experts": 3, "cells": {}, "divergence": (),
    }  # fmt: skip
    assert [edit["kept"] for edit in found["layers"][1:]] == [(), None]
    for nothing in (None, "", text[:40], "[1]", "{}"):
        assert read_plan(nothing) == (None, {})


def test_a_plan_s_rows_are_in_the_edits_words() -> None:
    edits = (
        PruneExperts(1, "a", kept=(0, 2), replacement="zero"),
        CondenseLayer(2, "b", experts=(5, 2), gates=(0.123456, 0.5)),
        MergeExperts(3, "c", kept=(0, 4), groups=((0, 9), (4,))),
    )
    searched = (CondenseLayer(3, "c", experts=(1,), gates=(0.5,), divergence=(0.3, 0.2)),)
    text = Plan(edits, searched=searched).to_text().replace('"edit": "merge"', '"edit": "of_mine"')
    found, _ = read_plan(text)
    told = [(row["edit"], row["title"], row["kept"], row["num_experts"], row["cells"],
             row["divergence"])
            for row in (*found["layers"], *found["searched"])]  # fmt: skip
    assert told == [
        ("prune", "prune (zero)", (0, 2), 3, {}, ()),
        ("condense", "condense", (5, 2), 6, {"gates": [["shared", 1.0], 0.1235, 0.5]}, ()),
        ("of_mine", "of_mine (not known here)", None, 0, {}, ()),
        ("condense", "condense", (1,), 2, {"gates": [["shared", 1.0], 0.5]}, (0.3, 0.2)),
    ]
    merged, _ = read_plan(Plan(edits).to_text())
    assert merged["layers"][2]["cells"] == {"groups merged": ["0+9"]}
    assert merged["layers"][2]["num_experts"] == 10


def test_usage_has_holes_where_a_row_is_missing() -> None:
    rows = ["layer,expert,tokens,usage", "1,0,5,0.123456", "1,2,3,", "4,1,9,2"]
    assert read_usage("\n".join(rows)) == {"1": [0.1235, None, None], "4": [None, 2.0]}
    assert read_usage(None) == {}


def test_a_curve_ends_where_the_run_was_killed() -> None:
    rows = '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo'
    assert list(curve_rows(rows)) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    assert list(curve_rows(None)) == []


HYDRA = "hydra:\n  mode: {mode}\n  runtime:\n    config_sources:\n    - path: /my conf\n" \
        "      schema: file\n      provider: command-line\n"  # fmt: skip


@pytest.mark.parametrize(
    ("commit", "overrides", "hydra", "lines"),
    [
        ("abc", ["a=1", "resume=true"], None, ["git checkout abc", "python run.py a=1"]),
        ("abc+dirty", [], None, ["git checkout abc  # and changes not committed"]),
        ("unknown", ["a='x y'"], None, ["python run.py 'a='\"'\"'x y'\"'\"''"]),
        (None, ["a=1"], HYDRA.format(mode="RUN"), ["python run.py --config-dir '/my conf' a=1"]),
        (None, ["+cd_moe=main"], None, ["python run.py +cd_moe=main hydra.mode=RUN"]),
    ],
)
def test_the_commands_make_this_run_again(
    commit: str | None, overrides: list[str], hydra: str | None, lines: list[str]
) -> None:
    assert commands_of(commit, overrides, hydra) == lines


def test_versions_are_those_of_the_store_where_it_was_made(tmp_path: Path) -> None:
    made = Store(tmp_path / "outputs" / "store").get("profile", {"a": 1}, lambda folder: None)
    report = {"seed": 0, "artifact/profile": f"profile/{made.key}"}
    config, hydra = "store: outputs/store\n", f"  runtime:\n    cwd: {tmp_path}\n"
    found = versions_of(report, config, hydra)
    assert found == json.loads((made.folder / "artifact.json").read_text())["versions"]
    assert "torch" in found
    assert versions_of(report, "store: elsewhere\n", hydra) == {}
    assert versions_of({}, config, hydra) == versions_of(report, None, hydra) == {}


def test_files_are_those_of_this_run_alone(tmp_path: Path) -> None:
    for name in ("plan.json", "a.partial", ".hydra/config.yaml", "diagnosis/layers.csv",
                 "plots/kept.png", "0/report.json", "wandb/debug.log"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(files_of(tmp_path)) == [".hydra/config.yaml", "diagnosis/layers.csv", "plan.json"]


def test_of_a_log_the_end_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert tail_of(log) is None and read_text(log) is None
    log.write_text("".join(f"line {number}\n" for number in range(50_000)))
    found = tail_of(log).splitlines()
    assert (len(found), found[-1]) == (LOG_LINES, "line 49999")
    log.write_bytes(b"one\n\xff two")
    assert tail_of(log) == read_text(log) == "one\n\ufffd two"


def test_widths_of_a_plan_by_which_hidden_units_go() -> None:
    first = NarrowExperts(0, "a", widths=(3,), scores=(2.0, 1.0))
    second = NarrowExperts(1, "b", widths=(4, 0), scores=(2.0, 0.0))
    plan, scores = read_plan(Plan((first, second, KeepLayer(2, "c"))).to_text())
    assert plan is not None
    assert [row.get("widths") for row in plan["layers"]] == [[3, 3], [4, 0], None]
    assert [row["title"] for row in plan["layers"]][:2] == ["narrow to 3", "narrow to 0 to 4"]
    assert scores == {0: [2.0, 1.0], 1: [2.0, 0.0]}
