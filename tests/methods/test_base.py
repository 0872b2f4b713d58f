"""What every method keeps to: an edit for each MoE layer, from what it says that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
from moe_lab.models.edits.plan import Plan
from moe_lab.models.stream import LayerStream
from moe_lab.option import Option
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError

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
    assert {edit.kind for edit in plan.edited()} == {edit.kind for edit in example or ()} - {"keep"}
    assert bool(plan.edited()) == (name != "none")
    (tmp_path / "plan.json").write_text(plan.to_text())
    assert Plan.load(tmp_path / "plan.json") == plan


@dataclass(frozen=True)
class Least(Method):
    """What has to be there, and two options."""

    num_layers: Annotated[int, Option("layers", least=1)] = 1
    bits: Annotated[int, Option("bits", least=2)] = 4

    of_condense = ("num_layers",)

    def plan(self, profile: Profile) -> Plan:
        return Plan(())


def test_what_a_method_is_unless_it_says_so() -> None:
    method: Method = Least()
    method.check([])
    assert (method.from_routers, method.takes_groups, method.padding) == (False, False, None)
    assert method.example([]) is None and list(method.parts()) == []
    assert method.identity({"bits": 4}) == {"bits": 4}
    assert Least.groups({"bits": 4}) == ()
    for wrong, message in (
        (Least(bits=1), "method.bits=1: it must be at least 2"),
        (Least(num_layers=0), "condense.num_layers=0: it must be at least 1"),
    ):
        with pytest.raises(UserError) as refused:
            wrong.check([])
        assert str(refused.value) == message
    with pytest.raises(TypeError, match="abstract"):
        type("Nameless", (Method,), {})()


def test_a_report_says_what_a_method_says_of_its_options() -> None:
    node = {"_target_": "a.b", "num_layers": 3, "layers": "last", "padding": None, "ratio": {}}
    assert Least.settings(node) == {"condense/num_layers": 3, "layers": "last"}
    assert Least.settings(node | {"layers": "all"}) == {"layers": "all"}
    merged = {"grouping": "ream", "layers": "all", "num_layers": 3, "num_experts": None}
    own = {"grouping": "ream", "group_size": 16}
    assert Merge.settings(merged) == {"layers": "all"} | own
    node = {"_target_": "moe_lab.methods.grouping.ream.Ream", "group_size": 8}
    assert Merge.settings(merged | {"grouping": node}) == {"layers": "all"} | own | {
        "group_size": 8
    }
    node = {"_target_": "research.most_used.MostUsed", "stay": 2}
    own = {"grouping": "most_used", "stay": 2}
    assert Merge.settings(merged | {"grouping": node}) == {"layers": "all"} | own
    assert Merge.settings(merged | {"grouping": "none"})["grouping"] == "none", "refused later"


def test_methods_say_which_other_groups_decide() -> None:
    assert Prune.groups({}) == ("metric", "ratio")
    assert Merge.groups({"num_experts": None}) == ("ratio",)
    assert Merge.groups({"num_experts": 4}) == ()
    assert [kind.groups({}) for kind in (Condense, DropLayers, DropBlocks, Nothing)] == [()] * 4
    assert (DropLayers(1, padding=0.5).padding, DropBlocks(1).padding) == (0.5, None)
