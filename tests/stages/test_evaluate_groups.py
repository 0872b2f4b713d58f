"""Groups: what each has of the model, on average."""

from __future__ import annotations

from pathlib import Path

import torch
from families import logits_of, tiny_batch, tiny_model
from slow_neurons import profile_of

from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import num_parameters
from moe_lab.models.narrowing import left_with
from moe_lab.stages.evaluate_groups import left_by, sizes_of_groups
from moe_lab.store import Store


def test_hidden_units_of_a_group_are_those_of_its_plan() -> None:
    """The dense model with a group's units alone is the model that the group's plan makes."""
    model, batch = tiny_model("mixtral"), tiny_batch()
    profile = profile_of(model, [batch])
    plan = Prune(energy, Uniform(0.5), unit="neurons").plan(profile)
    with left_with(model, left_by(plan)):
        silenced = logits_of(model, batch)
    experts = Prune(reap, Uniform(0.5)).plan(profile)
    assert left_by(experts) == {edit.index: edit.kept for edit in experts.edits}
    apply_plan(model, plan)
    torch.testing.assert_close(logits_of(model, batch), silenced, rtol=1e-4, atol=1e-5)


def test_parameters_of_groups_are_their_mean(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    model.save_pretrained(tmp_path / "dense")

    def make(folder: Path) -> None:
        (folder / "plans").mkdir()
        for number, kept in enumerate((4, 6)):
            edit = PruneExperts(1, "model.layers.1.mlp", tuple(range(kept)))
            (folder / "plans" / f"{number}.json").write_text(Plan((edit,)).to_text())

    plans = Store(tmp_path / "store").get("plan", {"a": 1}, make)
    expert = 3 * 32 * 16 + 32  # and its router row
    expected = num_parameters(model) - 3 * expert
    assert sizes_of_groups(plans, Checkpoint(tmp_path / "dense")) == {
        "compressed/parameters": expected,
        "compressed/parameter_ratio": expected / num_parameters(model),
    }
