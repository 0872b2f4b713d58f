"""Plans: what lies on disk is what was made."""

from __future__ import annotations

from pathlib import Path

import torch
from families import tiny_model
from stand_ins import replaced

from moe_lab.types import Edit, Plan


def test_a_plan_keeps_its_tensors_beside_it(tmp_path: Path) -> None:
    plan = replaced(tiny_model("mixtral"), "constant", "zero")
    plan.write_tensors(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(plan.to_text())
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    [name] = read.tensors
    assert torch.equal(read.tensors[name], plan.tensors[name])
    plain = Plan((Edit(0, "x", "prune", kept=(1, 2)),))
    plain.write_tensors(tmp_path / "other.json")
    assert not (tmp_path / "other.safetensors").exists()
    assert "replacement" not in plain.to_text()
