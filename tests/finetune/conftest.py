"""A pruned model beside the intact one, and the intact one's teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
from distilling import KEPT, teach
from families import tiny_model

from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/, pruned/ and its plan.json, and the dense model's teachers by their options."""
    folder = tmp_path_factory.mktemp("distillation")
    model = tiny_model("qwen2_moe")
    model.save_pretrained(folder / "dense")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    plan = Plan(tuple(PruneExperts(index, names[index], kept=KEPT[index]) for index in KEPT))
    apply_plan(model, plan)
    save_checkpoint(model, folder / "pruned", folder / "dense")
    (folder / "plan.json").write_text(plan.to_text())
    for name, top_k, temperature in (("whole", None, 1.0), ("few", 8, 1.0), ("warm", 8, 2.0)):
        teach(folder, name, top_k, temperature)
    return folder
