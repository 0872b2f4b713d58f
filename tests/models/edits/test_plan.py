"""Plans: what lies on disk is what was made, and is carried out as it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from families import tiny_model
from stand_ins import replaced

from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts


def test_a_plan_keeps_its_tensors_beside_it(tmp_path: Path) -> None:
    plan = replaced(tiny_model("mixtral"), "constant", "zero")
    plan.write_tensors(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(plan.to_text())
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    [name] = read.tensors
    assert torch.equal(read.tensors[name], plan.tensors[name])
    plain = Plan((PruneExperts(0, "x", kept=(1, 2)),))
    plain.write_tensors(tmp_path / "other.json")
    assert not (tmp_path / "other.safetensors").exists()
    assert "replacement" not in plain.to_text()


def test_plans_that_differ_in_a_layer_differ_in_a_line() -> None:
    """So that two can be compared with diff."""
    edits = tuple(PruneExperts(i, f"layers.{i}", kept=(0, 1, 3), scores=(0.5,) * 4)
                  for i in range(4))  # fmt: skip
    one = Plan(edits, layer_order=(2, 1), layer_divergence=(0.1, 0.2), notes={"scores": "of reap"})
    other = replace(one, edits=(*edits[:2], replace(edits[2], kept=(1, 2, 3)), edits[3]))
    lines = list(zip(one.to_text().splitlines(), other.to_text().splitlines(), strict=True))
    assert [a == b for a, b in lines].count(False) == 1
    assert len(lines) > len(edits)
