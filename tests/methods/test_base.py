"""What every method keeps to: an edit for each MoE layer, from what it says that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_batch, tiny_model

from moe_lab.methods.base import Method
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_blocks import DropBlocks
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.none import Nothing
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import Plan

METHODS = {
    "none": Nothing(),
    "prune by routers": Prune(frequency, Uniform(0.25)),
    "prune": Prune(reap, Uniform(0.25)),
    "merge": Merge(1, 4),
    "condense": Condense(num_layers=1, num_routed=1),
    "drop_layers": DropLayers(num_layers=1),
    "drop_blocks": DropBlocks(num_layers=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_has_an_edit_for_each_layer(name: str, tmp_path: Path) -> None:
    """In the model's order, of the kinds that it foresaw; and it is the same from the disk."""
    method: Method = METHODS[name]
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    only_routers = method.from_routers
    assert only_routers == (name in ("none", "prune by routers"))
    statistics = collect_statistics(model, [batch], only_routers)
    infos = [layer.info for layer in statistics]
    method.check(infos)
    plan = method.plan(Profile(statistics, lambda number=None: LayerStream(model, [batch])))
    assert [(e.index, e.name) for e in plan.edits] == [(one.index, one.name) for one in infos]
    example = method.example(infos)
    assert (example is None) == (name == "none")
    assert {edit.edit for edit in plan.edited()} == {edit.edit for edit in example or ()} - {"keep"}
    assert bool(plan.edited()) == (name != "none")
    (tmp_path / "plan.json").write_text(plan.to_text())
    assert Plan.load(tmp_path / "plan.json") == plan
