"""MergeMoE: who joins whom, and the least squares behind it, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_model
from layer_statistics import routed_alike
from odd_families import odd_model
from refits import carried_out, divergence, profile_of, text
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_lab.methods.grouping.base import Groups, MergeCandidates
from moe_lab.methods.grouping.mergemoe import MergeMoE, up_cosine
from moe_lab.methods.merge import Merge
from moe_lab.models.edits.plan import Plan, restructure_model
from moe_lab.models.edits.refit import RefitExperts
from moe_lab.models.experts import expert_forward, expert_hidden, expert_parameters
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.all_experts import ExpertSample
from moe_lab.types import LayerInfo, UserError

TEXT = [text(seed) for seed in range(3)]


def plan_of(model: PreTrainedModel, **options: object) -> Plan:
    made = Merge(1, **({"num_experts": 3, "grouping": "mergemoe"} | options))
    made.check([layer.info for layer in moe_layers(model)])
    return made.plan(profile_of(model, TEXT))


def test_the_most_used_are_centres_and_the_others_go_where_projections_are_alike() -> None:
    info = LayerInfo(0, "x", 6, 2, 2)
    found = routed_alike(info, torch.tensor([1.0, 8, 0, 9, 2, 0]), torch.zeros(6, 6))
    cosine_EE = torch.eye(6).double()
    for expert, centre in ((0, 3), (2, 1), (4, 3)):
        cosine_EE[expert, centre] = 0.5
    groups = MergeMoE().choose(MergeCandidates(found, 2, cosine_EE))
    assert groups.groups == ((1, 2, 5), (3, 0, 4))  # a tie goes to the lower centre
    assert groups.weights == ((1.0, 0.0, 0.0), (9 / 12, 1 / 12, 2 / 12))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_projections_are_alike_by_the_cosine_of_both_as_one_vector(family: str) -> None:
    model, batch = tiny_model(family), text()
    with ExpertSample(LayerStream(model, [batch])).open(1) as experts:
        found = up_cosine(experts)
    up_EF = moe_layers(model)[1].experts.gate_up_proj.detach().double().flatten(1)
    expected = F.cosine_similarity(up_EF[:, None], up_EF[None], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "dbrx"])
def test_the_new_down_projection_is_what_numpy_makes_of_the_formula(family: str) -> None:
    model = odd_model(family) if family == "dbrx" else tiny_model(family)
    batch, groups = text(), ((1, 4, 6), (2, 3), (7,))
    shares = ((0.5, 0.3, 0.2), (0.9, 0.1), (1.0,))
    chosen = Groups((1, 2, 7), groups, shares)
    with ExpertSample(LayerStream(model, [batch])).open(2) as experts:
        found = MergeMoE().down_projections(experts, chosen)
        x_TD = torch.cat([chunk.x_TD for chunk in experts.chunks()])
        layer = experts.layer
    parameters = expert_parameters(layer.experts)
    for place, (members, weights) in enumerate(zip(groups, shares, strict=True)):
        whole = [
            {name: weight * parameters[member][name] for name in parameters[member]}
            for member, weight in zip(members, weights, strict=True)
        ]
        average = {name: sum(one[name] for one in whole) for name in whole[0]}
        p_TI = expert_hidden(layer.experts, average, x_TD).detach().double().numpy()
        wanted_TD = np.zeros((len(x_TD), 32))
        for member, weight in zip(members, weights, strict=True):
            y_TD = expert_forward(layer.experts, parameters[member], x_TD)
            bias = parameters[member].get("down_bias", torch.zeros(1))
            wanted_TD += weight * (y_TD - bias).detach().double().numpy()
        expected_ID = np.linalg.pinv(p_TI) @ wanted_TD
        got_ID = found[place].T.double().numpy()
        assert np.abs(got_ID - expected_ID).max() < 1e-3 * np.abs(expected_ID).max()


def test_a_group_of_one_keeps_its_columns_to_the_bit() -> None:
    model = tiny_model("qwen2_moe")
    plan = plan_of(model, num_experts=7)
    other = carried_out(model, plan)
    merge = plan.edits[0]
    for place, (kept, group) in enumerate(zip(merge.kept, merge.groups, strict=True)):
        one, two = (moe_layers(m)[0].experts.down_proj for m in (model, other))
        assert torch.equal(one[kept], two[place]) == (len(group) == 1)


def test_merging_twins_changes_nothing() -> None:
    """Experts that are the same before are what they were: the least squares are exact."""
    model = tiny_model("mixtral")
    for layer in moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            tensor = getattr(layer.experts, name).data
            tensor[4:] = tensor[:4]
    plan = plan_of(model, num_experts=7)
    assert divergence(model, carried_out(model, plan), text()) < 1e-6


@pytest.mark.parametrize("propagate", [False, True])
def test_its_plan_has_a_refit_behind_each_merge(propagate: bool) -> None:
    model = tiny_model("qwen2_moe")
    plan = plan_of(model, propagate=propagate)
    kinds = [edit.kind for edit in plan.edits]
    assert kinds == ["merge", "refit"] * 3
    assert all(edit.align == "none" and edit.router == "all" for edit in plan.edits[::2])
    assert {len(tensor) for tensor in plan.tensors.values()} == {3}
    example = Merge(1, num_experts=3, grouping="mergemoe").example(
        [layer.info for layer in moe_layers(model)]
    )
    assert [edit.kind for edit in example][-3:] == ["refit"] * 3
    averaged = Plan(tuple(edit for edit in plan.edits if not isinstance(edit, RefitExperts)))
    far, near = (divergence(model, carried_out(model, one), text()) for one in (averaged, plan))
    assert near < far


def test_a_layer_with_a_norm_in_its_experts_is_refused_without_weights() -> None:
    model = tiny_model("qwen2_moe").to("meta")
    layer = moe_layers(model)[0]
    layer.experts.has_post_expert_norm = True
    with pytest.raises(UserError, match=r"ends in a norm.*another grouping than mergemoe"):
        restructure_model(model, [RefitExperts(layer.info.index, layer.info.name)])
