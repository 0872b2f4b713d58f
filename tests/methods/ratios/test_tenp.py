"""TENP's widths: whole experts by how they turn their tokens, the others alike."""

from __future__ import annotations

import pytest
import torch
from expert_sets import Case
from neuron_pairs import profile_of
from neuron_pools import pool

from moe_lab.methods.metrics.tenp import Tenp as Score
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.tenp import Tenp
from moe_lab.profile.agreement import agreements
from moe_lab.types import UserError


def planned(case: Case, **options: float):
    method = Prune(Score(), Tenp(0.5, **options), unit="neurons", widths="by_expert")
    method.check(list(case.infos.values()))
    return method.plan(profile_of(case))


def test_the_experts_that_turn_their_tokens_most_stay_whole() -> None:
    case = Case("mixtral")
    plan = planned(case, whole=0.25, slope=0)
    for edit, one in zip(plan.edited(), agreements(profile_of(case), None), strict=True):
        best = set(one.turn_sum.topk(2).indices.tolist())
        assert {e for e, width in enumerate(edit.widths) if width == 16} == best
        others = {width for e, width in enumerate(edit.widths) if e not in best}
        assert others == {5, 6} and sum(edit.widths) == 64
    assert plan.notes["whole_experts"] == {str(index): 2 for index in range(4)}
    assert plan.notes["given"]["ratio"] == pytest.approx(0.5, abs=0.02)


def test_more_of_them_in_deep_layers() -> None:
    plan = planned(Case("mixtral"), whole=0.25, slope=1)
    assert list(plan.notes["whole_experts"].values()) == [0, 1, 3, 4]
    assert plan.edited()[0].widths == (8,)
    last = plan.edited()[3].widths
    assert sorted(last) == [0] * 4 + [16] * 4


def test_none_and_multiples() -> None:
    layers = [pool(index, 4, 40) for index in range(2)]
    ratio = Tenp(0.5, whole=0.25, slope=0, round_to=8, floor=8)
    ratio.check(layers)
    widths = ratio._of_layer(layers[0], 1, layers).tolist()
    assert widths == [40, 16, 16, 8] and ratio.kept(layers) == 2 * 80
    assert Tenp(0.5, whole=0.0).kept(layers) == 2 * 4 * 20


def test_more_whole_experts_than_there_is_room_for() -> None:
    layers = [pool(index, 4, 40) for index in range(2)]
    with pytest.raises(UserError, match=r"ratio\.whole=0\.75.*3 whole experts of 4.*leaves 2 "):
        Tenp(0.5, whole=0.75, slope=0).check(layers)
    with pytest.raises(UserError, match="layer 1 would have 3 whole experts"):
        Tenp(0.5, whole=0.5, slope=0.5).check(layers)
    with pytest.raises(UserError, match="layer 0 would have 2 whole experts"):
        Tenp(0.5, whole=0.5, slope=0, floor=4).check(layers)


def test_one_layer_has_no_trapezoid() -> None:
    assert Tenp(0.5, whole=0.25, slope=1)._whole_experts([pool(0, 4, 40)]) == [1]
    assert torch.equal(
        Tenp(0.5, whole=0.25)._of_layer(pool(0, 4, 40), 1, [pool(0, 4, 40)]),
        torch.tensor([40, 14, 13, 13]),
    )
