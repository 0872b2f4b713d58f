"""Pictures of each kind of plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictured_runs import PLANS, condensed, dropped, names, save_usage, scored

from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.report.plots import plan
from moe_lab.report.plots.run import draw_run


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
    assert told(scored(PruneExperts, {3: 4})) == {3: [kept, kept, removed, removed]}
    merged = MergeExperts(0, "x", (0, 2), groups=((0, 1, 3), (2,)), weights=((), ()))
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
    assert plan.states(dropped(DropLayer), known).query("whole")["layer"].tolist() == [2, 2]


def test_a_layer_without_routed_experts_has_as_many_as_were_used(tmp_path: Path) -> None:
    made, _ = PLANS["no_expert"]
    found = plan.states(made, {1: 3, 2: 2})
    assert found["state"].tolist() == ["removed"] * 3 + ["kept"] * 2


def test_dropped_layers_are_told_from_kept_ones(tmp_path: Path) -> None:
    save_usage(tmp_path, dict.fromkeys(range(4), 8))
    (tmp_path / "plan.json").write_text(dropped(DropLayer).to_text())
    assert names(draw_run(tmp_path)) == ["usage", "scores", "kept"]
