"""One budget for the experts of all layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_scores import keep, layer, notes, rows
from running import Outcome

from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.coverage import Coverage
from moe_lab.models.layers import check_kept
from moe_lab.types import UserError

ABOVE = ([9.0, 8, 7, 6], [5.0, 4, 3, 2], [1.0, 0.5, 0.25, 0])


def test_global_ranks_the_experts_of_all_layers_together() -> None:
    scores = rows([1.0, 9, 2, 8], [7.0, 3, 6, 4])
    assert keep(Global(0.25), scores) == {1: (1, 3), 2: (0, 1, 2, 3)}
    assert keep(Global(0.5), scores) == {1: (1, 3), 2: (0, 2)}
    assert keep(Global(0.0), scores) == {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}
    assert notes(Global(0.5), scores) == {"kept_per_layer": {"1": 2, "2": 2}, "floor_changed": {}}


def test_global_breaks_ties_by_layer_then_expert() -> None:
    assert keep(Global(0.25), rows([1.0] * 4, [1.0] * 4)) == {1: (0, 1, 2, 3), 2: (0, 1)}


def test_the_floor_is_paid_by_the_lowest_ranked_of_the_others() -> None:
    scores = rows(*ABOVE, top_k=2)
    assert keep(Global(0.5), scores) == {1: (0, 1), 2: (0, 1), 3: (0, 1)}
    assert notes(Global(0.5), scores) == {
        "kept_per_layer": {"1": 2, "2": 2, "3": 2},
        "floor_changed": {"1": {"without": 4, "with": 2}, "3": {"without": 0, "with": 2}},
    }
    scores = rows(*ABOVE, top_k=1)
    assert keep(Global(0.5), scores) == {1: (0, 1, 2, 3), 2: (0,), 3: (0,)}
    assert notes(Global(0.5), scores)["floor_changed"] == {
        "2": {"without": 2, "with": 1}, "3": {"without": 0, "with": 1}
    }  # fmt: skip
    assert keep(Global(0.25, floor=3), scores) == {1: (0, 1, 2), 2: (0, 1, 2), 3: (0, 1, 2)}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("floor", [None, 2, 3])
def test_the_total_is_as_asked_whatever_the_floor(ratio: float, floor: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        rank = 10 ** torch.rand(5, 1, generator=generator)
        scores = rows(*(rank * torch.rand(5, 8, generator=generator)).tolist(), top_k=2)
        chosen = Global(ratio, floor)
        chosen.check([info for info, _ in scores])
        kept = keep(chosen, scores)
        assert sum(map(len, kept.values())) == 40 - round(40 * ratio)
        assert min(map(len, kept.values())) >= (floor or 2)
        for info, score in scores:  # the best of each layer
            inside = score[list(kept[info.index])].min()
            outside = [score[e] for e in range(8) if e not in kept[info.index]]
            assert all(value <= inside for value in outside)


def test_groups_lose_one_expert_each() -> None:
    grouped = {"groups": 2, "groups_used": 1, "top_k": 2}
    scores = rows([9.0, 8, 7, 0, 1, 2, 3, 4], [5.0, 5, 5, 5, 5, 5, 5, 5], **grouped)
    # Units of the first layer by mean: (9+4)/2, (8+3)/2, (7+2)/2, (0+1)/2; of the second all 5.
    assert keep(Global(0.25), scores) == {1: (0, 1, 6, 7), 2: tuple(range(8))}
    kept = keep(Global(0.4), scores)  # 6.4 of 16, in units of 2: 6 go
    assert sum(map(len, kept.values())) == 10
    for info, _ in scores:
        check_kept(info, len(kept[info.index]))
        assert sum(e < 4 for e in kept[info.index]) == len(kept[info.index]) / 2
    assert keep(Coverage(0.5), scores)[1] == (0, 1, 6, 7)
    with pytest.raises(UserError, match=r"ratio.floor=5 .*groups"):
        Global(0.25, floor=5).check([info for info, _ in scores])


def test_impossible_requests_are_refused_with_the_numbers() -> None:
    layers = [layer(index, 8, top_k=2) for index in (1, 2, 3)]
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"at least 0, below 1"):
            Global(ratio).check(layers)
    Global(0.75).check(layers)
    with pytest.raises(
        UserError, match=r"0\.8 is too much: 5 of 24.* 6 together .*routers need.*0\.75"
    ):
        Global(0.8).check(layers)
    with pytest.raises(UserError, match=r"0\.5 is too much: 12 of 24.*15 .*ratio.floor.*0\.375"):
        Global(0.5, floor=5).check(layers)
    for ratio in (Global(0.25, floor=9), Coverage(0.9, floor=9)):
        with pytest.raises(UserError, match=r"ratio.floor=9: layer 1 has only 8"):
            ratio.check(layers)
    for ratio in (Global(0.25, floor=1), Coverage(0.9, floor=1)):
        with pytest.raises(UserError, match=r"ratio.floor=1 .*1 of 8.*chooses 2.*floor=null"):
            ratio.check(layers)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(UserError, match="above 0"):
            Coverage(share).check(layers)
    with pytest.raises(UserError, match=r"below 0.*metric=frequency"):
        keep(Coverage(0.9), rows([1.0, -1, 2, 3]))


def test_a_job_with_one_budget_for_all_layers(job: Callable[..., Outcome], tmp_path: Path) -> None:
    done = job("ratio=global", "metric=soft_count", "compute.profile=routers")
    assert done.code == 0, done.text
    plans = list(done.store.glob("plan/*/plan.json"))
    notes = json.loads(plans[0].read_text())
    numbers = [len(edit["kept"]) for edit in notes["layers"]]
    assert sum(numbers) == 18 and list(notes["kept_per_layer"].values()) == numbers
