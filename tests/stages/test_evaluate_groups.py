"""Groups: what each has of the model, on average."""

from __future__ import annotations

from pathlib import Path

from families import tiny_model

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import num_parameters
from moe_lab.stages.evaluate_groups import sizes_of_groups
from moe_lab.store import Store


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
