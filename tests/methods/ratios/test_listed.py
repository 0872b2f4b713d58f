"""Numbers of experts that are given, or taken from another plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from layer_scores import numbers, sized

from moe_lab.methods.ratios.listed import Listed
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.types import UserError


def test_listed_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    layers = [sized(1), sized(2), sized(5)]
    assert numbers(Listed([4, 8, 2]), layers) == [4, 8, 2]
    assert numbers(Listed({5: 3}), layers) == [8, 8, 3]
    edits = (PruneExperts(1, "a", kept=(0, 5)), KeepLayer(2, "b"),
             MergeExperts(5, "c", kept=(1, 2, 3)))  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(Plan(edits).to_text())
    from_plan = Listed(plan=str(path))
    assert numbers(from_plan, layers) == [2, 8, 3]
    options = {"_target_": "x", "kept": None, "plan": str(path)}
    assert from_plan.identity(options) == Listed({5: 3, 1: 2}).identity(options)
    path.write_text(Plan((DropLayer(1, "a"),)).to_text())
    for wrong, words in (
        (Listed(), r"ratio.kept=\[6,4,8\].*\{3:4\}.*ratio.plan"),
        (Listed([4, 4]), r"ratio.kept=\[4,4\]: 2 numbers for 3 .*\[1, 2, 5\].*\{1:4\}"),
        (Listed({3: 4}), r"ratio.kept=\{3:4\}: 3 is no MoE layer; they are \[1, 2, 5\]"),
        (Listed([4, 9, 8]), r"layer 2 has 8 experts and can keep 2 to 8 of them, not 9"),
        (Listed({2: "x"}), r"not 'x'"),
        (Listed([1, 8, 8]), r"layer 1: 1 of 8.*chooses 2.*can keep 2 to 8"),
        (Listed(plan=str(tmp_path / "no.json")), r"no.json cannot be read as a plan"),
        (Listed(plan=str(path)), r"layer 1 ends as 'drop_layer'"),
    ):
        with pytest.raises(UserError, match=words):
            wrong.check(layers)
