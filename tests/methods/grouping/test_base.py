"""What all groupings keep to: whole outputs, router groups, no order of experts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from layer_statistics import routed_alike
from merges import KINDS, plan_of, profile_of

from moe_lab.dependencies import modules_of
from moe_lab.lookup import names_in
from moe_lab.methods.grouping import hc_smoe, m_smoe, ream
from moe_lab.methods.grouping.base import (
    BASES,
    Grouping,
    Groups,
    MergeCandidates,
    as_grouping,
    described,
    grouping_options,
)
from moe_lab.methods.merge import Merge
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.option import Option
from moe_lab.profile.all_experts import AllExperts, ExpertSample
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo, UserError

GROUPINGS = names_in("moe_lab.methods.grouping", BASES)


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_what_groupings_see_of_all_outputs_equals_a_slow_reference(family: str) -> None:
    """And neither the batch size nor padding changes it."""
    model = tiny_model(family)
    batch = tiny_batch()
    rows = [
        {name: values[row : row + 1, : int(batch["attention_mask"][row].sum())]
         for name, values in batch.items()}
        for row in range(3)
    ]  # fmt: skip
    for number, layer in enumerate(moe_layers(model)):
        index = layer.info.index
        found = {}
        for key, batches in (("whole", [batch]), ("rows", rows)):
            with ExpertSample(LayerStream(model, batches)).open(index) as experts:
                found[key] = hc_smoe.output_distances(experts), ream.gated_cosine(experts)
                chunks = list(experts.chunks())
        for one, other in zip(found["whole"], found["rows"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        x_TD = torch.cat([chunk.x_TD for chunk in chunks])
        logits = torch.cat([chunk.logits_TE for chunk in chunks])
        share = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(dim=-1)
        outputs = [
            expert_forward(layer.experts, one, x_TD) for one in expert_parameters(layer.experts)
        ]
        distances, cosines = found["rows"]
        for a, b in ((0, 1), (2, 6), (number, 7)):
            expected = (outputs[a].mean(dim=0) - outputs[b].mean(dim=0)).norm()
            assert float(distances[a, b]) == pytest.approx(float(expected), rel=1e-4)
            gated = [(share[:, e, None] * outputs[e]).mean(dim=0) for e in (a, b)]
            expected = torch.cosine_similarity(*gated, dim=0)
            assert float(cosines[a, b]) == pytest.approx(float(expected), abs=1e-4)


def test_groups_of_one_change_nothing() -> None:
    for grouping in GROUPINGS:
        model = tiny_model("mixtral")
        before = logits_of(model)
        made = plan_of(model, num_experts=None, ratio=Uniform(ratio=0.0), grouping=grouping)
        assert not made.edited()
        [one, *_] = profile_of(model).statistics
        same = torch.eye(8).double() if grouping == "ream" else 1 - torch.eye(8).double()
        groups = as_grouping(grouping).choose(MergeCandidates(one, 8, same))
        assert groups.groups == tuple((expert,) for expert in range(8))
        edit = MergeExperts(one.info.index, one.info.name, router="all", **vars(groups))
        apply_plan(model, Plan((edit,)))
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", KINDS)
def test_groups_move_with_the_experts(family: str) -> None:
    order = [2, 0, 3, 1, 6, 7, 5, 4]  # within router groups; new expert i is old order[i]
    plain, moved = tiny_model(family), tiny_model(family)
    for layer in moe_layers(moved):
        prune_layer(layer, order)
    found = [profile_of(plain), profile_of(moved)]
    for profile, numbers in zip(found, (range(8), order), strict=True):
        for one in profile.statistics:  # ties would go to the lower expert: no two score the same
            for name in ("count", "gate_norm_sum"):
                one.sums[name] = one[name] + torch.tensor(numbers) / 100
    for grouping in GROUPINGS:
        method = Merge(1, 4, grouping=grouping, propagate=False, align="none")
        one, other = (method.plan(profile).edits for profile in found)
        for was, now in zip(one, other, strict=True):
            if was.kind == now.kind == "refit":  # mergemoe's, behind each merge
                continue
            renamed = {frozenset(order[expert] for expert in group) for group in now.groups}
            assert renamed == {frozenset(group) for group in was.groups}
            assert {order[expert] for expert in now.kept} == set(was.kept)
            scores = [was.scores[expert] for expert in order]
            torch.testing.assert_close(torch.tensor(now.scores), torch.tensor(scores))


def test_router_groups_keep_the_same_number_and_merge_their_own() -> None:
    info = LayerInfo(1, "x", 8, 2, 2, groups=2, groups_used=1)
    cosine = torch.zeros(8, 8)
    cosine[2, 6] = cosine[4, 0] = 1.0  # of the other group: they do not count
    cosine[2, 1] = cosine[4, 7] = 0.5
    count = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    found = routed_alike(info, count, cosine)
    assert m_smoe.MSMoE().choose(MergeCandidates(found, 4)).groups == (
        (0, 3),
        (1, 2),
        (6, 5),
        (7, 4),
    )
    far = torch.full((8, 8), 9.0)
    far[0, 4] = far[4, 0] = 0.0
    far[0, 3] = far[3, 0] = far[5, 6] = far[6, 5] = 1.0
    by_output = hc_smoe.HCSMoE().choose(MergeCandidates(found, 6, far.double()))
    assert by_output.groups == ((0, 3), (1,), (2,), (4,), (6, 5), (7,))
    found.sums["gate_norm_sum"] = count.square()
    around = ream.Ream().choose(MergeCandidates(found, 4, 1 - far.double()))
    assert all(len({expert // 4 for expert in group}) == 1 for group in around.groups)
    assert around.kept == (0, 1, 6, 7)


@dataclass(frozen=True)
class Pairs(Grouping):
    """Neighbours become one, whatever `scale` times the distances of their outputs are."""

    scale: Annotated[float, Option("a factor", above=0)] = 1.0

    needs_outputs = True

    def scores(self, statistics: LayerStatistics) -> torch.Tensor:
        return statistics["count"]

    def outputs(self, experts: AllExperts) -> torch.Tensor:
        return self.scale * hc_smoe.output_distances(experts)

    def choose(self, candidates: MergeCandidates) -> Groups:
        found = tuple((2 * place, 2 * place + 1) for place in range(candidates.number))
        shares = ((0.5, 0.5),) * len(found)
        return Groups(tuple(first for first, _ in found), found, shares)


def test_what_a_grouping_is_unless_it_says_so() -> None:
    class Least(Pairs):
        needs_outputs = False

    grouping, info = Least(), LayerInfo(1, "x", 8, 2, 2)
    assert (grouping.align, grouping.router, grouping.propagate) == ("weights", "all", False)
    assert grouping.name == grouping.scored_by == __name__.rpartition(".")[2]
    assert grouping.outputs_options is None and not Grouping.needs_outputs
    grouping.check(info, 4)
    with pytest.raises(UserError, match=r"^grouping\.scale=0: it must be above 0$"):
        Least(0).check(info, 4)
    with pytest.raises(NotImplementedError):
        m_smoe.MSMoE().outputs(None)  # type: ignore[arg-type]  # it looks at none


@dataclass(frozen=True)
class Scaled(Pairs):
    """The same, with an option that must be given."""

    shift: Annotated[float, Option("an addend")] = field(kw_only=True)


def test_a_grouping_that_must_be_given_options_is_no_name() -> None:
    with pytest.raises(UserError, match=r"no default for shift: write a yaml .*grouping=<name>"):
        as_grouping(f"{__name__}.Scaled")
    assert as_grouping(Scaled(shift=2.0)) == Scaled(1.0, shift=2.0)


def test_a_grouping_of_ones_own_is_a_path_or_an_object() -> None:
    path = f"{__name__}.Pairs"
    assert as_grouping(path) == Pairs() and as_grouping("ream") == ream.Ream()
    assert as_grouping(Pairs(2.0)) == Pairs(2.0)
    assert grouping_options(Pairs(), path) == {"scale": 1.0}
    assert grouping_options(Pairs(), {"_target_": path, "scale": 2.0}) == {"scale": 2.0}
    name = __name__.rpartition(".")[2]
    assert described(path) == {"grouping": name, "scale": 1.0}
    assert described({"_target_": path, "scale": 2.0}) == {"grouping": name, "scale": 2.0}
    for wrong in (f"{__name__}.KINDS", f"{__name__}.plan_of"):
        with pytest.raises(UserError, match=r"derived from .*\.Grouping"):
            as_grouping(wrong)
    assert modules_of(*Merge(1, grouping="ream").parts()) >= {
        "moe_lab.methods.grouping.ream", "moe_lab.methods.metrics.reap",
    }  # fmt: skip


def test_what_outputs_depend_on_is_asked_anew() -> None:
    """By default all options of a grouping; those of HC-SMoE decide nothing about its distances."""
    model, questions = tiny_model("mixtral"), []

    def remember(identity, work, code):
        questions.append({key: identity[key] for key in identity if key not in ("layer",)})
        return work()

    profile = replace(profile_of(model), remember=remember)
    for grouping in (Pairs(), Pairs(2.0), hc_smoe.HCSMoE(), hc_smoe.HCSMoE("ward")):
        questions.clear()
        made = Merge(1, 4, grouping=grouping, align="none").plan(profile)
        assert len(made.edited()) == len(questions) == 4
        own = {"scale": grouping.scale} if isinstance(grouping, Pairs) else {}
        name = f"grouping/{grouping.name}"
        assert questions[0] == {"question": name, "num_samples": 32} | own
