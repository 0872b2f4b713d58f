"""Pictures of plans by which hidden units go show what the plan and its tensors say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictured_runs import names

from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.report.plots import widths
from moe_lab.report.plots.run import draw_run


def narrowed(layers: int, experts: int, width: int, scores: str = "spread") -> Plan:
    """Of each layer the units that score above the median stay, and of expert 0 none."""
    edits, tensors = [], {}
    generator = torch.Generator().manual_seed(0)
    for index in range(layers):
        score_EI = torch.rand(experts, width, generator=generator)
        if scores == "spread":
            score_EI = torch.exp(20 * score_EI)
        elif scores == "signed":
            score_EI -= 0.5
        elif scores == "zero":
            score_EI = torch.zeros(experts, width)
        kept_EI = score_EI >= score_EI.median()
        kept_EI[0] = False
        numbers = tuple(kept_EI.sum(dim=1).tolist())
        sums = tuple(score_EI.sum(dim=1).tolist())
        edits.append(NarrowExperts(index, f"layers.{index}.mlp", numbers, scores=sums))
        tensors[f"layers.{index}.neurons"] = kept_EI.to(torch.uint8)
        tensors[f"layers.{index}.neuron_scores"] = score_EI
    return Plan(tuple(edits), tensors=tensors)


def save(plan: Plan, folder: Path) -> Path:
    (folder / "plan.json").write_text(plan.to_text())
    plan.write_tensors(folder / "plan.json")
    return folder


@pytest.mark.parametrize("scores", ["spread", "even", "signed", "zero"])
def test_pictures_of_a_plan_with_its_tensors(scores: str, tmp_path: Path) -> None:
    made = draw_run(save(narrowed(3, 8, 20, scores), tmp_path))
    assert names(made) == ["scores", "kept", "neurons"]


def test_a_large_plan_is_drawn_in_part(tmp_path: Path) -> None:
    assert names(draw_run(save(narrowed(27, 128, 30), tmp_path))) == ["scores", "kept", "neurons"]


def test_without_tensors_the_widest_expert_is_the_whole(tmp_path: Path) -> None:
    edits = (NarrowExperts(1, "x", (4, 2, 0), scores=(1.0, 1.0, 0.0)),)
    (tmp_path / "plan.json").write_text(Plan(edits).to_text())
    assert names(draw_run(tmp_path)) == ["scores", "kept"]
    assert widths.shares(Plan(edits))[1].tolist() == [1, 0.5, 0]


def test_shares_are_of_the_width_before() -> None:
    plan = narrowed(2, 4, 10)
    for index, share_E in widths.shares(plan).items():
        kept_EI = plan.tensors[f"layers.{index}.neurons"]
        assert np.allclose(share_E, kept_EI.float().mean(dim=1).numpy())
        assert share_E[0] == 0 and share_E.max() > 0.3


def test_one_width_is_that_of_every_expert() -> None:
    edit = NarrowExperts(0, "x", (3,), scores=(1.0, 2.0))
    tensors = {"layers.0.neurons": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.uint8)}
    assert widths.shares(Plan((edit,), tensors=tensors))[0].tolist() == [0.75, 0.75]


def test_plans_by_which_no_hidden_unit_goes_have_none_of_it() -> None:
    plan = Plan((PruneExperts(0, "x", (0,), scores=(1.0, 0.5)),))
    assert widths.shares(plan) == {} and widths.scored_units(plan) == {}


def test_what_is_drawn_of_many_is_spread_over_all() -> None:
    assert widths._spread(range(100), 3) == [0, 50, 99]
    assert widths._spread([4, 2], 3) == [4, 2]
